"""Damaged pictures: a strict decode refuses them, and training still reads what Pillow reads."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from data_pipeline.input.decode import FORMATS, PictureError, decode, read_picture
from data_pipeline.input.metadata import ORIENTATION, jpeg_segments, png_chunks
from tests.input.pictures import as_pillow, encoded, picture

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data" / "grocery").glob("*.jpg"))
DESTROYED = 10  # levels of 255 by which a picture differs on average


def overwritten(seed: int) -> tuple[bytes, bytes]:
    """Returns a photograph's bytes, and the same with 200 random ones among its coded pixels."""
    draws = np.random.default_rng(seed)
    data = PHOTOGRAPHS[seed % len(PHOTOGRAPHS)].read_bytes()
    begin = [end for _, _, end in jpeg_segments(data)][-1] + 16
    at = int(draws.integers(begin, len(data) - 202))
    return data, data[:at] + draws.bytes(200) + data[at + 200 :]


def is_sound(data: bytes) -> bool:
    try:
        return bool(read_picture(data, strict=True))
    except PictureError:
        return False


def test_a_destroyed_jpeg_is_refused_and_training_reads_it_as_before():
    accepted = destroyed = 0
    for seed in range(100):
        whole, data = overwritten(seed)
        try:
            pixels = as_pillow(data)
        except OSError:
            with pytest.raises(PictureError):
                read_picture(data, strict=True)
            continue
        np.testing.assert_array_equal(decode(data), pixels)
        visible = np.abs(pixels.astype(int) - as_pillow(whole)).mean() > DESTROYED
        destroyed += visible
        accepted += visible and is_sound(data)
    assert destroyed > 40
    assert accepted < destroyed / 8  # those whose bytes are by chance valid codes of possible colours


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_file_that_was_cut_off_is_refused(kind, share):
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    data = encoded(picture(200, 150, "RGB" if kind != "GIF" else "P"), kind, **options)
    with pytest.raises(PictureError):
        read_picture(data[: int(len(data) * share)], strict=True)


def test_a_png_with_a_wrong_checksum_is_refused():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)), "PNG")
    begin, end = next((begin, end) for kind, begin, end, _ in png_chunks(data) if kind == b"IDAT")
    refused = 0
    for at in range(begin + 8, end - 4, 997):
        damaged = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        with pytest.raises(PictureError, match=r"wrong checksum in its chunk IDAT|cannot be decoded"):
            read_picture(damaged, strict=True)
        refused += 1
    assert refused > 20


GREY_LOSS = encoded(picture(200, 150, "L"), "JPEG")
INK_LOSS = encoded(picture(200, 150, "CMYK"), "JPEG")


@pytest.mark.parametrize("data", [GREY_LOSS, INK_LOSS, encoded(picture(200, 150), "JPEG", progressive=True)])
def test_other_jpegs_with_lost_pixels_are_refused_too(data):
    lost = data[: len(data) // 2] + b"\xff\xd9"
    with pytest.raises(PictureError, match="has lost pixels"):
        read_picture(lost, strict=True)
    np.testing.assert_array_equal(decode(lost), as_pillow(lost))


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_whole_photographs_are_sound(path):
    data = path.read_bytes()
    decoded = read_picture(data, strict=True)
    np.testing.assert_array_equal(decoded.pixels, as_pillow(data))
    kinds = ({"quality": 5}, {"quality": 100, "subsampling": 0}, {"progressive": True}, {"restart_marker_rows": 1})
    for options in kinds:
        again = encoded(Image.fromarray(decoded.pixels), "JPEG", **options)
        np.testing.assert_array_equal(read_picture(again, strict=True).pixels, as_pillow(again))


def bars(*colours: tuple[int, int, int], width: int) -> Image.Image:
    image = Image.new("RGB", (160, 120))
    for left in range(0, 160, width):
        image.paste(colours[left // width % len(colours)], (left, 0, left + width, 120))
    return image


@pytest.mark.parametrize("width", [1, 3, 8, 13, 16, 40])
@pytest.mark.parametrize("subsampling", ["444", "422", "440", "420", "411"])
def test_glaring_colours_are_no_damage(subsampling, width):
    red, green, blue, black = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
    for pair in ((red, black), ((255, 255, 0), blue), (green, (255, 0, 255)), (black, (255, 255, 0))):
        for quality in (5, 50, 95):
            pixels = np.asarray(bars(*pair, width=width))
            data = simplejpeg.encode_jpeg(pixels, quality, colorspace="RGB", colorsubsampling=subsampling)
            assert read_picture(data, strict=True).size == (160, 120)


def test_colours_of_films_are_no_damage():
    """A green screen in BT.709, of which no program knows when it writes a JPEG: 44 levels out of range."""
    y, cb, cr = (np.full((32, 32), level, np.uint8) for level in (182, 30, 12))
    data = simplejpeg.encode_jpeg_yuv_planes(y, cb[::2, ::2].copy(), cr[::2, ::2].copy(), quality=90)
    assert read_picture(data, strict=True).size == (32, 32)
    y, cb, cr = (np.full((32, 32), level, np.uint8) for level in (20, 250, 220))
    data = simplejpeg.encode_jpeg_yuv_planes(y, cb[::2, ::2].copy(), cr[::2, ::2].copy(), quality=90)
    with pytest.raises(PictureError, match="colours that no camera writes"):
        read_picture(data, strict=True)


def test_warnings_that_lose_no_pixels_are_none():
    data = encoded(picture(200, 150), "JPEG")
    jfif = data.index(b"JFIF\0")
    version = data[: jfif + 5] + b"\x09" + data[jfif + 6 :]
    adobe = data[:2] + b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x07" + data[2:]
    scan = data.index(b"\xff\xda") + 2 + int.from_bytes(data[data.index(b"\xff\xda") + 2 :][:2], "big")
    parameters = data[: scan - 3] + b"\0\0\0" + data[scan:]  # some phones write 0, 0, 0 in place of 0, 63, 0
    for odd in (version, adobe, parameters):
        np.testing.assert_array_equal(read_picture(odd, strict=True).pixels, as_pillow(odd))


def test_bytes_that_pad_the_coded_pixels_are_no_damage():
    data = encoded(picture(200, 150), "JPEG")
    for padding in (b"\0", b"\0" * 4, b"\0" * 700):
        padded = data[:-2] + padding + data[-2:]
        np.testing.assert_array_equal(read_picture(padded, strict=True).pixels, as_pillow(data))
    with pytest.raises(PictureError, match="extraneous bytes"):
        read_picture(data[:-2] + data[-100:], strict=True)


EXIF = Image.Exif()
EXIF[ORIENTATION] = 6
SEEDS = [
    encoded(picture(24, 18), "JPEG", exif=EXIF, icc_profile=bytes(200)),
    encoded(picture(24, 18, "RGBA"), "PNG", exif=EXIF, icc_profile=bytes(200)),
    encoded(picture(24, 18).convert("P"), "PNG", transparency=3),
    encoded(picture(24, 18, "RGBA"), "WEBP", exif=EXIF, icc_profile=bytes(200)),
    encoded(picture(24, 18), "TIFF", compression="tiff_lzw"),
    encoded(picture(24, 18, "L").convert("I"), "TIFF"),
    *(encoded(picture(24, 18), kind) for kind in FORMATS),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4)), max_size=5), st.data())
@pytest.mark.filterwarnings("ignore")
def test_what_a_conversion_accepts_is_read_by_training(seed, damages, draw):
    data = seed
    for place, replacement in damages:
        place %= len(data)
        data = data[:place] + replacement + data[place + len(replacement) :]
    data = data[: draw.draw(st.integers(1, len(data)) | st.just(len(data)))]
    with contextlib.suppress(PictureError):  # any other error fails the test
        sound = read_picture(data, strict=True, max_pixels=10**6)
        assert sound.format in FORMATS
        turned = decode(data, apply_exif=True, to_srgb=True, max_pixels=10**6)
        assert sorted(turned.shape) == sorted(decode(data).shape) == sorted(sound.pixels.shape)


def test_the_setting_of_another_library_does_not_let_damage_through(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(picture(200, 150), "JPEG")
    with pytest.raises(PictureError):
        read_picture(data[: len(data) // 2], strict=True)
