"""Faults that only a comparison shows: a frame in training and test, a picture under two products, mistyped ids."""

import collections
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_pipeline.faults import Fault
from data_pipeline.inspection.duplicates import same_bytes, same_picture
from data_pipeline.inspection.summary import InspectedData, SplitSummary
from data_pipeline.layouts.listing import NONE

SHOWN_IDS = 5
ImageRow = tuple[SplitSummary, int]  # a shop image: its split's summary, and its row there


def cross_checks(data: InspectedData) -> Iterator[Fault]:
    """Yields faults between clips, shop images, splits and galleries. Raises ValueError if a picture cannot be read."""
    for number, summary in enumerate(data.summaries):
        if not summary.clip_ids:
            detail = "found no clip, needs some for training or evaluation; restore the list, or leave the split out."
            yield Fault("split without clips", summary.split, detail)
        for other in data.summaries[number + 1 :]:
            yield from _clips_in_both(data, summary, other)
            yield from _frames_in_both(data, summary, other)
        yield from _frames_of_two_products(data, summary)
        yield from _doubles_in_galleries(data, summary)
        yield from _truth_without_query(summary)
    yield from _shop_images(data)
    yield from _alike_ids(data)


# --- splits -----------------------------------------------------------------------------------------------------------


def _clips_in_both(data: InspectedData, summary: SplitSummary, other: SplitSummary) -> Iterator[Fault]:
    rows = {clip_id: row for row, clip_id in enumerate(summary.clip_ids)}
    for clip_id in other.clip_ids:
        if clip_id in rows:
            detail = f"found the clip in {summary.split} and in {other.split}, needs it in one split; "
            file, line = data.clip_source(summary, rows[clip_id])
            yield Fault("clip in two splits", file, f"{detail}remove it from one.", line, f"clip {clip_id}")


def _frames_in_both(data: InspectedData, summary: SplitSummary, other: SplitSummary) -> Iterator[Fault]:
    """Yields a fault for each frame in both splits, unless its clip is too. Raises ValueError if one cannot be read."""
    frames, other_frames = summary.frame_fingerprints, other.frame_fingerprints
    read = lambda row: data.frame(summary, *summary.clip_of(row))
    read_other = lambda row: data.frame(other, *other.clip_of(row))
    pairs = [(pair, "the same bytes as") for pair in same_bytes(frames, other_frames)]
    pairs += [(pair, "the same picture as") for pair in same_picture(frames, other_frames, read, read_other)]
    for (one, two), how in pairs:
        (clip, frame), (other_clip, other_frame) = summary.clip_of(one), other.clip_of(two)
        if summary.clip_ids[clip] == other.clip_ids[other_clip]:
            continue  # the whole clip is a fault already
        file = data.frame_name(summary, clip, frame)
        name = data.frame_name(other, other_clip, other_frame)
        detail = f"found {how} {name} ({other.split} clip {other.clip_ids[other_clip]}), needs frames of {other.split} "
        detail += f"that {summary.split} does not have; leave one of the clips out."
        subject = f"clip {summary.clip_ids[clip]}"
        yield Fault(f"frame in {summary.split} and {other.split}", file, detail, 0, subject)


def _frames_of_two_products(data: InspectedData, summary: SplitSummary) -> Iterator[Fault]:
    """Yields a fault for each frame with the bytes of an earlier one of the split, in a clip of another product."""
    for one, two in same_bytes(summary.frame_fingerprints):
        (clip, frame), (other_clip, other_frame) = summary.clip_of(one), summary.clip_of(two)
        image, other_image = (summary.clip_images[row] for row in (clip, other_clip))
        if clip == other_clip or NONE in (image, other_image):
            continue
        if _product(summary, image) == _product(summary, other_image):
            continue
        file = data.frame_name(summary, other_clip, other_frame)
        detail = f"found the bytes of {data.frame_name(summary, clip, frame)}, a frame of clip "
        detail += f"{summary.clip_ids[clip]} of another product; check which of the products it shows."
        yield Fault("frame of two products", file, detail, 0, f"clip {summary.clip_ids[other_clip]}")


# --- shop images ------------------------------------------------------------------------------------------------------


def _product(summary: SplitSummary, image: int) -> object:
    product = int(summary.image_products[image])
    return product if product != NONE else summary.image_ids[image]


def _shop_images(data: InspectedData) -> Iterator[Fault]:
    """Yields the faults of shop images over all splits: two files under one id, one picture under two ids.

    The latter are "under two products" if these differ or, where not known, one gallery has both; else "under two ids".
    Raises ValueError if a picture to compare cannot be read.
    """
    images = [(summary, row) for summary in data.summaries for row in range(len(summary.image_ids))]
    if not images:
        return
    ids = [summary.image_ids[row] for summary, row in images]
    fingerprints = np.concatenate([summary.image_fingerprints for summary in data.summaries])
    first: dict[tuple[str, int], int] = {}  # by id and bytes: splits share shop images
    for number, image_id in enumerate(ids):
        first.setdefault((image_id, int(fingerprints["digest"][number])), number)
    distinct = sorted(number for number in first.values() if fingerprints["key"][number])
    by_id = collections.defaultdict(list)
    for number in distinct:
        by_id[ids[number]].append(number)
    for same_id in by_id.values():
        for number in same_id[1:]:
            detail = f"found another picture than {data.image_name(*images[same_id[0]])} under the same id, needs one "
            detail += "an id; see which is right."
            file, subject = data.image_name(*images[number]), f"image {ids[number]}"
            yield Fault("two shop images under one id", file, detail, 0, subject)
    shown_in = _galleries_by_image(data.summaries)
    chosen = fingerprints[np.array(distinct, np.int64)]
    read = lambda row: data.image(*images[distinct[row]])
    pairs = [(pair, "bytes") for pair in same_bytes(chosen)]
    pairs += [(pair, "picture") for pair in same_picture(chosen, None, read, read)]
    for (one, two), what in pairs:
        one, two = distinct[one], distinct[two]
        if ids[one] != ids[two]:
            yield _two_products(data, images[one], images[two], what, shown_in[ids[one]] & shown_in[ids[two]])


def _galleries_by_image(summaries: Sequence[SplitSummary]) -> dict[str, set[tuple[str, str]]]:
    """Returns, by image id, the galleries (split, livestream) that show it; an empty set for any other id."""
    galleries: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
    for summary in summaries:
        for livestream, images in summary.galleries.items():
            for image in images.tolist():
                if image != NONE:
                    galleries[summary.image_ids[image]].add((summary.split, livestream))
    return galleries


def _two_products(data: InspectedData, one: ImageRow, two: ImageRow, what: str, shared: set[tuple[str, str]]) -> Fault:
    """Returns the fault, in the file of `two`: "under two products" or "under two ids". shared: galleries with both."""
    ids = [summary.image_ids[image] for summary, image in (one, two)]
    products = [int(summary.image_products[image]) for summary, image in (one, two)]
    names = [data.tables["product"][product] if product != NONE else "not known" for product in products]
    file = data.image_name(*two)
    detail = f"found the same {what} as {data.image_name(*one)} (image {ids[0]}), "
    detail += f"products {names[1]} and {names[0]}"
    detail += f", both in the gallery of {min(shared)[1] or min(shared)[0]}" if shared else ""
    detail += "; nobody can tell which a clip shows: give them one id, or replace a picture."
    named = data.knows_products and NONE not in products
    same = named and products[0] == products[1]
    certain = (shared or named) and not same
    reason = "shop image under two products" if certain else "shop image under two ids"
    return Fault(reason, file, detail, 0, f"image {ids[1]}")


# --- galleries, truth and ids -----------------------------------------------------------------------------------------


def _doubles_in_galleries(data: InspectedData, summary: SplitSummary) -> Iterator[Fault]:
    for livestream, images in summary.galleries.items():
        rows, counts = np.unique(images[images != NONE], return_counts=True)
        for row in rows[counts > 1].tolist():
            file, gallery = data.image_name(summary, row), livestream or summary.split
            detail = f"found the image twice in the gallery of {gallery}, needs each once: it takes two places of the "
            detail += "ranking; remove a row."
            yield Fault("image twice in a gallery", file, detail, 0, f"image {summary.image_ids[row]}")


def _truth_without_query(summary: SplitSummary) -> Iterator[Fault]:
    """Yields a fault for each clip of the truth file that the split lacks, sorted by id: it is a miss in Recall."""
    for clip_id in sorted(set(summary.truth) - set(summary.clip_ids)):
        detail = "found no clip for this entry of the truth, needs one: it counts as missed in every Recall; "
        detail += "add the clip, or remove the entry."
        yield Fault("truth without query", summary.split, detail, 0, f"clip {clip_id}")


def _alike_ids(data: InspectedData) -> Iterator[Fault]:
    """Yields a fault for each group of ids that differ in case, width or space only, and each id with outer space."""
    kinds: list[tuple[str, Iterable[str]]] = [
        ("clip", {clip_id for summary in data.summaries for clip_id in summary.clip_ids}),
        ("image", {image_id for summary in data.summaries for image_id in summary.image_ids}),
        ("product", data.tables.get("product", ())),
        ("livestream", data.tables.get("livestream", ())),
    ]
    for kind, ids in kinds:
        groups = collections.defaultdict(list)
        for each in ids:
            groups["".join(unicodedata.normalize("NFKC", each).casefold().split())].append(each)
        for same in map(sorted, groups.values()):
            shown = ", ".join(map(repr, same[:SHOWN_IDS]))
            if len(same) > 1:
                detail = f"found the {kind} ids {shown}, which differ in case or space only"
            elif same[0] != same[0].strip():
                detail = f"found the {kind} id {shown} with space at an end"
            else:
                continue
            yield Fault("ids alike", "ids", f"{detail}; see whether they are one.", 0, f"{kind} {same[0]}")
