"""Pairs of nearly equal rows among many, in a time that grows about linearly with their number.

Rows are split by one column after another, with an overlap of the tolerance, so that no pair is lost. A split may
separate a few rows from all others: frames of a fixed camera differ in a few columns only, and each in other ones.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

LEAF = 48  # rows of which all pairs are compared
SAMPLE, COLUMNS = 256, 16  # a split is chosen among so many columns, those that vary most in so many rows
MAX_OVERLAP = 0.125  # share of the rows that a split may put on both sides
MIN_GAIN = 8  # pairs a row that a split must spare
ORDERS, WINDOW = 3, 16  # more than LEAF rows that no split separates are sorted in so many ways, and compared so far
BLOCK = 1 << 24  # bytes of rows compared at once

Rows = NDArray[np.int64]
Same = Callable[[Rows, Rows], NDArray[np.bool_]]  # of pairs of rows [n]: which are alike


def near_pairs(
    values: NDArray[np.uint8], tolerance: int, sides: NDArray[np.bool_] | None = None, same: Same | None = None
) -> Iterator[tuple[Rows, Rows]]:
    """Yields (ones, twos), int64 [n]: pairs of rows of `values` [m, d] that differ by <= tolerance in each column.

    Pairs may repeat. sides: only rows that have rows of the other side around them are looked at. same: what else near
    rows must be. Of more than LEAF rows that no split separates, only neighbours in ORDERS sorted orders are compared.
    They still link a group of many that are alike.
    """
    waiting = [np.arange(len(values))]
    while waiting:
        rows = waiting.pop()
        if len(rows) < 2 or (sides is not None and len(np.unique(sides[rows])) < 2):
            continue
        parts = _split(values, rows, tolerance) if len(rows) > LEAF else None
        if parts:
            waiting += parts
            continue
        for ones, twos in _all_pairs(rows) if len(rows) <= LEAF else _neighbours(values, rows):
            for begin in range(0, len(ones), max(1, BLOCK // values.shape[1])):
                one, two = (each[begin : begin + max(1, BLOCK // values.shape[1])] for each in (ones, twos))
                apart = np.maximum(values[one], values[two]) - np.minimum(values[one], values[two])
                near = apart.max(axis=1, initial=0) <= tolerance
                one, two = one[near], two[near]
                if same is not None and len(one):
                    alike = same(one, two)
                    one, two = one[alike], two[alike]
                yield one, two


def _split(values: NDArray[np.uint8], rows: Rows, tolerance: int) -> tuple[Rows, Rows] | None:
    """Returns the rows in two overlapping parts, such that each near pair is in one of them; None if it spares little.

    The cut is the one, of the COLUMNS that vary most, that leaves the fewest pairs to compare.
    """
    number = len(rows)
    sample = values[rows[np.linspace(0, number - 1, min(number, SAMPLE)).astype(np.int64)]]
    best, chosen = float(number) ** 2 - MIN_GAIN * number, None
    for column in np.argsort(-sample.var(axis=0), kind="stable")[:COLUMNS].tolist():
        below = np.cumsum(np.bincount(values[rows, column], minlength=256)).astype(float)  # rows up to each value
        left = below[np.minimum(np.arange(256) + tolerance, 255)]
        right = number - below
        pairs = np.where(left + right <= (1 + MAX_OVERLAP) * number, left**2 + right**2, np.inf)
        cut = int(np.argmin(pairs))
        if pairs[cut] < best:
            best, chosen = pairs[cut], (column, cut)
    if chosen is None:
        return None
    column, cut = chosen
    of_column = values[rows, column]
    return rows[of_column <= min(cut + tolerance, 255)], rows[of_column > cut]


def _all_pairs(rows: Rows) -> Iterator[tuple[Rows, Rows]]:
    ones, twos = np.triu_indices(len(rows), 1)
    yield rows[ones], rows[twos]


def _neighbours(values: NDArray[np.uint8], rows: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Yields pairs of rows at most WINDOW apart when sorted by one of ORDERS sums of their columns, of random signs.

    Columns count by how much they vary.
    """
    sample = values[rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(np.int64)]]
    signs = np.random.default_rng(0).choice(np.array((-1, 1), np.float32), (values.shape[1], ORDERS))
    directions = signs * sample.std(axis=0, dtype=np.float32)[:, None]
    step = max(1, BLOCK // values.shape[1])
    places = np.concatenate([values[rows[at : at + step]] @ directions for at in range(0, len(rows), step)])
    for order in np.argsort(places, axis=0, kind="stable").T:
        for shift in range(1, min(WINDOW, len(rows) - 1) + 1):
            yield rows[order[:-shift]], rows[order[shift:]]


class Groups:
    """Groups of numbers, joined pair by pair."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def join(self, one: int, two: int) -> None:
        first, second = sorted((self._first(one), self._first(two)))
        self._parents[second] = first

    def join_all(self, ones: Rows, twos: Rows) -> None:
        for one, two in zip(ones.tolist(), twos.tolist(), strict=True):
            self.join(one, two)

    def join_known(self, ones: Rows, twos: Rows) -> None:
        """Joins the pairs whose first number is in a group already."""
        known = np.array([one in self._parents for one in ones.tolist()], bool)
        self.join_all(ones[known], twos[known])

    def _first(self, number: int) -> int:
        parents = self._parents
        parents.setdefault(number, number)
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    def sorted(self) -> list[list[int]]:
        """Returns the groups, each ascending, in the order of their first numbers."""
        groups: dict[int, list[int]] = {}
        for number in sorted(self._parents):
            groups.setdefault(self._first(number), []).append(number)
        return list(groups.values())
