"""The room of a livestream: a wall, a shelf with products, a host behind a table; and the host's hand."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.shapes import Colour, Part, Pixels, Point, Points, curve, oval, paint, plate, sprite

ROOM = 480  # side of a room, pixels
HAND = 480  # side of a hand with its arm, pixels
TABLE = 0.74  # height of the table's far edge, as a share of the room's
GRIP = (0.3, 0.26)  # the point of the hand's sprite that is put on the product's edge

WALLS: tuple[Colour, ...] = (
    (226, 214, 198), (204, 214, 206), (198, 210, 222), (228, 204, 198), (170, 186, 178), (140, 152, 172),
    (212, 196, 214), (238, 230, 212), (120, 138, 140), (196, 178, 158), (92, 98, 116), (240, 216, 190),
)  # fmt: skip
WOODS: tuple[Colour, ...] = ((164, 118, 78), (122, 84, 58), (206, 170, 126), (232, 228, 222), (88, 72, 66))
SKINS: tuple[Colour, ...] = ((244, 206, 178), (228, 180, 146), (198, 144, 108), (150, 102, 74), (104, 70, 54))
HAIRS: tuple[Colour, ...] = ((48, 38, 36), (92, 60, 42), (160, 112, 64), (28, 28, 34), (128, 60, 44), (200, 196, 192))
CLOTHS: tuple[Colour, ...] = (
    (236, 232, 226), (62, 74, 96), (190, 92, 84), (98, 128, 112), (220, 178, 92), (150, 120, 160), (52, 52, 56),
    (120, 164, 190),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Room:
    """The pictures that a livestream's clips are composed of, besides the products."""

    picture: Image.Image  # RGB [ROOM, ROOM]
    palm: Image.Image  # the hand behind the product, RGBA [HAND / 2, HAND / 2]; the arm comes from the lower right
    fingers: Image.Image  # the same hand's fingers, in front of the product


def draw_room(dice: Dice, shelf: Sequence[Image.Image]) -> Room:
    """Returns a room's pictures. shelf: sprites, RGBA, of the products on its shelf, which shows the first nine."""
    wall = dice.pick(WALLS)
    colours: dict[str, Colour] = {
        "wall": wall,
        "trim": _times(1.14, wall),
        "shade": _times(0.86, wall),
        "wood": dice.pick(WOODS),
        "table": dice.pick(WOODS),
        "skin": dice.pick(SKINS),
        "hair": dice.pick(HAIRS),
        "cloth": dice.pick(CLOTHS),
        "accent": dice.pick(CLOTHS),
        "leaf": dice.pick(((82, 122, 84), (58, 98, 76), (120, 146, 92))),
        "sky": dice.pick(((196, 222, 240), (250, 224, 190), (70, 84, 120))),
        "glow": (255, 240, 206),
        "dark": (50, 48, 54),
    }
    left = dice.happens(0.5)  # where the shelf is
    parts = [*_wall(dice), *_decoration(dice, left)]
    boards, places = _shelf(dice, left)
    ground = np.linspace(1.06, 0.86, ROOM, dtype=np.float32)[:, None, None] * np.array(wall, np.float32)
    far, _ = paint([*parts, *boards], colours, ROOM, np.broadcast_to(ground, (ROOM, ROOM, 3)))
    picture = _picture(far)
    for (x, y, size), product in zip(places, shelf, strict=False):
        stand(picture, product, x, y, size)
    near = [*_plant(dice, not left), *_host(dice), *_table(dice)]
    pixels, _ = paint(near, colours, ROOM, np.asarray(picture, np.float32))
    palm, fingers = _hand()
    return Room(
        _picture(_lamplight(dice, pixels)).filter(ImageFilter.GaussianBlur(1.4)),  # the product in front is in focus
        sprite(*paint(palm, colours, HAND)),
        sprite(*paint(fingers, colours, HAND)),
    )


def _times(factor: float, colour: Colour) -> Colour:
    red, green, blue = (min(255, round(factor * level)) for level in colour)
    return red, green, blue


def _picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8))


def stand(picture: Image.Image, product: Image.Image, x: float, y: float, size: float) -> None:
    """Pastes a product into the picture, its foot at (x, y); size is its side, and all three are shares of ROOM."""
    side = round(size * ROOM)
    small = product.resize((side, side), Image.Resampling.BOX)
    picture.paste(small, (round(x * ROOM - side / 2), round(y * ROOM - 0.965 * side)), small)


def _lamplight(dice: Dice, pixels: Pixels) -> Pixels:
    y, x = np.linspace(0, 1, ROOM, dtype=np.float32)[:, None], np.linspace(0, 1, ROOM, dtype=np.float32)[None]
    far = np.hypot(x - dice.uniform(0.1, 0.9), y - dice.uniform(0.0, 0.6))
    tint = np.array(dice.pick(((1.0, 0.92, 0.78), (0.88, 0.95, 1.0), (1.0, 0.86, 0.9))), np.float32)
    return np.clip(pixels * (0.82 + 0.34 * np.exp(-4 * far * far)[..., None] * tint), 0, 255)


# --- things in a room -------------------------------------------------------------------------------------------------


def _wall(dice: Dice) -> list[Part]:
    kind = dice.below(5)
    if kind == 0:  # panels
        return [Part(plate(0.03 + 0.25 * k, 0.06, 0.22 + 0.25 * k, 0.7, 0.01), "trim", "flat") for k in range(4)]
    if kind == 1:  # wallpaper
        return [Part([(x, 0.0), (x, 1.0)], "trim", "flat", 0.035) for x in np.arange(0.02, 1.0, 0.085).tolist()]
    if kind == 2:  # a curtain
        return [Part(plate(x, -0.02, x + 0.075, 1.0), "shade", "round") for x in np.arange(0.0, 1.0, 0.075).tolist()]
    if kind == 3:  # tiles
        lines: list[Points] = [[(x, 0.0), (x, 1.0)] for x in np.arange(0.05, 1.0, 0.11).tolist()]
        lines += [[(0.0, y), (1.0, y)] for y in np.arange(0.04, 1.0, 0.11).tolist()]
        return [Part(line, "trim", "flat", 0.008) for line in lines]
    return [Part(plate(-0.1, 0.5, 1.1, 1.1), "shade", "flat")]


def _decoration(dice: Dice, shelf_left: bool) -> list[Part]:
    x, y = (0.7, 0.84)[dice.below(2)] if shelf_left else (0.16, 0.3)[dice.below(2)], dice.uniform(0.16, 0.26)
    kind = dice.below(3)
    if kind == 0:  # a window
        glass = plate(x - 0.15, y - 0.12, x + 0.15, y + 0.24, 0.005)
        bars: list[Points] = [[*glass, glass[0]], [(x, y - 0.12), (x, y + 0.24)], [(x - 0.15, y), (x + 0.15, y)]]
        return [Part(glass, "sky", "flat"), *(Part(bar, "trim", "flat", 0.016) for bar in bars)]
    if kind == 1:  # pictures
        frames = [(x - 0.08, y, 0.07, 0.09), (x + 0.1, y + 0.04, 0.055, 0.055)]
        return [
            part
            for u, v, half, tall in frames
            for part in (
                Part(plate(u - half, v - tall, u + half, v + tall, 0.004), "trim"),
                Part(plate(u - 0.8 * half, v - 0.84 * tall, u + 0.8 * half, v + 0.84 * tall, 0.004), "accent"),
                Part(oval(u, v + 0.2 * tall, 0.8 * half, 0.9 * tall), "sky", "ball"),
            )
        ]
    ring = oval(x, y + 0.04, 0.2, 0.2)  # a ring lamp
    return [Part([(x, y + 0.14), (x, 1.0)], "dark", "round", 0.014), Part([*ring, ring[0]], "glow", "flat", 0.03)]


def _shelf(dice: Dice, left: bool) -> tuple[list[Part], list[tuple[float, float, float]]]:
    """Returns the parts of the shelf, and nine places for products in random order: (x, y of the foot, size)."""
    begin = dice.uniform(0.01, 0.06) if left else dice.uniform(0.5, 0.55)
    end, size = begin + 0.44, dice.uniform(0.125, 0.15)
    heights = [0.2 + 0.175 * k + dice.uniform(-0.01, 0.01) for k in range(3)]
    parts = [Part(plate(begin, heights[0] - 0.17, end, 0.72, 0.01), "shade", "side")]
    parts += [Part([(begin, y), (end, y)], "wood", "flat", 0.016) for y in heights]
    parts += [Part([(x, heights[0] - 0.17), (x, 0.74)], "wood", "flat", 0.016) for x in (begin, end)]
    places = [(begin + 0.08 + 0.14 * k + dice.uniform(-0.01, 0.01), y, size) for y in heights for k in range(3)]
    return parts, dice.shuffled(places)


def _plant(dice: Dice, left: bool) -> list[Part]:
    x, height = (dice.uniform(0.06, 0.14) if left else dice.uniform(0.86, 0.94)), dice.uniform(0.18, 0.3)
    leaves = []
    for k in range(7):
        lean = (k - 3) * 0.24 + dice.uniform(-0.08, 0.08)
        tip = (x + height * math.sin(lean), 0.68 - height * math.cos(lean) * (1 - 0.06 * abs(k - 3)))
        side = (0.022 * math.cos(lean), 0.022 * math.sin(lean))
        middle = ((x + tip[0]) / 2, (0.68 + tip[1]) / 2)
        blade = [(x, 0.68), (middle[0] - side[0], middle[1] - side[1]), tip, (middle[0] + side[0], middle[1] + side[1])]
        leaves.append(Part(curve(blade), "leaf", "cloth"))
    return [*leaves, Part(_about(x, [(0.06, 0.66), (0.045, 0.78)]), "accent", "round")]


def _about(x: float, right: Points) -> Points:
    return [(x + half, y) for half, y in right] + [(x - half, y) for half, y in reversed(right)]


def _host(dice: Dice) -> list[Part]:
    x, y = 0.5 + dice.uniform(-0.1, 0.1), dice.uniform(0.27, 0.33)
    wide = dice.uniform(0.17, 0.2)

    def about(*right: Point) -> Points:
        """Returns a symmetrical outline from (half width, distance below the middle of the face)."""
        return _about(x, curve([(half, y + below) for half, below in right], closed=False))

    cap, bun = (
        Part(oval(x, y - 0.025, 0.165, 0.17), "hair", "ball"),
        Part(oval(x, y - 0.12, 0.08, 0.075), "hair", "ball"),
    )
    long = Part(about((0.02, -0.115), (0.09, -0.03), (0.1, 0.1), (0.085, 0.2)), "hair", "cloth")
    smile = curve([(x - 0.022, y + 0.045), (x, y + 0.054), (x + 0.022, y + 0.045)], closed=False)
    return [
        *dice.pick(([cap], [long], [cap, bun])),
        Part([(x, y + 0.05), (x, y + 0.15)], "skin", "round", 0.07),
        Part(about((0.0, 0.12), (0.06, 0.125), (wide, 0.18), (0.04 + wide, 0.86 - y)), "cloth", "cloth"),
        Part([(x - 0.04, y + 0.125), (x, y + 0.15), (x + 0.04, y + 0.125)], "skin", "flat", 0.02),
        Part(oval(x, y, 0.14, 0.175), "skin", "ball"),
        Part(about((0.0, -0.105), (0.055, -0.085), (0.075, -0.02), (0.04, -0.055), (0.0, -0.05)), "hair"),
        *(Part(oval(x + side, y + 0.005, 0.014, 0.018), "dark") for side in (-0.03, 0.03)),
        Part(smile, "dark", "flat", 0.007),
    ]


def _table(dice: Dice) -> list[Part]:
    return [
        Part(plate(-0.1, TABLE, 1.1, 1.1), "table", "flat"),
        Part([(-0.05, TABLE), (1.05, TABLE)], "table", "lid", 0.012),
        Part([(-0.05, 0.92), (1.05, 0.92)], "table", "side", 0.008),
    ]


def _hand() -> tuple[list[Part], list[Part]]:
    """Returns a hand that grips an edge from the right: (parts behind the product, parts in front of it)."""
    palm = [
        Part([(0.86, 1.05), (0.5, 0.42)], "skin", "round", 0.15),
        Part([(1.0, 1.2), (0.69, 0.74)], "cloth", "cloth", 0.21),
        Part(curve([(0.3, 0.16), (0.46, 0.14), (0.56, 0.3), (0.58, 0.46), (0.44, 0.5), (0.3, 0.4)]), "skin", "cloth"),
    ]
    fingers = [
        Part(
            [(0.46 - 0.012 * k, 0.2 + 0.062 * k), (0.215 + 0.02 * abs(k - 1), 0.17 + 0.062 * k)], "skin", "flat", 0.058
        )
        for k in range(4)
    ]
    return palm, fingers
