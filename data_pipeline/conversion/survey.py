"""Reading the lists of a source: training lists in parts by the workers, line numbers and duplicates by the parent."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.schema import ShopImage
from data_pipeline.layouts.annotations import MAX_ID_BYTES, checked_id, lines, parse_row
from data_pipeline.layouts.img2dataset import hash_names
from data_pipeline.layouts.listing import (
    LINE,
    NONE,
    TABLES,
    ClipListing,
    Layout,
    Listing,
    Run,
    Table,
    TextLayout,
    sort_images,
)

PART_BYTES = 1 << 24


def list_splits(layout: Layout, splits: Iterable[str], run: Run) -> tuple[list[Listing], dict[str, list[str]]]:
    """The listings of the splits, and the tables that their columns count in (sorted, shared by all splits)."""
    tables = {name: Table() for name in TABLES}
    listings: list[Listing] = []
    for split in splits:
        if split == "test" or not isinstance(layout, TextLayout):
            listings.append(list_clips(layout, split, tables))
        else:
            shelf = _training_images(layout, listings, run) if split == "val" else ()
            listings.append(list_training(layout, split, tables, run, shelf))
    known = _known_products(listings)
    for listing in listings:
        listing.images = [
            dataclasses.replace(image, product=image.product or known.get(image.id, "")) for image in listing.images
        ]
        products = np.array([tables["product"].number(image.product) for image in listing.images], np.int32)
        listing.image_products = products
        if listing.clips:
            listing.columns["product"] = np.append(products, np.int32(NONE))[listing.columns["image"]]
    texts = {}
    for name, table in tables.items():
        texts[name], renumber = table.sort()
        for listing in listings:
            listing.columns[name] = renumber[listing.columns[name]]
            if name == "product":
                listing.image_products = renumber[listing.image_products]
    return listings, texts


def _training_images(layout: TextLayout, listings: Sequence[Listing], run: Run) -> Iterator[ShopImage]:
    """Validation has no gallery in these layouts: its own are all shop images of both lists, converted or not."""
    if listings:
        yield from listings[0].images
    elif "train" in layout.splits():
        for survey in _surveys(layout, "train", layout.training_lists("train"), run):
            yield from filter(None, survey.images)


def _known_products(listings: Sequence[Listing]) -> dict[str, str]:
    """Image id -> product, from training rows: the test lists do not name products."""
    return {image.id: image.product for listing in listings for image in listing.images if image.product}


# --- training and validation ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Lines of a list that start in [begin, end)."""

    file: int
    path: Path
    begin: int
    end: int


@dataclasses.dataclass
class Survey:
    """What one part lists, one entry a row. Line numbers count from the part's first line.

    A row at fault whose clip id is sound keeps its place, without an image: when the row is mended, the clips behind it
    have the numbers that they have now, and their shards need not be written again.
    """

    clip_ids: list[bytes] = dataclasses.field(default_factory=list)
    lines: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)  # LINE
    texts: list[tuple[str, ...]] = dataclasses.field(default_factory=list)  # TABLES
    images: list[ShopImage | None] = dataclasses.field(default_factory=list)
    columns: list[int] = dataclasses.field(default_factory=list)  # how many the line has; 0: it is at fault
    frame_hashes: list[NDArray[np.uint64]] = dataclasses.field(default_factory=list)
    faults: list[Fault] = dataclasses.field(default_factory=list)
    nameless: int = 0  # rows at fault without a clip id
    num_lines: int = 0


def survey_part(layout: TextLayout, split: str, part: Part) -> Survey:
    """Reads a part of a training list (in a worker)."""
    survey = Survey()
    file = str(part.path.relative_to(layout.source))
    for number, offset, content in lines(part.path, part.begin, part.end):
        survey.num_lines = number
        line = (part.file, number, offset, len(content))
        try:
            row = parse_row(content)
            image = layout.shop_image(row, split)
        except BadInputError as err:
            clip = content.split(b"\t", 1)[0][:MAX_ID_BYTES].decode("utf-8", "backslashreplace")
            survey.faults.append(err.at(file, number, f"clip {clip}"))
            _keep_place(survey, clip, line)
            continue
        category = f"{row.category}\t{row.category_name}".strip("\t")
        survey.clip_ids.append(row.clip_id.encode())
        survey.lines.append(line)
        survey.texts.append((row.livestream, category, row.product, row.scale, row.duration, row.number))
        survey.images.append(image)
        survey.columns.append(row.columns)
        survey.frame_hashes.append(hash_names(layout.frames_to_locate(row)))
    return survey


def _keep_place(survey: Survey, clip_id: str, line: tuple[int, int, int, int]) -> None:
    try:
        survey.clip_ids.append(checked_id(clip_id, "clip").encode())
    except BadInputError:
        survey.nameless += 1
        return
    survey.lines.append(line)
    survey.texts.append(len(TABLES) * ("",))
    survey.images.append(None)
    survey.columns.append(0)
    survey.frame_hashes.append(np.zeros(0, np.uint64))


class ImageNumbers:
    """Shop images numbered in the order in which they come, each once."""

    def __init__(self) -> None:
        self.images: dict[tuple[str, str], tuple[int, ShopImage]] = {}

    def number(self, image: ShopImage | None) -> int:
        if image is None:
            return NONE
        return self.images.setdefault((image.id, image.reference), (len(self.images), image))[0]

    def list(self) -> list[ShopImage]:
        return [image for _, image in self.images.values()]


def list_training(
    layout: TextLayout, split: str, tables: dict[str, Table], run: Run, shelf: Iterable[ShopImage] = ()
) -> Listing:
    """The listing of a training list; shelf: further shop images of validation's gallery."""
    paths = layout.training_lists(split)
    images = ImageNumbers()
    faults: list[Fault] = []
    parts = [_arrays(Survey(), tables, images)]  # arrays of a part, not objects of a clip
    nameless = 0
    for survey in _surveys(layout, split, paths, run):
        faults += survey.faults
        nameless += survey.nameless
        parts.append(_arrays(survey, tables, images))
    for image in shelf:
        images.number(image)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    listing = Listing(
        split=split,
        clip_ids=whole["clip_ids"],
        lines=whole["lines"],
        files=[str(path.relative_to(layout.source)) for path in paths],
        columns={name: whole[name] for name in (*TABLES, "image")},
        images=images.list(),
        galleries={"": list(range(len(images.images)))} if split == "val" else {},
        faults=faults,
        listed=len(whole["clip_ids"]) + nameless,
        frame_hashes=whole["frame_hashes"],
        hash_counts=whole["hash_counts"],
    )
    _sort_clips(listing, _refuse_odd_lines(listing, whole["columns"]))
    sort_images(listing)
    return listing


def _arrays(survey: Survey, tables: dict[str, Table], images: ImageNumbers) -> dict[str, NDArray]:
    arrays: dict[str, NDArray] = {
        "clip_ids": np.array(survey.clip_ids, np.bytes_),
        "lines": np.array(survey.lines, LINE),
        "columns": np.array(survey.columns, np.int32),
        "image": np.array([images.number(image) for image in survey.images], np.int32),
        "frame_hashes": np.concatenate([*survey.frame_hashes, np.zeros(0, np.uint64)]),
        "hash_counts": np.array([len(each) for each in survey.frame_hashes], np.int64),
    }
    for column, name in enumerate(TABLES):
        arrays[name] = np.array([tables[name].number(texts[column]) for texts in survey.texts], np.int32)
    return arrays


def _surveys(layout: TextLayout, split: str, paths: Sequence[Path], run: Run) -> Iterator[Survey]:
    """The parts' surveys in order, line numbers counted from the beginning of each file."""
    parts = [
        Part(file, path, begin, begin + PART_BYTES)
        for file, path in enumerate(paths)
        for begin in range(0, path.stat().st_size, PART_BYTES)
    ]
    tasks = [(split, part) for part in parts]
    surveys = run(survey_part, tasks, f"{split}: list", total=len(parts), unit="part")
    before = 0
    for part, survey in zip(parts, surveys, strict=True):
        before = before if part.begin else 0
        survey.faults = [dataclasses.replace(fault, line=fault.line + before) for fault in survey.faults]
        survey.lines = [(file, number + before, offset, length) for file, number, offset, length in survey.lines]
        before += survey.num_lines
        yield survey


def _refuse_odd_lines(listing: Listing, columns: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Refuses rows with other columns than most of their file; which to keep: the first of each clip id."""
    keep = np.ones(len(listing), bool)

    def refuse(row: int, reason: str, detail: str) -> None:
        line, clip_id = listing.lines[row], listing.clip_ids[row].decode()
        listing.faults.append(
            Fault(reason, listing.files[line["file"]], detail, int(line["number"]), f"clip {clip_id}")
        )

    for file in range(len(listing.files)):
        of_file = np.flatnonzero((listing.lines["file"] == file) & (columns > 0))
        usual = int(np.argmax(np.bincount(columns[of_file]))) if len(of_file) else 0
        for row in of_file[columns[of_file] != usual]:
            detail = f"found {columns[row]} columns between tabs, needs {usual} as the file's other lines"
            refuse(row, "wrong number of columns", f"{detail}; restore the line.")
            listing.columns["image"][row] = NONE
    order = np.argsort(listing.clip_ids, kind="stable")  # stable: the first of a clip id is the first in the files
    first = -1
    for place, same in enumerate(listing.clip_ids[order][1:] == listing.clip_ids[order][:-1]):
        first = first if same and first >= 0 else place
        if same:
            line = listing.lines[order[first]]
            detail = f"found the clip id of {listing.files[line['file']]} line {line['number']} again, needs each once"
            refuse(order[place + 1], "duplicate clip id", f"{detail}; remove one of the lines.")
            keep[order[place + 1]] = False
        first = first if same else -1
    return keep


def _sort_clips(listing: Listing, keep: NDArray[np.bool_]) -> None:
    order = np.flatnonzero(keep)
    order = order[np.argsort(listing.clip_ids[order], kind="stable")]
    counts = listing.hash_counts[order]
    shift = (np.cumsum(listing.hash_counts) - listing.hash_counts)[order] - (np.cumsum(counts) - counts)
    listing.frame_hashes = listing.frame_hashes[np.repeat(shift, counts) + np.arange(counts.sum())]
    listing.hash_counts = counts
    listing.clip_ids = listing.clip_ids[order]
    listing.lines = listing.lines[order]
    listing.columns = {name: values[order] for name, values in listing.columns.items()}


# --- test, and folders ------------------------------------------------------------------------------------------------


def list_clips(layout: Layout, split: str, tables: dict[str, Table]) -> Listing:
    """The listing of a split without a training list; a clip without a true image in its gallery keeps its place."""
    clips, faults = layout.listed_clips(split)
    shelves, gallery_faults = layout.galleries(split)
    images: list[ShopImage] = []
    galleries: dict[str, list[int]] = {}
    numbers: dict[tuple[str, str], int] = {}
    for livestream, shelf in shelves.items():
        for image in shelf:
            if numbers.setdefault((image.id, image.reference), len(images)) == len(images):
                images.append(image)
        galleries[livestream] = [numbers[image.id, image.reference] for image in shelf]
    listed = len(clips) + len(faults)
    faults += gallery_faults
    clips.sort(key=lambda clip: clip.clip_id.encode())
    true_rows: list[int] = []
    for clip in clips:
        try:
            true_rows.append(first_true_image(clip, images, galleries))
        except BadInputError as err:
            faults.append(err.at(clip.file, 0, f"clip {clip.clip_id}"))
            true_rows.append(NONE)
    livestreams = [tables["livestream"].number(clip.livestream) for clip in clips]
    hashes = [hash_names(layout.frames_to_locate(clip)) for clip in clips]
    listing = Listing(
        split=split,
        clip_ids=np.array([clip.clip_id.encode() for clip in clips], np.bytes_),
        clips=clips,
        columns={
            **{name: np.full(len(clips), NONE, np.int32) for name in TABLES},
            "livestream": np.array(livestreams, np.int32),
            "image": np.array(true_rows, np.int32),
        },
        images=images,
        galleries={} if split == "train" else galleries,
        truth=layout.truth() if split == "test" else {},
        faults=faults,
        listed=listed,
        lost_images=len(gallery_faults),
        frame_hashes=np.concatenate([*hashes, np.zeros(0, np.uint64)]),
        hash_counts=np.array([len(each) for each in hashes], np.int64),
    )
    sort_images(listing)
    return listing


def first_true_image(clip: ClipListing, images: Sequence[ShopImage], galleries: dict[str, list[int]]) -> int:
    """Row of the first true image in the clip's gallery; BadInputError if it cannot be judged."""
    if clip.fault:
        raise clip.fault
    if not clip.frames:
        raise BadInputError("clip without frames", "found an empty frame list, needs at least one; remove the query.")
    if not clip.truth:
        raise BadInputError(
            "query without truth",
            "found no true image in the truth file, needs at least one; add it, or remove the query.",
        )
    if not galleries.get(clip.livestream):
        raise BadInputError(
            "livestream without gallery",
            f"found no shop image for livestream {clip.livestream}, needs a gallery; add it to the gallery file.",
        )
    for row in galleries[clip.livestream]:
        if images[row].id in clip.truth:
            return row
    raise BadInputError(
        "true image not in its gallery",
        f"found none of {', '.join(clip.truth)} in the gallery of livestream {clip.livestream}, needs one; "
        "correct the truth or the gallery file.",
    )
