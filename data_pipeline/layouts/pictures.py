"""Pictures of a source folder: finding and reading files that lie inside the folder, and decoding them strictly."""

import collections
import functools
import os
import warnings
from pathlib import Path
from stat import S_ISREG

from data_pipeline.faults import BadInputError
from data_pipeline.format.retries import retried
from data_pipeline.format.schema import Picture
from data_pipeline.input.decode import MAX_PIXELS, DecodedPicture, PictureError, read_picture

SUFFIXES = {  # in the order in which the official loader tries them (docs/official.md 8.9): format of the bytes
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".bmp": "BMP",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".jfif": "JPEG",  # from here on, those that it does not try
    ".gif": "GIF",
    ".avif": "AVIF",
}
HEIC_TO_JPEG = "`magick mogrify -format jpg *.heic`"
REMEDIES = {  # by PictureError's reason
    "empty picture": "restore the file",
    "not a picture": "replace the file",
    "unknown format": f"convert it to JPEG (a phone's HEIC: {HEIC_TO_JPEG})",
    "oversized picture": "replace the file",
    "truncated picture": "restore the file",
    "damaged picture": "restore the file, or leave it out",
}
ODDITIES = {  # of sound pictures; a conversion counts them
    "transparent": "are transparent somewhere; training sees white there",
    "misnamed": "have another format than their suffix names; they are read as what they are",
    "other colours": "have an ICC profile other than sRGB; training reads them as sRGB unless data.to_srgb is set",
}
RETRY_SECONDS = 20.0  # of a picture after an I/O error that may pass; with --on-error=skip each costs this long
MAX_BYTES = 1 << 26  # 64 MiB, more than any frame or shop image has


class PictureReader:
    """Finds and reads the pictures of a source folder, and refuses paths and links that lead out of it.

    A link at the folder's top level is followed wherever it leads: large sets are spread over disks in this way.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)
        self.odd: collections.Counter[str] = collections.Counter()  # `oddities` of pictures that the caller decoded

    def find(self, path: str, *, missing: str) -> Picture:
        """Returns the picture at `path`, relative to the source folder, with the first of SUFFIXES that exists there.

        If none exists, the suffix is kept: docs/official.md 8.9. Raises BadInputError if the path leads out of the
        folder, or, with the reason `missing`, if no file exists.
        """
        self._refuse_leaving(path)
        stem, given = os.path.splitext(path)
        for suffix in (*SUFFIXES, given):
            if os.path.isfile(os.path.join(self.root, stem + suffix)):
                return Picture(os.path.basename(stem), stem + suffix)
        detail = f"found no such picture with any of {', '.join(SUFFIXES)}; unpack the archive that holds it, "
        raise BadInputError(missing, f"{detail}or leave the clip out with --on-error=skip.", path)

    def read(self, picture: Picture) -> bytes:
        """Returns a picture's bytes. Raises BadInputError if unreadable, too many or few, or outside the folder."""
        self._refuse_leaving(picture.path)
        path = os.path.join(self.root, picture.path)
        self._refuse_link_out(path, picture.path)
        try:
            size, data = retried(lambda: _read_part(path, picture), path, seconds=RETRY_SECONDS)
        except OSError as err:
            detail = f"cannot be read ({err.strerror}); restore the file or its rights."
            raise BadInputError("unreadable picture", detail, picture.path) from err
        if len(data) != size:
            detail = f"found {len(data)} bytes, needs {size}; download the archive again."
            raise BadInputError("truncated picture", detail, picture.path)
        return data

    def _refuse_leaving(self, path: str) -> None:
        if os.path.isabs(path) or "\0" in path or ".." in path.replace("\\", "/").split("/"):
            detail = f"found the path {path!r:.200}, needs one below the source folder; correct the list."
            raise BadInputError("path leaves the source", detail)

    def _refuse_link_out(self, found: str, path: str) -> None:
        folder, name = os.path.split(found)
        real = os.path.join(_real_folder(folder), name)
        if os.path.islink(found):
            real = os.path.realpath(found)
        top = os.path.join(self.root, os.path.normpath(path).split(os.sep)[0])
        roots = (self._real_root, _real_folder(top))
        if real != roots[1] and not any(real.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
            detail = f"found a link to {real}, needs a file below the source folder; copy or mount it there, or put a "
            detail += "link to its folder at the source's top level, where links are followed."
            raise BadInputError("path leaves the source", detail, path)


def _read_part(path: str, picture: Picture) -> tuple[int, bytes]:
    """Returns a picture's size as it should be, and its bytes. Raises BadInputError if it is no file or too large."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        stat = os.fstat(file.fileno())
        size = stat.st_size if picture.size is None else picture.size
        if not S_ISREG(stat.st_mode):
            raise BadInputError("unreadable picture", "found no regular file; restore the file.", picture.path)
        if size > MAX_BYTES:
            detail = f"found {size:,} bytes, needs at most {MAX_BYTES:,}; replace the file."
            raise BadInputError("oversized picture", detail, picture.path)
        file.seek(picture.offset)
        return size, file.read(size)


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would otherwise wait for a writer for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@functools.lru_cache(maxsize=4096)  # a clip's frames share a folder, and resolving one takes a system call per level
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def decode_picture(data: bytes, path: str) -> DecodedPicture:
    """Returns the first picture of a file, decoded with a check for damage; `path` is for messages.

    Raises BadInputError if bytes are empty, damaged, of no format that is read, or declare more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large pictures, which MAX_PIXELS limits, and odd metadata
            return read_picture(data, strict=True, max_pixels=MAX_PIXELS)
    except PictureError as err:
        raise BadInputError(err.reason, f"{err}; {REMEDIES[err.reason]}.", path) from err


def oddities(picture: DecodedPicture, path: str) -> list[str]:
    """Returns which of ODDITIES a sound picture has. path: its name, which may be of another format."""
    found = {
        "transparent": picture.is_transparent,
        "misnamed": SUFFIXES.get(os.path.splitext(path)[1].lower()) != picture.format,
        "other colours": picture.metadata.has_other_colours,
    }
    return [name for name in ODDITIES if found[name]]
