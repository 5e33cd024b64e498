"""Draws the frames of a clip: a room with products on its table, and in each shot the product, hands and light."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.rooms import ROOM, TABLE, Room, stand
from data_pipeline.synthetic_shop.shots import HEIGHT, UNIT, WIDTH, Box, Numbers, Shot, Sprite, box_of, homography


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that the frames of a clip are drawn from."""

    backdrop: Image.Image
    palm: Sprite
    fingers: Sprite
    product: Sprite
    passing: Sprite | None  # another product, which may come between product and camera
    overlay: Image.Image
    shots: Sequence[Shot]  # one per second

    def frame(self, second: int) -> Image.Image:
        """Returns the frame of one second, RGB [HEIGHT, WIDTH]. Raises IndexError for a second without a shot."""
        shot = self.shots[second]
        picture = self.backdrop.transform((WIDTH, HEIGHT), Image.Transform.AFFINE, shot.view, Image.Resampling.BILINEAR)
        if shot.product is not None:
            if shot.standing:
                _shadow(picture, box_of(self.product, shot.product))
            for hand in shot.hands:
                put(picture, self.palm, hand)
            put(picture, self.product, shot.product)
            if self.passing is not None and shot.passing is not None:
                put(picture, self.passing, shot.passing)
            for hand in shot.hands:
                put(picture, self.fingers, hand)
        picture = picture.point(_exposed(shot.gains, shot.gamma))
        if shot.streak >= 0:
            picture = picture.filter(STREAKS[shot.streak])
        if shot.defocus:
            picture = picture.filter(ImageFilter.BoxBlur(shot.defocus))
        picture.paste(self.overlay, (0, 0), self.overlay)
        return picture

    def box(self, second: int) -> Box | None:
        """Returns the product's box, cut at the frame, hidden parts included; None if it is not shown or outside."""
        quad = self.shots[second].product
        return None if quad is None else box_of(self.product, quad)


def backdrop(room: Room, dice: Dice, others: Sequence[Sprite], shot: Shot) -> Image.Image:
    """Returns a copy of the room, perhaps mirrored, RGB [ROOM, ROOM], with up to four others on its table in `shot`."""
    picture = ImageOps.mirror(room.picture) if dice.happens(0.5) else room.picture
    lamps, warmth = dice.uniform(0.82, 1.12), dice.uniform(-0.1, 0.1)  # of the room alone, not of the product
    picture = picture.point(_exposed((lamps * (1 + warmth), lamps, lamps * (1 - warmth)), 1.0))
    a, b, c, _, _, _ = shot.view
    for other, across in zip(others, dice.shuffled((0.14, 0.28, 0.72, 0.86)), strict=False):
        x = (a * across * WIDTH + b * 0.8 * HEIGHT + c) / ROOM
        foot, size = TABLE + dice.uniform(0.02, 0.08), dice.uniform(0.19, 0.25)
        stand(picture, other.picture, x, foot, size)
    return picture


def draw_overlay(dice: Dice) -> Image.Image:
    """Returns the overlay of a livestream app, RGBA [HEIGHT, WIDTH]: a badge, lines of chat, a heart."""
    overlay = Image.new("RGBA", (4 * WIDTH, 4 * HEIGHT))
    draw = ImageDraw.Draw(overlay)
    colours = ((255, 255, 255, 190), (255, 214, 140, 200), (170, 220, 255, 200), (255, 180, 190, 200))
    draw.rounded_rectangle((24, 24, 190 + dice.below(60), 76), 26, (20, 20, 28, 110))
    draw.ellipse((30, 30, 70, 70), dice.pick(colours))
    draw.rounded_rectangle((84, 44, 150, 56), 6, (255, 255, 255, 200))
    for line in range(dice.below(4)):
        y, width = 4 * HEIGHT - 70 - 50 * line, 140 + dice.below(200)
        draw.rounded_rectangle((24, y, 24 + width, y + 38), 19, (20, 20, 28, 90))
        draw.rounded_rectangle((40, y + 14, 90, y + 24), 5, dice.pick(colours))
        draw.rounded_rectangle((100, y + 14, width, y + 24), 5, (255, 255, 255, 180))
    x, y = 4 * WIDTH - 70, 4 * HEIGHT - 70
    pink = (250, 96, 122, 220)
    draw.ellipse((x - 26, y - 24, x, y + 2), pink)
    draw.ellipse((x, y - 24, x + 26, y + 2), pink)
    draw.polygon([(x - 24, y - 4), (x + 24, y - 4), (x, y + 26)], pink)
    return overlay.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def put(picture: Image.Image, sprite: Sprite, quad: Numbers) -> None:
    """Pastes the sprite into the picture with its corners at the quad; outside the frame it does nothing."""
    box = box_of(sprite, quad)
    if box is None:
        return
    left, top, right, bottom = box
    across = max(np.hypot(*(quad[1] - quad[0])), np.hypot(*(quad[3] - quad[0])))
    source = next((level for level in reversed(sprite.levels) if level.width >= across), sprite.levels[0])
    matrix = homography(quad - (left, top), UNIT * source.width)
    cut = source.transform(
        (right - left, bottom - top),
        Image.Transform.PERSPECTIVE,
        matrix.reshape(-1)[:8].tolist(),
        Image.Resampling.BILINEAR,
    ).convert("RGBA")
    picture.paste(cut, (left, top), cut)


def _shadow(picture: Image.Image, box: Box | None) -> None:
    if box is not None:
        left, _, right, bottom = box
        width = max(8, round(1.25 * (right - left)))
        size = (width, max(4, width // 5))
        picture.paste((20, 16, 18), ((left + right - width) // 2, bottom - size[1] * 2 // 3), SHADOW.resize(size))


def _exposed(gains: Sequence[float], gamma: float) -> list[int]:
    """Returns 256 levels a gain, 0 to 255, a table for Image.point that sets exposure, white balance and contrast."""
    levels = np.arange(256) / 255
    return np.concatenate([np.clip(255 * (gain * levels) ** gamma, 0, 255).astype(int) for gain in gains]).tolist()


def _soft_disc() -> Image.Image:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    return Image.fromarray((150 * np.clip(1 - np.hypot(x, y), 0, 1) ** 0.8).astype(np.uint8))


def _streak(degrees: int) -> ImageFilter.Kernel:
    step = {0: (0, 1), 45: (-1, 1), 90: (1, 0), 135: (1, 1)}[degrees]
    weights = np.zeros((5, 5))
    for k in range(-2, 3):
        weights[2 + k * step[0], 2 + k * step[1]] = 1
    return ImageFilter.Kernel((5, 5), weights.reshape(-1).tolist())


SHADOW = _soft_disc()
STREAKS = {degrees: _streak(degrees) for degrees in (0, 45, 90, 135)}
