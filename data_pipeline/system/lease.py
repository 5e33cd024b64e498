"""Leases: one writer a folder at a time, also in a folder that several hosts share.

A lease is a small file in the folder. It names its holder and has a random token and a counter, which the holder raises
every RENEW_SECONDS. Whether a holder on the same machine still runs is known at once, from its process. Of a holder
elsewhere only the counter is seen, by one's own clock: if it changes, the holder runs; if it stands still for
DEAD_SECONDS, the lease is taken over. A holder that was stopped for so long finds, by `check`, that it lost the lease.

A lease also names its folder, by device and inode. One that names another was copied together with its folder, so it
says nothing of a run here; but as some network file systems give a folder other inodes later, it is watched, too.
"""

import contextlib
import dataclasses
import hashlib
import json
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Protocol, Self

from data_pipeline.faults import FailedError, WrongUseError
from data_pipeline.format.retries import retried
from data_pipeline.owner import Owner, temporary_name, this_process

LEASE = ".lease"  # the file, in the folder
RENEW_SECONDS, DEAD_SECONDS = 10.0, 60.0
LOOK_SECONDS, CONTENTION_SECONDS = 1.0, 0.1  # between two looks at a lease that is watched; at one that is changing


class HeldError(WrongUseError):
    """Another run writes to the folder."""


class LeaseLostError(FailedError, ValueError):
    """This run no longer has its lease, and must write nothing more to the folder."""


class Slot(Protocol):
    """A place for one lease, which all writers of a folder see: a file, or an object of a bucket."""

    name: str  # for messages

    def read(self) -> tuple[bytes, str] | None:
        """Returns the content and its version, a text that no other content has; None if there is none."""

    def write(self, data: bytes, version: str | None) -> bool:
        """Writes `data` if the version there is still `version` (None: if nothing is there). Returns whether it did."""

    def delete(self, version: str) -> bool:
        """Deletes the content if its version is still `version`. Returns whether it did."""


class FileSlot:
    """A slot that is a file. It needs no lock of the system: those of a network file system may hold on one host only.

    Who replaces version V first creates the file NAME.V, which only one can, and then renames it to NAME. If it is
    killed between the two, others remove its file: at once if its process has ended, else after `dead_seconds`. Two
    that remove at one moment may rename each other's file, so what was written is read back: it decides who has won.
    """

    def __init__(self, path: Path, *, dead_seconds: float = DEAD_SECONDS) -> None:
        self.name = str(path)
        self._path = path
        self._dead_seconds = dead_seconds
        self._obstacle: tuple[bytes, float] | None = None  # another's NAME.V, and since when it has stood there

    def read(self) -> tuple[bytes, str] | None:
        data = _content(self._path)
        return None if data is None else (data, hashlib.sha256(data).hexdigest()[:16])

    def write(self, data: bytes, version: str | None) -> bool:
        return self._swap(version, data, keep=True)

    def delete(self, version: str) -> bool:
        return self._swap(version, _encode(this_process(), "", 0, "", self._path.parent), keep=False)

    def _swap(self, version: str | None, data: bytes, *, keep: bool) -> bool:
        claim = self._path.with_name(f"{self._path.name}.{version or 'new'}")
        if self._version() != version or not self._create(claim, data):
            return False
        try:
            if self._version() != version:  # perhaps because another renamed the file of this one
                return keep and _content(self._path) == data
            if not keep:
                self._path.unlink(missing_ok=True)
                return True
            with contextlib.suppress(FileNotFoundError):  # it was removed as that of a dead process
                claim.replace(self._path)
            return _content(self._path) == data
        finally:
            claim.unlink(missing_ok=True)

    def _version(self) -> str | None:
        found = self.read()
        return found[1] if found else None

    def _create(self, claim: Path, data: bytes) -> bool:
        """Creates a file that did not exist, and returns whether it could. Removes one that a dead process left."""
        try:
            with claim.open("xb") as file:
                try:
                    file.write(data)
                    file.flush()
                except OSError:
                    claim.unlink()
                    raise
            return True
        except FileExistsError:
            other = _content(claim)
        if other is None:
            return False
        if self._obstacle is None or other != self._obstacle[0]:
            self._obstacle = other, time.monotonic()
        holder = Holder.parse(other)
        runs = holder.runs_in(self._path.parent) if holder else None
        if runs is False or (runs is None and time.monotonic() - self._obstacle[1] >= self._dead_seconds):
            self._obstacle, removed = None, temporary_name(claim)
            with contextlib.suppress(FileNotFoundError):
                claim.replace(removed)
                removed.unlink()
        return False


def _content(path: Path) -> bytes | None:
    try:
        return retried(path.read_bytes, str(path), seconds=DEAD_SECONDS)
    except FileNotFoundError:
        return None


def _identity(folder: Path) -> str:
    """Returns what tells a folder of this machine from its copies, also after it was renamed; "" if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}"


def _encode(owner: Owner, token: str, counter: int, since: str, folder: Path) -> bytes:
    about = {"token": token, **dataclasses.asdict(owner), "since": since, "folder": _identity(folder)}
    return json.dumps(about | {"counter": counter}).encode() + b"\n"


@dataclasses.dataclass(frozen=True)
class Holder:
    """What a lease says."""

    owner: Owner
    token: str
    since: str  # by the holder's clock, for messages only
    folder: str = ""  # as of _identity on the holder's machine; "": not known

    @classmethod
    def parse(cls, data: bytes) -> "Holder | None":
        """Returns the holder that `data` names, or None if they are no lease, such as an empty file."""
        try:
            found = json.loads(data)
            texts = {name: found[name] for name in ("host", "boot", "namespace", "start", "token", "since")}
            pid, folder = found["pid"], str(found.get("folder", ""))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not all(isinstance(text, str) for text in texts.values()) or type(pid) is not int or pid < 1:
            return None
        token, since = texts.pop("token"), texts.pop("since")
        return cls(Owner(pid=pid, **texts), token, since, folder)

    def runs_in(self, folder: Path) -> bool | None:
        """Returns whether the holder runs and its lease is of this folder. None: unknown; only the counter tells."""
        runs = self.owner.runs()
        is_copied = self.folder not in ("", _identity(folder))
        return None if runs and is_copied else runs

    def __str__(self) -> str:
        shown = {name: repr(text)[1:-1][:100] for name, text in (("host", self.owner.host), ("since", self.since))}
        return f"process {self.owner.pid} on host {shown['host']}, since {shown['since']}"


class Lease:
    """The lease of a folder, held in a `with` block: by the first line of its block nobody else writes there.

    Entering raises HeldError, which names the holder, if another run has it, and OSError if it cannot be read or
    written. Leaving the block deletes it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        slot: Slot | None = None,
        renew_seconds: float = RENEW_SECONDS,
        dead_seconds: float = DEAD_SECONDS,
    ) -> None:
        self._folder = folder
        self._slot: Slot = slot or FileSlot(folder / LEASE, dead_seconds=dead_seconds)
        self._renew_seconds, self._dead_seconds = renew_seconds, dead_seconds
        self._token, self._since = secrets.token_hex(16), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._counter = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    def __enter__(self) -> Self:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a lease that stays is that of an ended process, which nobody waits for
            while (found := self._own()) and not self._slot.delete(found):
                time.sleep(CONTENTION_SECONDS)

    def check(self) -> None:
        """Raises LeaseLostError unless this run still has its lease. Call it before each write that others rely on.

        Raises OSError if the lease cannot be read.
        """
        found = self._slot.read()
        holder = Holder.parse(found[0]) if found else None
        if holder is None or holder.token != self._token:
            if holder is not None:
                now = f"{holder} has taken it over"
            else:
                now = "its file is damaged" if found else "its file was removed, or another run took it and has ended"
            raise LeaseLostError(
                f"{self._folder}: this run lost its lease ({now}), perhaps because it stood still for over "
                f"{self._dead_seconds:.0f} s; it ends here and writes nothing more. If no other run is at work there, "
                "run the same command again."
            )

    def _take(self) -> None:
        watched, since = None, 0.0  # the lease of a holder elsewhere, and when it was first seen so
        while True:
            found = self._slot.read()
            if found is None:
                if self._write(None):
                    return
                time.sleep(CONTENTION_SECONDS)
                continue
            data, version = found
            holder = Holder.parse(data)
            runs = holder.runs_in(self._folder) if holder else None
            if holder and (runs or (watched not in (None, data) and runs is None)):
                raise HeldError(
                    f"{self._folder}: found another run that writes to it ({holder}), needs no other; wait for its "
                    "end, or give another folder."
                )
            if watched != data:
                if runs is None:
                    named = f"the lease of {holder}" if holder else "a damaged lease"
                    print(
                        f"{self._folder}: found {named}, which is watched for at most {self._dead_seconds:.0f} s, to "
                        "learn whether that run is still at work there.", file=sys.stderr, flush=True,
                    )  # fmt: skip
                watched, since = data, time.monotonic()
            if runs is False or time.monotonic() - since >= self._dead_seconds:
                if self._write(version):
                    return
                time.sleep(CONTENTION_SECONDS)
            else:
                time.sleep(min(LOOK_SECONDS, self._renew_seconds))

    def _write(self, version: str | None) -> bool:
        self._counter += 1
        data = _encode(this_process(), self._token, self._counter, self._since, self._folder)
        return self._slot.write(data, version)

    def _own(self) -> str | None:
        """Returns the version of the lease that is there if it is this run's, else None."""
        found = self._slot.read()
        holder = Holder.parse(found[0]) if found else None
        return found[1] if found and holder and holder.token == self._token else None

    def _renew(self) -> None:
        while not self._over.wait(self._renew_seconds):
            with contextlib.suppress(OSError):  # `check` tells it; the next turn tries again
                if version := self._own():
                    self._write(version)
