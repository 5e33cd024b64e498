"""Random numbers by name: the draws of a product, a room or a clip depend on the seed and its own name alone."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data_pipeline.input.random_words import below, uniform

T = TypeVar("T")


class Dice:
    """The random draws of one thing, one after the other.

    seed: 0 to 2**64 - 1. name: the thing's kind, at most eight letters. index: up to three numbers that tell it from
    others of its kind. Philox's raw words are the same in every NumPy version.
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
        """Returns a list of the options in random order, every order equally likely."""
        order = np.argsort(np.array([self.word() for _ in options], np.uint64), kind="stable")
        return [options[place] for place in order]

    def uuid(self) -> str:
        """Returns 32 hexadecimal digits in five groups, like an id of LPR4M (docs/official.md 8.5)."""
        digits = f"{int(self.word()):016x}{int(self.word()):016x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
