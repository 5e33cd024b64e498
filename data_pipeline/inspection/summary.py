"""The results of an inspection, and access to the pictures: the same for a source folder and a converted set."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import Fault
from data_pipeline.inspection.findings import Findings
from data_pipeline.inspection.fingerprints import FINGERPRINT, Fingerprints
from data_pipeline.inspection.store import GrowingArray
from data_pipeline.layouts.img2dataset import hash_names

OnNewFingerprints = Callable[[Fingerprints], None]


class Sample(NamedTuple):
    """A part of the clips that is inspected in place of all."""

    clips: int  # of each split, at most
    seed: int

    def rows(self, clip_ids: Iterable[str]) -> NDArray[np.int64]:
        """Returns the rows of the chosen clips, ascending. A clip's id and the seed decide, not the other clips."""
        words = hash_names([f"{self.seed}\0{clip_id}" for clip_id in clip_ids])
        return np.sort(np.argsort(words, kind="stable")[: self.clips])


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
    frame_counts: NDArray[np.int64]  # inspected frames of each clip
    frame_fingerprints: Fingerprints  # of the frames, clip after clip, mapped from a file; key 0: not sound
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
    remarks: list[str]
    findings: Findings
    work: Path
    on_new: OnNewFingerprints
    sample: Sample | None
    then: str = ""  # what else to do, beside a change of the lists or pictures, as the end of an advice
    knows_products: bool = False  # then each shop image counts as a product of its own

    def __init__(self, findings: Findings, work: Path, on_new: OnNewFingerprints, sample: Sample | None) -> None:
        """Creates empty results.

        findings: where faults are added. work: a folder for arrays that may not fit in memory. on_new: called after
        each task with the fingerprints, [n], of sound pictures without a problem that no earlier run knew. sample: the
        clips to inspect; None: all.
        """
        self.summaries, self.tables, self.remarks = [], {}, []
        self.findings, self.work, self.on_new, self.sample = findings, work, on_new, sample

    def join_parts(self, parts: Iterable["PartResult"], name: str, names: GrowingArray | None = None) -> "PartResult":
        """Returns the results in their order as one without faults, which are added to `findings`.

        name: of the file in `work` that the fingerprints are mapped from. names: gets the hashes of pictures' names.
        """
        prints, counts = GrowingArray(self.work / f"{name}.run", FINGERPRINT), [np.zeros(0, np.int64)]
        for part in parts:
            self.on_new(part.new_fingerprints)
            self.findings.add(part.faults)
            prints.append(part.fingerprints)
            counts.append(np.array(part.frame_counts, np.int64))
            if names:
                names.append(part.name_hashes)
        none, no_names = np.zeros(0, FINGERPRINT), np.zeros(0, np.uint64)
        return PartResult(prints.mapped(), none, [], np.concatenate(counts), no_names)

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
    frame_counts: Sequence[int] | NDArray[np.int64]  # of clips: frames of each
    name_hashes: NDArray[np.uint64]  # of the pictures' names, from a source folder
