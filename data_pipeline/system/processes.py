"""Worker processes: how many may run, and how they end with their parent."""

import multiprocessing
import multiprocessing.connection
import os
import threading

POLL_SECONDS = 1.0


def cores() -> int:
    """Returns the number of cores that this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Starts a thread that ends this child of multiprocessing, with status 1, when its parent ends, also by kill -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # The sentinel fires at once, unless another child that the parent forked still has it open; hence getppid().
        while os.getppid() == parent.pid and not multiprocessing.connection.wait([parent.sentinel], POLL_SECONDS):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
