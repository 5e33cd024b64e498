"""The results of an inspection, and access to the pictures: the same for a source folder and a converted set."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import Fault
from data_pipeline.inspection.fingerprints import FINGERPRINT, Fingerprints

UNLISTED = "named by no list"  # the subject of faults of pictures that training does not use
OnNewFingerprints = Callable[[Fingerprints], None]


@dataclasses.dataclass
class SplitSummary:
    """The clips and shop images of one split by row, with the fingerprint of every picture. A row of -1 means none."""

    split: str
    clip_ids: Sequence[str]
    image_ids: Sequence[str]
    clip_images: NDArray[np.int32]  # row of each clip's shop image
    columns: Mapping[str, NDArray[np.int32]]  # of TABLES, one entry per clip
    image_products: NDArray[np.int32]
    galleries: Mapping[str, NDArray[np.int32]]  # livestream -> rows of shop images
    truth: Mapping[str, Sequence[str]]  # test: clip id -> true image ids, also of clips that are not there
    frame_counts: Sequence[int]  # inspected frames of each clip
    frame_fingerprints: Fingerprints  # of the frames, clip after clip; key 0: not sound
    image_fingerprints: Fingerprints  # of the shop images

    @functools.cached_property
    def ends(self) -> NDArray[np.int64]:
        """The row of frame_fingerprints after each clip's last frame, int64 [clips]."""
        return np.cumsum(self.frame_counts)

    def clip_of(self, row: int) -> tuple[int, int]:
        """Returns (clip, its frame, from 0) of a row of frame_fingerprints. Raises IndexError after the last row."""
        clip = int(np.searchsorted(self.ends, row, side="right"))
        return clip, row - int(self.ends[clip] - self.frame_counts[clip])


class InspectedData(Protocol):
    """Results of an inspection, and access to the pictures, which raises ValueError if one cannot be read any more."""

    summaries: list[SplitSummary]
    tables: Mapping[str, Sequence[str]]  # texts by number, for the summaries' columns
    faults: list[Fault]
    remarks: list[str]
    knows_products: bool = False  # then each shop image counts as a product of its own

    def __init__(self) -> None:
        self.summaries, self.tables, self.faults, self.remarks = [], {}, [], []

    # Places for messages: of a frame, of a shop image, and the file that lists a clip with its line from 1 (0: none).
    def frame_name(self, summary: SplitSummary, clip: int, frame: int) -> str: ...
    def image_name(self, summary: SplitSummary, image: int) -> str: ...
    def clip_source(self, summary: SplitSummary, clip: int) -> tuple[str, int]: ...

    # Encoded bytes: of a sound frame, of a sound shop image, and of a file that a fault names (None: not readable).
    def frame(self, summary: SplitSummary, clip: int, frame: int) -> bytes: ...
    def image(self, summary: SplitSummary, image: int) -> bytes: ...
    def faulty_picture(self, file: str) -> bytes | None: ...


@dataclasses.dataclass
class PartResult:
    """The result of one task or of several: of some clips, shop images, or pictures that no list names."""

    fingerprints: Fingerprints  # of all pictures in their order; key 0: not sound
    new_fingerprints: Fingerprints  # of sound pictures that no earlier run knew
    faults: list[Fault]
    frame_counts: list[int]  # of clips: frames of each
    name_hashes: NDArray[np.uint64]  # of the pictures' names, from a source folder


def join_parts(parts: Iterable[PartResult], on_new: OnNewFingerprints) -> PartResult:
    """Returns the results in their order as one, after a call of on_new for each; its new_fingerprints are empty."""
    prints, faults, counts, hashes = [np.zeros(0, FINGERPRINT)], [], [], [np.zeros(0, np.uint64)]
    for part in parts:
        on_new(part.new_fingerprints)
        prints.append(part.fingerprints)
        faults += part.faults
        counts += part.frame_counts
        hashes.append(part.name_hashes)
    return PartResult(np.concatenate(prints), prints[0], faults, counts, np.concatenate(hashes))
