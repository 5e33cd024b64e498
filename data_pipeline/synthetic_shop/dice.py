"""Random numbers by name: what a product, a room or a frame draws depends on the seed and its own name alone."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data_pipeline.input.augment import below, uniform

T = TypeVar("T")


class Dice:
    """The words of one thing, one after the other, from Philox, whose raw words no NumPy version may change.

    seed: 0 to 2**64 - 1. name: what the thing is, at most eight letters. index: which of its kind, up to three numbers.
    """

    def __init__(self, seed: int, name: str, *index: int) -> None:
        counter = (0, *index, *(3 - len(index)) * (0,))
        key = (seed, int.from_bytes(name.encode()))
        self._words = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))

    def word(self) -> np.uint64:
        return np.uint64(self._words.random_raw())

    def below(self, bound: int) -> int:
        return below(self.word(), bound)

    def uniform(self, low: float, high: float) -> float:
        return uniform(self.word(), low, high)

    def happens(self, chance: float) -> bool:
        return self.uniform(0.0, 1.0) < chance

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        order = np.argsort(np.array([self.word() for _ in options], np.uint64), kind="stable")
        return [options[place] for place in order]

    def uuid(self) -> str:
        """32 hexadecimal digits in five groups, as the ids of livestreams and shop images have them (SPEC 8.5)."""
        digits = f"{int(self.word()):016x}{int(self.word()):016x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
