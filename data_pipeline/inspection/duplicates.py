"""Groups of pictures that show the same: byte for byte, encoded anew, resized, or mirrored.

Packages of one brand differ in little, and so do the frames of a camera that stands still: a product that covers a
hundredth of the picture changes its mean colour by less than a new encoding does. So colours are compared place by
place. The thumbnails of the fingerprints propose groups, and FINE x FINE places of the decoded pictures decide. Each
picture that has a candidate is decoded once more for each split it is compared with, however many look like it.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.input.decode import decode
from data_pipeline.inspection.fingerprints import THUMB, Fingerprints, is_comparable
from data_pipeline.inspection.neighbours import Groups, Rows, near_pairs
from data_pipeline.inspection.store import CHUNK, GrowingArray, chunks

THUMB_LEVELS = 13  # of 255, in any colour of the thumbnails; encoding anew changes 12
FINE = 24  # columns and rows of places that decide
FINE_LEVELS = 48  # of 255, in any place; encoding anew changes 30
NOISE, NOISE_SHARE = 6.0, 0.15  # levels that a place may change, and share of its contrast
# Changes as multiples of these. `Most`: what nine tenths of the places with CONTRAST change at most.
CONTRAST, MIN_PLACES = 12, 50  # levels; with fewer places of contrast all places count
MOST = 0.8  # a new encoding has at most MOST_MEASURED
MOST_FLOOR, OUTLIER = 0.1, 4.5  # the place that changes most changes by 4.0 x (MOST_FLOOR + most) in a new encoding
PAIRS = 1 << 12  # compared at once
DECODED = 1 << 16  # candidates of one group decoded at once, 250 MB

Read = Callable[[int], bytes]


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Pictures that show the same."""

    rows: list[int]  # of `pictures`, ascending
    other_rows: list[int]  # of `others`, ascending; [] without any
    same_bytes: bool  # whether all are equal byte for byte


def duplicates(
    pictures: Fingerprints, others: Fingerprints | None, read: Read, read_other: Read | None = None
) -> Iterator[Duplicates]:
    """Yields the groups of pictures that show the same, in the order of their first rows.

    If others is given, a group has rows of both. Pictures that are not comparable are left out. read and read_other
    return the encoded bytes of a row; what they raise passes. Raises ValueError if bytes cannot be decoded.
    """
    count, groups = len(pictures), Groups()
    theirs = _distinct(others, count) if others is not None else None
    encoded = lambda number: read(number) if number < count or read_other is None else read_other(number - count)
    fine_of = functools.lru_cache(DECODED)(lambda number: _fine(encoded(number)))  # mirrored ones are wanted again
    step = CHUNK if theirs else max(1, count)
    for begin in range(0, count, step):
        ours = _distinct(pictures[begin : begin + step], begin)
        if theirs:
            _, one, two = np.intersect1d(ours.digests, theirs.digests, return_indices=True)
            groups.join_all(ours.numbers[one], theirs.numbers[two])
        else:
            groups.join_all(*ours.equal)
        for values, numbers, sides in _comparisons(ours, theirs):
            for ones, twos in _near(values, numbers, sides, fine_of):
                groups.join_all(ones, twos)
        groups.join_known(*ours.equal)
    if theirs:
        groups.join_known(*theirs.equal)
    for group in groups.sorted():
        split = bisect.bisect_left(group, count)
        rows, other_rows = group[:split], [number - count for number in group[split:]]
        if len(group) > 1 and (others is None or (rows and other_rows)):
            of_bytes = {int(pictures["digest"][row]) for row in rows}
            of_bytes |= {int(others["digest"][row]) for row in other_rows} if others is not None else set()
            yield Duplicates(rows, other_rows, len(of_bytes) == 1)


@dataclasses.dataclass(frozen=True)
class _Distinct:
    """The comparable pictures of a part, the first of each that are equal byte for byte. Numbers count all pictures."""

    digests: NDArray[np.uint64]  # ascending
    numbers: Rows  # of the first picture of each digest
    thumbs: NDArray[np.uint8]
    equal: tuple[Rows, Rows]  # numbers of first pictures, and of others that equal them


def _distinct(pictures: Fingerprints, begin: int) -> _Distinct:
    rows = np.flatnonzero(is_comparable(pictures))
    digests, first, of_row = np.unique(pictures["digest"][rows], return_index=True, return_inverse=True)
    firsts = rows[first][of_row]
    again = rows != firsts
    return _Distinct(
        digests, begin + rows[first], pictures["thumb"][rows[first]], (begin + firsts[again], begin + rows[again])
    )


def _comparisons(
    ours: _Distinct, theirs: _Distinct | None
) -> Iterator[tuple[NDArray[np.uint8], Rows, NDArray[np.bool_] | None]]:
    """Yields (thumbnails, numbers, sides) of what to compare: as they are, then with the other side's mirrored.

    Mirrored ones have the number -1 - n. sides: which of two sides a picture is on; None: all with all.
    """
    other = theirs or ours
    sides = np.repeat((False, True), (len(ours.numbers), len(other.numbers)))
    if theirs:
        yield np.concatenate([ours.thumbs, other.thumbs]), np.concatenate([ours.numbers, other.numbers]), sides
    else:
        yield ours.thumbs, ours.numbers, None
    yield np.concatenate([ours.thumbs, other.thumbs[:, :, ::-1]]), np.concatenate([ours.numbers, ~other.numbers]), sides


def _near(
    thumbs: NDArray[np.uint8],
    numbers: Rows,
    sides: NDArray[np.bool_] | None,
    fine_of: Callable[[int], NDArray[np.uint8]],
) -> Iterator[tuple[Rows, Rows]]:
    """Yields pairs of numbers of pictures that show the same, enough to link all that do. fine_of: `_fine` by number.

    Raises as fine_of does.
    """
    candidates = Groups()
    for ones, twos in near_pairs(thumbs.reshape(len(thumbs), THUMB * THUMB * 3), THUMB_LEVELS, sides):
        candidates.join_all(ones, twos)
    for group in candidates.sorted():
        for begin in range(0, len(group), DECODED):
            part = np.array(group[begin : begin + DECODED])
            of_part = None if sides is None else sides[part]
            if of_part is not None and of_part.all() == of_part.any():
                continue
            chosen = numbers[part].tolist()
            fine = np.stack([fine_of(number) if number >= 0 else fine_of(~number)[:, ::-1] for number in chosen])
            if sides is not None and (numbers[part] < 0).any():
                # A package that equals its mirror image but for its print would equal others' mirror images, too.
                lopsided = np.flatnonzero(~_is_symmetric(fine))
                fine, part, of_part = fine[lopsided], part[lopsided], sides[part[lopsided]]
            same = functools.partial(_same, fine, _contrasts(fine))
            for ones, twos in near_pairs(fine.reshape(len(part), FINE * FINE * 3), FINE_LEVELS, of_part, same):
                found, others = (numbers[part[each]] for each in (ones, twos))
                yield np.maximum(found, ~found), np.maximum(others, ~others)


def _is_symmetric(fine: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Returns, bool [n], which pictures show the same as their own mirror images."""
    both = np.concatenate([fine, fine[:, :, ::-1]])
    return _same(both, _contrasts(both), np.arange(len(fine)), np.arange(len(fine), len(both)))


def _fine(encoded: bytes) -> NDArray[np.uint8]:
    """Returns a picture's brightness and its halved colours, means of the places, uint8 [FINE, FINE, 3].

    Colours count half, since JPEG keeps less of them. Raises ValueError if the bytes cannot be decoded.
    """
    small = Image.fromarray(decode(encoded)).resize((FINE, FINE), Image.Resampling.BOX)
    fine = np.array(small.convert("YCbCr"))
    fine[:, :, 1:] //= 2
    return fine


def _contrasts(fine: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the range of values around each place, in 3 x 3 places, uint8 [n, FINE, FINE, 3]."""
    around = sliding_window_view(np.pad(fine, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge"), (3, 3), axis=(1, 2))
    return around.max(axis=(4, 5)) - around.min(axis=(4, 5))


def _same(fine: NDArray[np.uint8], contrasts: NDArray[np.uint8], ones: Rows, twos: Rows) -> NDArray[np.bool_]:
    """Returns, bool [n], which pairs show the same.

    A new encoding changes all of a picture: a little, more where it has contrast, and by as much in one place as in
    others of that contrast. Another product changes some places much more than all others.
    """
    same = np.zeros(len(ones), bool)
    for begin in range(0, len(ones), PAIRS):
        one, two = ones[begin : begin + PAIRS], twos[begin : begin + PAIRS]
        apart = np.abs(fine[one].astype(np.float32) - fine[two])
        contrast = np.minimum(contrasts[one], contrasts[two])
        expected = NOISE + NOISE_SHARE * contrast.astype(np.float32)
        changes = (apart / expected).reshape(len(one), -1)
        counts = contrast.reshape(changes.shape) >= CONTRAST
        counts |= counts.sum(axis=1, keepdims=True) <= MIN_PLACES
        number = counts.sum(axis=1)
        ordered = np.sort(np.where(counts, changes, -1), axis=1)  # places that do not count come first
        most = ordered[np.arange(len(one)), changes.shape[1] - number + (0.9 * (number - 1)).astype(np.int64)]
        same[begin : begin + PAIRS] = (most <= MOST) & (changes.max(axis=1) <= OUTLIER * (most + MOST_FLOOR))
    return same


def equal_rows(pictures: Fingerprints, scratch: Path) -> Iterator[list[int]]:
    """Yields the rows, ascending, of each group of comparable pictures with the same bytes.

    scratch: a file for the sorted hashes of all. Raises OSError if it cannot be written.
    """
    digests = GrowingArray(scratch, np.uint64)
    for part in chunks(pictures):
        digests.append(part["digest"][is_comparable(part)])
    every = digests.mapped()
    every.sort()
    repeated = np.unique(every[1:][every[1:] == every[:-1]])
    rows: dict[int, list[int]] = {}
    for number, part in enumerate(chunks(pictures)):
        chosen = np.flatnonzero(is_comparable(part) & np.isin(part["digest"], repeated))
        for row, digest in zip((number * CHUNK + chosen).tolist(), part["digest"][chosen].tolist(), strict=True):
            rows.setdefault(digest, []).append(row)
    yield from rows.values()
