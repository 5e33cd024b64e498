"""Kinds of pictures that people have: odd metadata, many bits, transparency, profiles, wrong names, other formats."""

import io
import itertools
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from data_pipeline.input.decode import FORMATS, PictureError, decode, read_picture
from data_pipeline.input.metadata import ORIENTATION, TURNS, png_chunks
from tests.input.pictures import as_pillow, encoded, picture

GREY = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)


# --- EXIF -------------------------------------------------------------------------------------------------------------


def tiff(entries: list[tuple[int, int, int, bytes]], order: str = "<", orientation: bytes | None = None) -> bytes:
    """Returns EXIF data with (tag, type, count, four bytes of value or offset), and an orientation of short 6."""
    six = struct.pack(f"{order}HH", 6, 0) if orientation is None else orientation
    directory = sorted([*entries, (ORIENTATION, 3, 1, six)])
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in directory)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + start + struct.pack(f"{order}H", len(directory)) + body + bytes(4)


def with_exif(exif: bytes, mode: str = "RGB") -> bytes:
    return encoded(picture(40, 30, mode), "JPEG", exif=exif)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_turn_as_pillow_turns_them(orientation, mode):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(picture(40, 30, mode), "JPEG", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode(data, apply_exif=True), np.asarray(turned))
    np.testing.assert_array_equal(decode(data), as_pillow(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", *(["AVIF"] if features.check("avif") else [])])
def test_other_formats_are_turned_by_their_exif_too(kind):
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    data = encoded(picture(40, 30), kind, exif=exif)
    np.testing.assert_array_equal(decode(data, apply_exif=True), np.rot90(as_pillow(data)))


def test_a_tiff_is_turned_once():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(picture(40, 30), "TIFF", exif=exif)
    assert decode(data).shape == decode(data, apply_exif=True).shape == (40, 30, 3)


def test_odd_tags_of_a_tiff_do_not_matter():
    plain = encoded(picture(40, 30), "TIFF")
    (first,), upright = struct.unpack_from("<I", plain, 4), decode(plain)
    stored = [plain[at : at + 12] for at in range(first + 2, first + 2 + 12 * plain[first], 12)]
    odd = (1, 21, 270, 282, 305, 316, 34853, 40961, 65000)
    for tag, kind, count in itertools.product(odd, range(1, 13), (2, 2**31)):
        added = struct.pack("<HHII", tag, kind, count, 2**20), struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
        present = {entry[:2] for entry in added}
        entries = sorted(
            (*added, *(entry for entry in stored if entry[:2] not in present)), key=lambda each: each[1::-1]
        )
        directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        data = plain[:4] + struct.pack("<I", len(plain)) + plain[8:] + directory
        np.testing.assert_array_equal(decode(data, apply_exif=True), np.rot90(upright, 3))


def test_orientation_in_imagemagicks_text_and_in_xmp():
    raw = tiff([]).hex()
    data = encoded(picture(40, 30), "PNG")
    text = b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(raw) // 2:8}\n{raw}\n".encode())
    assert decode(with_chunk(data, b"zTXt", text), apply_exif=True).shape == (40, 30, 3)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode(encoded(picture(40, 30), "JPEG", xmp=xmp), apply_exif=True).shape == (40, 30, 3)
    assert decode(encoded(picture(40, 30), "WEBP", xmp=xmp), apply_exif=True).shape == (40, 30, 3)
    upright = tiff([], orientation=struct.pack("<HH", 1, 0))
    assert decode(encoded(picture(40, 30), "JPEG", xmp=xmp, exif=upright), apply_exif=True).shape == (30, 40, 3)


def test_any_single_odd_tag_leaves_the_orientation_as_it_is():
    upright = decode(with_exif(b""))
    expected = np.rot90(upright, 3)
    tags = (0x0001, 0x010F, 0x011A, 0x0111, 0x0201, 0x8769, 0x8825, 0x9204, 0x927C, 0xEA1C, 0xFFFF)
    values = (bytes(4), b"\xff" * 4, struct.pack("<I", 2**31), b"\x02\0\x02\0")
    sizes = (0, 1, 2, 5, 2**31)
    for tag, kind, count, value in itertools.product(tags, range(16), sizes, values):
        data = with_exif(tiff([(tag, kind, count, value)]))
        decoded = read_picture(data, apply_exif=True, strict=True)
        assert decoded.metadata.orientation == 6
        np.testing.assert_array_equal(decoded.pixels, expected)


@pytest.mark.parametrize(
    "exif",
    [
        *(tiff([], orientation=struct.pack("<HH", value, 0)) for value in (0, 9, 65535)),
        tiff([], "<").replace(struct.pack("<HHI", ORIENTATION, 3, 1), struct.pack("<HHI", ORIENTATION, 2, 2)),
        tiff([], "<").replace(struct.pack("<HHI", ORIENTATION, 3, 1), struct.pack("<HHI", ORIENTATION, 3, 2)),
        tiff([], "<").replace(struct.pack("<HHI", ORIENTATION, 3, 1), struct.pack("<HHI", ORIENTATION, 5, 1)),
        tiff([])[:12],
        tiff([])[:22],
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0no EXIF at all",
    ],
    ids=["0", "9", "65535", "text", "list", "fraction", "cut", "cut tag", "empty", "offset outside", "text instead"],
)
def test_an_orientation_that_is_none_turns_nothing(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(with_exif(exif), apply_exif=True).shape == (30, 40, 3)


def test_both_byte_orders_and_long_values():
    assert decode(with_exif(tiff([], ">")), apply_exif=True).shape == (40, 30, 3)
    for order in "<>":
        long = tiff([], order, struct.pack(f"{order}I", 6))
        at = long.index(struct.pack(f"{order}H", ORIENTATION)) + 2
        long = long[:at] + struct.pack(f"{order}H", 4) + long[at + 2 :]
        assert decode(with_exif(long), apply_exif=True).shape == (40, 30, 3)


# --- more than 8 bits -------------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def pgm(values: np.ndarray, largest: int) -> bytes:
    height, width = values.shape[:2]
    kind = "P5" if values.ndim == 2 else "P6"
    return f"{kind} {width} {height} {largest}\n".encode() + values.astype(">u2").tobytes()


def png_of_16_bits(values: np.ndarray, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG of 16 bits. kind: 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = encoded(Image.new("L", (1, 1)), "PNG")[:8]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    for name, content in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += chunk(name, content)
    return data


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=-1)


RGB16 = np.random.default_rng(0).integers(0, 65536, (30, 40, 3)).astype(np.uint16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.fromarray(GREY), "PNG"), grey(GREY >> 8)),
        (encoded(Image.fromarray(GREY), "TIFF"), grey(GREY >> 8)),
        (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), grey(np.round(GREY / 257))),
        (encoded(Image.fromarray((GREY / 65535).astype(np.float32)), "TIFF"), grey(np.round(GREY / 257))),
        (encoded(Image.fromarray((GREY / 257).astype(np.float32)), "TIFF"), grey(np.round(GREY / 257))),
        (pgm(GREY, 65535), grey(GREY >> 8)),
        (pgm(GREY >> 4, 4095), grey(np.round((GREY >> 4) / 4095 * 65535).astype(int) >> 8)),
        (pgm(RGB16, 65535), np.round(RGB16 / 257)),
        (png_of_16_bits(RGB16, 2), RGB16 >> 8),
    ],
    ids=["png", "tiff", "tiff_32", "tiff_float", "tiff_255", "pgm", "pgm_12", "ppm", "png_rgb"],
)
def test_more_than_8_bits_are_scaled(data, expected):
    decoded = read_picture(data, strict=True)
    difference = np.abs(decoded.pixels.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and difference.mean() < 0.01
    assert not decoded.is_transparent


def test_odd_floats_are_pixels():
    values = np.array([[-1.0, np.nan], [np.inf, 0.5]], np.float32)
    assert decode(encoded(Image.fromarray(values), "TIFF"))[..., 0].tolist() == [[0, 0], [0, 128]]
    assert decode(encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "PPM")).max() == 128
    assert not decode(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")).any()
    assert decode(encoded(Image.fromarray(np.full((2, 2), -5, np.int32)), "TIFF")).max() == 0


# --- transparency -----------------------------------------------------------------------------------------------------


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """Returns a PNG with one more chunk, before its pixels."""
    at = next(begin for kind, begin, _, _ in png_chunks(png) if kind == b"IDAT")
    return png[:at] + chunk(name, content) + png[at:]


def black_with_hole(mode: str) -> Image.Image:
    """Returns a black picture whose left half is transparent."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 30))
    return image.convert(mode)


PALETTE = Image.new("P", (40, 30), 1)
PALETTE.putpalette([0, 0, 0, 0, 0, 0])
PALETTE.paste(0, (0, 0, 20, 30))
STEPS = Image.new("L", (40, 30), 200)
STEPS.paste(0, (20, 0, 40, 30))
DEEP = np.full((30, 40), 51400, np.uint16)
DEEP[:, 20:] = 0


@pytest.mark.parametrize(
    "data",
    [
        encoded(black_with_hole("RGBA"), "PNG"),
        encoded(black_with_hole("LA"), "PNG"),
        encoded(black_with_hole("RGBA"), "WEBP", lossless=True, exact=True),
        encoded(black_with_hole("RGBA"), "TIFF"),
        encoded(PALETTE, "PNG", transparency=0),
        encoded(PALETTE, "PNG", transparency=b"\0\xff"),
        encoded(PALETTE, "GIF", transparency=0),
        encoded(STEPS, "PNG", transparency=200),
        encoded(STEPS.convert("RGB"), "PNG", transparency=(200, 200, 200)),
        with_chunk(encoded(STEPS.point(lambda level: level // 200).convert("P"), "PNG", bits=1), b"tRNS", b"\xff\0"),
        png_of_16_bits(DEEP, 0, (b"tRNS", struct.pack(">H", 51400))),
        png_of_16_bits(np.repeat(DEEP[..., None], 3, axis=2), 2, (b"tRNS", struct.pack(">HHH", *[51400] * 3))),
        png_of_16_bits(np.stack([0 * DEEP, 65535 * (DEEP == 0)], axis=2), 4),
    ],
    ids=[
        "rgba", "grey", "webp", "tiff", "palette_index", "palette_bytes", "gif", "colour_grey", "colour_rgb",
        "palette_bit", "colour_16", "colour_rgb_16", "alpha_16",
    ],
)  # fmt: skip
def test_transparent_pixels_are_on_white(data):
    decoded = read_picture(data, strict=True)
    assert decoded.is_transparent
    assert (decoded.pixels[:, :20] == 255).all()
    assert not decoded.pixels[:, 20:].any()


def test_half_transparent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (4, 4), (0, 100, 200, 128))
    assert np.abs(decode(encoded(image, "PNG")).astype(int) - [127, 177, 227]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_changes_nothing(mode):
    data = encoded(picture(40, 30, mode), "PNG")
    assert not read_picture(data).is_transparent
    np.testing.assert_array_equal(decode(data), as_pillow(data))


def test_a_colour_of_few_bits_is_transparent():
    rows = 4 * b"\0\x1b"  # levels 0, 1, 2, 3 in two bits each
    header = struct.pack(">IIBBBBB", 4, 4, 2, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", b"\0\x02"), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    assert decode(data)[0, :, 0].tolist() == [0, 85, 255, 255]


@pytest.mark.parametrize(("colours", "bits", "row"), [(2, 8, b"\0\1\2\3"), (0, 16, b"\0\1\2"), (0, 8, b"\0\1")])
@pytest.mark.parametrize("content", [b"", b"\0"])
def test_a_transparent_colour_that_is_cut_short_is_passed_over(colours, bits, row, content):
    header = struct.pack(">IIBBBBB", 1, 1, bits, colours, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", content), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    decoded = read_picture(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts), strict=True)
    assert decoded.pixels[0, 0].tolist() == ([1, 2, 3] if colours else [1, 1, 1]) and not decoded.is_transparent


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")
def test_a_cut_avif_is_not_said_to_need_another_pillow():
    data = encoded(picture(64, 64), "AVIF")
    for share in (0.1, 0.2, 0.6):
        with pytest.raises(PictureError, match=r"cannot be decoded .*needs a whole picture") as error:
            read_picture(data[: int(len(data) * share)])
        assert error.value.reason == "truncated picture"


# --- profiles ---------------------------------------------------------------------------------------------------------


def wide_profile() -> bytes:
    """Returns a profile of colours that are not sRGB's: red and green are exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)
    tags = {bytes(profile[at : at + 4]): at for at in entries}
    red, green = (profile[tags[name] + 4 : tags[name] + 12] for name in (b"rXYZ", b"gXYZ"))
    profile[tags[b"rXYZ"] + 4 : tags[b"rXYZ"] + 12], profile[tags[b"gXYZ"] + 4 : tags[b"gXYZ"] + 12] = green, red
    return bytes(profile).replace(b"sRGB", b"wide").replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_profile_is_counted_and_applied_on_request(kind):
    plain = encoded(Image.new("RGB", (16, 16), (250, 5, 5)), kind)
    data = encoded(Image.new("RGB", (16, 16), (250, 5, 5)), kind, icc_profile=wide_profile())
    assert read_picture(data).metadata.has_other_colours
    np.testing.assert_array_equal(decode(data), decode(plain))
    red, green, _ = decode(data, to_srgb=True)[8, 8]
    assert green > 200 > 50 > red
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = encoded(Image.new("RGB", (16, 16), (250, 5, 5)), kind, icc_profile=srgb)
    assert not read_picture(same).metadata.has_other_colours
    np.testing.assert_array_equal(decode(same, to_srgb=True), decode(plain))


@pytest.mark.parametrize("profile", [b"no profile", wide_profile()[:200], wide_profile()[:-100]], ids=len)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_profile_that_does_not_fit_is_left_alone(profile, mode):
    data = encoded(picture(40, 30, mode), "JPEG", icc_profile=profile)
    assert decode(data, to_srgb=True).shape == (30, 40, 3)


# --- long and odd metadata --------------------------------------------------------------------------------------------

LONG = b"comment\0" + bytes(3_000_000)
PLAIN_PNG, PLAIN_JPEG = encoded(picture(40, 30), "PNG"), encoded(picture(40, 30), "JPEG")


def with_segment(jpeg: bytes, marker: int, content: bytes, times: int = 1) -> bytes:
    return jpeg[:2] + times * (struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content) + jpeg[2:]


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(40, 30), "PNG", icc_profile=np.random.default_rng(0).bytes(2_000_000)),
        with_chunk(PLAIN_PNG, b"iCCP", b"icc\0\0" + zlib.compress(bytes(5_000_000))),
        with_chunk(PLAIN_PNG, b"zTXt", b"comment\0\0" + zlib.compress(bytes(5_000_000))),
        with_chunk(PLAIN_PNG, b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(5_000_000))),
        with_chunk(PLAIN_PNG, b"tEXt", LONG),
        with_chunk(PLAIN_PNG, b"pHYs", b"\0"),
        with_chunk(PLAIN_PNG, b"zTXt", b"comment\0\x07nothing"),
        with_chunk(PLAIN_PNG, b"eXIf", b"nothing").replace(b"nothing", b"Nothing"),  # a wrong checksum
        PLAIN_PNG + bytes(1000),
        with_segment(PLAIN_JPEG, 0xE1, b"Exif\0\0" + bytes(60_000), 60),
        with_segment(PLAIN_JPEG, 0xE2, b"MPF\0" + bytes(20)),
        with_segment(PLAIN_JPEG, 0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
        with_segment(PLAIN_JPEG, 0xE2, b"ICC_PROFILE\0"),
        with_segment(PLAIN_JPEG, 0xE0, b"JFXX\0"),
        with_segment(PLAIN_JPEG, 0xED, b"Photoshop 3.0\x008BIM\xff"),
        with_segment(PLAIN_JPEG, 0xFE, b""),
        PLAIN_JPEG + bytes(1000) + PLAIN_JPEG,
    ],
    ids=[
        "long_profile", "inflated_profile", "inflated_text", "inflated_xmp", "long_text", "short_chunk", "bad_text",
        "bad_checksum", "junk_after_png", "many_segments", "mpf", "bad_mpf", "short_profile", "jfxx", "photoshop",
        "empty_comment", "junk_after_jpeg",
    ],
)  # fmt: skip
def test_what_is_beside_the_pixels_may_be_long_or_odd(data):
    plain = PLAIN_PNG if data.startswith(PLAIN_PNG[:8]) else PLAIN_JPEG
    for options in ({}, {"apply_exif": True}, {"to_srgb": True}):
        np.testing.assert_array_equal(read_picture(data, strict=True, **options).pixels, decode(plain))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_odd_segments_do_not_matter_to_pillow_either(mode):
    plain = encoded(picture(40, 30, mode), "JPEG")
    for content in (b"MPF\0" + bytes(20), b"MPF\0II*\0\x08\0\0\0\1\0\xff\xff\7\0\xff\xff\xff\xff\0\0\0\0"):
        np.testing.assert_array_equal(decode(with_segment(plain, 0xE2, content)), decode(plain))


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_by_its_bytes(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in ("JPEG", "AVIF") else {}
    decoded = read_picture(encoded(picture(40, 30), kind, **options), strict=True)
    assert (decoded.format, decoded.size) == (kind, (40, 30))
    assert np.abs(decoded.pixels.astype(int) - np.asarray(picture(40, 30))).mean() < 8


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF", "TIFF"])
def test_of_several_pictures_the_first_counts(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    one, two = (picture(40, 30, "L", seed).convert("P") for seed in (1, 2))
    data = encoded(one.convert("RGB") if kind != "GIF" else one, kind, save_all=True, append_images=[two], **options)
    decoded = read_picture(data, strict=True)
    assert decoded.has_more
    assert np.abs(decoded.pixels.astype(int) - np.asarray(one.convert("RGB"))).mean() < 2


def test_cmyk_is_converted_as_pillow_does():
    data = encoded(picture(40, 30, "CMYK"), "JPEG")
    decoded = read_picture(data, strict=True)
    assert decoded.mode == "CMYK"
    np.testing.assert_array_equal(decoded.pixels, as_pillow(data))


def with_precision(bits: int, marker: int = 0xC0) -> bytes:
    at = PLAIN_JPEG.index(b"\xff\xc0")
    return PLAIN_JPEG[: at + 1] + bytes([marker]) + PLAIN_JPEG[at + 2 : at + 4] + bytes([bits]) + PLAIN_JPEG[at + 5 :]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(100), "a HEIC picture"),
        (b"\0\0\0\x18ftypmif1" + bytes(100), "a HEIC picture"),
        (b"\0\0\0\x18ftypmp42" + bytes(100), "a film"),
        (b"\xff\x0a" + bytes(100), "a JPEG XL picture"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "a JPEG 2000 picture"),
        (with_precision(12, 0xC1), "a JPEG of 12 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_format_that_is_not_read_is_named(data, name):
    with pytest.raises(PictureError, match=f"is {name}, needs JPEG, PNG") as caught:
        read_picture(data, strict=True)
    assert caught.value.reason == "unknown format"


def test_the_orientations_are_those_of_exif():
    assert sorted(TURNS) == list(range(2, 9))
