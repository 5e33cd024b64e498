"""What watches a run: signals to stop, a loop that stands still, memory that runs out, numbers that are not finite."""

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rice_jax.errors import warn
from rice_jax.parallel import hosts

MEMORY_SHARE = 0.9  # of the limit, above which memory is told of
LOOK_SECONDS = 10.0
SHOWN = 5
ECHO_SECONDS = 1.0  # timeout(1) and other launchers signal the process and, at once, its group: one wish, not two


# --- Signals ----------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """A signal asked the run to stop."""


class Stop:
    """SIGTERM and SIGINT as a wish, which the loop grants at the end of a step; another ends the process.

    received: the first signal, or 0. What comes within ECHO_SECONDS of it is its echo.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at_once = False

    def agreed(self, step: int) -> bool:
        """Whether to stop after this step: the same answer in every process. To be asked after every step."""
        if jax.process_count() == 1:
            return bool(self.received)
        # jax's own service has heard the SIGTERM of any host, and names a step that none of them has passed.
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.received = self.received or signal.SIGTERM
        return True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises StoppedError: around what may take long and changes no state.

        Not with several processes, which would stop in different places: they go on to the end of the next step.
        """
        self._at_once = jax.process_count() == 1
        try:
            if self._at_once and self.received:
                raise StoppedError
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, _: object) -> None:
        self.received = self.received or number
        if self._at_once:
            self._at_once = False
            raise StoppedError

    @property
    def status(self) -> int:
        """The process's exit status, as shells have it: 143 after SIGTERM, 130 after SIGINT."""
        return 128 + self.received

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Within it the signals mean this; outside the main thread they cannot be had and stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # A thread hears of a signal by this pair even while the main one hangs in the device, where no handler runs.
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        before = {number: signal.signal(number, self._handle) for number in signals}
        wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(reading,), daemon=True, name="signals")
        listener.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            writing.close()  # which ends the thread
            listener.join()
            reading.close()

    def _listen(self, reading: socket.socket) -> None:
        first = 0.0  # when it came
        while number := reading.recv(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if first:
                if time.monotonic() - first > ECHO_SECONDS:
                    os._exit(128 + number[0])
                continue
            first, self.received = time.monotonic(), self.received or number[0]
            name = signal.Signals(number[0]).name
            warn(f"{name}: stops after this step, with a checkpoint; the signal once more ends the process at once.")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # by which the others hear of it


# --- A loop that stands still, memory that runs out -------------------------------------------------------------------


class Watch:
    """A thread that reports a loop which stands still and memory that comes near its limit."""

    def __init__(self, stall_seconds: float, *, ends: bool) -> None:
        """
        Args:
          stall_seconds: how long one wait may take before it is reported with the stacks of all threads; 0: for ever.
          ends: whether the process ends, with status 1, when it stands still for as long again.
        """
        self._seconds, self._ends = stall_seconds, ends
        self._wait: tuple[str, int, float] | None = None  # for what, after which update, since when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def waits_for(self, what: str, step: int) -> None:
        """What the loop waits for from now on, after `step` updates; "" for what may take as long as it takes."""
        self._wait = (what, step, time.monotonic()) if what else None

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        told: tuple[str, int, float] | None = None
        full, looked = False, -math.inf
        while not self._over.wait(min(LOOK_SECONDS, self._seconds / 4) if self._seconds else LOOK_SECONDS):
            if self._seconds and (wait := self._wait) is not None:
                stood = time.monotonic() - wait[2]
                if wait is not told and stood >= self._seconds:
                    told = wait
                    self._report(wait, stood)
                elif wait is told and self._ends and stood >= 2 * self._seconds:
                    still = f"still waiting for the {wait[0]} after {stood:.0f} s"
                    warn(f"{still}; ends (stall_ends). The same command goes on.")
                    os._exit(1)  # nothing else would: a collective that hangs cannot be cancelled
            if not full and time.monotonic() - looked >= LOOK_SECONDS:  # which opens a file for each thread
                full, looked = _tell_of_memory(), time.monotonic()

    def _report(self, wait: tuple[str, int, float], stood: float) -> None:
        what, step, _ = wait
        advice = {
            "input": "look at the disk of data.path and at data.workers",
            "device": "a process that is gone or slow lets all others wait in a collective; look at every host",
        }[what]
        then = f"ends in {self._seconds:.0f} s more" if self._ends else "waits on (stall_ends would end it)"
        warn(
            f"process {jax.process_index()} waits for the {what} for {stood:.0f} s, after update {step}: {advice}. "
            f"The run {then}; a longer stall_seconds says that this is usual. Stacks of all threads:"
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)


def _tell_of_memory() -> bool:
    """Warns, and returns whether it did, when this process and its workers hold most of what there is."""
    limit, held = memory_limit(), resident_bytes()
    if not limit or held < MEMORY_SHARE * limit:
        return False
    warn(
        f"memory: this process and its workers hold {held / 2**30:.1f} GiB of {limit / 2**30:.1f}; at the limit the "
        "system kills them. Lower data.workers, data.threads or data.cache_bytes."
    )
    return True


def resident_bytes() -> int:
    """Of this process and its children; 0 where there is no /proc."""
    total, processes = 0, ["self"]
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            processes += path.read_text().split()
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def memory_limit() -> int:
    """Bytes that the machine or the control group allows, whichever is less; 0 where nobody says."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _memory_files():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(int(path.read_text()))
    return min((limit for limit in found if limit > 0), default=0)


def _memory_files() -> list[Path]:
    """Where control groups of version 2 and 1 keep the limit: of this process's group, and in a container's root."""
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
    """Reports updates whose loss or gradient is not finite, and stops a run in which they go on.

    The step has left the parameters and moments as they were (step.py); so the policy can only be to go on or to stop.
    """

    def __init__(
        self, path: Path, *, patience: int, parameters: list[str], clips_of: Callable[[int], list[str]]
    ) -> None:
        """
        Args:
          path: of the file that takes the whole report, a line of JSON an update.
          patience: updates in a row that are passed over; 0: the first one stops the run.
          parameters: names in the order of the metric `gradient_norms`.
          clips_of: the clip ids of update number n, 1 being the first.
        """
        self._path, self._patience, self._parameters, self._clips_of = path, patience, parameters, clips_of
        self._in_a_row = 0
        self._last: tuple[int, dict[str, float]] | None = None  # the newest update that was finite, and its gradients

    def look(self, step: int, values: Mapping[str, Any]) -> None:
        """At an update's metrics, on the host.

        Raises:
          ValueError: more in a row than the patience.
        """
        norms = dict(zip(self._parameters, np.asarray(values["gradient_norms"], np.float64).tolist(), strict=True))
        if values["finite"]:
            self._in_a_row, self._last = 0, (step, norms)
            return
        self._in_a_row += 1
        report = self._report(step, values, norms)
        if self._in_a_row > self._patience:
            raise ValueError(
                f"update {step}: loss or gradient was not finite for {self._in_a_row} updates in a row "
                f"(max_nonfinite_updates {self._patience}); {report}. Parameters and checkpoints are as before them; "
                "lower optimizer.learning_rate or set optimizer.clip_norm, and train in another --workdir."
            )
        if self._in_a_row == 1 and hosts.is_first():
            warn(f"update {step}: loss or gradient is not finite; the parameters were left as they are. {report}.")

    def _report(self, step: int, values: Mapping[str, Any], norms: dict[str, float]) -> str:
        """One line; the whole goes to the file."""
        parts = {name: float(values[name]) for name in ("loss", "icl", "frame_icl", "pmd", "pfr") if name in values}
        clips = self._clips_of(step)
        if hosts.is_first():
            line = {"step": step, **_text(parts), "gradient_norms": _text(norms), "clips": clips}
            with self._path.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        said = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        largest = f"not finite are {len(bad)} of {len(norms)} gradients" + (f" ({_some(bad)})" if bad else "")
        for update, known in ((step, norms), self._last or (step, {})):
            finite = {name: norm for name, norm in known.items() if math.isfinite(norm)}
            if finite:
                names = sorted(finite, key=lambda name: -finite[name])[:SHOWN]
                largest += f"; largest of update {update}: " + ", ".join(f"{n} {finite[n]:.3g}" for n in names)
        return f"{said}; {largest}; clips: {_some(clips)}; all of it in {self._path}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _text(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no word for NaN and infinity."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
