"""stdout and stderr of a long command, which goes on when nobody reads them, they are closed, or their disk is full."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def _null() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


class LastingStream:
    """A text stream that discards everything once it cannot be written, and says so once on stderr, if it is stdout.

    Its file descriptor then leads to /dev/null, so that buffers, other libraries and child processes go on, too.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._told = stream, name, False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # of the text, not of the stream
            raise
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        told, self._told = self._told, True
        null = _null()
        try:
            os.dup2(null.fileno(), self._stream.fileno())
        except (OSError, ValueError):
            self._stream = null
        if self._name == "stdout" and not told:
            cause = getattr(error, "strerror", None) or error
            print(f"warning: stdout cannot be written any more ({cause}); the work goes on.", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Context in which stdout and stderr are LastingStreams, also those that were closed when the process started."""
    for descriptor in range(3):  # else the next file opened gets that number, and what libraries print goes there
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    sys.stderr = LastingStream(before[1] or _null(), "stderr")
    sys.stdout = LastingStream(before[0] or _null(), "stdout")
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def end_quietly() -> int:
    """Returns the exit status of a short command whose output nobody reads, and discards what is still buffered.

    The status is that of other Unix tools, which SIGPIPE ends: 141.
    """
    with contextlib.suppress(OSError, ValueError), _null() as null:
        os.dup2(null.fileno(), sys.stdout.fileno())
    return 141
