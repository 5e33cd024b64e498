"""What no picture and no row shows alone: the same frame in training and test, one picture under two products, ..."""

import collections
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_pipeline.faults import Fault
from data_pipeline.inspection import duplicates as twins
from data_pipeline.inspection.summary import Inspectable, SplitSummary
from data_pipeline.layouts.listing import NONE

SHOWN_IDS = 5


def compare(patient: Inspectable) -> Iterator[Fault]:
    """Faults between clips, shop images, splits and galleries."""
    charts = patient.charts
    for place, chart in enumerate(charts):
        if not chart.clip_ids:
            detail = "found no clip, needs some: nothing would be trained or judged; restore the list, or leave it out."
            yield Fault("split without clips", chart.split, detail)
        for other in charts[place + 1 :]:
            yield from _ids_in_both(patient, chart, other)
            yield from _frames_in_both(patient, chart, other)
        yield from _frames_of_two_products(patient, chart)
        yield from _galleries(patient, chart)
        yield from _queries(chart)
    yield from _shop_images(patient)
    yield from _alike_ids(patient)


# --- splits -----------------------------------------------------------------------------------------------------------


def _ids_in_both(patient: Inspectable, chart: SplitSummary, other: SplitSummary) -> Iterator[Fault]:
    rows = {clip_id: row for row, clip_id in enumerate(chart.clip_ids)}
    for clip_id in other.clip_ids:
        if clip_id in rows:
            detail = f"found the clip in {chart.split} and in {other.split}, needs it in one split; remove it from one."
            file, line = patient.clip_source(chart, rows[clip_id])
            yield Fault("clip in two splits", file, detail, line, f"clip {clip_id}")


def _frames_in_both(patient: Inspectable, chart: SplitSummary, other: SplitSummary) -> Iterator[Fault]:
    """Evaluation on frames that were trained on proves nothing."""

    def view(of: SplitSummary, row: int) -> bytes:
        return patient.frame(of, *of.clip_of(row))

    found = [(pair, "the same bytes as") for pair in twins.same_bytes(chart.looks, other.looks)]
    pictures = twins.same_picture(chart.looks, other.looks, lambda row: view(chart, row), lambda row: view(other, row))
    found += [(pair, "the same picture as") for pair in pictures]
    for (one, two), how in found:
        (clip, frame), (other_clip, other_frame) = chart.clip_of(one), other.clip_of(two)
        if chart.clip_ids[clip] == other.clip_ids[other_clip]:
            continue  # told as a whole
        file = patient.frame_name(chart, clip, frame)
        name = patient.frame_name(other, other_clip, other_frame)
        detail = f"found {how} {name} ({other.split} clip {other.clip_ids[other_clip]}), needs frames of {other.split} "
        detail += f"that {chart.split} does not have; leave one of the clips out."
        yield Fault(f"frame in {chart.split} and {other.split}", file, detail, 0, f"clip {chart.clip_ids[clip]}")


def _frames_of_two_products(patient: Inspectable, chart: SplitSummary) -> Iterator[Fault]:
    """One frame, two labels; in a livestream that may be so, in a batch each is the other's negative."""
    for one, two in twins.same_bytes(chart.looks):
        (clip, frame), (other_clip, other_frame) = chart.clip_of(one), chart.clip_of(two)
        image, other_image = (chart.images_of[each] for each in (clip, other_clip))
        if clip == other_clip or NONE in (image, other_image) or _product(chart, image) == _product(chart, other_image):
            continue
        file = patient.frame_name(chart, other_clip, other_frame)
        detail = f"found the bytes of {patient.frame_name(chart, clip, frame)}, a frame of clip "
        detail += f"{chart.clip_ids[clip]}, whose product is another; see which of them it shows."
        yield Fault("frame of two products", file, detail, 0, f"clip {chart.clip_ids[other_clip]}")


# --- shop images ------------------------------------------------------------------------------------------------------


def _product(chart: SplitSummary, image: int) -> object:
    product = int(chart.image_products[image])
    return product if product != NONE else chart.image_ids[image]


def _shop_images(patient: Inspectable) -> Iterator[Fault]:
    """One picture under two products, and two pictures under one id, in whatever splits."""
    where = [(chart, row) for chart in patient.charts for row in range(len(chart.image_ids))]
    if not where:
        return
    looks = np.concatenate([chart.image_looks for chart in patient.charts])
    first: dict[tuple[str, int], int] = {}  # (id, bytes) -> row: splits share shop images
    for row, (chart, image) in enumerate(where):
        first.setdefault((chart.image_ids[image], int(looks["digest"][row])), row)
    rows = np.array(sorted(row for row in first.values() if looks["key"][row]), np.int64)
    chosen = looks[rows]
    view = lambda place: patient.image(*where[rows[place]])
    by_id = collections.defaultdict(list)
    for row in rows.tolist():
        by_id[where[row][0].image_ids[where[row][1]]].append(row)
    for image_id, same_id in by_id.items():
        for other in same_id[1:]:
            yield _two_pictures(patient, where[same_id[0]], where[other], image_id)
    galleries = _shelves(patient.charts)
    pairs = [(pair, "bytes") for pair in twins.same_bytes(chosen)]
    pairs += [(pair, "picture") for pair in twins.same_picture(chosen, None, view, view)]
    for (one, two), what in pairs:
        here, there = where[rows[one]], where[rows[two]]
        if here[0].image_ids[here[1]] != there[0].image_ids[there[1]]:
            yield _two_products(patient, here, there, what, galleries)


def _shelves(charts: Sequence[SplitSummary]) -> dict[str, set[tuple[str, str]]]:
    """Image id -> the galleries (split, livestream) that show it."""
    shelves: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
    for chart in charts:
        for livestream, images in chart.galleries.items():
            for image in images.tolist():
                if image != NONE:
                    shelves[chart.image_ids[image]].add((chart.split, livestream))
    return shelves


def _two_products(
    patient: Inspectable,
    here: tuple[SplitSummary, int],
    there: tuple[SplitSummary, int],
    what: str,
    galleries: dict[str, set[tuple[str, str]]],
) -> Fault:
    ids = [chart.image_ids[image] for chart, image in (here, there)]
    products = [int(chart.image_products[image]) for chart, image in (here, there)]
    names = [patient.tables["product"][product] if product != NONE else "not known" for product in products]
    shared = galleries[ids[0]] & galleries[ids[1]]
    file = patient.image_name(*there)
    detail = f"found the same {what} as {patient.image_name(*here)} (image {ids[0]}), "
    detail += f"products {names[1]} and {names[0]}"
    detail += f", both in the gallery of {min(shared)[1] or min(shared)[0]}" if shared else ""
    detail += "; nobody can tell which a clip shows: give them one id, or replace a picture."
    same = patient.knows_products and NONE not in products and products[0] == products[1]
    certain = shared or (patient.knows_products and NONE not in products)
    reason = "shop image under two products" if certain and not same else "shop image under two ids"
    return Fault(reason, file, detail, 0, f"image {ids[1]}")


def _two_pictures(
    patient: Inspectable, here: tuple[SplitSummary, int], there: tuple[SplitSummary, int], image_id: str
) -> Fault:
    file = patient.image_name(*there)
    other = patient.image_name(*here)
    detail = f"found another picture than {other} under the same id, needs one an id; see which is right."
    return Fault("two shop images under one id", file, detail, 0, f"image {image_id}")


# --- queries and ids --------------------------------------------------------------------------------------------------


def _galleries(patient: Inspectable, chart: SplitSummary) -> Iterator[Fault]:
    for livestream, images in chart.galleries.items():
        rows, counts = np.unique(images[images != NONE], return_counts=True)
        for row in rows[counts > 1].tolist():
            detail = f"found the image twice in the gallery of {livestream or chart.split}, needs each once: it takes "
            detail += "two places of the ranking; remove a row."
            file = patient.image_name(chart, row)
            yield Fault("image twice in a gallery", file, detail, 0, f"image {chart.image_ids[row]}")


def _queries(chart: SplitSummary) -> Iterator[Fault]:
    """Recall divides by the truth file: what it names and no clip shows counts as a miss."""
    for clip_id in sorted(set(chart.truth) - set(chart.clip_ids)):
        detail = "found no clip for this entry of the truth, needs one: it counts as missed in every Recall; "
        detail += "add the clip, or remove the entry."
        yield Fault("truth without query", chart.split, detail, 0, f"clip {clip_id}")


def _alike_ids(patient: Inspectable) -> Iterator[Fault]:
    """Ids that a person takes for one another are mostly one id, mistyped."""
    kinds: list[tuple[str, Iterable[str]]] = [
        ("clip", {clip_id for chart in patient.charts for clip_id in chart.clip_ids}),
        ("image", {image_id for chart in patient.charts for image_id in chart.image_ids}),
        ("product", patient.tables.get("product", ())),
        ("livestream", patient.tables.get("livestream", ())),
    ]
    for kind, ids in kinds:
        groups = collections.defaultdict(list)
        for each in ids:
            groups["".join(unicodedata.normalize("NFKC", each).casefold().split())].append(each)
        for same in groups.values():
            spaced = [each for each in same if each != each.strip()]
            if len(same) > 1 or spaced:
                shown = ", ".join(map(repr, sorted(same)[:SHOWN_IDS]))
                detail = (
                    f"found the {kind} ids {shown}, which differ in case or space only"
                    if len(same) > 1
                    else (f"found the {kind} id {shown} with space at an end")
                )
                yield Fault("ids alike", "ids", detail + "; see whether they are one.", 0, f"{kind} {sorted(same)[0]}")
