"""Random words: uniform 64-bit numbers, each fixed by the seed, its use, the epoch, the example and the picture.

Every random decision of the input reads one word, drawn by the counter-based generator Philox. So any host, worker or
thread finds the same word, and the order of drawing does not matter. NumPy keeps `Philox.random_raw` the same in all
versions, but not `Generator.permutation` and the like.
"""

import numpy as np
from numpy.typing import NDArray

RandomWords = NDArray[np.uint64]
# Uses of the seed. Each is the second half of a Philox key, so that no two uses share a word.
AUGMENT_STREAM, ORDER_STREAM, SPREAD_STREAM, GALLERY_STREAM = (
    int.from_bytes(use) for use in (b"augment", b"order", b"spread", b"gallery")
)


def random_words(seed: int, stream: int, count: int, *, epoch: int, example: int = 0, picture: int = 0) -> RandomWords:
    """Returns `count` random words, uint64 [count], each uniform over 0 to 2**64 - 1.

    Equal arguments give equal words, and a larger count appends to them. Raises OverflowError outside 0 to 2**64 - 1.
    """
    key, counter = np.array((seed, stream), np.uint64), np.array((0, picture, example, epoch), np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def below(word: np.uint64, bound: int) -> int:
    """Returns an integer of 0 to bound - 1, each equally likely (to 1 part in 2**64 / bound)."""
    return int(word) * bound >> 64


def uniform(word: np.uint64, low: float, high: float) -> float:
    """Returns low + (high - low) * u, where u is the word's upper 53 bits divided by 2**53: 0 <= u < 1."""
    return low + (high - low) * ((int(word) >> 11) * 2.0**-53)
