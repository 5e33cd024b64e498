"""Faults that only a comparison shows: a frame in training and test, a picture under two products, mistyped ids."""

import collections
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from data_pipeline.faults import Fault, counted
from data_pipeline.inspection.duplicates import duplicates, equal_rows
from data_pipeline.inspection.summary import InspectedData, SplitSummary
from data_pipeline.layouts.listing import NONE

SHOWN_IDS = 5
MAX_PAIRS = 100_000  # of images with one picture, among which one of two products is looked for
ImageRow = tuple[SplitSummary, int]  # a shop image: its split's summary, and its row there


def cross_checks(data: InspectedData) -> Iterator[Fault]:
    """Yields faults between clips, shop images, splits and galleries. Raises ValueError if a picture cannot be read."""
    for number, summary in enumerate(data.summaries):
        if not summary.clip_ids:
            detail = f"found no clip, needs some for training or evaluation; restore its list{data.then}, or convert "
            detail += "the others alone with --splits."
            yield Fault("split without clips", summary.split, detail)
        for other in data.summaries[number + 1 :]:
            yield from _clips_in_both(data, summary, other)
            yield from _frames_in_both(data, summary, other)
        yield from _frames_of_two_products(data, summary)
        yield from _doubles_in_galleries(data, summary)
        yield from _truth_without_query(data, summary)
    yield from _shop_images(data)
    yield from _alike_ids(data)


# --- splits -----------------------------------------------------------------------------------------------------------


def _clips_in_both(data: InspectedData, summary: SplitSummary, other: SplitSummary) -> Iterator[Fault]:
    rows = {clip_id: row for row, clip_id in enumerate(summary.clip_ids)}
    for clip_id in other.clip_ids:
        if clip_id in rows:
            detail = f"found the clip in {summary.split} and in {other.split}, needs it in one split; "
            file, line = data.clip_source(summary, rows[clip_id])
            yield Fault("clip in two splits", file, f"{detail}remove it from one{data.then}.", line, f"clip {clip_id}")


def _frames_in_both(data: InspectedData, summary: SplitSummary, other: SplitSummary) -> Iterator[Fault]:
    """Yields a fault for each picture that frames of both splits show, unless they are of one clip, which both have.

    Raises ValueError if a picture to compare cannot be read.
    """
    read = lambda row: data.frame(summary, *summary.clip_of(row))
    read_other = lambda row: data.frame(other, *other.clip_of(row))
    for group in duplicates(summary.frame_fingerprints, other.frame_fingerprints, read, read_other):
        frames = [(summary, *summary.clip_of(row)) for row in group.rows]
        frames += [(other, *other.clip_of(row)) for row in group.other_rows]
        clips = {each.clip_ids[clip] for each, clip, _ in frames}
        if len(clips) == 1:
            continue  # the whole clip is a fault already
        (_, clip, _), (_, other_clip, _) = frames[0], frames[len(group.rows)]
        detail = f"found {'the same bytes as' if group.same_bytes else 'the same picture as'} "
        detail += f"{data.frame_name(*frames[len(group.rows)])} ({other.split} clip {other.clip_ids[other_clip]})"
        if len(frames) > 2:
            rest = [each for place, each in enumerate(frames) if place not in (0, len(group.rows))]
            names = [data.frame_name(*each) for each in rest[:SHOWN_IDS]]
            detail += f" and {_shown(names, len(rest))}, in {len(clips):,} clips in all"
        detail += f", needs frames of {other.split} that {summary.split} does not have; leave these clips, or these "
        detail += f"frames of them, out of one split{data.then}, or, if the picture shows no product (a title, an "
        detail += "empty scene), "
        kind = f"frame in {summary.split} and {other.split}"
        detail += f"--accept '{kind}'."
        yield Fault(kind, data.frame_name(*frames[0]), detail, 0, f"clip {summary.clip_ids[clip]}")


def _shown(names: Sequence[str], count: int) -> str:
    """Returns the first SHOWN_IDS of names, and how many more of `count` there are."""
    shown = names[:SHOWN_IDS]
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")


def _frames_of_two_products(data: InspectedData, summary: SplitSummary) -> Iterator[Fault]:
    """Yields a fault for each picture, by its bytes, that frames of the split show in clips of several products."""
    for rows in equal_rows(summary.frame_fingerprints, data.work / "digests.run"):
        frames = [(*summary.clip_of(row), row) for row in rows]
        products = [_product(summary, summary.clip_images[clip]) for clip, _, _ in frames]
        others = [place for place, product in enumerate(products) if product not in (None, products[0])]
        if products[0] is None or not others:
            continue
        (clip, frame, _), (other_clip, other_frame, _) = frames[0], frames[others[0]]
        file = data.frame_name(summary, other_clip, other_frame)
        detail = f"found the bytes of {data.frame_name(summary, clip, frame)}, a frame of clip "
        detail += f"{summary.clip_ids[clip]} of another product"
        if len(frames) > 2:
            more = counted(len(frames) - 2, "more frame")
            detail += f", and of {more} of {len(set(products) - {None}):,} products in all"
        detail += "; check which of the products it shows."
        yield Fault("frame of two products", file, detail, 0, f"clip {summary.clip_ids[other_clip]}")


# --- shop images ------------------------------------------------------------------------------------------------------


def _product(summary: SplitSummary, image: int) -> object:
    """Returns what identifies the product of a shop image, by its row: its number or the image's id; None for NONE."""
    if image == NONE:
        return None
    product = int(summary.image_products[image])
    return product if product != NONE else summary.image_ids[image]


def _shop_images(data: InspectedData) -> Iterator[Fault]:
    """Yields the faults of shop images over all splits: several files under one id, one picture under several ids.

    The latter are "under two products" if some of these differ or, where not known, one gallery has two of them; else
    "under two ids". Raises ValueError if a picture to compare cannot be read.
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
        if len(same_id) > 1:
            names = [data.image_name(*images[number]) for number in same_id]
            more = f" and {_shown(names[2:], len(names) - 2)}" if len(names) > 2 else ""
            detail = f"found another picture than {names[0]}{more} under the same id, needs one an id; see which is "
            yield Fault("two shop images under one id", names[1], f"{detail}right.", 0, f"image {ids[same_id[0]]}")
    shown_in = _galleries_by_image(data.summaries)
    read = lambda row: data.image(*images[distinct[row]])
    for group in duplicates(fingerprints[np.array(distinct, np.int64)], None, read):
        numbers = list({ids[distinct[row]]: distinct[row] for row in reversed(group.rows)}.values())[::-1]
        if len(numbers) > 1:
            what = "bytes" if group.same_bytes else "picture"
            yield _several_ids(data, [images[number] for number in numbers], what, shown_in)


def _galleries_by_image(summaries: Sequence[SplitSummary]) -> dict[str, set[tuple[str, str]]]:
    """Returns, by image id, the galleries (split, livestream) that show it; an empty set for any other id."""
    galleries: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
    for summary in summaries:
        for livestream, images in summary.galleries.items():
            for image in images.tolist():
                if image != NONE:
                    galleries[summary.image_ids[image]].add((summary.split, livestream))
    return galleries


def _several_ids(
    data: InspectedData, images: Sequence[ImageRow], what: str, shown_in: Mapping[str, set[tuple[str, str]]]
) -> Fault:
    """Returns the fault of one picture under several ids, in the file of one: "under two products" or "two ids".

    shown_in: the galleries (split, livestream) that show an image, by its id.
    """
    ids = [summary.image_ids[row] for summary, row in images]
    products = [int(summary.image_products[row]) for summary, row in images]

    def certain(pair: tuple[int, int]) -> bool:
        one, two = pair
        named = data.knows_products and NONE not in (products[one], products[two])
        return products[one] != products[two] if named else bool(shown_in[ids[one]] & shown_in[ids[two]])

    pairs = itertools.islice(itertools.combinations(range(len(ids)), 2), MAX_PAIRS)
    found = next(filter(certain, pairs), None)
    one, two = found or (0, 1)
    names = [data.tables["product"][product] if product != NONE else "not known" for product in products]
    shared = shown_in[ids[one]] & shown_in[ids[two]]
    detail = f"found the same {what} as {data.image_name(*images[one])} (image {ids[one]}), "
    detail += f"products {names[two]} and {names[one]}"
    detail += f", both in the gallery of {min(shared)[1] or min(shared)[0]}" if shared else ""
    if len(ids) > 2:
        others = [each for place, each in enumerate(ids) if place not in (one, two)]
        detail += f", and as the images {_shown(others, len(others))}"
    detail += f"; nobody can tell which a clip shows: give them one id, or replace a picture{data.then}."
    reason = "shop image under two products" if found else "shop image under two ids"
    return Fault(reason, data.image_name(*images[two]), detail, 0, f"image {ids[two]}")


# --- galleries, truth and ids -----------------------------------------------------------------------------------------


def _doubles_in_galleries(data: InspectedData, summary: SplitSummary) -> Iterator[Fault]:
    """Yields a fault for each gallery that has images twice."""
    for livestream, images in summary.galleries.items():
        rows, counts = np.unique(images[images != NONE], return_counts=True)
        twice = rows[counts > 1].tolist()
        if twice:
            file, gallery = data.image_name(summary, twice[0]), livestream or summary.split
            more = f" and so {len(twice) - 1:,} more" if len(twice) > 1 else ""
            detail = f"found the image{more} twice in the gallery of {gallery}, needs each once: it takes two places "
            detail += f"of the ranking; remove a row{data.then}."
            yield Fault("image twice in a gallery", file, detail, 0, f"image {summary.image_ids[twice[0]]}")


def _truth_without_query(data: InspectedData, summary: SplitSummary) -> Iterator[Fault]:
    """Yields a fault if the truth file has clips that the split lacks: they are misses in Recall."""
    if absent := sorted(set(summary.truth) - set(summary.clip_ids)):
        more = f" and for {_shown(absent[1:], len(absent) - 1)}" if len(absent) > 1 else ""
        detail = f"found no clip for this entry of the truth{more}, needs one: it counts as missed in every Recall; "
        detail += f"add the clip, or remove the entry{data.then}."
        yield Fault("truth without query", summary.split, detail, 0, f"clip {absent[0]}")


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
