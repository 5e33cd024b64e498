"""Pictures of a source folder: finding them without leaving the folder, and reading them with every byte checked."""

import functools
import io
import os
import warnings
from pathlib import Path
from stat import S_ISREG

from PIL import Image

from data_pipeline.faults import BadInputError
from data_pipeline.format.schema import Picture
from data_pipeline.input.decode import FORMATS, MAX_PIXELS, UNREADABLE

# In the order in which the official loader tries them (SPEC 8.9), with what their bytes must be.
SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".bmp": "BMP",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
MAX_BYTES = 1 << 26  # 64 MiB: no frame or shop image is larger


class PictureFolder:
    """The pictures below a source folder; small and picklable."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)

    def find(self, path: str, *, missing: str) -> Picture:
        """The picture that `path` (relative to the folder) means: the first suffix that exists (SPEC 8.9).

        BadInputError: the path leaves the folder, or there is no such file (`missing` says what that is).
        """
        self._refuse_leaving(path)
        stem, given = os.path.splitext(path)
        for suffix in (*SUFFIXES, given):
            candidate = os.path.join(self.root, stem + suffix)
            if os.path.isfile(candidate):
                return Picture(os.path.basename(stem), stem + suffix)
        raise BadInputError(
            missing,
            f"found no such picture with any of {', '.join(SUFFIXES)}; unpack the archive that holds it, "
            "or leave the clip out with --on-error=skip.",
            path,
        )

    def read(self, picture: Picture) -> bytes:
        """The picture's bytes, as they are; BadInputError if they cannot be read."""
        self._refuse_leaving(picture.path)
        path = os.path.join(self.root, picture.path)
        self._refuse_link_out(path, picture.path)
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                stat = os.fstat(file.fileno())
                size = stat.st_size if picture.size is None else picture.size
                if not S_ISREG(stat.st_mode):
                    raise BadInputError("unreadable picture", "is no regular file; restore the file.", picture.path)
                if size > MAX_BYTES:
                    raise BadInputError(
                        "oversized picture",
                        f"found {size:,} bytes, needs at most {MAX_BYTES:,}; replace the file.",
                        picture.path,
                    )
                file.seek(picture.offset)
                data = file.read(size)
        except OSError as err:
            raise BadInputError(
                "unreadable picture", f"cannot be read ({err.strerror}); restore the file or its rights.", picture.path
            ) from err
        if len(data) != size:
            raise BadInputError(
                "truncated picture", f"found {len(data)} bytes, needs {size}; download the archive again.", picture.path
            )
        return data

    def _refuse_leaving(self, path: str) -> None:
        if os.path.isabs(path) or "\0" in path or ".." in path.replace("\\", "/").split("/"):
            raise BadInputError(
                "path leaves the source",
                f"found the path {path!r:.200}, needs one below the source folder; correct the list.",
            )

    def _refuse_link_out(self, found: str, path: str) -> None:
        folder, name = os.path.split(found)
        real = os.path.join(_real_folder(folder), name)
        if os.path.islink(found):
            real = os.path.realpath(found)
        if not real.startswith(self._real_root.rstrip(os.sep) + os.sep):
            raise BadInputError(
                "path leaves the source",
                f"found a link to {real}, needs a file below the source folder; "
                "copy or mount it there, or give a --source that holds both.",
                path,
            )


def _open_at_once(path: str, flags: int) -> int:
    """A pipe that is called as a picture would otherwise wait for a writer for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@functools.lru_cache(maxsize=4096)  # a clip's frames share a folder, and resolving costs a system call a level
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def check_picture(data: bytes, path: str) -> tuple[int, int]:
    """Width and height of a picture that decodes as a whole and is what the suffix of `path` says.

    Everything that is stored passes here once, so that training may trust it. BadInputError says what is wrong.
    """
    return decode_picture(data, path).size


def decode_picture(data: bytes, path: str, *, named: bool = True) -> Image.Image:
    """The first picture of a file, decoded as a whole; BadInputError as `check_picture` says.

    named: the path has a suffix to hold the bytes against.
    """
    if not data:
        raise BadInputError("empty picture", "found 0 bytes, needs a picture; restore the file.", path)
    suffix = os.path.splitext(path)[1]
    expected = SUFFIXES.get(suffix.lower())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, for which our own limit is lower, and of odd metadata
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            found = "JPEG" if picture.format == "MPO" else picture.format  # a JPEG with a second one behind it
            if named and found != expected:
                raise BadInputError(
                    "wrong suffix",
                    f"found {found} data in a file called {suffix or 'nothing'}, "
                    f"needs {expected or 'a suffix of a picture'}; rename or replace the file.",
                    path,
                )
            picture.load()
            return picture
    except (Image.DecompressionBombError, MemoryError) as err:
        raise BadInputError(
            "oversized picture", f"declares more than {MAX_PIXELS:,} pixels; replace the file.", path
        ) from err
    except Image.UnidentifiedImageError as err:
        raise BadInputError(
            "not a picture", f"found bytes {data[:8]!r}, needs {expected or 'a picture'}; replace the file.", path
        ) from err
    except BadInputError:
        raise
    except UNREADABLE as err:
        raise BadInputError(
            "truncated picture", f"cannot be decoded ({err}), needs a whole picture; restore the file.", path
        ) from err
