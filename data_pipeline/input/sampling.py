"""Which frames of a clip fill its slots."""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.input.augment import Words, below
from data_pipeline.input.options import FrameOptions


def sample_frames(count: int, slots: int) -> NDArray[np.int64]:
    """Positions of the frames that represent a clip of `count`: all, or `slots` evenly spaced, both ends (SPEC 9.1)."""
    if count < 1:
        raise ValueError(f"found {count} frames, needs at least 1; leave clips without frames out.")
    if count <= slots:
        return np.arange(count)
    return np.arange(slots) * (count - 1) // max(1, slots - 1)


def random_subset(count: int, slots: int, subset_words: Words) -> NDArray[np.int64]:
    """`slots` of `count` positions, in order, every subset equally likely (Floyd's algorithm: a word a slot)."""
    chosen: set[int] = set()
    for word, last in zip(subset_words, range(count - slots, count), strict=True):
        candidate = below(word, last + 1)
        chosen.add(last if candidate in chosen else candidate)
    return np.array(sorted(chosen), np.int64)


def frames_kept(count: int, slots: int, gate: int, fraction: int) -> int:
    """How many of `count` sampled frames the tail cut leaves; gate and fraction are tenths, 0 to 9 (SPEC 9.2).

    Only a clip that fills all slots is cut, and only from gate 5 up; at least one frame stays.
    """
    if count != slots or gate < 5:
        return count
    return slots - slots * fraction // 10


def choose_frames(count: int, options: FrameOptions, clip_words: Words, *, train: bool) -> NDArray[np.int64]:
    """Positions of the frames to show of a clip of `count`, in order, 1 to num_frames of them.

    clip_words: 2 + num_frames words of the clip (gate, fraction, subset).
    """
    slots = options.num_frames
    if train and options.frame_sampling == "random" and count > slots:
        indices = random_subset(count, slots, clip_words[2:])
    else:
        indices = sample_frames(count, slots)
    if options.tail_cut if train else options.test_tail_cut:
        gate, fraction = (below(word, 10) for word in clip_words[:2])
        indices = indices[: frames_kept(len(indices), slots, gate, fraction)]
    return indices
