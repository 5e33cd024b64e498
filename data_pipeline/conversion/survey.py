"""The survey of a source: reads its lists into a `Listing` per split.

Workers read training lists in parts. The parent process numbers lines, texts and images, and finds duplicates.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.schema import ShopImage
from data_pipeline.layouts.annotations import MAX_ID_BYTES, checked_id, parse_row, read_lines
from data_pipeline.layouts.img2dataset import hash_names
from data_pipeline.layouts.listing import LINE, NONE, TABLES, ClipListing, Layout, Listing, RunTasks, sort_images
from data_pipeline.layouts.text_layout import TextLayout

PART_BYTES = 1 << 24
Tables = dict[str, dict[str, int]]  # numbers of texts, by the column that contains them
NumberedImages = dict[tuple[str, str], tuple[int, ShopImage]]  # by id and reference


def list_splits(layout: Layout, splits: Iterable[str], run: RunTasks) -> tuple[list[Listing], dict[str, list[str]]]:
    """Returns the listings of the splits, with their faults, and the sorted texts by the column that numbers them.

    Raises WrongUseError for a list that is missing or ambiguous, BadInputError for one that cannot be read at all.
    """
    tables: Tables = {name: {} for name in TABLES}
    listings: list[Listing] = []
    for split in splits:
        if split == "test" or not isinstance(layout, TextLayout):
            listings.append(list_clips(layout, split, tables))
        else:
            gallery = _training_images(layout, listings, run) if split == "val" else ()
            listings.append(list_training(layout, split, tables, run, gallery))
    # Test lists do not name products: they are known from training rows with the same image.
    products = {image.id: image.product for listing in listings for image in listing.images if image.product}
    for listing in listings:
        listing.images = [
            dataclasses.replace(image, product=image.product or products.get(image.id, "")) for image in listing.images
        ]
        numbers = np.array([_number(tables["product"], image.product) for image in listing.images], np.int32)
        listing.image_products = numbers
        if listing.clips:
            listing.columns["product"] = np.append(numbers, np.int32(NONE))[listing.columns["image"]]
    texts = {name: sorted(table) for name, table in tables.items()}
    for name, table in tables.items():
        renumber = np.full(len(table) + 1, NONE, np.int32)  # the last entry maps NONE to NONE
        renumber[[table[text] for text in texts[name]]] = np.arange(len(table))
        for listing in listings:
            listing.columns[name] = renumber[listing.columns[name]]
            if name == "product":
                listing.image_products = renumber[listing.image_products]
    return listings, texts


def _training_images(layout: TextLayout, listings: Sequence[Listing], run: RunTasks) -> Iterator[ShopImage]:
    """Yields the training list's shop images, converted or not, if it exists: validation's gallery contains them."""
    if listings:
        yield from listings[0].images
    elif "train" in layout.splits():
        for survey in _surveys(layout, "train", layout.training_lists("train"), run):
            yield from (row.image for row in survey.rows if row.image)


# --- training and validation ------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class SurveyedRow:
    """A row with what stays of it in memory. Without an image it is at fault."""

    clip_id: str
    line: tuple[int, int, int, int]  # LINE
    texts: tuple[str, ...] = len(TABLES) * ("",)
    image: ShopImage | None = None
    columns: int = 0  # number of columns in the line; 0: at fault
    frame_hashes: NDArray[np.uint64] = dataclasses.field(default_factory=lambda: hash_names(()))


@dataclasses.dataclass
class Survey:
    """The rows of one part, with line numbers that count from its first line.

    A row at fault with a sound clip id is included. So later clips keep their ordinals when the row is corrected.
    """

    rows: list[SurveyedRow] = dataclasses.field(default_factory=list)
    faults: list[Fault] = dataclasses.field(default_factory=list)
    nameless: int = 0  # number of rows at fault without a sound clip id
    num_lines: int = 0


def survey_part(layout: TextLayout, file: int, path: Path, begin: int) -> Survey:
    """Returns the survey of the PART_BYTES from byte `begin` of a list, number `file`. Raises OSError on reading."""
    survey = Survey()
    for number, offset, content in read_lines(path, begin, begin + PART_BYTES):
        survey.num_lines = number
        if not content:
            continue
        line = (file, number, offset, len(content))
        try:
            row = parse_row(content)
            image = layout.shop_image(row)
        except BadInputError as err:
            clip_id = content.split(b"\t", 1)[0][:MAX_ID_BYTES].decode("utf-8", "backslashreplace")
            survey.faults.append(err.at(str(path.relative_to(layout.source)), number, f"clip {clip_id}"))
            try:
                survey.rows.append(SurveyedRow(checked_id(clip_id, "clip"), line))
            except BadInputError:
                survey.nameless += 1
            continue
        category = f"{row.category}\t{row.category_name}" if row.category or row.category_name else ""
        texts = (row.livestream, category, row.product, row.scale, row.duration, row.number)
        hashes = hash_names(layout.frames_to_locate(row))
        survey.rows.append(SurveyedRow(row.clip_id, line, texts, image, row.columns, hashes))
    return survey


def _number(numbers: dict[str, int], text: str) -> int:
    """Returns the number of a text, and adds a new text with the next number, from 0. Returns NONE for ""."""
    return numbers.setdefault(text, len(numbers)) if text else NONE


def _number_image(images: NumberedImages, image: ShopImage | None) -> int:
    """Returns a shop image's number, from 0, adding a new one; NONE for None. Equal id and reference are one image."""
    return images.setdefault((image.id, image.reference), (len(images), image))[0] if image else NONE


def list_training(
    layout: TextLayout, split: str, tables: Tables, run: RunTasks, gallery: Iterable[ShopImage] = ()
) -> Listing:
    """Returns the listing of split's list, with `gallery`. WrongUseError: none or several; OSError: unreadable."""
    paths = layout.training_lists(split)
    images: NumberedImages = {}
    faults: list[Fault] = []
    parts = [_arrays((), tables, images)]  # arrays of a part take less memory than objects of a clip
    nameless = 0
    for survey in _surveys(layout, split, paths, run):
        faults += survey.faults
        nameless += survey.nameless
        parts.append(_arrays(survey.rows, tables, images))
    for image in gallery:
        _number_image(images, image)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    listing = Listing(
        split=split,
        clip_ids=whole["clip_ids"],
        lines=whole["lines"],
        files=[str(path.relative_to(layout.source)) for path in paths],
        columns={name: whole[name] for name in (*TABLES, "image")},
        images=[image for _, image in images.values()],
        galleries={"": list(range(len(images)))} if split == "val" else {},
        faults=faults,
        listed=len(whole["clip_ids"]) + nameless,
        frame_hashes=whole["frame_hashes"],
        hash_counts=whole["hash_counts"],
    )
    _refuse_odd_lines(listing, whole["columns"])
    _sort_clips(listing, _refuse_duplicates(listing))
    sort_images(listing)
    return listing


def _arrays(rows: Sequence[SurveyedRow], tables: Tables, images: NumberedImages) -> dict[str, NDArray]:
    arrays: dict[str, NDArray] = {
        "clip_ids": np.array([row.clip_id.encode() for row in rows], np.bytes_),
        "lines": np.array([row.line for row in rows], LINE),
        "columns": np.array([row.columns for row in rows], np.int32),
        "image": np.array([_number_image(images, row.image) for row in rows], np.int32),
        "frame_hashes": np.concatenate([*(row.frame_hashes for row in rows), hash_names(())]),
        "hash_counts": np.array([len(row.frame_hashes) for row in rows], np.int64),
    }
    for column, name in enumerate(TABLES):
        arrays[name] = np.array([_number(tables[name], row.texts[column]) for row in rows], np.int32)
    return arrays


def _surveys(layout: TextLayout, split: str, paths: Sequence[Path], run: RunTasks) -> Iterator[Survey]:
    """Yields the surveys of all parts of a list in order, with line numbers that count from the start of each file."""
    tasks = [
        (file, path, begin) for file, path in enumerate(paths) for begin in range(0, path.stat().st_size, PART_BYTES)
    ]
    surveys = run(survey_part, tasks, f"{split}: list", total=len(tasks), unit="part")
    before = 0
    for (_, _, begin), survey in zip(tasks, surveys, strict=True):
        before = before if begin else 0
        survey.faults = [dataclasses.replace(fault, line=fault.line + before) for fault in survey.faults]
        for row in survey.rows:
            file, number, offset, length = row.line
            row.line = (file, number + before, offset, length)
        before += survey.num_lines
        yield survey


def _refuse_row(listing: Listing, row: int, reason: str, detail: str) -> None:
    line, clip_id = listing.lines[row], listing.clip_ids[row].decode()
    listing.faults.append(Fault(reason, listing.files[line["file"]], detail, int(line["number"]), f"clip {clip_id}"))


def _refuse_odd_lines(listing: Listing, columns: NDArray[np.int32]) -> None:
    """Adds a fault for rows with another number of columns than most of their file, and sets their image to NONE."""
    for file in range(len(listing.files)):
        rows = np.flatnonzero((listing.lines["file"] == file) & (columns > 0))
        usual = np.argmax(np.bincount(columns[rows], minlength=1))
        for row in rows[columns[rows] != usual]:
            detail = f"found {columns[row]} columns between tabs, needs {usual} as the file's other lines"
            _refuse_row(listing, row, "wrong number of columns", f"{detail}; restore the line.")
            listing.columns["image"][row] = NONE


def _refuse_duplicates(listing: Listing) -> NDArray[np.bool_]:
    """Returns which rows to keep, bool [len(listing)]: the first of each clip id. The others become faults."""
    keep = np.ones(len(listing), bool)
    order = np.argsort(listing.clip_ids, kind="stable")  # stable: of rows with one id the first in the files is first
    first = -1  # index into order of the first of a group of equal ids; -1: no group
    for index, same in enumerate(listing.clip_ids[order][1:] == listing.clip_ids[order][:-1]):
        first = (first if first >= 0 else index) if same else -1
        if same:
            line = listing.lines[order[first]]
            detail = f"found the clip id of {listing.files[line['file']]} line {line['number']} again, needs each once"
            _refuse_row(listing, order[index + 1], "duplicate clip id", f"{detail}; remove one of the lines.")
            keep[order[index + 1]] = False
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


# --- test, and own folders --------------------------------------------------------------------------------------------


def list_clips(layout: Layout, split: str, tables: Tables) -> Listing:
    """Returns the listing of a split without a training list; clips at fault lack an image. Raises as `list_splits`."""
    clips, faults = layout.listed_clips(split)
    galleries, gallery_faults = layout.galleries(split)
    numbered: NumberedImages = {}
    rows = {name: [_number_image(numbered, image) for image in gallery] for name, gallery in galleries.items()}
    images = [image for _, image in numbered.values()]
    listed = len(clips) + len(faults)
    faults += gallery_faults
    clips.sort(key=lambda clip: clip.clip_id.encode())
    true_rows: list[int] = []
    for clip in clips:
        try:
            true_rows.append(first_true_image(clip, images, rows))
        except BadInputError as err:
            faults.append(err.at(clip.file, 0, f"clip {clip.clip_id}"))
            true_rows.append(NONE)
    livestreams = [_number(tables["livestream"], clip.livestream) for clip in clips]
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
        galleries={} if split == "train" else rows,
        truth=layout.truth if split == "test" else {},
        faults=faults,
        listed=listed,
        lost_images=len(gallery_faults),
        frame_hashes=np.concatenate([*hashes, hash_names(())]),
        hash_counts=np.array([len(each) for each in hashes], np.int64),
    )
    sort_images(listing)
    return listing


def first_true_image(clip: ClipListing, images: Sequence[ShopImage], galleries: dict[str, list[int]]) -> int:
    """Returns the row in `images` of the first true image in a clip's gallery. galleries: rows by livestream.

    Raises BadInputError if the clip has no frame, truth or gallery, its gallery no true image, or it has a fault.
    """
    if clip.fault:
        raise clip.fault
    if not clip.frames:
        raise BadInputError("clip without frames", "found an empty frame list, needs at least one; remove the query.")
    if not clip.truth:
        detail = "found no true image in the truth file, needs at least one; add it, or remove the query."
        raise BadInputError("query without truth", detail)
    if not galleries.get(clip.livestream):
        detail = f"found no shop image for livestream {clip.livestream}, needs a gallery; add it to the gallery file."
        raise BadInputError("livestream without gallery", detail)
    for row in galleries[clip.livestream]:
        if images[row].id in clip.truth:
            return row
    detail = f"found none of {', '.join(clip.truth)} in the gallery of livestream {clip.livestream}, needs one; "
    raise BadInputError("true image not in its gallery", detail + "correct the truth or the gallery file.")
