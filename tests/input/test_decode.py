"""Decoding, resizing and the centre crop: Pillow's pixels from every decoder, and an error for every damaged file."""

import contextlib
import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline.input import decode as decode_module
from data_pipeline.input.augment import augment, augment_words
from data_pipeline.input.decode import MAX_PIXELS, centre_crop, decode, load_picture, read_picture, resize
from data_pipeline.input.options import FrameOptions
from tests.input.pictures import as_pillow, encoded, picture

SMALL = FrameOptions(image_size=24, resize=32)


JPEG_KINDS = [
    {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    for quality in (30, 95)
    for subsampling in (0, 1, 2)
    for progressive in (False, True)
]


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("size", [(64, 48), (127, 65), (9, 8), (1, 1)], ids=str)
def test_simplejpeg_gives_pillows_pixels(size, options):
    data = encoded(picture(*size), "JPEG", **options)
    np.testing.assert_array_equal(decode(data), as_pillow(data))
    grey = encoded(picture(*size, "L"), "JPEG", **options | {"subsampling": -1})
    np.testing.assert_array_equal(decode(grey), as_pillow(grey))


def palette_with_alpha() -> bytes:
    image = picture(40, 30, "P")
    return encoded(image, "PNG", transparency=bytes(range(256)))


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(40, 30, "L"), "JPEG"),
        encoded(picture(40, 30, "CMYK"), "JPEG"),
        encoded(picture(40, 30, "RGBA"), "PNG"),
        encoded(picture(40, 30, "LA"), "PNG"),
        encoded(picture(40, 30, "1"), "PNG"),
        encoded(picture(40, 30), "WEBP", lossless=True),
        encoded(picture(40, 30), "WEBP", quality=50),
        encoded(picture(40, 30), "BMP"),
        encoded(picture(40, 30), "PPM"),
        encoded(picture(40, 30), "TIFF"),
        encoded(picture(40, 30, "P"), "PNG"),
    ],
    ids=[
        "grey_jpeg",
        "cmyk_jpeg",
        "rgba",
        "grey_alpha",
        "bits",
        "webp_lossless",
        "webp",
        "bmp",
        "ppm",
        "tiff",
        "palette",
    ],
)
def test_every_kind_of_picture_decodes_as_pillows_convert(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(data)
    assert pixels.shape == (30, 40, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, as_pillow(data))


def test_exif_orientation_is_left_alone_unless_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = encoded(picture(40, 30), "JPEG", exif=exif)
    assert decode(data).shape == (30, 40, 3)
    turned = decode(data, apply_exif=True)
    np.testing.assert_array_equal(turned, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    assert turned.shape == (40, 30, 3)


WHOLE_JPEG = encoded(picture(120, 90), "JPEG")
WHOLE_PNG = encoded(picture(120, 90), "PNG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes, needs a JPEG"),
        (b"no picture, a text file", r"is not a picture \(starts with b'no pictu'\), needs JPEG, PNG"),
        (WHOLE_JPEG[:1000], r"cannot be decoded \(.*truncated.*\), needs a whole picture"),
        (WHOLE_JPEG[:3], "is not a picture"),
        (WHOLE_PNG[: len(WHOLE_PNG) // 2], "cannot be decoded"),
        (WHOLE_PNG[:60] + b"\0\1\2\3" + WHOLE_PNG[64:], "cannot be decoded"),
    ],
    ids=["empty", "text", "truncated_jpeg", "jpeg_magic", "truncated_png", "damaged_png"],
)
def test_unreadable_bytes_say_what_is_wrong_and_what_is_needed(data, message):
    with pytest.raises(ValueError, match=message):
        decode(data)


def test_every_truncation_of_a_jpeg_is_refused_or_pillows_pixels():
    data = encoded(picture(40, 30), "JPEG")
    for length in range(1, len(data), 7):
        try:
            expected = as_pillow(data[:length])
        except OSError:
            with pytest.raises(ValueError, match="needs"):
                decode(data[:length])
        else:
            np.testing.assert_array_equal(decode(data[:length]), expected)


SEEDS = [
    WHOLE_JPEG,
    WHOLE_PNG,
    palette_with_alpha(),
    *(encoded(picture(9, 7), kind) for kind in ("WEBP", "TIFF", "BMP")),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_pillows_pixels_or_a_value_error(seed, damages):
    data = seed
    for place, replacement in damages:
        data = data[:place] + replacement + data[place + 2 :]
    with contextlib.suppress(ValueError):  # any other error fails the test
        decoded = read_picture(data, max_pixels=10**6)
        with contextlib.suppress(Exception):  # Pillow alone ends at damage beside the pixels
            pixels = as_pillow(data)
            if decoded.mode in ("RGB", "L") and not decoded.is_transparent:
                np.testing.assert_array_equal(decoded.pixels, pixels)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_bomb(width: int, height: int) -> bytes:
    """A JPEG whose header declares another size."""
    start = WHOLE_JPEG.index(b"\xff\xc0") + 5
    return WHOLE_JPEG[:start] + struct.pack(">HH", height, width) + WHOLE_JPEG[start + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bomb", [png_bomb, jpeg_bomb])
@pytest.mark.parametrize("size", [(8193, 8192), (12_000, 12_000), (60_000, 60_000)], ids=str)
def test_decompression_bombs_are_refused_before_they_are_decoded(bomb, size):
    with pytest.raises(ValueError, match="declares more than 67108864 pixels"):
        decode(bomb(*size))


def test_a_picture_at_the_limit_is_decoded():
    data = encoded(picture(20, 10), "JPEG")
    assert decode(data, max_pixels=200).shape == (10, 20, 3)
    with pytest.raises(ValueError, match="declares more than 199 pixels"):
        decode(data, max_pixels=199)


# --- resizing and cropping --------------------------------------------------------------------------------------------


def test_stretch_resizes_as_the_official_transform():
    image = picture(130, 70)
    resized = resize(np.asarray(image), FrameOptions())
    np.testing.assert_array_equal(resized, np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR)))


def test_a_picture_of_the_right_size_is_not_resized():
    pixels = np.asarray(picture(32, 32))
    assert resize(pixels, SMALL) is pixels


@pytest.mark.parametrize(("size", "resized"), [((100, 50), (64, 32)), ((50, 101), (32, 64)), ((33, 32), (33, 32))])
def test_keep_ratio_resizes_the_shorter_side_with_clips_filter(size, resized):
    image = picture(*size)
    options = FrameOptions(image_size=24, resize=32, resize_mode="keep_ratio")
    expected = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(np.asarray(image), options), expected)


EXTREME = [(2, 60_000), (60_000, 2), (1, 1), (1, 65_535), (3, 50_001), (8, 8_000)]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [
    FrameOptions(resize_mode="keep_ratio"), FrameOptions(), FrameOptions(resize=3000, resize_mode="keep_ratio"),
    FrameOptions(min_scale=0.3, max_aspect=1.5, shrink_to=448, resize_mode="keep_ratio"), FrameOptions(min_scale=0.3),
], ids=["keep_ratio", "stretch", "large", "keep_ratio_scaled", "stretch_scaled"])  # fmt: skip
@pytest.mark.parametrize("size", EXTREME, ids=str)
def test_a_picture_of_any_shape_becomes_a_crop(size, options, train):
    data = encoded(picture(*size), "PNG")
    loaded = load_picture(data, options, train=train)
    assert loaded.shape[0] * loaded.shape[1] <= MAX_PIXELS
    if train:
        assert augment(loaded, options, augment_words(0, 0, 0, 0)).shape == (224, 224, 3)
    else:
        assert centre_crop(loaded, options).shape == (224, 224, 3)


@pytest.mark.parametrize("size", [(2, 60_000), (60_000, 2), (40_000, 1)], ids=str)
def test_the_middle_of_a_long_picture_is_that_of_the_whole(size, monkeypatch):
    options = FrameOptions(image_size=6, resize=8, resize_mode="keep_ratio")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    whole = centre_crop(resize(pixels, options), options)
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 8 * 8 * 1000)
    short = resize(pixels, options)
    assert max(short.shape) <= 8 * 17
    np.testing.assert_array_equal(centre_crop(short, options), whole)


@pytest.mark.parametrize("size", [(640, 360), (360, 640), (100, 3000), (4000, 37), (255, 256)], ids=str)
def test_an_ordinary_shape_is_resized_as_a_whole(size):
    options = FrameOptions(resize_mode="keep_ratio")
    image, short = picture(*size), min(size)
    expected = image.resize(tuple(256 * side // short for side in size), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(np.asarray(image), options), np.asarray(expected))


def test_centre_crop_has_offset_16_of_256():
    pixels = np.asarray(picture(256, 256))
    np.testing.assert_array_equal(centre_crop(pixels, FrameOptions()), pixels[16:240, 16:240])


def test_frames_needs_no_jax():
    code = """
import sys
import data_pipeline.input.decode, data_pipeline.input.plan
sys.exit("jax" in sys.modules or "grain" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
