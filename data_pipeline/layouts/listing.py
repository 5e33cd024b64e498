"""Layouts of a source, and the clips and shop images that they list before any picture is opened.

LPR4M has 4 million clips with 473 million frame names in 50 GB of text. So the workers read the text in parts, and the
memory keeps of each clip its id, the place of its line, seven int32 columns and, where pictures must be looked up, ten
hashes (200 bytes in all). The workers that write the shards read the lines again by their offsets.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.manifest import TABLE_FILES
from data_pipeline.format.schema import Box, Picture, ShopImage
from data_pipeline.input.sampling import sample_frames

LINE = np.dtype([("file", "<u2"), ("number", "<i4"), ("offset", "<i8"), ("length", "<i4")])  # RowLocation as numbers
TABLES = tuple(TABLE_FILES)
NONE = -1
RunTasks = Callable[..., Iterator]  # Workers.run


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingRow:
    """One line of a training or validation list, parsed."""

    clip_id: str
    livestream: str
    frames: tuple[str, ...]  # paths (LPR750K) or frame ids (LPR4M)
    boxes: tuple[tuple[Box, ...], ...] | None  # of each frame; None: not given
    image_id: str
    columns: int  # how many the line has
    image_title: str
    category: str
    category_name: str
    product: str  # spu id where the list has one, else the image id
    speech: str
    image_path: str | None = None  # LPR750K only
    scale: str = ""
    duration: str = ""
    number: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class RowLocation:
    """The place of a training row, from which a worker can read it again."""

    file: str  # relative to the source folder
    number: int  # of the line, from 1
    offset: int  # bytes
    length: int  # bytes, without the line end


@dataclasses.dataclass(frozen=True, slots=True)
class ClipListing:
    """A clip that is no line of a training list: a test clip, or any clip of an own folder."""

    clip_id: str
    livestream: str
    frames: tuple[str, ...]  # paths or frame ids
    truth: tuple[str, ...]  # ids of its true images
    file: str  # that lists it, relative to the source folder
    boxes: tuple[tuple[Box, ...], ...] | None = None
    title: str = ""
    speech: str = ""
    fault: BadInputError | None = None  # the clip has an ordinal, but gets no record


ClipEntry = TrainingRow | ClipListing
ClipSource = RowLocation | ClipListing  # from which a clip can be read again


@dataclasses.dataclass(frozen=True, slots=True)
class FoundFrame:
    position: int  # in the clip's list
    picture: Picture | BadInputError | None  # None: its download failed


class Layout(abc.ABC):
    """A layout of a source folder on disk. Picklable and small, as each worker gets a copy."""

    FOLDERS: ClassVar[tuple[str, ...]]  # that a source must have; the first contains the lists or clips

    def __init__(self, source: Path, stored_frames: int | None) -> None:
        self.source = source
        self.stored_frames = stored_frames  # how many evenly spaced frames of a clip are stored at most; None: all
        self.faults: list[Fault] = []  # of lists and names as a whole: no conversion may skip them
        self.copies: list[str] = []  # paths of listed pictures that are not stored, as one of that name has their bytes

    def stored_positions(self, count: int) -> list[int]:
        """Returns the ascending positions of the frames to store of `count`: sampled (docs/official.md 9.1), or all."""
        if self.stored_frames is None or not count:
            return list(range(count))
        positions: list[int] = sample_frames(count, self.stored_frames).tolist()
        return positions

    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Returns its splits in order. Raises WrongUseError for several training lists or without the chosen one."""

    @abc.abstractmethod
    def checksums(self, splits: Sequence[str]) -> dict[str, list[int]]:
        """Returns [bytes, CRC32C] by name: of lists, or a folder's tables and "pictures". Raises as `listed_clips`."""

    @abc.abstractmethod
    def listed_clips(self, split: str) -> tuple[list[ClipListing], list[Fault]]:
        """Returns the clips of a split without a training list, and faults of clips whose entry cannot be read.

        Raises WrongUseError if a list or download is missing or ambiguous, BadInputError if a file cannot be read.
        """

    @abc.abstractmethod
    def galleries(self, split: str) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        """Returns shop images by livestream, in the source's order, and faults of others. Raises as `listed_clips`."""

    @property
    @abc.abstractmethod
    def truth(self) -> dict[str, tuple[str, ...]]:
        """True images' ids by test clip id, also of clips not listed; {} without any. Raises as `listed_clips` does."""

    def changed_since(self, time: int) -> list[str]:
        """Returns the paths of picture files or archives with a later time of change, in ns.

        [] where asking for the time of each would take long: the layouts of downloads ask only for archives' times.
        """
        return []

    def frames_to_locate(self, listed: ClipEntry) -> Sequence[str]:
        """Returns the names of a clip's frames that `locate` must look up; () if paths say where pictures are."""
        return ()

    def locate(self, listings: Sequence["Listing"], run: RunTasks, work: Path) -> list[str]:
        """Looks up pictures, adds faults to listings, returns remarks; here []. LPR4M: WrongUseError if it has none."""
        return []

    @abc.abstractmethod
    def find_frames(self, source: ClipSource, split: str) -> tuple[ClipEntry, list[FoundFrame]]:
        """Returns a clip as it is listed, and its frames at `stored_positions` with their pictures, sorted by position.

        Conversion and doctor both choose a clip's frames by this method. If a download misses one of them, they are
        sampled again from the frames that it has. All frames that it misses are then returned too, with None (failed)
        or the error. LPR750K's missing frames have the error. Raises BadInputError for a line that cannot be parsed,
        OSError on reading it; LPR4M raises KeyError before `locate`.
        """

    @abc.abstractmethod
    def find_image(self, image: ShopImage, split: str) -> Picture:
        """Returns where a shop image's picture is. Raises BadInputError if there is none; own folders do not look."""


@dataclasses.dataclass
class Listing:
    """The clips and shop images that the source lists for one split, sorted by id. An ordinal is an index into them."""

    split: str
    clip_ids: NDArray[np.bytes_]
    columns: dict[str, NDArray[np.int32]]  # TABLES and "image" (index into images; NONE: at fault), an entry a clip
    images: list[ShopImage]
    galleries: dict[str, list[int]]  # livestream: indices into images, in the order of the source
    faults: list[Fault]
    listed: int  # number of clips that the source names, those at fault included
    frame_hashes: NDArray[np.uint64]  # of the frames to locate, clip after clip
    hash_counts: NDArray[np.int64]  # number of frames to locate, an entry a clip
    lost_images: int = 0  # number of gallery entries at fault
    lines: NDArray[np.void] = dataclasses.field(default_factory=lambda: np.zeros(0, LINE))  # LINE a clip, or empty
    files: list[str] = dataclasses.field(default_factory=list)  # by LINE's `file`, relative to the source folder
    clips: list[ClipListing] = dataclasses.field(default_factory=list)  # an entry a clip if `lines` is empty
    truth: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # test: `Layout.truth`
    image_products: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # one an image

    def __len__(self) -> int:
        return len(self.clip_ids)

    def source(self, ordinal: int) -> ClipSource:
        """Returns clip `ordinal`'s ClipListing, or its line's RowLocation. Raises IndexError for an ordinal outside."""
        if self.clips:
            return self.clips[ordinal]
        file, number, offset, length = self.lines[ordinal].item()
        return RowLocation(self.files[file], number, offset, length)


def sort_images(listing: Listing) -> None:
    """Sorts `images` by id, then reference, and the gallery "", and adapts columns["image"] and galleries, in place."""
    order = sorted(range(len(listing.images)), key=lambda row: (listing.images[row].id, listing.images[row].reference))
    renumber = np.full(len(order) + 1, NONE, np.int32)
    renumber[order] = np.arange(len(order))
    listing.images = [listing.images[row] for row in order]
    listing.columns["image"] = renumber[listing.columns["image"]]
    for name, rows in listing.galleries.items():
        renumbered = renumber[rows].tolist()
        listing.galleries[name] = renumbered if name else sorted(renumbered)  # no file orders validation's gallery, ""
