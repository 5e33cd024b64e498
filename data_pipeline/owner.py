"""Identities of processes on all hosts that share a file system, and temporary files that name their writer."""

import dataclasses
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
import uuid
from pathlib import Path

ABANDONED_SECONDS = 600.0  # a temporary file of an unknown writer that nobody wrote for so long is deleted
PROC = Path("/proc")
TEMPORARY = re.compile(r"\..+\.[\w.-]+-([0-9a-f]{8})-(\d+)-(\d*)-[0-9a-f]{8}\.tmp")


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, told from every other one by all its fields but `host`, which only tells a user where to look."""

    host: str
    boot: str  # id of the machine's last start; where /proc is missing, its network address; "": not known
    namespace: str  # of process ids: each container has its own; "" where the system has none
    pid: int
    start: str  # of the process, in clock ticks since the machine's start; "": not known

    def runs(self) -> bool | None:
        """Returns whether the process runs. None: unknown, as for a process of another machine or container."""
        here = this_process()
        same = self.boot and (self.boot, self.namespace) == (here.boot, here.namespace)
        return _runs(self.pid, self.start) if same else None

    @property
    def place(self) -> str:
        """Eight hexadecimal digits that differ for two machines, or containers, almost certainly; "" if not known."""
        return hashlib.sha256(f"{self.boot} {self.namespace}".encode()).hexdigest()[:8] if self.boot else ""


def this_process() -> Owner:
    """Returns the identity of this process."""
    return _identity(os.getpid())


@functools.lru_cache(maxsize=1)  # by process id, since a forked child has another
def _identity(pid: int) -> Owner:
    boot, namespace = "", ""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(PROC / "self/ns/pid")
    except OSError:
        node = uuid.getnode()  # with the bit of a group address set it is a random number
        # Containers, which have /proc, may have equal addresses.
        boot = "" if PROC.exists() or node >> 40 & 1 else f"{node:012x}"
    found = _state_and_start(pid)
    return Owner(socket.gethostname(), boot, namespace, pid, found[1] if found else "")


def _state_and_start(pid: int) -> tuple[str, str] | None:
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


def _runs(pid: int, start: str) -> bool | None:
    """Returns whether process `pid` of this machine and namespace runs and started at `start`. None: unknown."""
    if sys.platform == "win32":
        return None  # os.kill is something else there
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it is another user's, or no number of a process
    found = _state_and_start(pid)
    if found is None or not start:
        return None  # without /proc, or where it hides others' processes
    return found[0] not in "ZX" and found[1] == start  # a zombie ended; with another start it is another process


def temporary_name(path: Path) -> Path:
    """Returns a hidden name beside `path`, ".NAME.HOST-PLACE-PID-START-RANDOM.tmp", which no other call returns."""
    owner = this_process()
    host = re.sub(r"[^\w.-]", "_", owner.host, flags=re.ASCII)[:32] or "host"
    place = owner.place or "0" * 8
    return path.with_name(f".{path.name}.{host}-{place}-{owner.pid}-{owner.start}-{secrets.token_hex(4)}.tmp")


def remove_abandoned(folder: Path) -> None:
    """Deletes the files and folders in `folder` with a name of temporary_name whose writer has ended.

    If it is unknown whether the writer runs, its file is deleted when it has not changed for ABANDONED_SECONDS, by the
    clock of the file system. Call it under the folder's lease. Raises OSError if the folder cannot be read or written.
    """
    here, now = this_process(), None
    for path in sorted(folder.iterdir()):
        if (match := TEMPORARY.fullmatch(path.name)) is None:
            continue
        place, pid, start = match.groups()
        runs = _runs(int(pid), start) if place == here.place else None
        try:
            if runs is None:
                now = _file_system_time(folder) if now is None else now
                runs = now - path.stat().st_mtime < ABANDONED_SECONDS
            if not runs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:
            continue  # its writer renamed or deleted it


def _file_system_time(folder: Path) -> float:
    """Returns the time, in seconds, that the file system gives to a file that is written now."""
    probe = temporary_name(folder / "time")
    try:
        probe.write_bytes(b"\0")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
