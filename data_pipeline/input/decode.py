"""From the bytes of a clip's pictures to pixels: choose, decode, resize, crop, flip. Pure functions of (bytes, words).

Pixels are uint8 [height, width, 3], RGB. Words are uint64 from a counter-based generator (`words`), so that a
picture is augmented the same way whichever host, worker or thread does it, and in whatever order.
"""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_pipeline.input.options import FrameOptions

try:
    import simplejpeg  # type: ignore[import-untyped,unused-ignore]
except ImportError:  # an extra: 1.5 times Pillow's speed, the same pixels
    simplejpeg = None


Pixels = NDArray[np.uint8]


MAX_PIXELS = 2**26  # 8192 x 8192: a decompression bomb declares more, a photograph less


FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # the suffixes that the official loader tries (SPEC 8.9)


# Pillow's readers raise more than OSError on damaged files.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def decode(data: bytes, *, apply_exif: bool = False, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Pixels of one encoded picture, as Pillow's convert("RGB") gives them (SPEC 8.9).

    Raises ValueError with what is wrong and what is needed; the caller says which picture it is.
    """
    if not data:
        raise ValueError("has 0 bytes, needs a JPEG, PNG or WebP")
    if simplejpeg is not None and data.startswith(b"\xff\xd8\xff") and not apply_exif:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours == "YCbCr" and height * width <= max_pixels:
                pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
                return pixels
        except ValueError:
            pass  # stricter than Pillow, which then decides and has the better message
    try:
        return _decode_with_pillow(data, apply_exif, max_pixels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise ValueError(f"declares more than {max_pixels} pixels, which no frame or shop image has") from err
    except Image.UnidentifiedImageError as err:
        raise ValueError(f"is not a picture (starts with {data[:8]!r}), needs {', '.join(FORMATS)}") from err
    except UNREADABLE as err:
        raise ValueError(f"cannot be decoded ({err}), needs a whole picture") from err


def _decode_with_pillow(data: bytes, apply_exif: bool, max_pixels: int) -> Pixels:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        if opened.width * opened.height > max_pixels:
            raise Image.DecompressionBombError
        picture = ImageOps.exif_transpose(opened) if apply_exif else opened
        if picture.mode == "P":
            picture.load()
            picture.info.pop("transparency", None)  # convert() drops it anyway, with a warning
        return np.asarray(picture.convert("RGB"))


def resize(pixels: Pixels, options: FrameOptions) -> Pixels:
    """To resize x resize ("stretch"), or its shorter side to resize ("keep_ratio"); as it is if it has that size."""
    height, width = pixels.shape[:2]
    if options.resize_mode == "stretch":
        size = (options.resize, options.resize)
    else:
        short = min(height, width)
        size = (options.resize * width // short, options.resize * height // short)
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"is {width} x {height}, too narrow to be resized to {options.resize} on its shorter side")
    if size == (width, height):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, resampling(options)))


def resampling(options: FrameOptions) -> Image.Resampling:
    return Image.Resampling.BILINEAR if options.resize_mode == "stretch" else Image.Resampling.BICUBIC


def load(data: bytes, options: FrameOptions, *, train: bool) -> Pixels:
    """All that no random word touches: decoded, and resized unless the crop resizes."""
    pixels = decode(data, apply_exif=options.apply_exif)
    return shrink(pixels, options) if train and options.crops_at_random_scale else resize(pixels, options)


def shrink(pixels: Pixels, options: FrameOptions) -> Pixels:
    """Its shorter side to shrink_to, if it is longer: a photograph of 12 million pixels takes 36 MB of the cache."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if not 0 < options.shrink_to < short:
        return pixels
    size = (options.shrink_to * width // short, options.shrink_to * height // short)
    return np.asarray(Image.fromarray(pixels).resize(size, resampling(options)))


def centre_crop(pixels: Pixels, options: FrameOptions) -> Pixels:
    """The middle image_size x image_size: offset 16 of 256 for 224."""
    top, left = (round((side - options.image_size) / 2) for side in pixels.shape[:2])  # torchvision's rounding
    return pixels[top : top + options.image_size, left : left + options.image_size]
