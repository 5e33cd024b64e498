"""One look at a picture: whether it can be used, how large it is, and what tells it from others.

Looks of sound pictures are kept in a file, a block at a time, each with its checksum: after a kill nothing that was
looked at is decoded again unless its file has another size or time since.
"""

import contextlib
import dataclasses
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.faults import BadInputError
from data_pipeline.format.schema import Picture
from data_pipeline.format.tfrecord import HEADER, OVERHEAD, frame_record, unframe_record
from data_pipeline.input.decode import UNREADABLE, simplejpeg
from data_pipeline.layouts.pictures import PictureReader, decode_picture

FINGERPRINT = np.dtype(
    [
        ("key", "<u8"),  # of the file as it was; 0: no sound picture
        ("digest", "<u8"),  # of its bytes
        ("hash", "<u8"),  # of what it shows: where brightness rises from left to right, 8 x 8
        ("mirror", "<u8"),  # the hash of its mirror image
        ("width", "<u4"),
        ("height", "<u4"),
        ("thumb", "u1", (4, 4, 3)),
    ]
)
VERSION = 2  # of LOOK and of what is refused: another one begins anew
MIN_SIDE = 16  # px: the smallest side of which a network of patches can see anything
UNIFORM_RANGE = 12  # levels of 255: JPEG's noise on a black frame stays below it
GREY_ROWS = 8  # of a block of JPEG
STRAY = 0.1  # per cent of the pixels at either end that are not asked: a hot pixel, a dot
ORIENTATION = 0x0112  # EXIF
ODD_MODES = {"CMYK": "inks (CMYK)", "I": "32 bits", "F": "floats", "I;16": "16 bits", "I;16B": "16 bits"}


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A picture that was looked at: what was seen, and what is odd about it."""

    look: NDArray[np.void]  # LOOK, of shape ()
    problems: Sequence[BadInputError] = ()
    known: bool = False  # from an earlier run


NOTHING = np.zeros((), FINGERPRINT)


def shows_something(looks: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which looks are of pictures that can be told from others: sound, not tiny and not of one colour."""
    thumbs = looks["thumb"].reshape(len(looks), 16, 3).astype(np.int16)
    seen: NDArray[np.bool_] = np.ptp(thumbs, axis=1).max(axis=1, initial=0) > UNIFORM_RANGE
    return seen & (looks["key"] > 0) & (np.minimum(looks["width"], looks["height"]) >= MIN_SIDE)


def inspect_picture(data: bytes, path: str, key: int = 1, *, named: bool = True) -> Inspected:
    """A picture's bytes looked at. BadInputError (raised) if a conversion would refuse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        return _inspect_picture(data, path, key, named)


def _inspect_picture(data: bytes, path: str, key: int, named: bool) -> Inspected:
    picture = decode_picture(data, path, named=named)
    rgb = _rgb(picture)
    brightness = np.asarray(rgb.resize((9, 8), Image.Resampling.BOX).convert("L"), np.int16)
    look = np.zeros((), FINGERPRINT)
    look["key"], look["digest"] = key, int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    look["hash"], look["mirror"] = _hash(brightness), _hash(brightness[:, ::-1])
    look["width"], look["height"] = picture.size
    look["thumb"] = np.asarray(rgb.resize((4, 4), Image.Resampling.BOX))
    problems = [BadInputError(reason, detail, path) for reason, detail in _oddities(picture, rgb, look["thumb"], data)]
    return Inspected(look, problems)


def _hash(brightness: NDArray[np.int16]) -> np.uint64:
    bits: np.uint64 = np.packbits(brightness[:, 1:] > brightness[:, :-1]).view("<u8")[0]
    return bits


def _rgb(picture: Image.Image) -> Image.Image:
    """As training sees it (SPEC 8.9)."""
    if picture.mode == "P":
        picture.info.pop("transparency", None)  # convert() drops it anyway, with a warning
    return picture.convert("RGB")


def _oddities(picture: Image.Image, rgb: Image.Image, thumb: NDArray[np.uint8], data: bytes) -> list[tuple[str, str]]:
    """Reason and detail of what a conversion takes and a person should know."""
    found = []
    width, height = picture.size
    if min(width, height) < MIN_SIDE:
        detail = f"found {width} x {height} pixels, needs {MIN_SIDE} on each side; replace the file."
        found.append(("tiny picture", detail))
    # The thumb first: percentiles of every picture would cost more than decoding it.
    if np.max(np.ptp(thumb.reshape(-1, 3).astype(np.int16), axis=0)) <= 2 * UNIFORM_RANGE and width * height > 1:
        darkest, brightest = np.percentile(np.asarray(rgb).reshape(-1, 3), (STRAY, 100 - STRAY), axis=0).astype(int)
        uniform = (brightest - darkest).max() <= UNIFORM_RANGE
    else:
        uniform = False
    if uniform:
        colour = "black" if brightest.max() <= 2 * UNIFORM_RANGE else f"of one colour {tuple(darkest.tolist())}"
        found.append(("uniform picture", f"is all {colour}, needs something to see; replace the file or leave it out."))
    if picture.mode in ODD_MODES:
        detail = f"has {ODD_MODES[picture.mode]}, of which 8-bit RGB is made by force; save it as 8-bit RGB."
        found.append(("unusual colours", detail))
    with contextlib.suppress(*UNREADABLE):
        if picture.getexif().get(ORIENTATION, 1) not in (0, 1):
            detail = "is to be turned by its EXIF, which training does not unless data.apply_exif; turn it for good."
            found.append(("turned by EXIF", detail))
    if picture.format == "JPEG" and picture.mode == "RGB":
        found += _damage(rgb, data)
    if picture.format != "MPO" and _has_second(picture):
        found.append(("several pictures in a file", "is animated or has pages, of which the first is used; split it."))
    return found


def _damage(rgb: Image.Image, data: bytes) -> list[tuple[str, str]]:
    """What Pillow passes over: it shows what a JPEG has lost as grey or as stripes, when an end mark is there."""
    mend = "look at it, and restore the file."
    if simplejpeg:
        try:
            simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as err:
            reason = "truncated picture" if "premature end" in str(err).lower() else "damaged picture"
            return [(reason, f"decodes with a complaint ({err}); {mend}")]
    elif rgb.height > GREY_ROWS and rgb.crop((0, rgb.height - GREY_ROWS, *rgb.size)).getextrema() == 3 * ((128, 128),):
        return [("damaged picture", f"has nothing but grey in its lowest rows, as where the end is lost; {mend}")]
    return []


def _has_second(picture: Image.Image) -> bool:
    try:
        picture.seek(1)
    except UNREADABLE:
        return False
    return True


# --- in a folder ------------------------------------------------------------------------------------------------------


class Viewer:
    """Looks at the pictures of a source folder, or remembers what an earlier run saw (in a worker)."""

    def __init__(self, root: Path, known: NDArray[np.void]) -> None:
        self.folder = PictureReader(root)
        self.known = known  # LOOK, sorted by key

    def look(self, picture: Picture) -> Inspected:
        """BadInputError: it cannot be used."""
        key = self._key(picture)
        at = int(np.searchsorted(self.known["key"], np.uint64(key)))
        if key and at < len(self.known) and int(self.known["key"][at]) == key:
            return Inspected(self.known[at], known=True)
        data = self.folder.read(picture)
        return inspect_picture(data, f"{picture.path}/{picture.member}" if picture.member else picture.path, key)

    def _key(self, picture: Picture) -> int:
        """64 bits of where a picture lies and of its file's size and time; 0 where it cannot be read."""
        try:
            stat = os.stat(self.folder.root / picture.path)
        except (OSError, ValueError):
            return 0
        text = f"{VERSION}\0{picture.path}\0{picture.offset}\0{picture.size}\0{stat.st_size}\0{stat.st_mtime_ns}"
        return key_of(text)


def key_of(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


# --- from run to run --------------------------------------------------------------------------------------------------


def load_known(path: Path) -> NDArray[np.void]:
    """Looks of earlier runs, sorted by key. What is damaged at the file's end, as a kill leaves it, is cut off."""
    data = path.read_bytes() if path.exists() else b""
    blocks, end = [np.zeros(0, FINGERPRINT)], 0
    while end + OVERHEAD <= len(data):
        size = HEADER.unpack_from(data, end)[0] + OVERHEAD
        try:
            block = unframe_record(data[end : end + size])
        except ValueError:
            break
        if len(block) % FINGERPRINT.itemsize:
            break
        blocks.append(np.frombuffer(block, FINGERPRINT))
        end += size
    if end < len(data):
        os.truncate(path, end)
    looks = np.concatenate(blocks)
    return looks[np.unique(looks["key"], return_index=True)[1]]


def append_known(path: Path, looks: NDArray[np.void]) -> None:
    if len(looks):
        with path.open("ab") as file:
            file.write(frame_record(looks.tobytes()))
