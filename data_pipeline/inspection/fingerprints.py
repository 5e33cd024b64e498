"""Fingerprints of pictures: their size, a hash and a thumbnail, made from the decoded pixels."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.faults import BadInputError
from data_pipeline.format.schema import Picture
from data_pipeline.input.decode import DecodedPicture
from data_pipeline.input.metadata import UPRIGHT
from data_pipeline.layouts.pictures import PictureReader, decode_picture, oddities

THUMB = 8  # columns and rows of a thumbnail
FINGERPRINT = np.dtype(
    [
        ("key", "<u8"),  # hash of the picture's place and of its file's size and time; 0: no sound picture
        ("digest", "<u8"),  # hash of its bytes
        ("width", "<u4"),
        ("height", "<u4"),
        ("thumb", "u1", (THUMB, THUMB, 3)),  # mean colours
    ]
)
Fingerprints = NDArray[np.void]  # of dtype FINGERPRINT, shape [n], or [] for one
NO_FINGERPRINT = np.zeros((), FINGERPRINT)
VERSION = 5  # of FINGERPRINT and of the checks: with another number, fingerprints of earlier runs are not used
MIN_SIDE = 16  # pixels: on a shorter side a network of patches sees nothing
UNIFORM_RANGE = 12  # of 255 levels: JPEG's noise on a black frame stays below it
STRAY = 0.1  # per cent of the pixels, darkest and brightest, that the test for one colour ignores: hot pixels, specks
ODD_MODES = {"CMYK": "inks (CMYK)", "I": "32 bits", "F": "floats", "I;16": "16 bits", "I;16B": "16 bits"}


@dataclasses.dataclass(frozen=True)
class InspectedPicture:
    fingerprint: Fingerprints  # of one picture
    problems: Sequence[BadInputError] = ()  # that a conversion accepts
    known: bool = False  # whether the fingerprint is an earlier run's


def is_comparable(fingerprints: Fingerprints) -> NDArray[np.bool_]:
    """Returns, bool [n], which pictures can be compared: sound, no side below MIN_SIDE, and not of one colour."""
    thumbs = fingerprints["thumb"].reshape(len(fingerprints), THUMB * THUMB, 3)
    varied: NDArray[np.bool_] = (thumbs.max(axis=1) - thumbs.min(axis=1)).max(axis=1, initial=0) > UNIFORM_RANGE
    large = np.minimum(fingerprints["width"], fingerprints["height"]) >= MIN_SIDE
    return varied & (fingerprints["key"] > 0) & large


def inspect_picture(data: bytes, path: str, key: int = 1, *, named: bool = True) -> InspectedPicture:
    """Returns the fingerprint of an encoded picture under `key`, and the problems that a conversion would accept.

    path: names the picture in problems. named: whether its suffix should agree with its format. Raises BadInputError
    for a picture that a conversion would refuse: empty, damaged, of no format that is read, or of too many pixels.
    """
    picture = decode_picture(data, path)
    rgb = Image.fromarray(picture.pixels)
    fingerprint = np.zeros((), FINGERPRINT)
    fingerprint["key"] = key
    fingerprint["digest"] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    fingerprint["width"], fingerprint["height"] = picture.size
    fingerprint["thumb"] = np.asarray(rgb.resize((THUMB, THUMB), Image.Resampling.BOX))
    problems = _problems(picture, fingerprint["thumb"])
    if named and "misnamed" in oddities(picture, path):
        suffix = os.path.splitext(path)[1] or "nothing"
        detail = f"found {picture.format} data in a file called {suffix}, and reads them as such; rename it."
        problems.append(("wrong suffix", detail))
    return InspectedPicture(fingerprint, [BadInputError(reason, detail, path) for reason, detail in problems])


def _problems(picture: DecodedPicture, thumb: NDArray[np.uint8]) -> list[tuple[str, str]]:
    found = []
    width, height = picture.size
    if min(width, height) < MIN_SIDE:
        detail = f"found {width} x {height} pixels, needs {MIN_SIDE} on each side (or --accept 'tiny picture'); "
        detail += "replace the file or leave it out."
        found.append(("tiny picture", detail))
    # The thumbnail decides first: percentiles of every picture would cost more than decoding it.
    if np.max(np.ptp(thumb.reshape(-1, 3).astype(np.int16), axis=0)) <= 2 * UNIFORM_RANGE and width * height > 1:
        darkest, brightest = np.percentile(picture.pixels.reshape(-1, 3), (STRAY, 100 - STRAY), axis=0).astype(int)
        if (brightest - darkest).max() <= UNIFORM_RANGE:
            colour = "black" if brightest.max() <= 2 * UNIFORM_RANGE else f"of one colour {tuple(darkest.tolist())}"
            detail = f"is all {colour}, needs something to see (or --accept 'uniform picture'); replace the file or "
            detail += "leave it out."
            found.append(("uniform picture", detail))
    if picture.mode in ODD_MODES:
        detail = f"has {ODD_MODES[picture.mode]}, which training reduces to 8-bit RGB; save it as 8-bit RGB."
        found.append(("unusual colours", detail))
    if picture.metadata.orientation != UPRIGHT:
        detail = "has an EXIF orientation, which training ignores unless data.apply_exif is set; turn its pixels."
        found.append(("turned by EXIF", detail))
    if picture.has_more:
        detail = "is animated or has several pages, and training takes only the first; split it."
        found.append(("several pictures in a file", detail))
    return found


# --- from run to run --------------------------------------------------------------------------------------------------


def key_of(text: str) -> int:
    """Returns a hash of the text: 64 bits, never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def inspect_file(
    folder: PictureReader, picture: Picture, find: Callable[[int], Fingerprints | None]
) -> InspectedPicture:
    """Returns a source's picture as inspect_picture does, or the fingerprint that an earlier run made of its file.

    find: returns the known fingerprint of a key, or None. Raises BadInputError if the picture cannot be read, or is one
    that a conversion would refuse.
    """
    try:
        stat = os.stat(folder.root / picture.path)
        place = f"{VERSION}\0{picture.path}\0{picture.offset}\0{picture.size}"
        key = key_of(f"{place}\0{stat.st_size}\0{stat.st_mtime_ns}")
    except (OSError, ValueError):
        key = 0
    if key and (fingerprint := find(key)) is not None:
        return InspectedPicture(fingerprint, known=True)
    return inspect_picture(folder.read(picture), picture_name(picture), key)


def picture_name(picture: Picture) -> str:
    """Returns the path of a picture, PATH/MEMBER if it is in a tar."""
    return f"{picture.path}/{picture.member}" if picture.member else picture.path
