"""Draws one product: its sprite, from its category's parts, its palette and its pattern, and its shop image.

A product shares shape and palette with the siblings of its group. The pattern is its own.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_pipeline.synthetic_shop.categories import CATEGORIES
from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.patterns import PATTERNS, levels
from data_pipeline.synthetic_shop.shapes import Colour, Part, Pixels, Stencil, paint, sprite

SPRITE = 240  # side of a sprite, pixels
CANVAS = 2 * SPRITE  # side of the canvas that it is painted on, pixels
SHOP_IMAGE = 256  # side of a shop image, pixels
PAINTS: dict[str, Colour] = {
    "white": (238, 235, 230),
    "dark": (52, 50, 58),
    "steel": (168, 174, 182),
    "wood": (178, 134, 92),
    "glow": (250, 232, 190),
    "inside": (70, 62, 66),
}
# Ground, figure and the figure's core: apart in lightness or hue, so that a pattern shows at 64 pixels.
PALETTES = tuple(
    tuple((int(code[i : i + 2], 16), int(code[i + 2 : i + 4], 16), int(code[i + 4 : i + 6], 16)) for i in (0, 6, 12))
    for code in (
        "f2e8d81f4e79d9822b", "f7d9c4b5323e5b1a2e", "e9e4d42f6b4ff0b429", "cfe3ee1d3557e63946", "f4c6cf7a2e5dfdf6ec",
        "26384ff4d58def6f6c", "0f6f6af3efe0f2a541", "f0b429343a55f7f3e8", "d85a4af8ecd621323f", "7b4b94f3d9ef2b2440",
        "b8d8ba2d4739f2545b", "f6f1e72b2d42ef233c", "3d5a80ee6c4de0fbfc", "f7e1ae8c4a2f2f6f73", "d4c1ec4b3f72ffcb77",
        "1d1f2ae8e2d0c9485b", "e8a598823329fbf3e4", "5fa8d3fdf4e3b23a48", "a7c957386641f2e8cf", "6b2737f1d6b8e39774",
        "fde2e41f7a8cffb703", "2a9d8f264653f4e4ba", "e9c46a6d2e46fbf7ef", "8d99aefdfcf7d90429", "c9ada722223bf2e9e4",
        "ffb5a7423e6ef8edeb", "386fa4f9dc5cfdfbf5", "f3722c14323ff9f3dc", "90be6dfdf7e4c44536", "e3d5ca5e503fd58936",
    )
)  # fmt: skip


def draw_product(category: str, palette: Sequence[Colour], pattern: str, shape: Dice, own: Dice) -> Image.Image:
    """Returns a sprite, RGBA [SPRITE, SPRITE], by dice of the group and its own. Raises KeyError for unknown names."""
    parts = CATEGORIES[category](shape)
    named = PAINTS | dict(zip(("ground", "figure", "core"), palette, strict=True))
    return sprite(*paint(parts, named, CANVAS, body=functools.partial(_body, parts, palette, pattern, own)))


def _body(
    parts: Sequence[Part], palette: Sequence[Colour], pattern: str, own: Dice, stencils: Sequence[Stencil]
) -> Pixels:
    """Returns the pattern's colours, float32 [CANVAS, CANVAS, 3]. On the visible body each colour has its share."""
    body = np.zeros((CANVAS, CANVAS), bool)
    for part, where in zip(parts, stencils, strict=True):
        covered = where.alpha > 0.5
        body[where.window] = body[where.window] | covered if part.paint == "body" else body[where.window] & ~covered
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    unit = math.sqrt((bottom - top) * (right - left)) / 2  # makes a bottle's stripes as wide as a box's
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    x, y = x - (left + right) / 2, (y - (top + bottom) / 2) / unit
    if any(part.relief == "round" for part in parts if part.paint == "body"):  # wound around: narrow at the sides
        half = (right - left) / 2
        x = np.arcsin(np.clip(x / half, -1, 1)) * (0.85 * half)
    chosen = levels(PATTERNS[pattern](x / unit, y, own), body)
    return np.array(palette, np.float32)[chosen]


def shop_image(product: Image.Image, palette: Sequence[Colour], dice: Dice) -> Image.Image:
    """Returns the sprite on a clean ground in soft light, RGB [SHOP_IMAGE, SHOP_IMAGE]. dice: of the group's light."""
    side = SHOP_IMAGE
    y, x = np.linspace(0, 1, side, dtype=np.float32)[:, None], np.linspace(0, 1, side, dtype=np.float32)[None]
    tint = 0.08 * np.array(dice.pick(palette), np.float32) + 0.92 * np.array((247, 246, 244), np.float32)
    glow = 1.0 - 0.1 * np.hypot(x - 0.42, y - 0.36) ** 2 - 0.05 * np.clip((y - 0.74) / 0.05, 0, 1)
    ground = Image.fromarray(np.clip(tint * glow[..., None], 0, 255).astype(np.uint8))
    size = round(side * dice.uniform(0.84, 0.92))
    left, top = (side - size) // 2, round(0.95 * side - 0.97 * size)
    small = product.resize((size, size), Image.Resampling.LANCZOS)
    solid = small.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    assert solid is not None, "a product has a body"
    shadow = Image.new("L", (side, side))
    foot, reach = top + solid[3], 0.06 * (solid[2] - solid[0])
    ImageDraw.Draw(shadow).ellipse((left + solid[0] - reach, foot - 7, left + solid[2] + 2 * reach, foot + 9), 120)
    ground.paste((70, 62, 66), (0, 0), shadow.filter(ImageFilter.GaussianBlur(5)))
    ground.paste(small, (left, top), small)
    return ground
