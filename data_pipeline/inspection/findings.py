"""The results as JSON: faults by kind with their severity, and distributions."""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import Fault
from data_pipeline.inspection.fingerprints import Fingerprints
from data_pipeline.inspection.summary import UNLISTED, InspectedData, SplitSummary
from data_pipeline.layouts.listing import NONE

# Kinds that a conversion accepts and that make neither training nor its figures wrong. Every other kind is an error.
WARNINGS = (
    "control characters", "file of no manifest", "frame listed twice", "frame of another shape",
    "frame of two products",
    "ids alike", "image twice in a gallery", "several pictures in a file", "shop image under two ids",
    "truth without query", "turned by EXIF", "two shop images under one id", "unusual colours", "wrong suffix",
)  # fmt: skip
MAX_LISTED = 10_000  # faults of a kind in the report; all are counted
MAX_VALUES = 20  # most frequent values that are listed with their counts


@dataclasses.dataclass
class Findings:
    """Faults by kind, in the order in which they were found."""

    accepted: Collection[str] = ()  # kinds that the user wants as warnings
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    errors: set[str] = dataclasses.field(default_factory=set)  # kinds with at least one error
    faults: list[Fault] = dataclasses.field(default_factory=list)

    def add(self, faults: Iterable[Fault]) -> None:
        """Adds faults that are not listed yet: splits share shop images. Counts all, keeps MAX_LISTED of a kind."""
        known = set(self.faults)
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
        """Returns "warning" for a kind of WARNINGS or `accepted`, or a picture that no list names; else "error"."""
        harmless = fault.reason in WARNINGS or fault.reason in self.accepted or fault.subject == UNLISTED
        return "warning" if harmless else "error"

    def as_json(self) -> dict[str, Any]:
        """Returns "safe" (no error), "counts" {kind: {"severity", "count"}} and "faults", a list of dicts.

        Kinds with errors first, then by count. A fault has kind, severity, file, line or None, subject or None, detail.
        """
        worst = {kind: "error" if kind in self.errors else "warning" for kind in self.counts}
        order = sorted(self.counts, key=lambda kind: (worst[kind], -self.counts[kind], kind))
        return {
            "safe": not self.errors,
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


def distributions(data: InspectedData) -> dict[str, Any]:
    """Returns by split, for JSON, counts of clips, frames, images, galleries and sizes, and "clips_by" each column."""
    return {summary.split: _split_distributions(summary, data.tables) for summary in data.summaries}


def _split_distributions(summary: SplitSummary, tables: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    frames, images = summary.frame_fingerprints, summary.image_fingerprints
    sound, sound_images = frames[frames["key"] > 0], images[images["key"] > 0]
    sizes = [len(rows) for rows in summary.galleries.values()]
    spread = {name: _spread(column, tables.get(name, ())) for name, column in summary.columns.items()}
    products = np.append(summary.image_products, np.int32(NONE))[summary.clip_images]
    spread["product"] = _spread(products, tables.get("product", ()))
    return {
        "clips": len(summary.clip_ids),
        "frames": sum(summary.frame_counts),
        "sound_frames": len(sound),
        "shop_images": len(summary.image_ids),
        "sound_shop_images": len(sound_images),
        "galleries": {"count": len(sizes), "smallest": min(sizes, default=0), "largest": max(sizes, default=0)},
        "frames_a_clip": {str(n): clips for n, clips in sorted(collections.Counter(summary.frame_counts).items())},
        "clips_by": {name: values for name, values in spread.items() if values["values"]},
        "frame_sizes": _sizes(sound),
        "shop_image_sizes": _sizes(sound_images),
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


def _sizes(pictures: Fingerprints) -> dict[str, int]:
    pairs = collections.Counter(zip(pictures["width"].tolist(), pictures["height"].tolist(), strict=True))
    return {f"{width} x {height}": count for (width, height), count in pairs.most_common(MAX_VALUES)}
