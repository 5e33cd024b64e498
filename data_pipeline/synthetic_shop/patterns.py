"""The patterns by which siblings differ. A pattern is a field: a number at every point, cut at quantiles into colours.

Every pattern gives each colour the same share of a product's surface, so siblings have the same colour histogram.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.synthetic_shop.dice import Dice

Field = NDArray[np.floating]
SHARES = (0.56, 0.30, 0.14)  # of the surface: ground, figure, the figure's core


def levels(field: Field, mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Returns the colour, 0, 1 or 2, of every point, int [height, width]; the highest values have colour 2.

    Each colour has its share, of SHARES, of the points in the mask, as measured at every seventh.
    """
    cuts = np.quantile(field[mask][::7], np.cumsum(SHARES[:-1]))
    return np.searchsorted(cuts, field)


# --- fields: x and y go from -1 to 1 across a square product; the highest values are the figure -----------------------


def _wave(place: Field, period: float) -> Field:
    """Returns 1 at multiples of the period, -1 half-way between them, linear in between."""
    phase = place / period
    return 1 - 4 * np.abs(phase - np.round(phase))


def _turned(x: Field, y: Field, degrees: float) -> tuple[Field, Field]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return x * cos + y * sin, y * cos - x * sin


def _lattice(x: Field, y: Field, period: float) -> tuple[Field, Field]:
    """Returns (x, y) of each point within its cell of a brick lattice, two arrays of -1 to 1."""
    row = np.floor(y / period)
    return _saw(x / period + row / 2), 2 * (y / period - row) - 1


def _saw(phase: Field) -> Field:
    return 2 * (phase - np.floor(phase)) - 1


def _stripes(degrees: float) -> Callable[[Field, Field, Dice], Field]:
    return lambda x, y, dice: _wave(_turned(x, y, degrees)[0] + dice.uniform(0, 1), dice.uniform(0.66, 0.82))


def _checks(x: Field, y: Field, dice: Dice) -> Field:
    period = dice.uniform(1.0, 1.2)
    return _wave(x + 0.2, period) * _wave(y + 0.2, period)


def _plaid(x: Field, y: Field, dice: Dice) -> Field:
    period = dice.uniform(0.95, 1.1)
    across, down = _wave(x, period), _wave(y, period)
    return np.maximum(across, down) + 0.35 * np.minimum(across, down)


def _dots(x: Field, y: Field, dice: Dice) -> Field:
    u, v = _lattice(x, y, dice.uniform(0.75, 0.9))
    return -np.hypot(u, v)


def _diamonds(x: Field, y: Field, dice: Dice) -> Field:
    period = dice.uniform(0.9, 1.1)
    return _wave(x, period) + _wave(y, 1.5 * period)


def _chevrons(x: Field, y: Field, dice: Dice) -> Field:
    return _wave(y + 0.26 * _wave(x, dice.uniform(0.9, 1.1)), dice.uniform(0.74, 0.86))


def _waves(x: Field, y: Field, dice: Dice) -> Field:
    return _wave(y + 0.2 * np.sin(x * math.tau / dice.uniform(1.1, 1.3)), dice.uniform(0.7, 0.8))


def _rings(x: Field, y: Field, dice: Dice) -> Field:
    return _wave(np.hypot(x, y), dice.uniform(0.68, 0.78))


def _rays(x: Field, y: Field, dice: Dice) -> Field:
    return np.sin((5 + 2 * dice.below(2)) * np.arctan2(y, x)) + 0.3 * np.exp(-8 * (x * x + y * y))


def _blobs(x: Field, y: Field, dice: Dice) -> Field:
    total = np.zeros_like(x)
    for _ in range(7):
        u, _ = _turned(x, y, dice.uniform(0, 360))
        total += np.sin(u * dice.uniform(3.5, 7.0) + dice.uniform(0, math.tau))
    return total


def _spots(x: Field, y: Field, dice: Dice) -> Field:
    discs = [
        -np.hypot(x - dice.uniform(-1, 1), y - dice.uniform(-1.3, 1.3)) / dice.uniform(0.25, 0.6) for _ in range(7)
    ]
    return np.max(discs, axis=0)


def _scales(x: Field, y: Field, dice: Dice) -> Field:
    u, v = _lattice(x, y, dice.uniform(0.75, 0.9))
    return np.abs(np.hypot(u, v + 1) - 1.1) * -1 + 0.15 * v


def _triangles(x: Field, y: Field, dice: Dice) -> Field:
    u, v = _lattice(x, y, dice.uniform(0.85, 1.0))
    return np.minimum(v + 0.2, 0.8 - 2 * np.abs(u) - v)


def _crosses(x: Field, y: Field, dice: Dice) -> Field:
    u, v = np.abs(_lattice(x, y, dice.uniform(0.95, 1.1)))
    return np.maximum(np.minimum(0.28 - u, 0.8 - v), np.minimum(0.28 - v, 0.8 - u))


def _printed(x: Field, y: Field, dice: Dice) -> Field:
    field = np.full_like(x, -1.0)
    for row in range(-3, 4):
        middle, left, ragged = 0.5 * row, -0.92, dice.uniform(0.3, 0.95)
        while left < ragged - 0.1:
            right = min(ragged, left + dice.uniform(0.3, 0.8))
            word = np.minimum(np.minimum(x - left, right - x), 0.16 - np.abs(y - middle))
            field, left = np.maximum(field, word), right + 0.17
    return field


def _halves(degrees: float) -> Callable[[Field, Field, Dice], Field]:
    return lambda x, y, dice: _turned(x, y, degrees + dice.uniform(-8, 8))[0]


def _band(x: Field, y: Field, dice: Dice) -> Field:
    return -np.abs(y + dice.uniform(-0.15, 0.15))


def _disc(x: Field, y: Field, dice: Dice) -> Field:
    return -np.hypot(x, y)


def _clover(x: Field, y: Field, dice: Dice) -> Field:
    return -np.hypot(x, y) / (1 + 0.45 * np.cos(4 * np.arctan2(x, -y)))


def _heart(x: Field, y: Field, dice: Dice) -> Field:
    u, v = np.abs(x), 0.15 - y
    return -np.hypot(u, 1.15 * v - 0.62 * np.sqrt(u))


def _star(x: Field, y: Field, dice: Dice) -> Field:
    fifth = math.tau / 5
    angle = np.arctan2(x, -y)
    from_tip = np.abs(angle - fifth * np.round(angle / fifth))
    return -np.hypot(x, y) * np.cos(from_tip - fifth)  # a pentagram's sides stand at right angles to the next tip


def _moon(x: Field, y: Field, dice: Dice) -> Field:
    return np.minimum(0.9 - np.hypot(x, y), 1.6 * (np.hypot(x - 0.42, y + 0.12) - 0.55))


PATTERNS: dict[str, Callable[[Field, Field, Dice], Field]] = {
    "upright stripes": _stripes(0),
    "hoops": _stripes(90),
    "slanting stripes": _stripes(40),
    "checks": _checks,
    "plaid": _plaid,
    "dots": _dots,
    "diamonds": _diamonds,
    "chevrons": _chevrons,
    "waves": _waves,
    "rings": _rings,
    "rays": _rays,
    "camouflage": _blobs,
    "spots": _spots,
    "scales": _scales,
    "triangles": _triangles,
    "crosses": _crosses,
    "print": _printed,
    "halves": _halves(0),
    "a slanting split": _halves(50),
    "a dipped foot": _halves(90),
    "a band": _band,
    "a disc": _disc,
    "a clover": _clover,
    "a star": _star,
    "a heart": _heart,
    "a moon": _moon,
}
