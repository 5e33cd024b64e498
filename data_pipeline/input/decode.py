"""From the bytes of a clip's pictures to pixels: choose, decode, resize, crop, flip. Pure functions of (bytes, words).

Pixels are uint8 [height, width, 3], RGB. Words are uint64 from a counter-based generator (`words`), so that a
picture is augmented the same way whichever host, worker or thread does it, and in whatever order.
"""

import dataclasses
import io
import math
import struct
import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

try:
    import simplejpeg  # type: ignore[import-untyped,unused-ignore]
except ImportError:  # an extra: 1.5 times Pillow's speed, the same pixels
    simplejpeg = None

Pixels = NDArray[np.uint8]
Words = NDArray[np.uint64]

MAX_PIXELS = 2**26  # 8192 x 8192: a decompression bomb declares more, a photograph less
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # the suffixes that the official loader tries (SPEC 8.9)
# Pillow's readers raise more than OSError on damaged files.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)

AUGMENT_STREAM = int.from_bytes(b"augment")  # second half of the Philox key: no other use of the seed gets these words
SHOP_IMAGE, FIRST_FRAME, WHOLE_CLIP = 0, 1, 2**32  # `picture` in words(): slot k of the clip is FIRST_FRAME + k
PICTURE_WORDS = 15  # a picture's words by position: an option that is turned on leaves the others' words alone
CROP_Y, CROP_X, FLIP, AREA, ASPECT, BRIGHTNESS, CONTRAST, SATURATION = range(8)
RED, GREEN, BLUE, ERASE, ERASE_Y, ERASE_X, ERASE_SIDE = range(8, PICTURE_WORDS)
ERASED = (123, 117, 104)  # CLIP's mean colour (SPEC 9.5): nothing, to the network


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """How pictures become arrays; the defaults are the official code's (SPEC 9), sizes in pixels.

    Only training crops, flips, cuts and jitters at random; evaluation takes the centre crop of every sampled frame.
    """

    image_size: int = 224  # side of what the network sees
    resize: int = 256  # before the crop: both sides ("stretch") or the shorter one ("keep_ratio")
    resize_mode: Literal["stretch", "keep_ratio"] = "stretch"  # bilinear as RICE, or bicubic as CLIP (SPEC 11, row 17)
    num_frames: int = 10  # slots of a clip
    frame_sampling: Literal["uniform", "random"] = "uniform"  # "random", in training: any num_frames, in order
    tail_cut: bool = True  # in training, half of the clips that fill every slot lose a random tail (SPEC 9.2)
    test_tail_cut: bool = False  # the same in evaluation, as the official code does unasked (SPEC 11, row 15)
    flip: bool = True  # mirror, with chance one half
    consistent_augment: bool = False  # one crop, flip and colour for all frames of a clip (SPEC 11, row 16)
    min_scale: float = 1.0  # below 1: crop a random share of the area, at least this much, in place of resize + crop
    max_aspect: float = 1.0  # above 1: that crop's width : height is off by up to this factor, either way
    shrink_to: int = 0  # such crops are of a picture whose shorter side is at most this; 0: of the picture as it is
    colour_jitter: float = 0.0  # brightness, contrast and saturation times 1 - c to 1 + c
    white_balance: float = 0.0  # red, green and blue, each times 1 - w to 1 + w
    erase: float = 0.0  # chance that a square of 0.2 to 0.5 of the side is painted over
    apply_exif: bool = False  # turn pictures as their EXIF orientation says; the official code does not

    def __post_init__(self) -> None:
        for name, allowed in (("resize_mode", ("stretch", "keep_ratio")), ("frame_sampling", ("uniform", "random"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, needs one of {', '.join(allowed)}.")
        if not 1 <= self.image_size <= self.resize:
            raise ValueError(f"image_size: found {self.image_size}, needs 1 to resize ({self.resize}); set both.")
        if self.shrink_to and self.shrink_to < self.image_size:
            raise ValueError(f"shrink_to: found {self.shrink_to}, needs 0 or at least image_size, {self.image_size}.")
        if self.num_frames < 1:
            raise ValueError(f"num_frames: found {self.num_frames}, needs at least 1.")
        if not 0 < self.min_scale <= 1 or not self.max_aspect >= 1:
            raise ValueError(
                f"min_scale, max_aspect: found {self.min_scale}, {self.max_aspect}; "
                "needs 0 < min_scale <= 1 <= max_aspect."
            )
        for name in ("colour_jitter", "white_balance", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, needs 0 to 1.")

    @property
    def crops_at_random_scale(self) -> bool:
        return self.min_scale < 1 or self.max_aspect > 1


# --- random words -----------------------------------------------------------------------------------------------------


def words(seed: int, epoch: int, example: int, picture: int, count: int = PICTURE_WORDS) -> Words:
    """`count` random words of one picture of one example (its row in the split) in one epoch, uint64."""
    return np.random.Philox(
        key=np.array((seed, AUGMENT_STREAM), np.uint64), counter=np.array((0, picture, example, epoch), np.uint64)
    ).random_raw(count)


def below(word: np.uint64, bound: int) -> int:
    """An integer of 0 to bound - 1, each equally likely (to 1 part in 2**64 / bound)."""
    return int(word) * bound >> 64


def uniform(word: np.uint64, low: float, high: float) -> float:
    return low + (high - low) * ((int(word) >> 11) * 2.0**-53)


# --- which frames -----------------------------------------------------------------------------------------------------


def sample_frames(count: int, slots: int) -> NDArray[np.int64]:
    """Positions of the frames that represent a clip of `count`: all, or `slots` evenly spaced, both ends (SPEC 9.1)."""
    if count < 1:
        raise ValueError(f"found {count} frames, needs at least 1; leave clips without frames out.")
    if count <= slots:
        return np.arange(count)
    return np.arange(slots) * (count - 1) // max(1, slots - 1)


def random_subset(count: int, slots: int, subset_words: Words) -> NDArray[np.int64]:
    """`slots` of `count` positions, in order, every subset equally likely (Floyd's algorithm: a word a slot)."""
    chosen: set[int] = set()
    for word, last in zip(subset_words, range(count - slots, count), strict=True):
        candidate = below(word, last + 1)
        chosen.add(last if candidate in chosen else candidate)
    return np.array(sorted(chosen), np.int64)


def frames_kept(count: int, slots: int, gate: int, fraction: int) -> int:
    """How many of `count` sampled frames the tail cut leaves; gate and fraction are tenths, 0 to 9 (SPEC 9.2).

    Only a clip that fills all slots is cut, and only from gate 5 up; at least one frame stays.
    """
    if count != slots or gate < 5:
        return count
    return slots - slots * fraction // 10


def choose_frames(count: int, options: FrameOptions, clip_words: Words, *, train: bool) -> NDArray[np.int64]:
    """Positions of the frames to show of a clip of `count`, in order, 1 to num_frames of them.

    clip_words: 2 + num_frames words of the clip (gate, fraction, subset).
    """
    slots = options.num_frames
    if train and options.frame_sampling == "random" and count > slots:
        indices = random_subset(count, slots, clip_words[2:])
    else:
        indices = sample_frames(count, slots)
    if options.tail_cut if train else options.test_tail_cut:
        gate, fraction = (below(word, 10) for word in clip_words[:2])
        indices = indices[: frames_kept(len(indices), slots, gate, fraction)]
    return indices


# --- decoding ---------------------------------------------------------------------------------------------------------


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


# --- resizing and augmentation ----------------------------------------------------------------------------------------


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
    return np.asarray(Image.fromarray(pixels).resize(size, _filter(options)))


def _filter(options: FrameOptions) -> Image.Resampling:
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
    return np.asarray(Image.fromarray(pixels).resize(size, _filter(options)))


def centre_crop(pixels: Pixels, options: FrameOptions) -> Pixels:
    """The middle image_size x image_size: offset 16 of 256 for 224."""
    top, left = (round((side - options.image_size) / 2) for side in pixels.shape[:2])  # torchvision's rounding
    return pixels[top : top + options.image_size, left : left + options.image_size]


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
    return np.asarray(Image.fromarray(pixels).resize(size, _filter(options), box=box))


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
