"""Processes as /proc has them."""

import contextlib
import time
from pathlib import Path


def _state_and_parent(pid: int) -> tuple[str, int]:
    """OSError when it is gone."""
    state, parent = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split())[:2]
    return state, int(parent)


def children(parent: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if _state_and_parent(int(entry.name))[1] == parent:
                found.add(int(entry.name))
    return found


def until_gone(pids: set[int], seconds: float = 60) -> None:
    """Waits until none of them runs; a zombie does not, and whoever adopts orphans need not bury them."""

    def runs(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return _state_and_parent(pid)[0] != "Z"
        return False

    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)
