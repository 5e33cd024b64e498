"""Random words and the changes that training makes to pictures by them."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from data_pipeline.input.decode import Pixels, resampling
from data_pipeline.input.options import FrameOptions

Words = NDArray[np.uint64]


AUGMENT_STREAM = int.from_bytes(b"augment")  # second half of the Philox key: no other use of the seed gets these words


SHOP_IMAGE, FIRST_FRAME, WHOLE_CLIP = 0, 1, 2**32  # `picture` in words(): slot k of the clip is FIRST_FRAME + k


PICTURE_WORDS = 15  # a picture's words by position: an option that is turned on leaves the others' words alone


CROP_Y, CROP_X, FLIP, AREA, ASPECT, BRIGHTNESS, CONTRAST, SATURATION = range(8)


RED, GREEN, BLUE, ERASE, ERASE_Y, ERASE_X, ERASE_SIDE = range(8, PICTURE_WORDS)


ERASED = (123, 117, 104)  # CLIP's mean colour (SPEC 9.5): nothing, to the network


def draw_words(seed: int, epoch: int, example: int, picture: int, count: int = PICTURE_WORDS) -> Words:
    """`count` random words of one picture of one example (its row in the split) in one epoch, uint64."""
    return np.random.Philox(
        key=np.array((seed, AUGMENT_STREAM), np.uint64), counter=np.array((0, picture, example, epoch), np.uint64)
    ).random_raw(count)


def below(word: np.uint64, bound: int) -> int:
    """An integer of 0 to bound - 1, each equally likely (to 1 part in 2**64 / bound)."""
    return int(word) * bound >> 64


def uniform(word: np.uint64, low: float, high: float) -> float:
    return low + (high - low) * ((int(word) >> 11) * 2.0**-53)


def augment(pixels: Pixels, options: FrameOptions, picture_words: Words) -> Pixels:
    """A loaded picture of training, cropped, mirrored and coloured by its words: [image_size, image_size, 3]."""
    crop = random_scale_crop if options.crops_at_random_scale else random_crop
    pixels = crop(pixels, options, picture_words)
    if options.flip and below(picture_words[FLIP], 2):
        pixels = mirror(pixels)
    if options.colour_jitter:
        pixels = jitter(pixels, options.colour_jitter, picture_words)
    if options.white_balance:
        pixels = balance(pixels, options.white_balance, picture_words)
    return erase(pixels, options.erase, picture_words) if options.erase else pixels


def mirror(pixels: Pixels) -> Pixels:
    """pixels[:, ::-1], copied channel by channel: NumPy takes five times as long for runs of three bytes."""
    mirrored = np.empty(pixels.shape, np.uint8)
    for channel in range(3):
        mirrored[..., channel] = pixels[:, ::-1, channel]
    return mirrored


def random_crop(pixels: Pixels, options: FrameOptions, picture_words: Words) -> Pixels:
    size = options.image_size
    top = below(picture_words[CROP_Y], pixels.shape[0] - size + 1)
    left = below(picture_words[CROP_X], pixels.shape[1] - size + 1)
    return pixels[top : top + size, left : left + size]


def random_scale_crop(pixels: Pixels, options: FrameOptions, picture_words: Words) -> Pixels:
    """A random share of the area of the decoded picture, resized from there to image_size in one step.

    "stretch" measures area and aspect on the picture as stretched to a square, "keep_ratio" in its own pixels. A side
    that would leave the picture becomes the whole side.
    """
    height, width = pixels.shape[:2]
    area = uniform(picture_words[AREA], options.min_scale, 1.0)
    aspect = math.exp(uniform(picture_words[ASPECT], -1.0, 1.0) * math.log(options.max_aspect))
    unit = (width, height) if options.resize_mode == "stretch" else (math.sqrt(width * height),) * 2
    crop_width = min(width, unit[0] * math.sqrt(area * aspect))
    crop_height = min(height, unit[1] * math.sqrt(area / aspect))
    left = uniform(picture_words[CROP_X], 0.0, width - crop_width)
    top = uniform(picture_words[CROP_Y], 0.0, height - crop_height)
    box = (left, top, min(width, left + crop_width), min(height, top + crop_height))
    size = (options.image_size, options.image_size)
    return np.asarray(Image.fromarray(pixels).resize(size, resampling(options), box=box))


def jitter(pixels: Pixels, strength: float, picture_words: Words) -> Pixels:
    """Brightness, contrast and saturation, in this order, each times a factor of 1 - strength to 1 + strength."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    steps = ((ImageEnhance.Brightness, BRIGHTNESS), (ImageEnhance.Contrast, CONTRAST), (ImageEnhance.Color, SATURATION))
    for enhancer, position in steps:
        picture = enhancer(picture).enhance(uniform(picture_words[position], 1 - strength, 1 + strength))
    return np.asarray(picture)


def balance(pixels: Pixels, strength: float, picture_words: Words) -> Pixels:
    """Each channel times a factor of its own, 1 - strength to 1 + strength: the same thing under another lamp."""
    factors = [uniform(picture_words[position], 1 - strength, 1 + strength) for position in (RED, GREEN, BLUE)]
    return np.clip(pixels * np.array(factors, np.float32) + 0.5, 0, 255).astype(np.uint8)


def erase(pixels: Pixels, chance: float, picture_words: Words) -> Pixels:
    """With that chance, a square of 0.2 to 0.5 of the side is painted over; cut at its edge: its centre is anywhere."""
    if uniform(picture_words[ERASE], 0.0, 1.0) >= chance:
        return pixels
    height, width = pixels.shape[:2]
    half = uniform(picture_words[ERASE_SIDE], 0.1, 0.25)
    y, x = (uniform(picture_words[position], 0.0, 1.0) for position in (ERASE_Y, ERASE_X))
    rows, columns = (
        slice(max(0, round((centre - half) * side)), round((centre + half) * side))
        for centre, side in ((y, height), (x, width))
    )
    painted = pixels.copy()
    painted[rows, columns] = ERASED
    return painted
