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
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.layouts.annotations import Line, Query, Row, livestream_of
from data_pipeline.layouts.downloads import hash_names
from data_pipeline.schema import Clip, Picture, ShopImage

LINE = np.dtype([("file", "<u2"), ("number", "<i4"), ("offset", "<i8"), ("length", "<i4")])
TABLES = ("livestream", "category", "product", "scale", "duration", "number")
NONE = -1


class Layout(Protocol):
    """One layout on disk. Picklable and small: each worker has its own."""

    source: Path

    def splits(self) -> tuple[str, ...]:
        """Those of train, val, test that the source has lists for."""

    def training_lists(self, split: str) -> list[Path]:
        """The files of the training or validation list."""

    def test_files(self) -> list[Path]:
        """The files that say what the test split is."""

    def shop_image(self, row: Row, split: str) -> ShopImage:
        """The shop image of a training row."""

    def frames_to_locate(self, listed: Row | Query) -> Sequence[str]:
        """The frames whose place must be looked up for all clips at once; none where a path says it."""

    def queries(self) -> tuple[list[Query], list[Fault]]:
        """The test clips, and what is wrong with the others."""

    def galleries(self) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        """Livestream -> its shop images in the order of the file."""

    def truth(self) -> dict[str, tuple[str, ...]]:
        """Clip id -> true image ids, also of clips that are no query."""

    def locate(self, listings: Sequence["Listing"], run: "Run", work: Path) -> list[str]:
        """Finds the pictures that paths do not say, before the first is opened; lines for the report."""

    def read_clip(self, source: "Line | Query", split: str) -> Clip:
        """A listed clip with its pictures to be stored; BadInputError."""

    def read_image(self, image: ShopImage, split: str) -> Picture:
        """Where a shop image's picture is; BadInputError."""


Run = Callable[..., Iterator]  # Workers.run: results in the order of the tasks


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
    lines: NDArray[np.void] = dataclasses.field(default_factory=lambda: np.zeros(0, LINE))  # training: one a clip
    files: list[str] = dataclasses.field(default_factory=list)  # what LINE's `file` counts, relative to the source
    queries: list[Query] = dataclasses.field(default_factory=list)  # test: one a clip
    truth: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # test: all of the truth file
    image_products: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # one an image

    def __len__(self) -> int:
        return len(self.clip_ids)

    def source(self, ordinal: int) -> Line | Query:
        if self.queries:
            return self.queries[ordinal]
        file, number, offset, length = self.lines[ordinal].item()
        return Line(self.files[file], number, offset, length)


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


# --- test -------------------------------------------------------------------------------------------------------------


def list_test(layout: Layout, tables: dict[str, Table]) -> Listing:
    """The listing of the test split; a query without a true image in its gallery is a fault and keeps its place."""
    queries, faults = layout.queries()
    shelves, gallery_faults = layout.galleries()
    images: list[ShopImage] = []
    galleries: dict[str, list[int]] = {}
    numbers: dict[tuple[str, str], int] = {}
    for livestream, shelf in shelves.items():
        for image in shelf:
            if numbers.setdefault((image.id, image.reference), len(images)) == len(images):
                images.append(image)
        galleries[livestream] = [numbers[image.id, image.reference] for image in shelf]
    listed = len(queries) + len(faults)
    faults += gallery_faults
    queries.sort(key=lambda query: query.clip_id.encode())
    true_rows: list[int] = []
    for query in queries:
        try:
            true_rows.append(true_row(query, images, galleries))
        except BadInputError as err:
            faults.append(err.at(query.file, 0, f"clip {query.clip_id}"))
            true_rows.append(NONE)
    livestreams = [tables["livestream"].number(livestream_of(query.clip_id)) for query in queries]
    hashes = [hash_names(layout.frames_to_locate(query)) for query in queries]
    listing = Listing(
        split="test",
        clip_ids=np.array([query.clip_id.encode() for query in queries], np.bytes_),
        queries=queries,
        columns={
            **{name: np.full(len(queries), NONE, np.int32) for name in TABLES},
            "livestream": np.array(livestreams, np.int32),
            "image": np.array(true_rows, np.int32),
        },
        images=images,
        galleries=galleries,
        truth=layout.truth(),
        faults=faults,
        listed=listed,
        lost_images=len(gallery_faults),
        frame_hashes=np.concatenate([*hashes, np.zeros(0, np.uint64)]),
        hash_counts=np.array([len(each) for each in hashes], np.int64),
    )
    sort_images(listing)
    return listing


def true_row(query: Query, images: Sequence[ShopImage], galleries: dict[str, list[int]]) -> int:
    """Row of the first true image in the query's gallery; BadInputError if the query cannot be judged."""
    livestream = livestream_of(query.clip_id)
    if not query.frames:
        raise BadInputError("clip without frames", "found an empty frame list, needs at least one; remove the query.")
    if not query.truth:
        raise BadInputError(
            "query without truth",
            "found no true image in the truth file, needs at least one; add it, or remove the query.",
        )
    if not galleries.get(livestream):
        raise BadInputError(
            "livestream without gallery",
            f"found no shop image for livestream {livestream}, needs a gallery; add it to the gallery file.",
        )
    for row in galleries[livestream]:
        if images[row].id in query.truth:
            return row
    raise BadInputError(
        "true image not in its gallery",
        f"found none of {', '.join(query.truth)} in the gallery of livestream {livestream}, needs one; "
        "correct the truth or the gallery file.",
    )


def reasons(faults: Iterable[Fault]) -> dict[str, int]:
    return dict(sorted(collections.Counter(fault.reason for fault in faults).items()))
