"""What a source lists, one row a clip: read once, before any picture is opened.

LPR4M has 4 million clips with 473 million frame names in 50 GB of text. So the workers read the text in parts, and what
stays of a clip are its id (71 bytes), where its line stands (18), seven int32 columns (28) and, where pictures must be
looked up, ten hashes (80); no frame. The workers that write the shards read the lines again by their offsets. Shop
images (332 thousand) and test clips (20 thousand) are kept as objects.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.schema import Box, Clip, Picture, ShopImage

LINE = np.dtype([("file", "<u2"), ("number", "<i4"), ("offset", "<i8"), ("length", "<i4")])
TABLES = ("livestream", "category", "product", "scale", "duration", "number")
NONE = -1
Run = Callable[..., Iterator]  # Workers.run: results in the order of the tasks


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of a training list."""

    clip_id: str
    livestream: str
    frames: tuple[str, ...]  # paths (LPR750K) or frame ids (LPR4M)
    boxes: tuple[tuple[Box, ...], ...] | None  # of each frame; None: not given
    image_id: str
    image_path: str | None  # LPR750K only
    image_title: str
    category: str
    category_name: str
    product: str  # spu id where the list has one, else the image id
    speech: str
    scale: str
    duration: str
    number: str
    columns: int


@dataclasses.dataclass(frozen=True, slots=True)
class RowLocation:
    """Where a training row stands: enough to read it again, so that nobody needs to keep its frames."""

    file: str  # relative to the source folder
    number: int  # from 1
    offset: int
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class ClipListing:
    """A clip that no training list has a line of, as its layout lists it: those of test, and all of a folder's."""

    clip_id: str
    livestream: str
    frames: tuple[str, ...]
    truth: tuple[str, ...]
    file: str  # where it is listed
    boxes: tuple[tuple[Box, ...], ...] | None = None
    speech: str = ""
    fault: BadInputError | None = None  # it keeps its place, without a record


@dataclasses.dataclass(frozen=True, slots=True)
class FoundFrame:
    """A frame of a clip, looked for."""

    position: int  # in the clip's list
    picture: Picture | BadInputError | None  # None: a download that is known to have failed


class Layout(Protocol):
    """One layout on disk. Picklable and small: each worker has its own."""

    FOLDERS: ClassVar[tuple[str, ...]]  # that a source must have; the first is where its splits are told
    source: Path
    stored_frames: int | None  # of a clip, evenly spaced; None: all
    copies: list[str]  # paths of pictures that are listed and the same as one of their name that is read in their place
    faults: list[Fault]  # of lists and names as a whole: nobody could say which clips they cost

    def splits(self) -> tuple[str, ...]:
        """Those of train, val, test that the source has clips for."""

    def checksums(self, splits: Sequence[str]) -> dict[str, list[int]]:
        """Size and CRC32C, by name, of all that says what the splits are: a conversion of other ones is another."""

    def frames_to_locate(self, listed: Row | ClipListing) -> Sequence[str]:
        """The frames whose place must be looked up for all clips at once; none where a path says it."""

    def listed_clips(self, split: str) -> tuple[list[ClipListing], list[Fault]]:
        """The clips of a split without a training list, and what is wrong with those that have no place among them."""

    def galleries(self, split: str) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        """Livestream -> its shop images in the order of the file; asked for the same splits."""

    def truth(self) -> dict[str, tuple[str, ...]]:
        """Clip id -> true image ids, also of clips that are no query."""

    def locate(self, listings: Sequence["Listing"], run: Run, work: Path) -> list[str]:
        """Finds the pictures that paths do not say, before the first is opened; lines for the report."""

    def read_clip(self, source: RowLocation | ClipListing, split: str) -> Clip:
        """A listed clip with its pictures to be stored; BadInputError."""

    def find_frames(self, source: RowLocation | ClipListing, split: str) -> tuple[Row | ClipListing, list[FoundFrame]]:
        """A listed clip, and all of its stored frames that `read_clip` would look for; BadInputError: none can be."""

    def read_image(self, image: ShopImage, split: str) -> Picture:
        """Where a shop image's picture is; BadInputError."""


@runtime_checkable
class TextLayout(Layout, Protocol):
    """A layout whose training and validation clips are lines of text files."""

    def training_lists(self, split: str) -> list[Path]:
        """The files of the training or validation list."""

    def shop_image(self, row: Row, split: str) -> ShopImage:
        """The shop image of a training row."""


class Table:
    """Texts numbered in the order in which they come; `sort()` renumbers them once all are known."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers)) if text else NONE

    def sort(self) -> tuple[list[str], NDArray[np.int32]]:
        """(texts sorted, new number by old number; the last entry maps NONE to itself)."""
        texts = sorted(self.numbers)
        renumber = np.full(len(texts) + 1, NONE, np.int32)
        for new, text in enumerate(texts):
            renumber[self.numbers[text]] = new
        return texts, renumber


@dataclasses.dataclass
class Listing:
    """The clips and shop images that the source lists for one split, each sorted by id."""

    split: str
    clip_ids: NDArray[np.bytes_]
    columns: dict[str, NDArray[np.int32]]  # TABLES and "image" (a row of images; NONE: at fault), one entry a clip
    images: list[ShopImage]
    galleries: dict[str, list[int]]  # livestream -> rows of images, in the order of the file
    faults: list[Fault]
    listed: int  # clips that the source names, faulty ones included
    frame_hashes: NDArray[np.uint64]  # of the frames to locate, one clip after the other
    hash_counts: NDArray[np.int64]
    lost_images: int = 0  # rows of the gallery file that are at fault
    lines: NDArray[np.void] = dataclasses.field(default_factory=lambda: np.zeros(0, LINE))  # of a list: one a clip
    files: list[str] = dataclasses.field(default_factory=list)  # what LINE's `file` counts, relative to the source
    clips: list[ClipListing] = dataclasses.field(default_factory=list)  # where there are no lines: one a clip
    truth: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # test: all of the truth file
    image_products: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # one an image

    def __len__(self) -> int:
        return len(self.clip_ids)

    def source(self, ordinal: int) -> RowLocation | ClipListing:
        if self.clips:
            return self.clips[ordinal]
        file, number, offset, length = self.lines[ordinal].item()
        return RowLocation(self.files[file], number, offset, length)


def sort_images(listing: Listing) -> None:
    """Images by id (then reference), and every number of an image with them."""
    order = sorted(range(len(listing.images)), key=lambda row: (listing.images[row].id, listing.images[row].reference))
    place = np.full(len(order) + 1, NONE, np.int32)
    place[order] = np.arange(len(order))
    listing.images = [listing.images[row] for row in order]
    listing.columns["image"] = place[listing.columns["image"]]
    # Validation's gallery has no file that orders it: its order is that of the images, sorted.
    listing.galleries = {
        name: sorted(place[rows].tolist()) if name == "" else place[rows].tolist()
        for name, rows in listing.galleries.items()
    }


def reasons(faults: Iterable[Fault]) -> dict[str, int]:
    return dict(sorted(collections.Counter(fault.reason for fault in faults).items()))
