"""Numbers of a data set by split, as JSON: counts, sizes, and how often each value of a column occurs."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.inspection.fingerprints import Fingerprints
from data_pipeline.inspection.store import chunks
from data_pipeline.inspection.summary import InspectedData, SplitSummary
from data_pipeline.layouts.listing import NONE

MAX_VALUES = 20  # most frequent values that are listed with their counts


def distributions(data: InspectedData) -> dict[str, Any]:
    """Returns by split, for JSON, counts of clips, frames, images, galleries and sizes, and "clips_by" each column."""
    return {summary.split: _split_distributions(summary, data.tables) for summary in data.summaries}


def _split_distributions(summary: SplitSummary, tables: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    frame_sizes, image_sizes = map(_sizes, (summary.frame_fingerprints, summary.image_fingerprints))
    lengths = collections.Counter(summary.frame_counts.tolist())
    sizes = [len(rows) for rows in summary.galleries.values()]
    spread = {name: _spread(column, tables.get(name, ())) for name, column in summary.columns.items()}
    products = np.append(summary.image_products, np.int32(NONE))[summary.clip_images]
    spread["product"] = _spread(products, tables.get("product", ()))
    return {
        "clips": len(summary.clip_ids),
        "frames": int(summary.frame_counts.sum()),
        "sound_frames": frame_sizes.total(),
        "shop_images": len(summary.image_ids),
        "sound_shop_images": image_sizes.total(),
        "galleries": {"count": len(sizes), "smallest": min(sizes, default=0), "largest": max(sizes, default=0)},
        "frames_a_clip": {str(n): clips for n, clips in sorted(lengths.items())},
        "clips_by": {name: values for name, values in spread.items() if values["values"]},
        "frame_sizes": _most_common(frame_sizes),
        "shop_image_sizes": _most_common(image_sizes),
    }


def _spread(column: NDArray[np.int32], texts: Sequence[str]) -> dict[str, Any]:
    numbers, counts = np.unique(column[column != NONE], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    ranked = counts[order]
    tenth = -(-len(ranked) // 10)
    return {
        "values": len(ranked),
        "without": int(np.count_nonzero(column == NONE)),
        "once": int(np.count_nonzero(ranked == 1)),
        "median": float(np.median(ranked)) if len(ranked) else 0.0,
        "share_of_the_first_tenth": round(int(ranked[:tenth].sum()) / max(1, int(ranked.sum())), 4),
        "first": {texts[numbers[at]].replace("\t", " "): int(counts[at]) for at in order[:MAX_VALUES]},
        "ranked": ranked[np.unique(np.geomspace(1, len(ranked), 40).astype(int)) - 1].tolist() if len(ranked) else [],
    }


def _sizes(pictures: Fingerprints) -> collections.Counter[tuple[int, int]]:
    """Returns how many sound pictures have each (width, height)."""
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    for part in chunks(pictures):
        sound = part[part["key"] > 0]
        sizes.update(zip(sound["width"].tolist(), sound["height"].tolist(), strict=True))
    return sizes


def _most_common(sizes: collections.Counter[tuple[int, int]]) -> dict[str, int]:
    return {f"{width} x {height}": count for (width, height), count in sizes.most_common(MAX_VALUES)}
