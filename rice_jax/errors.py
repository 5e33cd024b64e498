"""Errors and warnings as a user reads them: one line on stderr, and an exit status."""

import contextlib
import errno
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from data_pipeline.system.processes import WorkerDiedError
from data_pipeline.system.signals import ended_by_signals
from data_pipeline.system.streams import end_quietly, lasting_output

AGAIN = "run the same command again to go on"
ADVICE = {errno.ENOENT: "give a path that exists", errno.ENOSPC: "make space there"}


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Prints "error: MESSAGE" on stderr and raises SystemExit(status). Status 1: it failed; 2: wrong use."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def run(main: Callable[[Any], None], values: Any, *, long: bool = False, alone: bool = True) -> None:
    """Runs main(values) as a command: an error that a user can fix becomes one line on stderr and an exit status.

    For ValueError, OSError and WorkerDiedError it raises SystemExit(1), for KeyboardInterrupt SystemExit(130); other
    exceptions pass. When nobody reads stdout, a `long` command goes on, and another ends quietly with status 141. A
    signal to stop ends the process with one line, if it is `alone`; of several processes the others say it. Only
    commands may call this, because it silences Orbax in the whole process.
    """
    _silence_orbax()
    with contextlib.ExitStack() as stack:
        if long:
            stack.enter_context(lasting_output())
        if alone:
            stack.enter_context(ended_by_signals(AGAIN))
        try:
            main(values)
            if sys.stdout is not None:
                sys.stdout.flush()
        except (ValueError, OSError, WorkerDiedError, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError) and not long:
                raise SystemExit(end_quietly()) from None
            fail(reason(error), status=status(error))


@functools.cache
def _silence_orbax() -> None:
    """Drops, in the whole process, what is printed beside the exception when Orbax cannot read or write one file.

    Orbax logs a traceback a thread, and Python complains of dozens of coroutines that Orbax drops. They come from
    TensorStore's threads too, and after the exception; so this is never undone.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if "coroutine" not in repr(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def reason(error: BaseException) -> str:
    """Returns an error as text: ValueError's and WorkerDiedError's message, OSError's file, cause and what to do.

    KeyboardInterrupt gives the advice to run the command again, any other error "TYPE: MESSAGE".
    """
    if isinstance(error, (ValueError, WorkerDiedError)):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {AGAIN}"
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno is None:
        return where
    return f"{where}; {ADVICE.get(error.errno, 'check that path')}, then run the same command again."


def status(error: BaseException) -> int:
    """Returns the exit status of a command that `error` ends: 130 for KeyboardInterrupt, else 1."""
    return 130 if isinstance(error, KeyboardInterrupt) else 1
