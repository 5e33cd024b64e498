"""The log of a run: metrics.jsonl, from which all else is read, TensorBoard and the printed progress."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from rice_jax.parallel import hosts
from rice_jax.training.ledger import as_hex

STEP = re.compile(rb'\{"step": (\d+)[,}]')  # at the start of each line that Log writes
EVALUATION = b'/queries"'  # in the lines of evaluations only


def as_json(value: Any) -> Any:
    """Returns a metric as JSON has it: a number or bool, None if not finite; of uint32, the ledger's 16 hex digits."""
    array = np.asarray(value)
    if array.dtype == np.uint32:
        return as_hex(array)
    number = array.item()
    return number if not isinstance(number, float) or math.isfinite(number) else None


class Log:
    """Writes the metrics of a run, by step, and keeps the figures of its evaluations in memory.

    All processes call the same methods with the same values; the first one writes and prints. Before it writes it calls
    `check`, which raises an error, which passes, if this run may no longer write.
    """

    def __init__(self, workdir: Path, *, step: int, check: Callable[[], object] = bool) -> None:
        """Opens the log of `workdir`. Lines after `step`, the restored one, and a half-written last line are deleted.

        Raises ValueError for a line that is none of metrics, and OSError if the file cannot be read or written.
        """
        self.newest: dict[str, Any] = {}  # metrics of the newest update that was written
        self._check = check
        path = workdir / "metrics.jsonl"
        if first := hosts.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            check()
        self._evaluations: list[dict[str, Any]] = hosts.ask_first(lambda: cut_lines(path, step))
        self._lines = (path if first else Path(os.devnull)).open("a")
        # TensorBoard ignores events of earlier runs at or after the purge step.
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, write_to_disk=first)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line, in process 0 only: the metrics of update `step`, from 1, or of an evaluation after it."""
        values = {name: as_json(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name.replace("@", "_at_"), value, step)

    def write_evaluation(self, step: int, split: str, figures: Mapping[str, int | float]) -> None:
        """Writes the figures of an evaluation of a split, made after update `step`, and keeps them."""
        values = {f"{split}/{name}": as_json(value) for name, value in figures.items()}
        self._check()
        self.write(step, values)
        self._lines.flush()
        self._evaluations.append({"step": step, **values})

    def write_updates(
        self, updates: list[tuple[int, Any]], check: Callable[[int, Mapping[str, Any]], None]
    ) -> list[tuple[int, Any]]:
        """Writes the metrics of `updates`, pairs of number and metrics, and waits until the device has computed them.

        Calls check(number, metrics) after each line, with gradient_norms, which are not written. Its error passes.
        Sets `newest`. Returns [].
        """
        self._check()
        for step, on_device in updates:
            values = jax.device_get(on_device)
            written = {name: value for name, value in values.items() if name != "gradient_norms"}
            self.write(step, written)
            self.newest = {name: as_json(value) for name, value in written.items()}
            check(step, values)
        self._lines.flush()  # nothing is left to be written when the lease may be lost
        self._board.flush()
        return []

    def say(self, text: str) -> None:
        if hosts.is_first():
            print(text, flush=True)

    def has_evaluation(self, step: int, split: str) -> bool:
        return any(line["step"] == step for line in self._of(split))

    def last_evaluation(self, split: str) -> dict[str, int | float]:
        """Returns the figures of a split's newest evaluation by name, null as None; {} without one."""
        found = self._of(split)
        return {k.removeprefix(f"{split}/"): v for k, v in found[-1].items() if k != "step"} if found else {}

    def recalls(self, split: str) -> dict[int, float]:
        """Returns the Recall@1 in percent of each evaluation of a split, by step; {} without one.

        Evaluations in galleries of another size than the newest one's are left out: their figures do not compare.
        """
        name, gallery, found = f"{split}/recall@1", f"{split}/gallery", self._of(split)
        alike = [line for line in found if line.get(gallery) == found[-1].get(gallery)]
        return {line["step"]: line[name] for line in alike if line.get(name) is not None}

    def _of(self, split: str) -> list[dict[str, Any]]:
        return [line for line in self._evaluations if f"{split}/queries" in line]

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self._board.close()


def cut_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Cuts metrics.jsonl before its first line after `step`, and returns the lines of evaluations that are left.

    A half-written last line (no newline at its end) is cut, too. The file is read once, line by line, and only lines of
    evaluations are parsed, because a long run has millions of others. [] without a file. Raises ValueError if a line
    has no step or an evaluation is no JSON, and OSError if the file cannot be read or cut.
    """
    if not path.exists():
        return []
    evaluations, kept = [], 0  # kept: bytes
    with path.open("rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                found = STEP.match(line)
                if int(found[1] if found else json.loads(line)["step"]) > step:
                    break
                if EVALUATION in line:
                    evaluations.append(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} line {number}: is no line of metrics ({error}); restore the file, or move it away, and "
                    "the run goes on without the lines so far."
                ) from error
            kept += len(line)
        file.truncate(kept)
    return evaluations


class Progress:
    """Computes the speed of updates since the previous report and the remaining time, without compilation."""

    def __init__(self, *, total: int, batch_size: int) -> None:
        self.started = False
        self._step, self._total, self._batch_size = 0, total, batch_size
        self._since = time.monotonic()

    def start(self, step: int) -> str:
        """Starts the clock after the first update; returns the time since the object was created, as "3 min 2 s"."""
        self.started, since = True, self._since
        self.pause(step)
        return duration(self._since - since)

    def line(self, step: int, metrics: Mapping[str, Any]) -> str:
        """Returns 'step 150/3000  loss 3.912 (icl ...)  0.412 s/step  155 examples/s  19 min 34 s left'.

        Without metrics there is no loss, without an update since the last report no speed. Restarts the clock.
        """
        seconds = (time.monotonic() - self._since) / max(1, step - self._step)
        rate = ""
        if step > self._step:
            left = duration((self._total - step) * seconds)
            rate = f"  {seconds:.3f} s/step  {self._batch_size / seconds:.0f} examples/s  {left} left"
        self.pause(step)
        names = [name for name in ("icl", "frame_icl", "pmd", "pfr") if name in metrics]
        parts = " ".join(f"{name} {number(metrics[name])}" for name in names)
        loss = f"  loss {number(metrics['loss'])} ({parts})" if metrics else ""
        return f"step {step}/{self._total}{loss}{rate}"

    def pause(self, step: int) -> None:
        """Restarts the clock, so that the time since the last report (an evaluation) does not count as a step's."""
        self._step, self._since = step, time.monotonic()


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
