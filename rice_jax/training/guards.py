"""Guards of a run: signals that stop it, waits that last too long, memory near its limit, and NaN or infinity."""

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_pipeline.system.signals import STOPS, heard
from rice_jax.errors import warn
from rice_jax.parallel import hosts

MEMORY_SHARE = 0.9  # of the limit, above which Watch warns
CHECK_SECONDS = 10.0  # between two checks by Watch
LISTED = 5  # names in a message
SIGNALS = (signal.SIGINT, *STOPS)
DUPLICATE_SECONDS = 1.0  # timeout(1) and other launchers signal the process and right after that its group


# --- Signals ----------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """The run stops because of a signal."""


class Stop:
    """Stops a run at the end of an update after one of SIGNALS; the same signal again ends the process at once.

    `received` is the first signal's number, 0 before it. A signal that comes again within DUPLICATE_SECONDS is ignored.
    """

    def __init__(self) -> None:
        self.received = 0
        self._raises = False
        self._asked = 0

    def agreed(self) -> bool:
        """Returns whether to stop now, alike in all processes, and sets `received` if so.

        All processes must call it equally often: the answer is the same for the same call.
        """
        if jax.process_count() == 1:
            return bool(self.received)
        # jax's preemption service learns of a SIGTERM on any host and picks a call that no process has made yet.
        self._asked += 1
        if not multihost_utils.reached_preemption_sync_point(self._asked):
            return False
        self.received = self.received or signal.SIGTERM
        return True

    def check(self) -> None:
        """Raises StoppedError, in all processes, if they have `agreed` to stop."""
        if self.agreed():
            raise StoppedError

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context in which a signal, also an earlier one, raises StoppedError: for long work that changes no state.

        With several processes it raises nothing, since each would stop at another place: the work must call `check`.
        """
        self._raises = jax.process_count() == 1
        try:
            if self._raises and self.received:
                raise StoppedError
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, _: object) -> None:
        self.received = self.received or number
        if self._raises:
            self._raises = False
            raise StoppedError

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Context that yields this object, which handles SIGNALS meanwhile, if in the main thread."""
        # With several processes jax's preemption service handles SIGTERM.
        numbers = [n for n in SIGNALS if n != signal.SIGTERM or jax.process_count() == 1]
        first: dict[int, float] = {}  # time of each signal

        def hear(number: int) -> None:
            name, now, told = signal.Signals(number).name, time.monotonic(), bool(first)
            if now - first.setdefault(number, now) > DUPLICATE_SECONDS:
                os._exit(128 + number)
            if told:
                return
            self.received = self.received or number
            warn(f"{name}: the run stops after this step and saves a checkpoint; a second {name} ends it at once.")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # jax's preemption service passes it on to the other processes

        with heard(numbers, hear, self._handle):
            yield self


# --- Waits and memory -------------------------------------------------------------------------------------------------


class Watch:
    """A thread that warns when the loop waits too long, and when memory comes near its limit.

    After `stall_seconds` (0: never) it prints all threads' stacks; if `ends`, it exits with status 1 after twice that.
    """

    def __init__(self, stall_seconds: float, *, ends: bool) -> None:
        self._seconds, self._ends = stall_seconds, ends
        self._wait: tuple[str, int, float] | None = None  # subject, updates done, start
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def waits_for(self, subject: str, step: int) -> None:
        """Notes that a wait for "input" or "device" begins, after `step` updates. `pause` or another call ends it."""
        self._wait = (subject, step, time.monotonic())

    def pause(self) -> None:
        """Notes that no wait is under way: of the work until the next `waits_for` Watch does not warn."""
        self._wait = None

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        reported: tuple[str, int, float] | None = None
        memory_reported, memory_checked = False, -math.inf
        while not self._over.wait(min(CHECK_SECONDS, self._seconds / 4) if self._seconds else CHECK_SECONDS):
            if self._seconds and (wait := self._wait) is not None:
                waited = time.monotonic() - wait[2]
                if wait is not reported and waited >= self._seconds:
                    reported = wait
                    self._report(wait, waited)
                elif wait is reported and self._ends and waited >= 2 * self._seconds:
                    still = f"still waiting for the {wait[0]} after {waited:.0f} s"
                    warn(f"{still}; the process ends (stall_ends). Run the same command again to continue.")
                    os._exit(1)  # nothing else would: a collective that hangs cannot be cancelled
            # Not more often than that: a check opens a file for each thread.
            if not memory_reported and time.monotonic() - memory_checked >= CHECK_SECONDS:
                memory_reported, memory_checked = _warn_of_memory(), time.monotonic()

    def _report(self, wait: tuple[str, int, float], waited: float) -> None:
        subject, step, _ = wait
        advice = "check the disk of data.path, and data.workers"
        if subject == "device" and jax.process_count() > 1:
            advice = "one process that is gone or slow makes all others wait in a collective; check every host"
        elif subject == "device":
            advice = "look at the device (nvidia-smi, the system's log), and end what else uses it"
        then = f"ends in {self._seconds:.0f} s" if self._ends else "keeps waiting (stall_ends=true would end it)"
        warn(
            f"process {jax.process_index()} has waited {waited:.0f} s for the {subject}, after update {step}: "
            f"{advice}. The run {then}; set a longer stall_seconds if this is normal. Stacks of all threads:"
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)


def _warn_of_memory() -> bool:
    """Warns if this process and its children hold MEMORY_SHARE of a known memory limit; returns whether it did."""
    limit, held = memory_limit(), resident_bytes()
    if not limit or held < MEMORY_SHARE * limit:
        return False
    warn(
        f"memory: this process and its workers hold {held / 2**30:.1f} GiB of {limit / 2**30:.1f}; at the limit the "
        "system kills them. Lower data.workers, data.threads or data.cache_bytes."
    )
    return True


def resident_bytes() -> int:
    """Returns the resident memory of this process and its own children, summed, in bytes; 0 without /proc."""
    total, processes = 0, ["self"]
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            processes += path.read_text().split()
    for process in processes:
        with contextlib.suppress(OSError):  # the process has ended
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def memory_limit() -> int:
    """Returns the smallest of the machine's memory and its control groups' limits, in bytes; 0 if none is known."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _memory_files():
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            found.append(int(path.read_text()))
    return min((limit for limit in found if limit > 0), default=0)


def _memory_files() -> list[Path]:
    root, files = Path("/sys/fs/cgroup"), [Path("/sys/fs/cgroup/memory.max")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                files.append(root / group.lstrip("/") / "memory.max")
            elif "memory" in controllers.split(","):
                files += [root / "memory" / g / "memory.limit_in_bytes" for g in (group.lstrip("/"), "")]
    return files


# --- Numbers that are not finite --------------------------------------------------------------------------------------


class NotFinite:
    """Reports updates with a loss or gradient that is not finite; more than `patience` of them in a row stop the run.

    The training step has left the parameters and moments unchanged in such updates. `path` receives a full report of
    each as a line of JSON. `parameters` names the entries of the metric gradient_norms; clips_of(update) returns the
    clip ids of an update, numbered from 1.
    """

    def __init__(
        self, path: Path, *, patience: int, parameters: list[str], clips_of: Callable[[int], list[str]]
    ) -> None:
        self._path, self._patience, self._parameters, self._clips_of = path, patience, parameters, clips_of
        self._in_a_row = 0
        self._last: tuple[int, dict[str, float]] | None = None  # the newest finite update, and its gradient norms

    def check(self, step: int, values: Mapping[str, Any]) -> None:
        """Reports an update that is not finite. Raises ValueError after more than `patience` in a row, or OSError."""
        norms = dict(zip(self._parameters, np.asarray(values["gradient_norms"], np.float64).tolist(), strict=True))
        if values["finite"]:
            self._in_a_row, self._last = 0, (step, norms)
            return
        self._in_a_row += 1
        report = self._report(step, values, norms)
        if self._in_a_row > self._patience:
            raise ValueError(
                f"update {step}: loss or gradient was not finite for {self._in_a_row} updates in a row "
                f"(max_nonfinite_updates {self._patience}); {report}. Parameters and checkpoints are from before them; "
                "lower optimizer.learning_rate or set optimizer.clip_norm, and train in another --workdir."
            )
        if self._in_a_row == 1 and hosts.is_first():
            warn(f"update {step}: loss or gradient is not finite; the parameters stay as they were. {report}.")

    def _report(self, step: int, values: Mapping[str, Any], norms: dict[str, float]) -> str:
        parts = {name: float(values[name]) for name in ("loss", "icl", "frame_icl", "pmd", "pfr") if name in values}
        clips = self._clips_of(step)
        if hosts.is_first():
            line = {"step": step, **_text(parts), "gradient_norms": _text(norms), "clips": clips}
            with self._path.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        losses = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        gradients = f"{len(bad)} of {len(norms)} gradients are not finite" + (f" ({_some(bad)})" if bad else "")
        for update, known in ((step, norms), self._last or (step, {})):
            finite = {name: norm for name, norm in known.items() if math.isfinite(norm)}
            if finite:
                names = sorted(finite, key=lambda name: -finite[name])[:LISTED]
                gradients += f"; largest of update {update}: " + ", ".join(f"{n} {finite[n]:.3g}" for n in names)
        return f"{losses}; {gradients}; clips: {_some(clips)}; full report in {self._path}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _text(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
