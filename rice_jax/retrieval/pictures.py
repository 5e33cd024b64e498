"""Pictures that a user gives to a model, made as evaluation sees them: files, bytes, Pillow's pictures, arrays."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.input.decode import centre_crop, load_picture
from data_pipeline.input.options import FrameOptions

if TYPE_CHECKING:
    Pictures = Iterable[str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray]
else:  # when the code runs, `prepare` itself says what is wrong with other types; tests check annotations then
    Pictures = Any
NEEDED = (
    'a path, bytes, a file opened with "rb", a picture of Pillow, or an array of uint8 levels 0 to 255: [height, '
    "width] of grey, [height, width, 3] of RGB or [height, width, 4] of RGBA"
)


def prepare(pictures: Pictures, options: FrameOptions) -> UInt8[np.ndarray, "n px px 3"]:
    """Returns pictures decoded, resized and cropped by `options`; the errors are those of Model.prepare."""
    given: Any = pictures
    is_one = isinstance(given, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    if is_one or hasattr(given, "read") or (hasattr(given, "__array__") and np.ndim(given) in (2, 3)):
        raise TypeError("prepare takes several pictures; give [picture], or a list of them.")
    prepared = []
    for ordinal, picture in enumerate(given):
        name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else f"picture {ordinal}"
        try:
            prepared.append(centre_crop(load_picture(_given(picture), options, train=False), options))
        except ValueError as error:
            raise ValueError(f"{name}: {error}.") from error
        except TypeError as error:
            raise TypeError(f"{name}: found {error}, needs {NEEDED}.") from error
    return np.array(prepared, np.uint8).reshape(-1, options.image_size, options.image_size, 3)


def _given(picture: Any) -> bytes | Image.Image:
    """Returns the bytes of a picture's file, or a picture of Pillow.

    Raises OSError if a file cannot be read, and TypeError, which says what was found, for anything that is no picture.
    """
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, Image.Image):
        return picture
    if hasattr(picture, "read"):
        if hasattr(picture, "seek") and picture.seekable():
            picture.seek(0)  # as Pillow does: a picture that was just written to a BytesIO ends where it stands
        data = picture.read()
        if not isinstance(data, bytes):
            raise TypeError("a file opened as text")
        return data
    if not hasattr(picture, "__array__"):
        raise TypeError(f"{type(picture).__module__}.{type(picture).__qualname__}")
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size or array.shape[2:] not in ((), (3,), (4,)):
        raise TypeError(f"an array of {array.dtype} {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))
