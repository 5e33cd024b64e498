"""The choice of the frames that fill a clip's slots."""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.input.options import FrameOptions
from data_pipeline.input.random_words import RandomWords, below


def sample_frames(count: int, slots: int) -> NDArray[np.int64]:
    """Returns the positions, int64, of the frames that represent a clip of `count`, ascending (docs/official.md 9.1).

    All positions if count <= slots, otherwise `slots` evenly spaced ones with the first and the last (one slot: the
    first). Raises ValueError if count is below 1.
    """
    if count < 1:
        raise ValueError(f"found {count} frames, needs at least 1; leave clips without frames out.")
    if count <= slots:
        return np.arange(count)
    return np.arange(slots) * (count - 1) // max(1, slots - 1)


def random_subset(count: int, slots: int, words: RandomWords) -> NDArray[np.int64]:
    """Returns `slots` of the positions 0 to count - 1, int64, ascending, every subset equally likely (Floyd).

    Raises ValueError unless there is one word per slot.
    """
    chosen: set[int] = set()
    for word, last in zip(words, range(count - slots, count), strict=True):
        candidate = below(word, last + 1)
        chosen.add(last if candidate in chosen else candidate)
    return np.array(sorted(chosen), np.int64)


def frames_kept(count: int, slots: int, gate: int, fraction: int) -> int:
    """Returns how many of `count` sampled frames the tail cut keeps, at least one (docs/official.md 9.2).

    gate and fraction are random tenths, 0 to 9. Only a clip that fills all slots is cut, and only if the gate is 5 or
    more: it loses fraction / 10 of its slots, rounded down.
    """
    if count != slots or gate < 5:
        return count
    return slots - slots * fraction // 10


def choose_frames(count: int, options: FrameOptions, words: RandomWords, *, train: bool) -> NDArray[np.int64]:
    """Returns the positions, int64, of the frames shown of a clip of `count`, ascending, 1 to num_frames of them.

    words: 2 + num_frames random words of the clip, for the tail cut's gate and fraction and for random sampling. Raises
    ValueError if count is below 1, or random sampling gets another number of words.
    """
    slots = options.num_frames
    if train and options.frame_sampling != "uniform" and count > slots:
        positions = random_subset(count, slots, words[2:])
    else:
        positions = sample_frames(count, slots)
    if options.tail_cut if train else options.test_tail_cut:
        gate, fraction = (below(word, 10) for word in words[:2])
        positions = positions[: frames_kept(len(positions), slots, gate, fraction)]
    return positions
