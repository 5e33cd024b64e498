"""Plans the shots of a clip, one per second, as numbers: view, product, hands, light. The true boxes follow from them.

Points are pixels of the frame, float64 [n, 2], x and y. A quad has the points that a sprite's corners are mapped to,
[4, 2], from the upper left one clockwise.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.rooms import GRIP, ROOM

WIDTH, HEIGHT = 192, 256
Numbers = NDArray[np.float64]
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom exclusive
SHARES = ((0.06, 0.1), (0.16, 0.26), *3 * ((0.28, 0.4),), *4 * ((0.38, 0.6),))  # of the frame's area, for the box
UNIT = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float64)


class Sprite:
    """A square RGBA picture at several sizes, so that small copies do not flicker, and its silhouette."""

    def __init__(self, picture: Image.Image) -> None:
        levels = [picture.convert("RGBa")]
        while levels[-1].width > 32:
            levels.append(levels[-1].reduce(2))
        self.levels = levels
        self.picture = picture
        solid = np.asarray(picture)[..., 3] > 8
        rows = np.flatnonzero(solid.any(1))
        left, right = solid[rows].argmax(1), solid.shape[1] - solid[rows, ::-1].argmax(1)
        ends = [(x, y) for xs in (left, right) for dy in (0, 1) for x, y in zip(xs, rows + dy, strict=True)]
        self.hull = np.array(ends, np.float64) / len(solid)  # points in the unit square

    def edge(self, y: float, *, right: bool) -> tuple[float, float]:
        """Returns the silhouette's outermost x near height y, and y, in the unit square. Raises ValueError for none."""
        at_height = self.hull[np.abs(self.hull[:, 1] - y) < 0.05]
        return (float(np.max(at_height[:, 0]) if right else np.min(at_height[:, 0])), y)


# --- geometry ---------------------------------------------------------------------------------------------------------


def homography(source: Numbers, target: Numbers) -> Numbers:
    """Returns the matrix, float64 [3, 3], that maps four points to four. Raises LinAlgError if no single one does."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
    solved = np.linalg.solve(np.array(rows), target.reshape(-1))
    return np.append(solved, 1.0).reshape(3, 3)


def project(matrix: Numbers, points: Numbers) -> Numbers:
    mapped = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    return mapped[:, :2] / mapped[:, 2:]


def box_of(sprite: Sprite, quad: Numbers) -> Box | None:
    """Returns the smallest box around the sprite's silhouette, cut at the frame; None if it is outside the frame."""
    outline = project(homography(UNIT, quad), sprite.hull)
    left, top = np.maximum(np.floor(outline.min(0)), 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(outline.max(0)), (WIDTH, HEIGHT)).astype(int).tolist()
    return (left, top, right, bottom) if left < right and top < bottom else None


def turned_square(centre: Numbers, size: float, *, yaw: float, pitch: float, roll: float) -> Numbers:
    """Returns the quad of a square of `size` pixels, seen from three times its size away; angles are in radians."""
    plane = np.column_stack([UNIT - 0.5, np.zeros(4)])
    spins = ((0, 2, yaw), (1, 2, pitch), (0, 1, roll))
    for a, b, angle in spins:
        cos, sin = math.cos(angle), math.sin(angle)
        plane[:, a], plane[:, b] = cos * plane[:, a] - sin * plane[:, b], sin * plane[:, a] + cos * plane[:, b]
    return centre + size * plane[:, :2] / (1 + plane[:, 2:] / 3)


def hand_at(grip: Numbers, size: float, angle: float, *, right: bool) -> Numbers:
    """Returns the quad of a hand with its fingers on `grip` and its arm to the lower right, or mirrored, lower left."""
    corners = (UNIT - GRIP) * size
    if not right:
        corners, angle = corners * (-1, 1), -angle
    cos, sin = math.cos(angle), math.sin(angle)
    return grip + corners @ np.array([(cos, sin), (-sin, cos)])


# --- shots ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shot:
    """One second of a clip."""

    view: tuple[float, ...]  # affine, from the frame to the room
    product: Numbers | None  # quad; None: it is not shown in this second
    standing: bool  # whether it is on the table, not in a hand
    hands: tuple[Numbers, ...]
    passing: Numbers | None  # quad of another product, held closer to the camera
    gains: tuple[float, float, float]  # of red, green and blue
    gamma: float
    streak: int  # direction of motion blur, in degrees; -1: none
    defocus: float  # radius, pixels


class Drift:
    """A slow, smooth, random motion between -1 and 1."""

    def __init__(self, dice: Dice) -> None:
        self.waves = [(dice.uniform(low, 2 * low), dice.uniform(0, math.tau)) for low in (0.35, 0.8)]

    def at(self, second: float) -> float:
        (slow, a), (quick, b) = self.waves
        return 0.62 * math.sin(slow * second + a) + 0.38 * math.sin(quick * second + b)


class Take:
    """The constants and the drifting quantities of a clip.

    live: dice of the livestream, for the light that its clips share. dice: of the clip.
    """

    def __init__(self, live: Dice, dice: Dice, product: Sprite) -> None:
        self.dice, self.product = dice, product
        self.warmth, self.tint = live.uniform(-0.18, 0.18), live.uniform(-0.07, 0.07)
        self.exposure, self.gamma = dice.uniform(0.76, 1.2), dice.uniform(0.88, 1.16)
        self.hands: tuple[bool, ...] = dice.pick(((), (True,), (True,), (False,), (True, False)))  # True: a right one
        self.size = self._size(dice.uniform(*dice.pick(SHARES)))
        self.place = np.array((WIDTH * dice.uniform(0.4, 0.6), HEIGHT * dice.uniform(0.42, 0.58)))
        self.lean = dice.uniform(-0.3, 0.3)
        self.zoom = dice.uniform(0.46, 0.6)
        self.aim = np.array((dice.uniform(0.44, 0.56), dice.uniform(0.5, 0.58)))
        self.pan, self.tilt, self.near, self.sway, self.lift = (Drift(dice) for _ in range(5))
        self.yaw, self.pitch, self.roll, self.tremble = (Drift(dice) for _ in range(4))

    def _size(self, share: float) -> float:
        """Returns the sprite's side, in pixels, with which its box fits the frame and covers about `share` of it."""
        width, height = np.ptp(self.product.hull, axis=0)
        return min(math.sqrt(share * WIDTH * HEIGHT / (width * height)), 0.92 * HEIGHT / height, 1.02 * WIDTH / width)

    def shot(self, second: int, *, shown: bool, passing: bool) -> Shot:
        """Returns the shot of a second, with a product only if shown. passing: whether another may come before it."""
        dice = self.dice
        quad: Numbers | None = None
        hands: tuple[Numbers, ...] = ()
        other: Numbers | None = None
        if shown:
            side = self.size * (1 + 0.16 * self.near.at(second))
            quad, roll = self._presented(second, side)
            hands = self._hands(second, quad, 90 + 0.68 * side, roll)
            if passing and dice.happens(0.2):
                off = np.array((dice.pick((-1, 1)) * dice.uniform(0.38, 0.6), dice.uniform(-0.1, 0.5)))
                size, tipped = side * dice.uniform(0.55, 0.8), dice.uniform(-0.5, 0.5)
                other = turned_square(quad.mean(0) + side * off, size, yaw=0.2, pitch=0.0, roll=tipped)
        flicker = self.exposure * dice.uniform(0.94, 1.06)
        return Shot(
            view=self._view(second),
            product=quad,
            standing=not self.hands,
            hands=hands,
            passing=other,
            gains=(flicker * (1 + self.warmth), flicker * (1 + self.tint), flicker * (1 - self.warmth)),
            gamma=self.gamma,
            streak=45 * dice.below(4) if dice.happens(0.3) else -1,
            defocus=1.2 if dice.happens(0.08) else 0.0,
        )

    def _presented(self, second: int, side: float) -> tuple[Numbers, float]:
        """Returns the product's quad, on the table or in a hand, and its roll in radians."""
        x = self.place[0] + 0.13 * WIDTH * self.sway.at(second)
        if not self.hands:
            y = 0.8 * HEIGHT - 0.46 * side + 12 * self.tilt.at(second)
            yaw, pitch, roll = 0.45 * self.yaw.at(second), 0.1, 0.05 * self.roll.at(second)
        else:
            y = self.place[1] + 0.1 * HEIGHT * self.lift.at(second)
            yaw, pitch = 0.65 * self.yaw.at(second), 0.4 * self.pitch.at(second)
            roll = self.lean + 0.28 * self.tremble.at(second)
        return turned_square(np.array((x, y)), side, yaw=yaw, pitch=pitch, roll=roll), roll

    def _hands(self, second: int, quad: Numbers, size: float, roll: float) -> tuple[Numbers, ...]:
        edges = np.array([self.product.edge(0.62, right=right) for right in self.hands]).reshape(-1, 2)
        grips = project(homography(UNIT, quad), edges)
        angle = 0.6 * roll + 0.15 * self.tremble.at(second)
        return tuple(hand_at(grip, size, angle, right=right) for grip, right in zip(grips, self.hands, strict=True))

    def _view(self, second: int) -> tuple[float, ...]:
        """Returns Pillow's affine transform, six numbers, from the frame to the room; the view stays in the room."""
        span = self.zoom * ROOM * (1 + 0.12 * self.near.at(second))  # of the room, across the frame
        centre = ROOM * (self.aim + (0.09 * self.pan.at(second), 0.05 * self.tilt.at(second)))
        half = np.array((span, span * HEIGHT / WIDTH)) * 0.55
        x, y = np.clip(centre, half, ROOM - half).tolist()
        scale, roll = span / WIDTH, 0.05 * self.roll.at(second)
        cos, sin = scale * math.cos(roll), scale * math.sin(roll)
        return (cos, -sin, x - (cos * WIDTH - sin * HEIGHT) / 2, sin, cos, y - (sin * WIDTH + cos * HEIGHT) / 2)


def plan_shots(live: Dice, dice: Dice, product: Sprite, length: int, shown: range, *, passing: bool) -> list[Shot]:
    """Returns a shot for each of `length` seconds; those in `shown` show the product.

    live, dice: as for `Take`. passing: whether another product may come between product and camera.
    """
    take = Take(live, dice, product)
    return [take.shot(second, shown=second in shown, passing=passing) for second in range(length)]
