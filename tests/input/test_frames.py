"""Frames: which are chosen, that every decoder gives Pillow's pixels, and that random ranges reach both ends."""

import contextlib
import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline.input import augment as augment_module
from data_pipeline.input import decode as decode_module
from data_pipeline.input.augment import ERASED, PICTURE_WORDS, WHOLE_CLIP, augment, below, draw_words, uniform
from data_pipeline.input.decode import centre_crop, decode, resize
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.sampling import choose_frames, frames_kept, sample_frames

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fixture_temporal.json").read_text())
SMALL = FrameOptions(image_size=24, resize=32)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes with transparency
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# --- which frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["no_cut"], ids=lambda case: f"{case['frames']} frames")
def test_sampling_agrees_with_the_official_processor(case):
    indices = sample_frames(case["frames"], 10).tolist()
    assert indices == [index for index in case["indices"] if index >= 0]
    assert len(indices) == sum(case["mask"])


@pytest.mark.parametrize("case", GOLDEN["official_train_and_test"], ids=lambda case: str(list(case.values())[:3]))
def test_tail_cut_agrees_with_the_official_processor(case):
    indices = sample_frames(case["frames"], 10)
    gate, fraction = round(10 * (case["gate"] or 0)), round(10 * (case["fraction"] or 0))
    kept = frames_kept(len(indices), 10, gate, fraction)
    assert indices[:kept].tolist() == [index for index in case["indices"] if index >= 0]


def test_sampling_agrees_with_numpys_linspace_for_ten_slots():
    for count in range(11, 3000):
        assert sample_frames(count, 10).tolist() == np.linspace(0, count - 1, 10).astype(int).tolist()


@pytest.mark.parametrize("slots", [1, 2, 3, 10, 25])
def test_sampling_keeps_order_and_both_ends_for_any_number_of_slots(slots):
    for count in range(1, 60):
        indices = sample_frames(count, slots)
        assert len(indices) == min(count, slots)
        assert np.all(np.diff(indices) > 0)
        assert indices[0] == 0
        assert indices[-1] == (count - 1 if slots > 1 else 0)


def test_a_clip_without_frames_is_refused():
    with pytest.raises(ValueError, match="found 0 frames, needs at least 1"):
        sample_frames(0, 10)


def clip_words(example: int) -> np.ndarray:
    return draw_words(0, 0, example, WHOLE_CLIP, 12)


def test_tail_cut_keeps_ten_half_of_the_time_and_else_one_to_ten_alike():
    options = FrameOptions()
    kept = Counter(len(choose_frames(30, options, clip_words(e), train=True)) for e in range(4000))
    assert set(kept) == set(range(1, 11))
    expected = {n: 4000 * (0.05 + 0.5 * (n == 10)) for n in range(1, 11)}
    assert sum((kept[n] - expected[n]) ** 2 / expected[n] for n in kept) < 27.9  # 9 degrees of freedom, once in 1,000


def test_tail_cut_spares_short_clips_and_evaluation():
    options = FrameOptions()
    for example in range(200):
        for count in range(1, 10):
            assert len(choose_frames(count, options, clip_words(example), train=True)) == count
        assert len(choose_frames(10, options, clip_words(example), train=False)) == 10
    uncut = FrameOptions(tail_cut=False)
    assert all(len(choose_frames(10, uncut, clip_words(e), train=True)) == 10 for e in range(200))


def test_tail_cut_in_evaluation_is_the_same_cut_when_asked_for():
    tested = FrameOptions(test_tail_cut=True, tail_cut=False)
    trained = FrameOptions()
    for example in range(100):
        in_test = choose_frames(40, tested, clip_words(example), train=False)
        assert in_test.tolist() == choose_frames(40, trained, clip_words(example), train=True).tolist()


def test_random_sampling_draws_every_subset_alike_and_in_order():
    options = FrameOptions(num_frames=2, frame_sampling="random", tail_cut=False)
    counts = Counter(
        tuple(choose_frames(5, options, draw_words(0, 0, e, WHOLE_CLIP, 4), train=True).tolist()) for e in range(2000)
    )
    assert set(counts) == {(i, j) for i in range(5) for j in range(i + 1, 5)}
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 27.9  # 9 degrees of freedom, once in 1,000
    evaluated = choose_frames(5, options, draw_words(0, 0, 1, WHOLE_CLIP, 4), train=False)
    assert evaluated.tolist() == [0, 4]


# --- random words -----------------------------------------------------------------------------------------------------


def test_words_never_change():
    assert [hex(word) for word in draw_words(1, 2, 3, 4, 2)] == ["0xe68bb1ac73a6d654", "0x6e4d78251d7be7f8"]


def test_words_differ_between_seeds_epochs_examples_and_pictures():
    keys = [(s, e, x, p) for s in (0, 1) for e in (0, 1) for x in (0, 1) for p in (0, 1, 2, WHOLE_CLIP)]
    drawn = {int(word) for key in keys for word in draw_words(*key, 8)}
    assert len(drawn) == len(keys) * 8


def test_below_reaches_both_ends_and_no_further():
    top = np.uint64(2**64 - 1)
    for bound in (1, 2, 10, 33, 1000):
        assert (below(np.uint64(0), bound), below(top, bound)) == (0, bound - 1)
    assert uniform(np.uint64(0), 0.5, 1.5) == 0.5
    assert 1.5 - 1e-9 < uniform(top, 0.5, 1.5) <= 1.5


# --- decoding ---------------------------------------------------------------------------------------------------------

JPEG_KINDS = [
    {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    for quality in (30, 95)
    for subsampling in (0, 1, 2)
    for progressive in (False, True)
]


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("size", [(64, 48), (127, 65), (9, 8), (1, 1)], ids=str)
def test_simplejpeg_gives_pillows_pixels(size, options):
    pytest.importorskip("simplejpeg")
    data = encoded(picture(*size), "JPEG", **options)
    np.testing.assert_array_equal(decode(data), as_pillow(data))


def test_pillow_alone_gives_the_same_pixels(monkeypatch):
    data = encoded(picture(50, 40), "JPEG")
    with_it = decode(data)
    monkeypatch.setattr(decode_module, "simplejpeg", None)
    np.testing.assert_array_equal(decode(data), with_it)


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
        encoded(Image.fromarray(np.arange(0, 60_000, 50, dtype=np.uint16).reshape(30, 40)), "PNG"),
        encoded(picture(40, 30), "WEBP", lossless=True),
        encoded(picture(40, 30), "WEBP", quality=50),
        encoded(picture(40, 30), "BMP"),
        encoded(picture(40, 30), "PPM"),
        encoded(picture(40, 30), "TIFF"),
        palette_with_alpha(),
    ],
    ids=[
        "grey_jpeg",
        "cmyk_jpeg",
        "rgba",
        "grey_alpha",
        "bits",
        "16_bit",
        "webp_lossless",
        "webp",
        "bmp",
        "ppm",
        "tiff",
        "palette_alpha",
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
        (encoded(picture(8, 8), "GIF"), "is not a picture"),
    ],
    ids=["empty", "text", "truncated_jpeg", "jpeg_magic", "truncated_png", "damaged_png", "gif"],
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
        pixels = decode(data, max_pixels=10**6)
        np.testing.assert_array_equal(pixels, as_pillow(data))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that only declares its size."""
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


# --- resizing and augmentation ----------------------------------------------------------------------------------------


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


def test_a_hair_is_not_blown_up_to_gigabytes():
    hair = np.zeros((1, 20_000, 3), np.uint8)
    with pytest.raises(ValueError, match="is 20000 x 1, too narrow"):
        resize(hair, FrameOptions(resize_mode="keep_ratio"))


def test_centre_crop_has_offset_16_of_256():
    pixels = np.asarray(picture(256, 256))
    np.testing.assert_array_equal(centre_crop(pixels, FrameOptions()), pixels[16:240, 16:240])


def words_for(**positions: int) -> np.ndarray:
    drawn = np.zeros(PICTURE_WORDS, np.uint64)
    for name, word in positions.items():
        drawn[getattr(augment_module, name.upper())] = word
    return drawn


def test_crop_reaches_offsets_0_to_32_and_every_corner():
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(256)[:, None], np.arange(256)
    corners = [tuple(augment(pixels, FrameOptions(flip=False), draw_words(0, 0, e, 1))[0, 0, :2]) for e in range(3000)]
    assert {int(y) for y, _ in corners} == set(range(33))
    assert {int(x) for _, x in corners} == set(range(33))
    top = 2**64 - 1
    last = augment(pixels, FrameOptions(flip=False), words_for(crop_y=top, crop_x=top))
    np.testing.assert_array_equal(last, pixels[32:, 32:])


def test_half_of_the_pictures_are_mirrored():
    pixels = np.asarray(picture(32, 32))
    options = FrameOptions(image_size=32, resize=32)
    mirrored = sum(
        np.array_equal(augment(pixels, options, draw_words(0, 0, e, 1)), pixels[:, ::-1]) for e in range(1000)
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
    drawn = [augment(pixels, options, draw_words(5, 0, example, 1)).any() for example in range(2000)]
    assert 0.27 < np.mean(drawn) < 0.33


def test_turning_an_option_on_leaves_the_crop_alone():
    pixels = np.asarray(picture(32, 32))
    for example in range(50):
        drawn = draw_words(0, 0, example, 1)
        plain = augment(pixels, FrameOptions(image_size=24, resize=32, flip=False), drawn)
        jittered = augment(pixels, FrameOptions(image_size=24, resize=32, flip=False, colour_jitter=1e-9), drawn)
        np.testing.assert_array_equal(plain, jittered)


@pytest.mark.parametrize(
    "wrong",
    [
        {"resize_mode": "squash"},
        {"frame_sampling": "all"},
        {"image_size": 257},
        {"image_size": 0},
        {"num_frames": 0},
        {"min_scale": 0.0},
        {"max_aspect": 0.5},
        {"colour_jitter": 1.5},
        {"white_balance": -0.1},
        {"erase": 1.5},
    ],
    ids=str,
)
def test_impossible_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*: found .*{next(iter(wrong.values()))}.*needs"):
        FrameOptions(**wrong)


def test_frames_needs_no_jax():
    code = """
import sys
import data_pipeline.input.decode, data_pipeline.input.plan
sys.exit("jax" in sys.modules or "grain" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
