"""What is known of a split after its pictures were looked at, wherever they came from."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import Fault
from data_pipeline.inspection.fingerprints import FINGERPRINT

UNLISTED = "named by no list"  # the subject of faults of pictures that are no part of the training


@dataclasses.dataclass
class SplitSummary:
    """One split: clips and shop images by row, and a look at every picture. Rows and table numbers of -1: none."""

    split: str
    clip_ids: Sequence[str]
    image_ids: Sequence[str]
    images_of: NDArray[np.int32]  # row of each clip's shop image
    columns: Mapping[str, NDArray[np.int32]]  # TABLES, one entry a clip
    image_products: NDArray[np.int32]
    galleries: Mapping[str, NDArray[np.int32]]  # rows of images
    truth: Mapping[str, Sequence[str]]  # test: clip id -> true image ids, also of clips that are not there
    counts: NDArray[np.int64]  # frames looked at, one entry a clip
    looks: NDArray[np.void]  # LOOK of the frames, clip after clip; key 0: none
    image_looks: NDArray[np.void]

    @functools.cached_property
    def ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts)

    def clip_of(self, frame: int) -> tuple[int, int]:
        """Row of the clip that a row of `looks` belongs to, and which of its frames that is."""
        clip = int(np.searchsorted(self.ends, frame, side="right"))
        return clip, frame - int(self.ends[clip] - self.counts[clip])


class Inspectable(Protocol):
    """What is examined: a source folder or a converted set."""

    charts: list[SplitSummary]
    tables: Mapping[str, Sequence[str]]  # texts that the columns count in
    faults: list[Fault]
    remarks: list[str]
    knows_products: bool  # else each shop image is its own

    def frame_name(self, chart: SplitSummary, clip: int, frame: int) -> str:
        """Where a frame is, for a person."""

    def image_name(self, chart: SplitSummary, image: int) -> str:
        """The same of a shop image."""

    def clip_source(self, chart: SplitSummary, clip: int) -> tuple[str, int]:
        """File and line (0: none) that list a clip."""

    def frame(self, chart: SplitSummary, clip: int, frame: int) -> bytes:
        """The bytes of a sound frame."""

    def image(self, chart: SplitSummary, image: int) -> bytes:
        """The bytes of a sound shop image."""

    def picture(self, fault: Fault) -> bytes | None:
        """The bytes of the picture that a fault is about, if it is about one that can be read."""


@dataclasses.dataclass
class PartResult:
    """What came of some clips or shop images: the looks one after the other, and how many each has."""

    looks: NDArray[np.void] = dataclasses.field(default_factory=lambda: np.zeros(0, FINGERPRINT))
    counts: list[int] = dataclasses.field(default_factory=list)
    fresh: NDArray[np.void] = dataclasses.field(default_factory=lambda: np.zeros(0, FINGERPRINT))  # to be remembered
    faults: list[Fault] = dataclasses.field(default_factory=list)
    failed: int = 0  # downloads known to have failed
    names: NDArray[np.uint64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))  # of files, hashed


OnNewFingerprints = Callable[[NDArray[np.void]], None]
