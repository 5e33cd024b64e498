"""Outlines of straight and curved lines, and how the parts of a drawing are painted and shaded.

Points are (x, y) in the unit square, y downwards. Pixels are float32 [side, side, 3], 0 to 255.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Point = tuple[float, float]
Points = list[Point]
Relief = Literal["round", "ball", "flat", "cloth", "side", "lid"]
Colour = tuple[int, int, int]
Pixels = NDArray[np.floating]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A piece of a drawing, painted over those before it."""

    outline: Points
    paint: str  # name of a colour, or "body" for the pattern
    relief: Relief = "flat"
    width: float = 0.0  # above 0: a line of this width along the points


# --- outlines ---------------------------------------------------------------------------------------------------------


def curve(points: Sequence[Point], *, closed: bool = True) -> Points:
    """Returns a smooth line through the points (Catmull-Rom), 8 points a stretch; closed: the first is not repeated."""
    count = len(points)
    through = np.array(points if closed else [points[0], *points, points[-1]], np.float64)
    result: Points = []
    for i in range(count if closed else count - 1):
        a, b, c, d = (through[(i + k) % len(through)] for k in ((-1, 0, 1, 2) if closed else (0, 1, 2, 3)))
        for t in np.linspace(0, 1, 9)[:-1]:
            place = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
            result.append((float(place[0]), float(place[1])))
    return result if closed else [*result, points[-1]]


def turned(profile: Sequence[Point]) -> Points:
    """Returns the silhouette of a solid of revolution about x = 0.5, from (half width, y) from the top down."""
    right = curve(profile, closed=False)
    return [(0.5 + half, y) for half, y in right] + [(0.5 - half, y) for half, y in reversed(right)]


def plate(left: float, top: float, right: float, bottom: float, radius: float = 0.02) -> Points:
    corners = ((right - radius, top + radius, -90), (right - radius, bottom - radius, 0),
               (left + radius, bottom - radius, 90), (left + radius, top + radius, 180))  # fmt: skip
    return [point for x, y, start in corners for point in arc(x, y, radius, radius, start, start + 90)]


def oval(x: float, y: float, width: float, height: float) -> Points:
    return arc(x, y, width / 2, height / 2, 0, 360)


def mirrored(right: Sequence[Point]) -> Points:
    """Returns the outline that is `right`, from the top down, and its mirror image about x = 0.5."""
    return [*right, *((1 - x, y) for x, y in reversed(right))]


def arc(x: float, y: float, a: float, b: float, start: float, end: float) -> Points:
    angles = np.radians(np.linspace(start, end, 9 if end - start < 180 else 41))
    return [(x + a * math.cos(angle), y + b * math.sin(angle)) for angle in angles.tolist()]


# --- painting ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Stencil:
    """The window of a canvas that a part covers."""

    top: int
    left: int
    alpha: Pixels  # cover, [height, width], 0 to 1
    edge: Pixels  # factor of the light, lower at the border, so that a part stands out from those behind it

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.alpha.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def stencil(part: Part, side: int) -> Stencil:
    """Returns the part's cover (0 to 1) and light at the edge, in its window of a canvas of side x side pixels."""
    radius = part.width / 2
    xs, ys = zip(*part.outline, strict=True)
    left, top = (max(0, math.floor(side * (min(axis) - radius)) - 1) for axis in (xs, ys))
    right, bottom = (min(side, math.ceil(side * (max(axis) + radius)) + 1) for axis in (xs, ys))
    mask = Image.new("L", (2 * max(1, right - left), 2 * max(1, bottom - top)))
    draw = ImageDraw.Draw(mask)
    points = [(2 * (x * side - left), 2 * (y * side - top)) for x, y in part.outline]
    if part.width:
        pen = 2 * radius * side
        draw.line(points, 255, round(2 * pen), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - pen, y - pen, x + pen, y + pen), 255)
    else:
        draw.polygon(points, 255)
    mask = mask.reduce(2)
    alpha, inner = (np.asarray(each, np.float32) / 255 for each in (mask, mask.filter(ImageFilter.BoxBlur(side / 70))))
    return Stencil(top, left, alpha, 0.8 + 0.2 * np.sqrt(np.clip(2 * inner - 1, 0, 1)))


def paint(
    parts: Sequence[Part],
    colours: Mapping[str, Colour],
    side: int,
    ground: Pixels | None = None,
    body: Callable[[Sequence[Stencil]], Pixels] | None = None,
) -> tuple[Pixels, Pixels]:
    """Returns the painted pixels, float32 [side, side, 3], 0 to 255, and the parts' cover, [side, side], 0 to 1.

    The parts are painted in their order on `ground`, or on black if it is None. body: makes from the parts' stencils
    the pattern, [side, side, 3], which paints parts called "body". Raises KeyError for another paint without a colour.
    """
    stencils = [stencil(part, side) for part in parts]
    pattern = body(stencils) if body else None
    pixels = np.zeros((side, side, 3), np.float32) if ground is None else ground.copy()
    cover = np.zeros((side, side), np.float32)
    for part, where in zip(parts, stencils, strict=True):
        if part.paint == "body" and pattern is not None:
            colour = pattern[where.window]
        else:
            colour = np.array(colours[part.paint], np.float32)
        lit = colour * (_light(part.relief, *where.alpha.shape) * where.edge)[..., None]
        behind = pixels[where.window]
        pixels[where.window] = behind + (lit - behind) * where.alpha[..., None]
        cover[where.window] = np.maximum(cover[where.window], where.alpha)
    return np.clip(pixels, 0, 255), cover


def sprite(pixels: Pixels, cover: Pixels) -> Image.Image:
    """Returns the painted pixels as an RGBA picture of half the canvas's side; cover, 0 to 1, is its alpha."""
    rgba = np.dstack([pixels, 255 * cover]).astype(np.uint8)
    return Image.fromarray(rgba).convert("RGBa").reduce(2).convert("RGBA")


def _light(relief: Relief, height: int, width: int) -> NDArray[np.float32]:
    """Returns the light that a surface reflects from a lamp at the upper left, factors, float32 [height, width]."""
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    if relief == "round":
        light = 1.04 - 0.3 * (x + 0.2) ** 2 + 0.14 * np.exp(-(((x + 0.5) / 0.13) ** 2))
    elif relief == "ball":
        light = (
            1.08 - 0.2 * ((x + 0.35) ** 2 + (y + 0.4) ** 2) + 0.12 * np.exp(-((x + 0.42) ** 2 + (y + 0.5) ** 2) / 0.05)
        )
    elif relief == "cloth":
        folds = np.sin(5.1 * x + 1.6 * y) + np.sin(2.3 * x - 3.4 * y + 1.0) + 0.5 * np.sin(9.0 * x + 4.2 * y * x)
        light = 0.97 + 0.045 * folds - 0.05 * y
    elif relief == "flat":
        light = 1.01 - 0.04 * x - 0.04 * y
    else:
        light = np.full_like(x * y, {"side": 0.74, "lid": 1.1}[relief])
    return np.broadcast_to(light, (height, width))
