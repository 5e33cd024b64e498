"""What worker processes of any kind need: how many there may be, and an end when their parent ends."""

import multiprocessing
import multiprocessing.connection
import os
import threading

LOOK_SECONDS = 1.0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """From now on this process, started by multiprocessing, ends with its parent, however that ends.

    kill -9 of a parent closes nothing: its workers would wait for tasks, and hold shared memory, for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # The sentinel tells at once, but only when nobody else holds its other end, as whom the parent has forked does.
        while os.getppid() == parent.pid and not multiprocessing.connection.wait([parent.sentinel], LOOK_SECONDS):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
