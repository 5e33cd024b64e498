"""What a run says: metrics.jsonl (the truth), TensorBoard, and one progress line."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from rice_jax.parallel import hosts


def plain(value: Any) -> Any:
    """A metric as JSON: a number, null where it is not finite, or a hex digest for the ledger's two words."""
    array = np.asarray(value)
    if array.dtype == np.uint32:
        return "".join(f"{word:08x}" for word in array)
    number = array.item()
    return number if not isinstance(number, float) or math.isfinite(number) else None


class Log:
    """Lines of numbers under a workdir, by step. On resume what lies beyond the restored step is cut off.

    Of several processes the first writes and reads; the others call the same methods, which keep them in step.
    """

    def __init__(self, workdir: Path, *, step: int) -> None:
        self.newest: dict[str, Any] = {}  # metrics of the newest update that was written
        self._path = workdir / "metrics.jsonl"
        first = hosts.is_first()
        if first:
            self._cut(step)
        self._lines = (self._path if first else Path(os.devnull)).open("a")
        # TensorBoard forgets what was written at or after the purge step.
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, write_to_disk=first)

    def _cut(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._read() if line["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self._path)

    def _read(self) -> list[dict[str, Any]]:
        """The lines there are; a last one that a kill left half written does not count."""
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        try:
            return [json.loads(line) for line in whole]
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._path}: is no list of JSON lines ({error}); move it away to go on.") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line: the metrics of update number `step` (1 is the first), or of an evaluation after it."""
        values = {name: plain(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name.replace("@", "_at_"), value, step)

    def write_updates(
        self, updates: list[tuple[int, Any]], look: Callable[[int, Mapping[str, Any]], None] = lambda *_: None
    ) -> list[tuple[int, Any]]:
        """The lines of updates, waiting for the device to have made them; nothing is left, hence an empty list.

        look: called with each update's number and metrics, `gradient_norms` among them, which are not for the file.
        """
        for step, on_device in updates:
            values = jax.device_get(on_device)
            written = {name: value for name, value in values.items() if name != "gradient_norms"}
            self.write(step, written)
            self.newest = {name: plain(value) for name, value in written.items()}
            self._lines.flush()
            look(step, values)
        self._board.flush()
        return []

    def say(self, text: str) -> None:
        if hosts.is_first():
            print(text, flush=True)

    def has_evaluation(self, step: int, split: str) -> bool:
        return any(line["step"] == step for line in self._evaluations(split))

    def last_evaluation(self, split: str) -> dict[str, int | float]:
        """The figures of the newest evaluation in the file; empty when there is none."""
        found = self._evaluations(split)
        return {k.removeprefix(f"{split}/"): v for k, v in found[-1].items() if k != "step"} if found else {}

    def recalls(self, split: str) -> dict[int, float]:
        """Recall@1 by step, of all evaluations in the file."""
        name = f"{split}/recall@1"
        return {line["step"]: line[name] for line in self._evaluations(split) if line.get(name) is not None}

    def _evaluations(self, split: str) -> list[dict[str, Any]]:
        self._lines.flush()
        found: list[dict[str, Any]] = hosts.ask_first(
            lambda: [line for line in self._read() if f"{split}/queries" in line]
        )
        return found

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self._board.close()


class Progress:
    """Rates between calls, and the time that is left at the last one; compiling is not part of them."""

    def __init__(self, *, total: int, batch_size: int) -> None:
        self.started = False
        self._step, self._total, self._batch_size = 0, total, batch_size
        self._since = time.monotonic()

    def start(self, step: int) -> str:
        """After the first update: the clock starts; how long it took until here."""
        took = duration(time.monotonic() - self._since)
        self.started = True
        self.pause(step)
        return took

    def line(self, step: int, metrics: Mapping[str, Any]) -> str:
        """'step 150/3000  loss 3.912 (icl ...)  0.412 s/step  155 examples/s  19 min 34 s left'"""
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
        """Starts the clock anew: what was done since (an evaluation) is not a step's time."""
        self._step, self._since = step, time.monotonic()


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
