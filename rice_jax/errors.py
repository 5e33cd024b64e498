"""Errors and warnings as a user reads them: one line on stderr, and an exit status."""

import contextlib
import errno
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.format import retries
from data_pipeline.system.processes import WorkerDiedError
from data_pipeline.system.signals import ended_by_signals
from data_pipeline.system.streams import end_quietly, lasting_output

# What jax and the libraries of a device say of exhausted memory, in whichever line of their text.
EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|out[ _]?of[ _]?memory|ALLOC_FAILED", re.IGNORECASE)
AGAIN = "run the same command again to go on"
DISK = "look at the disk, or at the file server and the connection to it"
OTHER_PATH = {  # what to do about errors that only another path helps against
    errno.ENOENT: "give a path that exists",
    errno.EEXIST: "there is a file of that name; give another path",
    errno.ENOTDIR: "a part of that path is a file; give another path",
    errno.EISDIR: "it is a folder; give the path of a file",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EROFS: "nothing can be written there; give a path on another file system",
}
ADVICE = {  # and against which something else helps, and then the same command
    errno.ENOSPC: "make space there",
    errno.EDQUOT: "make space there",
    errno.EACCES: "look at the permissions of that path, or give another",
    errno.EPERM: "look at the permissions of that path, or give another",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files (sysctl fs.file-max)",
    errno.EFBIG: "that disk has no room for so large a file: give a --workdir or --output on another disk",
    errno.ELOOP: "replace the symbolic link in that path that leads back to itself",
    errno.EBUSY: "end the program that uses that path",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENOTCONN), DISK),
    **dict.fromkeys((errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET), DISK),
}


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Prints "error: MESSAGE" on stderr and raises SystemExit(status). Status 1: it failed; 2: wrong use."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def run(main: Callable[[Any], None], values: Any, *, long: bool = False, alone: bool = True) -> None:
    """Runs main(values) as a command: an error that a user can fix becomes one line on stderr and an exit status.

    For ValueError, OSError, MemoryError and WorkerDiedError it raises SystemExit(1), for KeyboardInterrupt
    SystemExit(130); other exceptions pass. When nobody reads stdout, a `long` command goes on, and another ends quietly
    with status 141. A signal to stop ends the process with one line, if it is `alone`; of several processes the others
    say it. Only commands may call this, because it changes how the whole process warns (one_line_warnings).
    """
    one_line_warnings()
    with contextlib.ExitStack() as stack:
        if long:
            stack.enter_context(lasting_output())
        if alone:
            stack.enter_context(ended_by_signals(AGAIN))
        try:
            main(values)
            if sys.stdout is not None:
                sys.stdout.flush()
        except (ValueError, OSError, MemoryError, WorkerDiedError, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError) and not long:
                raise SystemExit(end_quietly()) from None
            fail(reason(error), status=status(error))


class _OneLine(logging.Handler):
    """Prints what libraries log and warn of as "warning: LIBRARY: TEXT", each text once, whatever its numbers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.exc_info and record.levelno >= logging.ERROR and "orbax" in record.pathname + text:
                return  # Orbax raises these errors, too
            self.show(text, record.pathname)
        except Exception:  # as every handler: what a library logs wrongly ends no command
            self.handleError(record)

    def show(self, text: str, file: str) -> None:
        text = re.sub(r"/proc/self/fd/\d+", lambda found: os.path.realpath(found[0]), text)  # as Orbax knows a workdir
        text = f"{_library(file)}: {' '.join(text.split())[:500]}"
        if (kind := re.sub(r"\d+", "0", text)) not in self._seen:
            self._seen.add(kind)
            warn(text)


def _library(file: str) -> str:
    """Returns the name of the package that a source file belongs to, such as "orbax"; else the name of the file."""
    inside = re.search(r"(?:site|dist)-packages/(\w+)", file)
    return inside[1] if inside else Path(file).stem


@functools.cache
def one_line_warnings() -> None:
    """Prints, in the whole process, what libraries warn of as one line each, and drops what Orbax raises anyway.

    After an error Orbax drops coroutines, of which Python complains by the dozen. They come from TensorStore's threads
    and after the exception; so this is never undone.
    """
    handler = _OneLine()
    for other in logging.root.handlers[:]:
        if type(other) is logging.StreamHandler:  # that of a library, which would print the same again
            logging.root.removeHandler(other)
    logging.root.addHandler(handler)
    warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: handler.show(
        f"{message}", filename
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if "coroutine" not in repr(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def reason(error: BaseException) -> str:
    """Returns an error as text: the message, and of an OSError the file, the cause and, with an errno, advice.

    KeyboardInterrupt gives the advice to run the command again, an unknown error "TYPE: MESSAGE".
    """
    if isinstance(error, ValueError | MemoryError | WorkerDiedError):
        return str(error) or f"this machine's memory is exhausted; end what else uses it, then {AGAIN}"
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {AGAIN}"
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno is None:
        return where
    if error.errno in OTHER_PATH and "; " not in (error.strerror or ""):  # else it says what to do itself
        return f"{where}; {OTHER_PATH[error.errno]}."
    if not where.endswith((retries.DISK, *retries.ADVICE.values())):  # else it says already what to look at
        where = f"{where}; {ADVICE.get(error.errno, 'check that path')}"
    return f"{where}, then run the same command again."


def status(error: BaseException) -> int:
    """Returns the exit status of a command that `error` ends: 130 for KeyboardInterrupt, else 1."""
    return 130 if isinstance(error, KeyboardInterrupt) else 1
