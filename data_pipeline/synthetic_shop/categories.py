"""The categories of the drawn shop, and the drawing of one product of any of them."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.patterns import PATTERNS, levels
from data_pipeline.synthetic_shop.products import (
    CANVAS,
    PAINTS,
    backpack,
    ball,
    beanie,
    boot,
    bottle,
    bowl,
    can,
    candle,
    carton,
    cushion,
    dish,
    dress,
    handbag,
    jar,
    lamp,
    mug,
    notebook,
    phone_case,
    scent,
    shirt,
    shorts,
    snack_bag,
    sneaker,
    sock,
    teapot,
    tote,
    umbrella,
    vase,
)
from data_pipeline.synthetic_shop.shapes import Colour, Part, Pixels, Stencil, paint, sprite

SHOP_IMAGE = 256  # side of a shop image, pixels


CATEGORIES: dict[str, Callable[[Dice], list[Part]]] = {
    "water bottle": lambda dice: bottle(dice, neck=0.12, body=0.24, top=0.15, shoulder=0.28, cap="core"),
    "olive oil": lambda dice: bottle(dice, neck=0.065, body=0.22, top=0.13, shoulder=0.38, cap="dark"),
    "shampoo": lambda dice: bottle(dice, neck=0.08, body=0.27, top=0.2, shoulder=0.34, cap="white"),
    "perfume": scent,
    "cereal": lambda dice: carton(dice, width=0.56, height=0.82, depth=0.15),
    "tea box": lambda dice: carton(dice, width=0.7, height=0.5, depth=0.2),
    "gift box": lambda dice: carton(dice, width=0.64, height=0.6, depth=0.22, ribbon=True),
    "notebook": notebook,
    "jam": lambda dice: jar(dice, half=0.28, top=0.26, lid="core"),
    "face cream": lambda dice: jar(dice, half=0.38, top=0.5, lid="white", belly=1.0),
    "candle": candle,
    "soda": can,
    "mug": mug,
    "bowl": bowl,
    "vase": vase,
    "teapot": teapot,
    "plate": dish,
    "tote bag": tote,
    "handbag": handbag,
    "backpack": backpack,
    "crisps": snack_bag,
    "T-shirt": lambda dice: shirt(dice, sleeve=dice.uniform(0.2, 0.32), hem=0.94),
    "sweater": lambda dice: shirt(dice, sleeve=dice.uniform(0.95, 1.1), hem=0.88),
    "dress": dress,
    "shorts": shorts,
    "sneaker": sneaker,
    "boot": boot,
    "sock": sock,
    "beanie": beanie,
    "cushion": cushion,
    "lamp": lamp,
    "umbrella": umbrella,
    "phone case": phone_case,
    "beach ball": ball,
}


def draw_product(category: str, palette: Sequence[Colour], pattern: str, shape: Dice, own: Dice) -> Image.Image:
    """The sprite, RGBA [SPRITE, SPRITE]. shape: dice of the group, as siblings have one outline; own: the pattern's."""
    parts = CATEGORIES[category](shape)
    named = PAINTS | dict(zip(("ground", "figure", "core"), palette, strict=True))
    return sprite(*paint(parts, named, CANVAS, body=functools.partial(_body, parts, palette, pattern, own)))


def _body(
    parts: Sequence[Part], palette: Sequence[Colour], pattern: str, own: Dice, stencils: Sequence[Stencil]
) -> Pixels:
    """The pattern's colours everywhere, their shares exact on what of the body is not painted over."""
    body = np.zeros((CANVAS, CANVAS), bool)
    for part, where in zip(parts, stencils, strict=True):
        covered = where.alpha > 0.5
        body[where.window] = body[where.window] | covered if part.paint == "body" else body[where.window] & ~covered
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    unit = math.sqrt((bottom - top) * (right - left)) / 2  # so that a bottle's stripes are as wide as a box's
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    x, y = x - (left + right) / 2, (y - (top + bottom) / 2) / unit
    if any(part.relief == "round" for part in parts if part.paint == "body"):  # wound around: narrower to the sides
        half = (right - left) / 2
        x = np.arcsin(np.clip(x / half, -1, 1)) * (0.85 * half)
    chosen = levels(PATTERNS[pattern](x / unit, y, own), body)
    return np.array(palette, np.float32)[chosen]


def shop_image(product: Image.Image, palette: Sequence[Colour], dice: Dice) -> Image.Image:
    """The sprite as a shop shows it, RGB [SHOP_IMAGE, SHOP_IMAGE]: on a clean ground, in soft light."""
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
