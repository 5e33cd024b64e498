"""Signals by which schedulers, terminals and people stop a command."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator

# SLURM and SGE send SIGUSR1, LSF SIGUSR2, limits of CPU time SIGXCPU. SIGINT (Ctrl-C) is Python's KeyboardInterrupt.
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def _ignore(number: int, frame: object) -> None:
    pass


@contextlib.contextmanager
def heard(
    numbers: Collection[int], hear: Callable[[int], None], handle: Callable[[int, object], None] = _ignore
) -> Iterator[None]:
    """Context in which hear(number) is called, in a thread, for each of these signals; their default action is off.

    `handle` is called in the main thread, as by signal.signal, and may raise. Python calls it only when that thread is
    not in C, so that `hear` is what works in a collective that hangs. SIGHUP stays ignored if it was, as under nohup.
    Outside the main thread, where Python sets no handler, the context changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def listen() -> None:
        while number := reading.recv(1):
            if number[0] in numbers:
                hear(number[0])

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, handle) for number in set(numbers) - ignored}
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writing.close()  # which ends the thread
        thread.join()
        reading.close()


def ended_by_signals(then: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which one of STOPS ends the process at once: with status 128 + its number, and one line.

    The line is "stopped by SIGTERM; THEN", on stderr. Nothing is saved: for work that the same command continues after
    a kill -9.
    """

    def end(number: int) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads stderr
            print(f"stopped by {signal.Signals(number).name}; {then}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    return heard(STOPS, end)
