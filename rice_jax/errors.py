"""Errors and warnings as a user reads them: one line on stderr and an exit status."""

import errno
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn


def fail(message: str, *, status: int = 1) -> NoReturn:
    """One line on stderr and an exit status: 1 failed, 2 wrong use."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


MEND = {errno.ENOENT: "give a path that exists", errno.ENOSPC: "make space there"}


def run(main: Callable[[Any], None], values: Any) -> None:
    """Runs a command; what a user can mend is one message on stderr, anything else keeps its traceback."""
    # For one failed save Orbax logs a traceback a thread; the error is raised all the same, and said here once.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        main(values)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        fail(reason(error), status=status(error))


def reason(error: BaseException) -> str:
    """What a user is told of an error."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to go on"
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno is None:
        return where
    return f"{where}; {MEND.get(error.errno, 'check that path')}, then run the same command again."


def status(error: BaseException) -> int:
    return 130 if isinstance(error, KeyboardInterrupt) else 1
