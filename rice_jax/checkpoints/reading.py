"""What an error means while a step is read: damage, a disk that does not answer, too little memory, or a wrong program.

Only damage lets a run go back to an older step. A disk that failed is asked again. Everything else ends the command,
and leaves the steps as they are.
"""

import errno
import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from rice_jax.errors import EXHAUSTED

T = TypeVar("T")

# What TensorStore says of bytes, of a disk, and of the system's errors. INVALID_ARGUMENT and such are not among them:
# it says so of a wrong program, too, and a step's files are compared with their list before they are restored.
CORRUPT = (
    r"\bDATA_LOSS\b|Error decoding|ZSTD_decompress|Zstd-compressed stream|Uncompressed chunk is|Requested byte range"
)
UNANSWERED = r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|NOT_FOUND)\b"
SYSTEM_ERROR = r"OS error (\d+)"
NAMES = r'"(?:[^"\\]|\\.)*"|\S*/\S*'  # in an error's text: quoted names and paths


class DamagedError(ValueError):
    """A step's folder is incomplete, unreadable, or has other numbers than were saved. Another step may be used."""


class MissingError(DamagedError):
    """A file is missing or not whole. It is looked at twice, because a file server may lag behind."""


class UnfinishedError(MissingError):
    """A step has no digest.json: its save was not finished."""


PAUSES = {MissingError: (10.0,), OSError: (1.0, 5.0)}  # seconds before each further attempt


def patiently(folder: Path, read: Callable[[], T]) -> T:
    """Returns read(), which is called again after a MissingError (once) and after an I/O error (twice).

    Raises DamagedError if the step in `folder` is damaged, OSError, which names the file, if the last attempt met an
    I/O error, and MemoryError if memory ran out. Other exceptions pass unchanged.
    """
    for attempt in itertools.count():
        try:
            return read()
        except Exception as error:
            kind = meaning(error, folder)
            pauses = PAUSES.get(kind, ()) if kind else ()
            if attempt >= len(pauses):
                if kind is None or isinstance(error, DamagedError):
                    raise
                raise _explained(error, kind, folder) from error
        time.sleep(pauses[attempt])
    raise AssertionError("itertools.count() has no end")


def meaning(error: BaseException, folder: Path | None = None) -> type[Exception] | None:
    """Returns MissingError, DamagedError, MemoryError, or OSError for an I/O error; None if the program is at fault.

    Words in the path of `folder`, the step's, and in other names say nothing.
    """
    number, text = system_error(error, folder), _words(error, folder)
    if isinstance(error, DamagedError):
        return MissingError if isinstance(error, MissingError) else DamagedError
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return MemoryError
    if isinstance(error, OSError) or number is not None:
        return OSError
    if isinstance(error, (ValueError, RuntimeError)):  # TensorStore's and jax's
        if EXHAUSTED.search(text):
            return MemoryError
        if not isinstance(error, jax.errors.JaxRuntimeError):
            return OSError if re.search(UNANSWERED, text) else DamagedError if re.search(CORRUPT, text) else None
    # Orbax wraps an error of TensorStore in one whose class and text say nothing.
    return meaning(error.__cause__, folder) if type(error) is Exception and error.__cause__ is not None else None


def _words(error: BaseException, folder: Path | None) -> str:
    """Returns an error's text without the path of `folder` and other names, which a user chose."""
    text = str(error) if folder is None else str(error).replace(str(folder), "")
    return re.sub(NAMES, "", text)


def system_error(error: BaseException, folder: Path | None = None) -> int | None:
    """Returns the system's number (errno) of an error, which TensorStore has in its text; None if it has none."""
    found = re.search(SYSTEM_ERROR, _words(error, folder))
    return int(found[1]) if found else getattr(error, "errno", None)


def _explained(error: BaseException, kind: type[Exception], folder: Path) -> Exception:
    """Returns an error of `kind` whose message names the file, or else the folder, and the cause."""
    error = error.__cause__ if type(error) is Exception and error.__cause__ is not None else error
    text = first_line(error)
    if kind is OSError:
        number, name = system_error(error), getattr(error, "filename", None) or folder
        done = f"after {1 + len(PAUSES[OSError])} attempts, and every checkpoint is left as it was"
        if number is None:
            return OSError(f"{name}: could not be read ({text}), {done}; look at the disk or the file server.")
        return OSError(number, f"{os.strerror(number)}, {done}", str(name))
    if kind is MemoryError:
        return MemoryError(f"{folder}: memory ran out while this checkpoint was restored ({text})")
    return DamagedError(f"{folder} is damaged ({text})")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 200 characters; without a message the error's class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
