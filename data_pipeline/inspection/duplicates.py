"""Pairs of pictures that show the same: byte for byte, encoded anew, or mirrored.

Packages of one brand differ in little: a hash of brightness alone takes cherry yoghurt for vanilla. So the hash and the
thumbnail only propose pairs, and 16 x 16 colours decide. Measured on the 81 shop images of a grocery: encoded anew at
quality 30 to 95 and 96 to 224 pixels, a picture differs by at most 3.1 levels from itself, and by at least 5.2 from any
other (10.5 from the mirror image of another).
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.input.decode import decode
from data_pipeline.inspection.fingerprints import Fingerprints, is_comparable

HASH_BITS = 12  # of 64 that may differ; encoding anew changes 10
THUMB_LEVELS = 10  # of 255, in any of the 4 x 4 x 3; encoding anew changes 5
SAME_LEVELS = 4.0  # of 255, mean over 16 x 16 x 3
ALL_PAIRS = 1_000_000_000  # up to so many pairs all are compared; beyond, those that share a quarter of the hash
BLOCK = 1 << 22  # pairs compared at once
MAX_BUCKET = 2_000  # pictures that share a quarter of the hash: more share a white ground, not a picture

Hashes = NDArray[np.uint64]
Pair = tuple[int, int]


def same_bytes(pictures: Fingerprints, others: Fingerprints | None = None) -> Iterator[Pair]:
    """Yields (row of pictures, row of others) for pictures with the same bytes, the latter ascending.

    Each row of others is paired with the first equal row of pictures. If others is None, each row of pictures is paired
    with the first equal row before it: both are rows of pictures. Pictures that are not comparable are left out.
    """
    rows = np.flatnonzero(is_comparable(pictures))
    other_rows = rows if others is None else np.flatnonzero(is_comparable(others))
    wanted = (pictures if others is None else others)["digest"][other_rows]
    digests, first = np.unique(pictures["digest"][rows], return_index=True)
    if not len(digests):
        return
    at = np.minimum(np.searchsorted(digests, wanted), len(digests) - 1)
    for match in np.flatnonzero(digests[at] == wanted).tolist():
        one, other = int(rows[first[at[match]]]), int(other_rows[match])
        if others is not None or one != other:
            yield one, other


def same_picture(
    pictures: Fingerprints,
    others: Fingerprints | None,
    read: Callable[[int], bytes],
    read_other: Callable[[int], bytes],
) -> Iterator[Pair]:
    """Yields (row of pictures, row of others) for near-duplicates: different bytes, same picture, possibly mirrored.

    Each pair comes once. If others is None, both are rows of pictures, the smaller first. Pictures that are not
    comparable are left out. read and read_other return the encoded bytes of a row; what they raise passes. Raises
    ValueError if bytes cannot be decoded.
    """
    colours: dict[tuple[bool, int], NDArray[np.float32]] = {}

    def colours_of(other: bool, row: int) -> NDArray[np.float32]:
        if (other, row) not in colours:
            pixels = decode((read_other if other else read)(row))
            small = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX)
            colours[other, row] = np.asarray(small, np.float32)
        return colours[other, row]

    found: set[Pair] = set()  # a picture that is its own mirror image is proposed twice
    for side in (1, -1):
        for one, other in _proposed(pictures, pictures if others is None else others, side, within=others is None):
            difference = colours_of(False, one) - colours_of(others is not None, other)[:, ::side]
            if np.abs(difference).mean() <= SAME_LEVELS and (one, other) not in found:
                found.add((one, other))
                yield one, other


def _proposed(pictures: Fingerprints, others: Fingerprints, side: int, *, within: bool) -> Iterator[Pair]:
    """Yields (row, row) alike in hash and thumbnail, not in bytes. side -1 mirrors `others`; within: smaller first."""
    comparable, other_comparable = is_comparable(pictures), is_comparable(others)
    search = _all_pairs if len(pictures) * len(others) <= ALL_PAIRS else _pairs_by_quarters
    for ones, twos in search(pictures["hash"], others["hash" if side == 1 else "mirror"]):
        chosen = ones < twos if within else np.ones(len(ones), bool)
        chosen &= comparable[ones] & other_comparable[twos]
        chosen &= pictures["digest"][ones] != others["digest"][twos]
        ones, twos = ones[chosen], twos[chosen]
        difference = np.abs(pictures["thumb"][ones].astype(np.int16) - others["thumb"][twos][:, :, ::side])
        near = difference.reshape(len(ones), 48).max(axis=1, initial=0) <= THUMB_LEVELS
        yield from zip(ones[near].tolist(), twos[near].tolist(), strict=True)


def _all_pairs(hashes: Hashes, others: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    step = max(1, BLOCK // max(1, len(others)))
    for begin in range(0, len(hashes), step):
        differing = np.bitwise_count(hashes[begin : begin + step, None] ^ others[None])
        ones, twos = np.nonzero(differing <= HASH_BITS)
        yield ones + begin, twos


def _pairs_by_quarters(hashes: Hashes, others: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for quarter in range(4):
        parts = [((each >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)) for each in (hashes, others)]
        orders = [np.argsort(part, kind="stable") for part in parts]
        bounds = [np.searchsorted(part[order], np.arange(2**16 + 1)) for part, order in zip(parts, orders, strict=True)]
        for value in range(2**16):
            ones, twos = (order[bound[value] : bound[value + 1]] for order, bound in zip(orders, bounds, strict=True))
            if len(ones) and len(twos) and max(len(ones), len(twos)) <= MAX_BUCKET:
                differing = np.bitwise_count(hashes[ones][:, None] ^ others[twos][None])
                rows, columns = np.nonzero(differing <= HASH_BITS)
                yield ones[rows], twos[columns]
