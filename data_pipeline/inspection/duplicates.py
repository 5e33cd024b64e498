"""Pictures that show the same: byte for byte, encoded anew, or mirrored.

Packages of one brand differ in little: a hash of brightness alone takes cherry yoghurt for vanilla. So the hash and a
thumbnail only propose, and 16 x 16 colours decide. Measured on the 81 shop images of a grocery: encoded anew at quality
30 to 95 and 96 to 224 pixels a picture is at most 3.1 levels from itself, and 5.2 from the most alike of the others
(10.5 from the mirror image of another).
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.input.decode import decode
from data_pipeline.inspection.fingerprints import shows_something

HASH_BITS = 12  # of 64 that may differ; encoding anew changes 10
THUMB_LEVELS = 10  # of 255, in any of the 4 x 4 x 3; encoding anew changes 5
SAME_LEVELS = 4.0  # of 255, mean over 16 x 16 x 3
ALL_PAIRS = 1_000_000_000  # up to so many pairs every one is compared; beyond, those that share a quarter of the hash
BLOCK = 1 << 22  # pairs at once
MAX_BUCKET = 2_000  # pictures that share a quarter of the hash: more are a white ground, not a picture

Fingerprints = NDArray[np.void]
Hashes = NDArray[np.uint64]
Pair = tuple[int, int]


def same_bytes(looks: Fingerprints, others: Fingerprints | None = None) -> Iterator[Pair]:
    """(row, row of others) of pictures with the same bytes: each of `others` with the first of `looks` like it.

    others None: each of `looks` with the first before it.
    """
    rows = np.flatnonzero(shows_something(looks))
    other_rows = rows if others is None else np.flatnonzero(shows_something(others))
    seconds = (looks if others is None else others)["digest"][other_rows]
    digests, first = np.unique(looks["digest"][rows], return_index=True)
    if not len(digests):
        return
    at = np.minimum(np.searchsorted(digests, seconds), len(digests) - 1)
    for place in np.flatnonzero(digests[at] == seconds).tolist():
        one, other = int(rows[first[at[place]]]), int(other_rows[place])
        if others is not None or one != other:
            yield one, other


def same_picture(
    looks: Fingerprints, others: Fingerprints | None, view: Callable[[int], bytes], view_other: Callable[[int], bytes]
) -> Iterator[Pair]:
    """(row, row of others) of pictures with other bytes that show the same, or one the mirror image of the other.

    others None: rows of `looks` both.

    view: the bytes of a picture by its row.
    """
    seen: dict[tuple[bool, int], NDArray[np.float32]] = {}

    def colours(other: bool, row: int) -> NDArray[np.float32]:
        if (other, row) not in seen:
            pixels = decode((view_other if other else view)(row))
            small = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX)
            seen[other, row] = np.asarray(small, np.float32)
        return seen[other, row]

    told: set[Pair] = set()  # what is its own mirror image is proposed twice
    for side in (1, -1):
        for one, other in _alike(looks, looks if others is None else others, side, within=others is None):
            apart = colours(False, one) - colours(others is not None, other)[:, ::side]
            if np.abs(apart).mean() <= SAME_LEVELS and (one, other) not in told:
                told.add((one, other))
                yield one, other


def _alike(looks: Fingerprints, others: Fingerprints, side: int, *, within: bool) -> Iterator[Pair]:
    """Pairs that the hash and the thumbnail propose; side -1: with the mirror images of `others`."""
    seen, other_seen = shows_something(looks), shows_something(others)
    whole = len(looks) * len(others) <= ALL_PAIRS
    search = _all_pairs if whole else _pairs_by_quarters
    for ones, twos in search(looks["hash"], others["hash" if side == 1 else "mirror"]):
        chosen = ones < twos if within else np.ones(len(ones), bool)
        chosen &= seen[ones] & other_seen[twos]
        chosen &= looks["digest"][ones] != others["digest"][twos]
        ones, twos = ones[chosen], twos[chosen]
        apart = np.abs(looks["thumb"][ones].astype(np.int16) - others["thumb"][twos][:, :, ::side]).reshape(
            len(ones), 48
        )
        near = apart.max(axis=1, initial=0) <= THUMB_LEVELS
        yield from zip(ones[near].tolist(), twos[near].tolist(), strict=True)


def _all_pairs(hashes: Hashes, others: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    step = max(1, BLOCK // max(1, len(others)))
    for begin in range(0, len(hashes), step):
        differ = np.bitwise_count(hashes[begin : begin + step, None] ^ others[None])
        ones, twos = np.nonzero(differ <= HASH_BITS)
        yield ones + begin, twos


def _pairs_by_quarters(hashes: Hashes, others: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for quarter in range(4):
        parts = [((each >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)) for each in (hashes, others)]
        orders = [np.argsort(part, kind="stable") for part in parts]
        bounds = [np.searchsorted(part[order], np.arange(2**16 + 1)) for part, order in zip(parts, orders, strict=True)]
        for value in range(2**16):
            ones, twos = (order[bound[value] : bound[value + 1]] for order, bound in zip(orders, bounds, strict=True))
            if len(ones) and len(twos) and max(len(ones), len(twos)) <= MAX_BUCKET:
                differ = np.bitwise_count(hashes[ones][:, None] ^ others[twos][None])
                rows, columns = np.nonzero(differ <= HASH_BITS)
                yield ones[rows], twos[columns]
