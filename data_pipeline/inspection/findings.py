"""Findings: the faults of one cause together, by kind with their severity."""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Collection, Hashable, Iterable
from pathlib import Path
from typing import Any

from data_pipeline.faults import Fault
from data_pipeline.layouts.text_layout import NO_IMAGE

# Kinds that a conversion accepts and that make neither training nor its figures wrong. Every other kind is an error.
WARNINGS = (
    "control characters", "file of no manifest", "frame listed twice", "frame of another shape",
    "frame of two products",
    "ids alike", "image twice in a gallery", "several pictures in a file", "shop image under two ids",
    "truth without query", "turned by EXIF", "two shop images under one id", "unusual colours", "wrong suffix",
)  # fmt: skip
UNLISTED = "named by no list"  # the subject of faults of pictures that training does not use
MISSING = ("missing frame", NO_IMAGE)
OF_SEVERAL_FILES = (  # kinds whose detail names the cause, whichever clips or records it is found in
    "livestream without gallery", "product without shop image", "several shop images", "bad gallery",
)  # fmt: skip
OF_A_LIST = (  # kinds that a list has in many lines if it was written in another way
    "bad box", "bad gallery row", "bad id", "box inside out", "box outside the frame", "control characters",
    "duplicate clip id", "frame listed twice", "frame of another shape", "frames and boxes differ", "not UTF-8",
    "not a list", "path leaves the source", "wrong number of columns",
)  # fmt: skip
OF_A_FOLDER = ("table and sidecar differ", "unreadable sidecar")  # kinds with a cause for each shard of a download
LISTS = (".txt", ".json", ".csv")
CITED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[.*\]|\S*\d\S*""")  # cells and numbers in a detail
SHOWN_PLACES = 5
MAX_LISTED = 10_000  # faults of a kind in the report; all are counted


@dataclasses.dataclass(slots=True)
class Finding:
    """All that one cause makes wrong."""

    first: Fault
    cases: int = 1
    others: list[str] = dataclasses.field(default_factory=list)  # places of the next SHOWN_PLACES cases

    def detail(self) -> str:
        if self.cases == 1:
            return self.first.detail
        shown = "; ".join(self.others)
        rest = f" and {left:,} more" if (left := self.cases - 1 - len(self.others)) else ""
        return f"{self.first.detail} The same cause in {self.cases - 1:,} more: {shown}{rest}."


class Findings:
    """Findings by kind, in the order in which they were found. Faults of one cause are one finding.

    accepted: kinds that the user wants as warnings. root: the folder that the faults' files are relative to.
    """

    def __init__(self, accepted: Collection[str] = (), root: Path | None = None) -> None:
        self.accepted, self.root = accepted, root
        self.counts: collections.Counter[str] = collections.Counter()  # of findings, by kind
        self.cases: collections.Counter[str] = collections.Counter()  # of faults, by kind
        self.errors: set[str] = set()  # kinds with at least one error
        self.findings: dict[Hashable, Finding] = {}  # by cause, at most MAX_LISTED of a kind
        self._seen: set[int] = set()  # hashes of faults and causes

    def add(self, faults: Iterable[Fault]) -> None:
        """Adds faults that were not added before: splits share shop images. Counts all, keeps MAX_LISTED of a kind."""
        for fault in faults:
            if self._is_new(fault):
                self._add(fault)

    def _add(self, fault: Fault) -> None:
        self.cases[fault.reason] += 1
        if self.severity(fault) == "error":
            self.errors.add(fault.reason)
        cause, fault = cause_of(fault, self.root)
        if (finding := self.findings.get(cause)) is not None:
            finding.cases += 1
            if len(finding.others) < SHOWN_PLACES:
                finding.others.append(_place(fault, finding.first))
        elif self._is_new(cause):
            self.counts[fault.reason] += 1
            if self.counts[fault.reason] <= MAX_LISTED:
                self.findings[cause] = Finding(fault)

    def _is_new(self, item: Hashable) -> bool:
        before = len(self._seen)
        self._seen.add(hash(item))
        return len(self._seen) > before

    def severity(self, fault: Fault) -> str:
        """Returns "warning" for a kind of WARNINGS or `accepted`, or a picture that no list names; else "error"."""
        harmless = fault.reason in WARNINGS or fault.reason in self.accepted or fault.subject == UNLISTED
        return "warning" if harmless else "error"

    def as_json(self) -> dict[str, Any]:
        """Returns "safe" (no error), "counts" {kind: {"severity", "count", "cases"}} and "faults", a list of dicts.

        Kinds with errors first, then by count. A fault has kind, severity, file, line or None, subject or None, detail
        and cases: of how many clips, lines or pictures it is the cause.
        """
        worst = {kind: "error" if kind in self.errors else "warning" for kind in self.counts}
        order = sorted(self.counts, key=lambda kind: (worst[kind], -self.counts[kind], kind))
        places = {kind: place for place, kind in enumerate(order)}
        found = sorted(self.findings.values(), key=lambda each: (places[each.first.reason], self.severity(each.first)))
        return {
            "safe": not self.errors,
            "counts": {
                kind: {"severity": worst[kind], "count": self.counts[kind], "cases": self.cases[kind]} for kind in order
            },
            "faults": [
                {
                    "kind": finding.first.reason,
                    "severity": self.severity(finding.first),
                    "file": finding.first.file,
                    "line": finding.first.line or None,
                    "subject": finding.first.subject or None,
                    "detail": finding.detail(),
                    "cases": finding.cases,
                }
                for finding in found
            ],
        }


def cause_of(fault: Fault, root: Path | None) -> tuple[Hashable, Fault]:
    """Returns what faults of one cause have in common, and the fault, which is moved to a folder that is missing.

    Faults of one list have a common cause if they differ in their line and subject only, those of OF_A_LIST also if in
    the numbers and cells that their details cite. Missing pictures have it if a folder or a download lacks them all.
    root: as in Findings.
    """
    if fault.reason in MISSING and root and "/" in fault.file and (folder := _missing_folder(root, fault.file)):
        detail = "found no such folder, needs it for pictures that the lists name; unpack the archive that holds it."
        return (fault.reason, folder), dataclasses.replace(fault, file=folder, line=0, detail=detail)
    if fault.reason in OF_SEVERAL_FILES:
        return (fault.reason, fault.detail), fault
    cited = CITED.sub("#", fault.detail)
    if fault.reason in MISSING and ("/" not in fault.file or fault.file.endswith(LISTS)):  # a download lacks it
        return (fault.reason, cited), fault
    if fault.reason in OF_A_FOLDER:
        return (fault.reason, os.path.dirname(fault.file), cited), fault
    if fault.line or fault.file.endswith(LISTS):
        return (fault.reason, fault.file, cited if fault.reason in OF_A_LIST else fault.detail), fault
    return (fault,), fault


@functools.lru_cache(maxsize=1 << 16)
def _is_folder(path: str) -> bool:
    return os.path.isdir(path)


def _missing_folder(root: Path, file: str) -> str | None:
    """Returns the outermost folder above `file` that is not there, relative to root; None if its folder is there."""
    missing = None
    while (file := os.path.dirname(file)) and not _is_folder(os.path.join(root, file)):
        missing = file
    return missing


def _place(fault: Fault, first: Fault) -> str:
    """Returns where a fault is, as far as this differs from the first of its cause."""
    file = fault.file if fault.file != first.file else ""
    line = f"line {fault.line}" if fault.line else ""
    subject = f"({fault.subject})" if line and fault.subject else fault.subject
    return " ".join(filter(None, (file, line, subject))) or fault.detail
