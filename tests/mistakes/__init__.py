"""Mistakes that `make mutations` makes, each in a copy of the code."""

from typing import NamedTuple


class Mistake(NamedTuple):
    name: str  # of the model's as in golden/sensitivity.txt
    tests: tuple[str, ...]
    changes: tuple[tuple[str, str, str], ...]  # (file, text that stands in it once, what takes its place)


def mistake(name: str, tests: tuple[str, ...], *changes: tuple[str, str, str]) -> Mistake:
    return Mistake(name, tests, changes)
