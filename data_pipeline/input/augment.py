"""The random changes that training makes to a picture: crop, mirror, colours, erased square.

Each change reads its random words at fixed positions. So a picture changes the same way on every host, and enabling one
option leaves the words of the others as they are.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance

from data_pipeline.input.decode import Pixels, resampling
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.random_words import AUGMENT_STREAM, RandomWords, below, random_words, uniform

# `picture` of augment_words. Slot k of the clip is FIRST_FRAME + k; WHOLE_CLIP is for frame sampling.
SHOP_IMAGE, FIRST_FRAME, WHOLE_CLIP = 0, 1, 2**32
PICTURE_WORDS = 15  # random words of a picture, by position:
CROP_Y, CROP_X, FLIP, AREA, ASPECT, BRIGHTNESS, CONTRAST, SATURATION = range(8)
RED, GREEN, BLUE, ERASE, ERASE_Y, ERASE_X, ERASE_SIDE = range(8, PICTURE_WORDS)
ERASED = (123, 117, 104)  # CLIP's mean colour (docs/official.md 9.5): zero after normalisation


def augment_words(seed: int, epoch: int, example: int, picture: int, count: int = PICTURE_WORDS) -> RandomWords:
    """Returns the random words, uint64 [count], of one picture in one epoch. example: row of the clip in its split."""
    return random_words(seed, AUGMENT_STREAM, count, epoch=epoch, example=example, picture=picture)


def augment(pixels: Pixels, options: FrameOptions, words: RandomWords) -> Pixels:
    """Returns a picture of load_picture after the random changes of `options`: uint8 [image_size, image_size, 3]."""
    crop = random_scale_crop if options.crops_at_random_scale else random_crop
    pixels = crop(pixels, options, words)
    if options.flip and below(words[FLIP], 2):
        pixels = mirror(pixels)
    if options.colour_jitter:
        pixels = jitter(pixels, options.colour_jitter, words)
    if options.white_balance:
        pixels = balance(pixels, options.white_balance, words)
    return erase(pixels, options.erase, words) if options.erase else pixels


def mirror(pixels: Pixels) -> Pixels:
    """Returns pixels[:, ::-1] as a copy, made by channel: NumPy takes five times as long for runs of three bytes."""
    mirrored = np.empty(pixels.shape, np.uint8)
    for channel in range(3):
        mirrored[..., channel] = pixels[:, ::-1, channel]
    return mirrored


def random_crop(pixels: Pixels, options: FrameOptions, words: RandomWords) -> Pixels:
    """Returns a view, [image_size, image_size, 3], each position within the picture equally likely."""
    size = options.image_size
    top = below(words[CROP_Y], pixels.shape[0] - size + 1)
    left = below(words[CROP_X], pixels.shape[1] - size + 1)
    return pixels[top : top + size, left : left + size]


def random_scale_crop(pixels: Pixels, options: FrameOptions, words: RandomWords) -> Pixels:
    """Returns a random part of the picture, resized to [image_size, image_size, 3] in one step.

    The part has min_scale to 1 of the area and an aspect of 1 / max_aspect to max_aspect: of the picture stretched to a
    square for resize_mode "stretch", of its own pixels for "keep_ratio". A side longer than the picture's is cut to it.
    """
    height, width = pixels.shape[:2]
    area = uniform(words[AREA], options.min_scale, 1.0)
    aspect = math.exp(uniform(words[ASPECT], -1.0, 1.0) * math.log(options.max_aspect))
    unit = (width, height) if options.resize_mode == "stretch" else (math.sqrt(width * height),) * 2
    crop_width = min(width, unit[0] * math.sqrt(area * aspect))
    crop_height = min(height, unit[1] * math.sqrt(area / aspect))
    left = uniform(words[CROP_X], 0.0, width - crop_width)
    top = uniform(words[CROP_Y], 0.0, height - crop_height)
    box = (left, top, min(width, left + crop_width), min(height, top + crop_height))
    return np.asarray(Image.fromarray(pixels).resize((options.image_size,) * 2, resampling(options), box=box))


def jitter(pixels: Pixels, strength: float, words: RandomWords) -> Pixels:
    """Returns a copy with brightness, then contrast, then saturation scaled by 1 - strength to 1 + strength."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    steps = ((ImageEnhance.Brightness, BRIGHTNESS), (ImageEnhance.Contrast, CONTRAST), (ImageEnhance.Color, SATURATION))
    for enhancer, position in steps:
        picture = enhancer(picture).enhance(uniform(words[position], 1 - strength, 1 + strength))
    return np.asarray(picture)


def balance(pixels: Pixels, strength: float, words: RandomWords) -> Pixels:
    """Returns a uint8 copy, clipped, with each colour scaled by its own factor of 1 - strength to 1 + strength."""
    factors = [uniform(words[position], 1 - strength, 1 + strength) for position in (RED, GREEN, BLUE)]
    return np.clip(pixels * np.array(factors, np.float32) + 0.5, 0, 255).astype(np.uint8)


def erase(pixels: Pixels, chance: float, words: RandomWords) -> Pixels:
    """Returns, with probability `chance`, a copy with a square, 0.2 to 0.5 of its side, in ERASED; else `pixels`."""
    if uniform(words[ERASE], 0.0, 1.0) >= chance:
        return pixels
    height, width = pixels.shape[:2]
    half = uniform(words[ERASE_SIDE], 0.1, 0.25)
    y, x = (uniform(words[position], 0.0, 1.0) for position in (ERASE_Y, ERASE_X))
    rows, columns = (
        slice(max(0, round((centre - half) * side)), round((centre + half) * side))
        for centre, side in ((y, height), (x, width))
    )
    painted = pixels.copy()
    painted[rows, columns] = ERASED
    return painted
