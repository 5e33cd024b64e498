"""From the bytes of a picture to pixels: decode, resize, shrink, centre crop.

Pixels are uint8 [height, width, 3], RGB.
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
MAX_PIXELS = 2**26  # 8192 x 8192: a photograph has fewer, a decompression bomb declares more
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # of the suffixes in docs/official.md 8.9
# Pillow's readers raise more than OSError on damaged files.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def decode(data: bytes, *, apply_exif: bool = False, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Returns the pixels of an encoded picture, uint8 [h, w, 3], as Pillow's convert("RGB") (docs/official.md 8.9).

    apply_exif: rotate the picture by its EXIF orientation. Raises ValueError if bytes are empty, damaged, of another
    format than FORMATS, or declare more than max_pixels. The message says what is wrong; the caller adds the place.
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
            pass  # simplejpeg is stricter than Pillow, which then decides and has the better message
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                raise Image.DecompressionBombError
            return np.asarray(convert_rgb(ImageOps.exif_transpose(opened) if apply_exif else opened))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise ValueError(f"declares more than {max_pixels} pixels, which no frame or shop image has") from err
    except Image.UnidentifiedImageError as err:
        raise ValueError(f"is not a picture (starts with {data[:8]!r}), needs {', '.join(FORMATS)}") from err
    except UNREADABLE as err:
        raise ValueError(f"cannot be decoded ({err}), needs a whole picture") from err


def convert_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "P":
        picture.load()
        picture.info.pop("transparency", None)  # convert() drops it anyway, with a warning
    return picture.convert("RGB")


def load_picture(data: bytes, options: FrameOptions, *, train: bool) -> Pixels:
    """Returns the picture decoded and resized, or, if `train` takes crops at random scale, only shrunk.

    Raises ValueError if it cannot be decoded, or "keep_ratio" would make more than MAX_PIXELS of it.
    """
    pixels = decode(data, apply_exif=options.apply_exif)
    return shrink(pixels, options) if train and options.crops_at_random_scale else resize(pixels, options)


def resize(pixels: Pixels, options: FrameOptions) -> Pixels:
    """Returns the pixels resized to resize x resize ("stretch"), or their shorter side to `resize` ("keep_ratio").

    Pixels of that size are returned as they are. Raises ValueError if "keep_ratio" would make more than MAX_PIXELS.
    """
    height, width = pixels.shape[:2]
    size = (options.resize, options.resize)
    if options.resize_mode == "keep_ratio":
        short = min(height, width)
        size = (options.resize * width // short, options.resize * height // short)
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"is {width} x {height}, too narrow to be resized to {options.resize} on its shorter side")
    if size == (width, height):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, resampling(options)))


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
