"""Augmentation: every random range reaches both ends, and each change reads its own random words."""

import numpy as np
import pytest
from PIL import Image

from data_pipeline.input import augment as augment_module
from data_pipeline.input.augment import ERASED, PICTURE_WORDS, augment, augment_words
from data_pipeline.input.options import FrameOptions
from tests.input.pictures import picture


def words_for(**positions: int) -> np.ndarray:
    drawn = np.zeros(PICTURE_WORDS, np.uint64)
    for name, word in positions.items():
        drawn[getattr(augment_module, name.upper())] = word
    return drawn


def test_crop_reaches_offsets_0_to_32_and_every_corner():
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(256)[:, None], np.arange(256)
    unflipped = FrameOptions(flip=False)
    corners = [tuple(augment(pixels, unflipped, augment_words(0, 0, e, 1))[0, 0, :2]) for e in range(3000)]
    assert {int(y) for y, _ in corners} == set(range(33))
    assert {int(x) for _, x in corners} == set(range(33))
    top = 2**64 - 1
    last = augment(pixels, unflipped, words_for(crop_y=top, crop_x=top))
    np.testing.assert_array_equal(last, pixels[32:, 32:])


def test_half_of_the_pictures_are_mirrored():
    pixels = np.asarray(picture(32, 32))
    options = FrameOptions(image_size=32, resize=32)
    mirrored = sum(
        np.array_equal(augment(pixels, options, augment_words(0, 0, e, 1)), pixels[:, ::-1]) for e in range(1000)
    )
    assert 450 < mirrored < 550
    np.testing.assert_array_equal(augment(pixels, options, words_for(flip=0)), pixels)
    np.testing.assert_array_equal(augment(pixels, options, words_for(flip=2**63)), pixels[:, ::-1])


def test_random_scale_crop_resizes_the_whole_picture_at_scale_one():
    image = picture(90, 60)
    options = FrameOptions(image_size=24, resize=32, min_scale=0.25, max_aspect=1.5, flip=False)
    whole = augment(np.asarray(image), options, words_for(area=2**64 - 1, aspect=2**63))
    np.testing.assert_array_equal(whole, np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR)))


def test_random_scale_crop_is_pillows_resize_of_a_box():
    image = picture(96, 64)
    options = FrameOptions(image_size=24, resize=32, min_scale=0.25, flip=False)
    top = 2**64 - 1
    expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box=(48, 32, 96, 64)))
    np.testing.assert_array_equal(augment(np.asarray(image), options, words_for(crop_y=top, crop_x=top)), expected)


def test_random_scale_crop_is_wide_when_the_aspect_is_above_one():
    image = picture(96, 64)
    options = FrameOptions(image_size=24, resize=32, min_scale=0.25, max_aspect=4.0, flip=False)
    wide, tall = (augment(np.asarray(image), options, words_for(aspect=word)) for word in (2**64 - 1, 0))
    np.testing.assert_array_equal(
        wide, np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box=(0, 0, 96, 16)))
    )
    np.testing.assert_array_equal(
        tall, np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box=(0, 0, 24, 64)))
    )


@pytest.mark.parametrize("resize_mode", ["stretch", "keep_ratio"])
def test_random_scale_crop_never_leaves_the_picture(resize_mode):
    options = FrameOptions(image_size=8, resize=8, min_scale=0.1, max_aspect=3.0, resize_mode=resize_mode)
    extremes = [0, 2**63, 2**64 - 1]
    for size in [(40, 9), (7, 60), (1, 1)]:
        pixels = np.asarray(picture(*size))
        for area in extremes:
            for aspect in extremes:
                for offset in extremes:
                    drawn = words_for(area=area, aspect=aspect, crop_x=offset, crop_y=offset)
                    assert augment(pixels, options, drawn).shape == (8, 8, 3)


def test_colour_jitter_reaches_both_ends_and_its_middle_changes_nothing():
    pixels = np.asarray(picture(16, 16)) // 2 + 50
    options = FrameOptions(image_size=16, resize=16, flip=False, colour_jitter=0.5)
    middle = words_for(brightness=2**63, contrast=2**63, saturation=2**63)
    np.testing.assert_array_equal(augment(pixels, options, middle), pixels)
    dark, bright = (words_for(brightness=w, contrast=2**63, saturation=2**63) for w in (0, 2**64 - 1))
    np.testing.assert_allclose(augment(pixels, options, dark), pixels * 0.5, atol=1)
    np.testing.assert_allclose(augment(pixels, options, bright), np.minimum(pixels * 1.5, 255), atol=1)


def test_white_balance_turns_each_channel_by_its_own_word():
    pixels = np.asarray(picture(16, 16)) // 2 + 50
    options = FrameOptions(image_size=16, resize=16, flip=False, white_balance=0.2)
    middle = {"red": 2**63, "green": 2**63, "blue": 2**63}
    np.testing.assert_array_equal(augment(pixels, options, words_for(**middle)), pixels)
    for channel, name in enumerate(middle):
        for word, factor in ((0, 0.8), (2**64 - 1, 1.2)):
            expected = pixels.astype(float)
            expected[..., channel] *= factor
            found = augment(pixels, options, words_for(**middle | {name: word}))
            np.testing.assert_allclose(found, np.minimum(expected, 255), atol=0.51)


@pytest.mark.parametrize(("side_word", "area"), [(0, 8 * 8), (2**64 - 1, 20 * 20)])  # 0.2 and 0.5 of 40 px
def test_erasing_paints_one_square_of_the_side_it_drew(side_word: int, area: int) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    options = FrameOptions(image_size=40, resize=40, flip=False, erase=0.5)
    centre = {"erase_y": 2**63, "erase_x": 2**63, "erase_side": side_word}
    found = augment(pixels, options, words_for(erase=0, **centre))
    painted = (found == ERASED).all(axis=-1)
    rows, columns = np.nonzero(painted)
    assert painted.sum() == area == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert rows.mean() == columns.mean() == 19.5 and not found[~painted].any() and not pixels.any()
    corner = augment(pixels, options, words_for(erase=0, erase_side=side_word))
    assert (corner == ERASED).all(axis=-1).sum() == area / 4  # its centre is the picture's corner


def test_erasing_happens_as_often_as_asked():
    pixels = np.zeros((8, 8, 3), np.uint8)
    options = FrameOptions(image_size=8, resize=8, flip=False, erase=0.3)
    drawn = [augment(pixels, options, augment_words(5, 0, example, 1)).any() for example in range(2000)]
    assert 0.27 < np.mean(drawn) < 0.33


def test_turning_an_option_on_leaves_the_crop_alone():
    pixels = np.asarray(picture(32, 32))
    for example in range(50):
        drawn = augment_words(0, 0, example, 1)
        plain = augment(pixels, FrameOptions(image_size=24, resize=32, flip=False), drawn)
        jittered = augment(pixels, FrameOptions(image_size=24, resize=32, flip=False, colour_jitter=1e-9), drawn)
        np.testing.assert_array_equal(plain, jittered)


def test_words_differ_by_seed_epoch_example_and_picture_and_keep_their_uses() -> None:
    given = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    drawn = [tuple(augment_words(*words).tolist()) for words in given]
    assert len(set(drawn)) == len(given)
    # A run that goes on must read the word that it would have read: no version may change these.
    uses = (
        "CROP_Y CROP_X FLIP AREA ASPECT BRIGHTNESS CONTRAST SATURATION RED GREEN BLUE ERASE ERASE_Y ERASE_X ERASE_SIDE"
    )
    assert [getattr(augment_module, use) for use in uses.split()] == list(range(augment_module.PICTURE_WORDS))
