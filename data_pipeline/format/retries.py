"""Reading again after I/O errors that pass, as those of a network file system do while its server restarts."""

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

RETRY_SECONDS = 300.0  # from the first failed attempt to the last
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 20.0  # seconds
QUIET_SECONDS = 1.0  # of attempts, before a warning
DISK = "look at the disk, mount or network that holds it"
ADVICE = {  # of errors that another place than the disk causes; of all others it is DISK
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files (sysctl fs.file-max)",
    errno.ENOMEM: "give this machine or job more memory",
}
# Errors of a disk, mount or network for a moment. Not all systems define all of them.
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "ETIME", "EAGAIN", "EBUSY", "EINTR", "EREMOTEIO", "ENOLINK", "ECOMM", "EPROTO",
        "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN", "EPIPE", "ESHUTDOWN", "ENETDOWN", "ENETUNREACH",
        "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENOBUFS", "ENOMEM", "EMFILE", "ENFILE", "EDEADLK", "ENOLCK",
        "ENXIO", "ENODEV",
    )
    if hasattr(errno, name)
)  # fmt: skip
Result = TypeVar("Result")


def retried(attempt: Callable[[], Result], where: str, *, seconds: float | None = None) -> Result:
    """Returns attempt(). After an OSError of PASSING it calls it again, with growing pauses, for `seconds`.

    `attempt` must open its file anew, since a handle may be stale. where: the file, or file and record, for messages.
    seconds: RETRY_SECONDS if None. Raises an OSError that says what failed, for how long and what to look at when the
    time is over; other errors pass at once.
    """
    limit = RETRY_SECONDS if seconds is None else seconds
    pause, begin, warned = FIRST_PAUSE, time.monotonic(), False
    while True:
        try:
            return attempt()
        except OSError as err:
            if err.errno not in PASSING:
                raise
            passed = time.monotonic() - begin
            if passed + pause > limit:
                text = f"{err.strerror} in every attempt of {passed:.0f} s; {ADVICE.get(err.errno or 0, DISK)}"
                raise OSError(err.errno, text, where) from err
            if passed >= QUIET_SECONDS and not warned:
                warned = True
                text = f"{err.strerror}; it is tried again for up to {limit:.0f} s."
                print(f"warning: {where}: {text}", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
