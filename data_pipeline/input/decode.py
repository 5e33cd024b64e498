"""What a picture is: from encoded bytes to pixels, for conversion, doctor, training, evaluation and `Model.prepare`.

Pixels are uint8 [height, width, 3], RGB. Then they are resized, shrunk, and cropped in the centre.
"""

import contextlib
import dataclasses
import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import simplejpeg  # type: ignore[import-untyped,unused-ignore]
from numpy.typing import NDArray
from PIL import Image, ImageCms, features

from data_pipeline.input.metadata import (
    JPEG,
    PNG,
    TURNS,
    UPRIGHT,
    Metadata,
    damaged_chunk,
    essential,
    is_avif,
    jpeg_metadata,
    metadata_of,
    name_format,
)
from data_pipeline.input.options import FrameOptions

Pixels = NDArray[np.uint8]
MAX_PIXELS = 2**26  # 8192 x 8192: a photograph has fewer, a decompression bomb declares more
MAX_SQUARES = 16  # of a picture so long that "keep_ratio" would make over MAX_PIXELS of it, this many middle ones count
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", *(["AVIF"] if features.check("avif") else []))
# Pillow's readers raise more than OSError on damaged files.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RuntimeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
# What libjpeg-turbo says of lost pixels. Its other warnings are of metadata, or of what some cameras write.
DAMAGED = re.compile("premature end|bad (Huffman|arithmetic) code|extraneous bytes|instead of RST", re.IGNORECASE)
PADDED = re.compile(r"(\d+) extraneous bytes before marker 0xd9")  # after the pixels: zeros there lose nothing
# RGB that was encoded has no excess but by rounding, 20 levels at quality 5. Frames of films have up to 45, as their
# brightness has other shares of red, green and blue (BT.709 in place of BT.601).
MAX_EXCESS = 64
TO_RGB = np.array([[1, 1, 1], [0, -0.344136, 1.772], [1.402, -0.714136, 0]])  # of Y, Cb - 128 and Cr - 128, by rows
MODES = {"Gray": "L", "YCbCr": "RGB"}  # Pillow's names of the colours that simplejpeg decodes to the same pixels
BITS = 258  # TIFF's tag
LARGEST = (1.0, 255.0, 2.0**16 - 1, 2.0**31 - 1)  # white, if the file does not say what is: the least that none exceeds


class PictureError(ValueError):
    """Bytes that are no usable picture. `reason` is the kind of fault; the text says what is wrong, not the place."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both: a worker process sends the error by these arguments
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


@dataclasses.dataclass(frozen=True, slots=True)
class DecodedPicture:
    """The first picture of a file, and what its file has that is unusual."""

    pixels: Pixels
    format: str  # one of FORMATS
    mode: str  # of the stored colours, in Pillow's names: "RGB", "L", "CMYK", "I;16", ...
    metadata: Metadata
    is_transparent: bool = False  # somewhere; there the pixels are mixed with white
    has_more: bool = False  # other pictures follow: an animation, or pages

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]


def decode(data: bytes, *, apply_exif: bool = False, to_srgb: bool = False, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Returns the pixels of an encoded picture as `read_picture` does, without the check for damage."""
    return read_picture(data, apply_exif=apply_exif, to_srgb=to_srgb, max_pixels=max_pixels).pixels


def read_picture(
    data: bytes,
    *,
    apply_exif: bool = False,
    to_srgb: bool = False,
    strict: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> DecodedPicture:
    """Returns the first picture of a file of any of FORMATS, whatever its name, decoded as Pillow's convert("RGB").

    Unlike there, transparent pixels are on white, and more than 8 bits are scaled to 8 (docs/official.md 11, row 39).

    apply_exif: turn the picture as its EXIF orientation says. to_srgb: convert the colours of its ICC profile to sRGB.
    strict: refuse also damage that Pillow passes over: lost parts or impossible colours of a JPEG, a PNG's checksums.
    Raises PictureError, a ValueError, if bytes are empty, damaged, of another format, or declare more than max_pixels.
    """
    if not data:
        raise PictureError("empty picture", "has 0 bytes, needs a JPEG, PNG or WebP")
    pixels, mode, metadata = None, "", Metadata()
    if data.startswith(JPEG):
        pixels, mode = _decode_jpeg(data, max_pixels, strict=strict)
        metadata = jpeg_metadata(data)
        if strict and mode == "RGB" and _excess(data) > MAX_EXCESS:
            raise PictureError("damaged picture", "has colours that no camera writes, needs a whole picture")
    elif strict and data.startswith(PNG) and (chunk := damaged_chunk(data)):
        detail = f"has a wrong checksum in its chunk {chunk}, so that pixels are lost, needs a whole picture"
        raise PictureError("damaged picture", detail)
    if pixels is not None and not (to_srgb and metadata.has_other_colours):
        decoded = DecodedPicture(pixels, "JPEG", mode, metadata)
    else:
        decoded = _decode_by_pillow(data, to_srgb, max_pixels)
    return _turned(decoded) if apply_exif else decoded


def read_opened(picture: Image.Image, *, apply_exif: bool = False, to_srgb: bool = False) -> DecodedPicture:
    """Returns a picture that Pillow has opened or made, as `read_picture` its file. Raises PictureError if damaged."""
    try:
        if picture.width * picture.height > MAX_PIXELS:
            raise _oversized(MAX_PIXELS)
        picture.load()
        decoded = _convert(picture, b"", to_srgb)
    except PictureError:
        raise
    except UNREADABLE as err:
        raise PictureError("truncated picture", f"cannot be decoded ({err}), needs a whole picture") from err
    return _turned(decoded) if apply_exif else decoded


def _turned(decoded: DecodedPicture) -> DecodedPicture:
    if decoded.metadata.orientation == UPRIGHT:
        return decoded
    turned = Image.fromarray(decoded.pixels).transpose(TURNS[decoded.metadata.orientation])
    return dataclasses.replace(decoded, pixels=np.asarray(turned))


def _oversized(max_pixels: int) -> PictureError:
    return PictureError(
        "oversized picture", f"declares more than {max_pixels} pixels, which no frame or shop image has"
    )


def _decode_jpeg(data: bytes, max_pixels: int, *, strict: bool) -> tuple[Pixels | None, str]:
    """Returns a JPEG's pixels and mode; (None, "") if Pillow must decode it. Raises PictureError if strict, damaged."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width <= max_pixels:
            if colours in MODES:
                return simplejpeg.decode_jpeg(data, "RGB"), MODES[colours]
            if strict:
                simplejpeg.decode_jpeg(data, "RGB" if colours == "RGB" else "CMYK")
    except ValueError as err:  # of a picture that is no JPEG of 8 bits, too: Pillow decides, and has the better message
        padded = PADDED.search(str(err))
        is_padding = padded is not None and bytes(int(padded[1])) + b"\xff\xd9" in data
        if strict and DAMAGED.search(str(err)) and not is_padding:
            reason = "truncated picture" if "premature end" in str(err).lower() else "damaged picture"
            raise PictureError(reason, f"has lost pixels ({err}), needs a whole picture") from err
    return None, ""


def _excess(data: bytes) -> float:
    """Returns by how many levels the mean of any 16 x 16 pixels of a JPEG leaves the range of RGB, 0 to 255.

    JPEG stores brightness and colours apart, and each as a difference from the block before. So after a damaged block
    that is by chance a valid code, all others may have the wrong colours. 0 if the JPEG cannot be read in this way.
    """
    with contextlib.suppress(*UNREADABLE), Image.open(io.BytesIO(essential(data)), formats=("JPEG",)) as picture:
        picture.draft("YCbCr", (1, 1))  # an eighth of each side: only the means of blocks are decoded
        means = np.asarray(picture, np.float32)
        height, width = (side // 2 for side in means.shape[:2])
        sampling: Any = picture.layer  # type: ignore[attr-defined]
        # With factors above 2, as 4:1:1 has, a colour is shared by more than 16 pixels of different brightness.
        if picture.mode == "YCbCr" and height and width and all(max(factors[1:3]) <= 2 for factors in sampling):
            means = means[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
            rgb = (means - (0, 128, 128)) @ TO_RGB
            return float(np.maximum(rgb - 255, -rgb).max())
    return 0.0


def _decode_by_pillow(data: bytes, to_srgb: bool, max_pixels: int) -> DecodedPicture:
    try:
        try:
            return _convert(_load(data, max_pixels), data, to_srgb)
        except UNREADABLE:
            bare = essential(data)  # what is odd may be no pixel: text of a megabyte, an index of other pictures
            if bare == data:
                raise
            return _convert(_load(bare, max_pixels), data, to_srgb)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise _oversized(max_pixels) from err
    except Image.UnidentifiedImageError as err:
        if is_avif(data) and "AVIF" in FORMATS:
            detail = "cannot be decoded (an AVIF picture that is damaged or cut short), needs a whole picture"
            raise PictureError("truncated picture", detail) from err
        needs = f"needs {', '.join(FORMATS)}"
        if found := name_format(data):
            raise PictureError("unknown format", f"is {found}, {needs}") from err
        raise PictureError("not a picture", f"is not a picture (starts with {data[:8]!r}), {needs}") from err
    except UNREADABLE as err:
        raise PictureError("truncated picture", f"cannot be decoded ({err}), needs a whole picture") from err


def _load(data: bytes, max_pixels: int) -> Image.Image:
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    if picture.width * picture.height > max_pixels:
        raise Image.DecompressionBombError
    picture.load()
    return picture


def _convert(picture: Image.Image, data: bytes, to_srgb: bool) -> DecodedPicture:
    """Returns a loaded picture as RGB; `data` are the bytes of its file, b"" if they are not known."""
    is_jpeg = data.startswith(JPEG)
    metadata = jpeg_metadata(data) if is_jpeg else metadata_of(picture)
    rgb, transparent = picture, False
    if picture.has_transparency_data:
        rgb, transparent = _with_alpha(picture, data)
    elif picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        rgb = _eight_bits(picture)
    elif picture.mode not in ("L", "RGB", "CMYK"):
        rgb = picture.convert("RGB")
    if to_srgb and metadata.has_other_colours:
        rgb = _in_srgb(rgb, metadata.profile)
    if transparent:
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb)
    pixels = np.asarray(rgb.convert("RGB"))
    found = "JPEG" if is_jpeg else picture.format or ""  # Pillow says "MPO" of a JPEG that others follow
    has_more = False
    with contextlib.suppress(*UNREADABLE):  # of a TIFF's second page, say
        has_more = not is_jpeg and bool(getattr(picture, "is_animated", False))
    return DecodedPicture(pixels, found, picture.mode, metadata, transparent, has_more)


def _with_alpha(picture: Image.Image, data: bytes) -> tuple[Image.Image, bool]:
    """Returns a picture with an alpha channel, a palette's or a transparent colour, as RGBA; and whether that shows."""
    colour: Any = picture.info.get("transparency")  # a level, three levels, or bytes of alpha by index of the palette
    if picture.mode.startswith("I"):
        rgba = _eight_bits(picture).convert("RGBA")
        rgba.putalpha(Image.fromarray(np.where(np.asarray(picture) == colour, 0, 255).astype(np.uint8)))
    else:
        bits = data[24] if data.startswith(PNG) and picture.mode in ("L", "RGB") else 8
        if bits != 8:  # the file has the colour in its own bits, and Pillow the pixels in 8
            scaled = [each >> 8 if bits == 16 else each * 255 // (2**bits - 1) for each in np.atleast_1d(colour)]
            picture.info["transparency"] = tuple(map(int, scaled)) if picture.mode == "RGB" else int(scaled[0])
        rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    return rgba, rgba.getchannel("A").getextrema() != (255, 255)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Returns a grey picture of more than 8 bits as one of 8, by the rule for 16 bits that Pillow has for colours.

    Integers of a known number of bits lose the lowest ones. For 32 bits and floats nothing says what is white: it is
    the least value of LARGEST that no pixel exceeds. Less than 0 is black.
    """
    values = np.asarray(picture)
    if picture.mode != "F" and (picture.mode != "I" or picture.format in ("PNG", "PPM")):
        tags: Any = getattr(picture, "tag_v2", {})
        bits = tags.get(BITS, (16,))[0]
        return Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))
    levels = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
    possible = LARGEST if picture.mode == "F" else LARGEST[1:]
    white = next((each for each in possible if levels.max() <= each), float(levels.max()))
    return Image.fromarray((levels.clip(0) * (255 / white) + 0.5).astype(np.uint8))


def _in_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Returns a picture in the colours of sRGB, RGB or RGBA; as it is if the profile is damaged or of other colours."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    return converted or picture


def load_picture(given: bytes | Image.Image, options: FrameOptions, *, train: bool) -> Pixels:
    """Returns the picture decoded and resized, or, if `train` takes crops at random scale, only shrunk.

    It is given as the bytes of its file or as one of Pillow. Raises PictureError, a ValueError, if it is damaged.
    """
    if isinstance(given, Image.Image):
        pixels = read_opened(given, apply_exif=options.apply_exif, to_srgb=options.to_srgb).pixels
    else:
        pixels = decode(given, apply_exif=options.apply_exif, to_srgb=options.to_srgb)
    return shrink(pixels, options) if train and options.crops_at_random_scale else resize(pixels, options)


def resize(pixels: Pixels, options: FrameOptions) -> Pixels:
    """Returns the pixels resized to resize x resize ("stretch"), or their shorter side to `resize` ("keep_ratio").

    Pixels of that size are returned as they are. If "keep_ratio" would make more than MAX_PIXELS, only the middle
    MAX_SQUARES squares of the picture are resized.
    """
    height, width = pixels.shape[:2]
    size = (options.resize, options.resize)
    if options.resize_mode == "keep_ratio":
        short = min(height, width)
        if (options.resize * width // short) * (options.resize * height // short) > MAX_PIXELS:
            pixels = _middle(pixels, max(1, min(MAX_SQUARES, MAX_PIXELS // options.resize**2)) * short)
            height, width = pixels.shape[:2]
        size = (options.resize * width // short, options.resize * height // short)
    if size == (width, height):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, resampling(options)))


def _middle(pixels: Pixels, length: int) -> Pixels:
    """Returns a view of the middle of a picture, at most length + 1 pixels of each side: its centre stays the same."""
    begins = [max(0, side - length) // 2 for side in pixels.shape[:2]]
    return pixels[tuple(slice(begin, side - begin) for begin, side in zip(begins, pixels.shape[:2], strict=True))]


def shrink(pixels: Pixels, options: FrameOptions) -> Pixels:
    """Returns the pixels with a shorter side of shrink_to, or as they are if it is no longer or shrink_to is 0."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if not 0 < options.shrink_to < short:  # a photograph of 12 million pixels would take 36 MB of the cache
        return pixels
    size = (options.shrink_to * width // short, options.shrink_to * height // short)
    return np.asarray(Image.fromarray(pixels).resize(size, resampling(options)))


def resampling(options: FrameOptions) -> Image.Resampling:
    return Image.Resampling.BILINEAR if options.resize_mode == "stretch" else Image.Resampling.BICUBIC


def centre_crop(pixels: Pixels, options: FrameOptions) -> Pixels:
    """Returns a view of the middle, [image_size, image_size, 3]: offset 16 of 256 for 224."""
    top, left = (round((side - options.image_size) / 2) for side in pixels.shape[:2])  # torchvision's rounding
    return pixels[top : top + options.image_size, left : left + options.image_size]
