"""What was found, as numbers and lists for machines: faults by kind with their severity, and distributions."""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import Fault
from data_pipeline.inspection.summary import UNLISTED, Inspectable, SplitSummary
from data_pipeline.layouts.listing import NONE

# Kinds that a conversion takes and that leave training and its figures what they are; every other kind is an error.
WARNINGS = frozenset(
    {
        "control characters",
        "damaged picture",
        "file of no manifest",
        "frame listed twice",
        "frame of two products",
        "ids alike",
        "image twice in a gallery",
        "several pictures in a file",
        "shop image under two ids",
        "truth without query",
        "turned by EXIF",
        "two shop images under one id",
        "unusual colours",
    }
)
MAX_LISTED = 10_000  # faults of a kind in the report; all are counted
LONG_TAIL = 20  # most frequent texts that are named


@dataclasses.dataclass
class Findings:
    """Faults by kind, in the order in which they were found."""

    accepted: Collection[str] = ()  # kinds that someone knows of, and takes as warnings
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    errors: set[str] = dataclasses.field(default_factory=set)  # kinds
    faults: list[Fault] = dataclasses.field(default_factory=list)

    def add(self, faults: Iterable[Fault]) -> None:
        known = set(self.faults)  # splits share shop images
        for fault in faults:
            if fault in known:
                continue
            known.add(fault)
            self.counts[fault.reason] += 1
            if self.severity(fault) == "error":
                self.errors.add(fault.reason)
            if self.counts[fault.reason] <= MAX_LISTED:
                self.faults.append(fault)

    def severity(self, fault: Fault) -> str:
        known = fault.reason in WARNINGS or fault.reason in self.accepted
        return "warning" if known or fault.subject == UNLISTED else "error"

    @property
    def safe(self) -> bool:
        return not self.errors

    def as_json(self) -> dict[str, Any]:
        """Kinds with an error first, then by number."""
        worst = {kind: "error" if kind in self.errors else "warning" for kind in self.counts}
        order = sorted(self.counts, key=lambda kind: (worst[kind], -self.counts[kind], kind))
        return {
            "safe": self.safe,
            "counts": {kind: {"severity": worst[kind], "count": self.counts[kind]} for kind in order},
            "faults": [
                {
                    "kind": fault.reason,
                    "severity": self.severity(fault),
                    "file": fault.file,
                    "line": fault.line or None,
                    "subject": fault.subject or None,
                    "detail": fault.detail,
                }
                for fault in sorted(self.faults, key=lambda fault: (order.index(fault.reason), self.severity(fault)))
            ],
        }


def distributions(patient: Inspectable) -> dict[str, Any]:
    """By split: counts, and how clips spread over products, categories, livestreams, types, lengths and sizes."""
    return {chart.split: _of_split(chart, patient.tables) for chart in patient.charts}


def _of_split(chart: SplitSummary, tables: Any) -> dict[str, Any]:
    sound, sound_images = (looks[looks["key"] > 0] for looks in (chart.looks, chart.image_looks))
    sizes = [len(images) for images in chart.galleries.values()]
    spread = {name: _spread(column, tables.get(name, ())) for name, column in chart.columns.items()}
    products = np.append(chart.image_products, np.int32(NONE))[chart.images_of]
    spread["product"] = _spread(products, tables.get("product", ()))
    return {
        "clips": len(chart.clip_ids),
        "frames": int(chart.counts.sum()),
        "sound_frames": len(sound),
        "shop_images": len(chart.image_ids),
        "sound_shop_images": len(sound_images),
        "galleries": {"count": len(sizes), "smallest": min(sizes, default=0), "largest": max(sizes, default=0)},
        "frames_a_clip": _histogram(chart.counts),
        "clips_by": {name: each for name, each in spread.items() if each["values"]},
        "frame_sizes": _sizes(sound),
        "shop_image_sizes": _sizes(sound_images),
    }


def _spread(column: NDArray[np.int32], texts: Sequence[str]) -> dict[str, Any]:
    """How many values there are, the most frequent ones, and the long tail."""
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
        "first": {texts[numbers[at]].replace("\t", " "): int(counts[at]) for at in order[:LONG_TAIL]},
        "ranked": ranked[np.unique(np.geomspace(1, len(ranked), 40).astype(int)) - 1].tolist() if len(ranked) else [],
    }


def _histogram(values: NDArray[np.int64]) -> dict[str, int]:
    numbers, counts = np.unique(values, return_counts=True)
    return {str(number): int(count) for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)}


def _sizes(looks: NDArray[np.void]) -> dict[str, int]:
    pairs = collections.Counter(zip(looks["width"].tolist(), looks["height"].tolist(), strict=True))
    return {f"{width} x {height}": count for (width, height), count in pairs.most_common(LONG_TAIL)}
