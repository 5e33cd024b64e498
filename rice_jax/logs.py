"""What a run says: metrics.jsonl (the truth), TensorBoard, and one progress line."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter


def plain(value: Any) -> Any:
    """An array of metrics as JSON: a number, or a hex digest for the ledger's two words."""
    array = np.asarray(value)
    if array.dtype == np.uint32:
        return "".join(f"{word:08x}" for word in array)
    return array.item()


class Log:
    """Lines of numbers under a workdir, by step. On resume what lies beyond the restored step is cut off."""

    def __init__(self, workdir: Path, *, step: int) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        self._cut(step)
        self._lines = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step, write_to_disk=True)
        self.newest: dict[str, Any] = {}  # metrics of the newest update that was written

    def _cut(self, step: int) -> None:
        """Keeps the lines of updates before `step`, and none that a kill left half written."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self._path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line: the metrics of update number `step` (1 is the first), or of an evaluation after it."""
        values = {name: plain(value) for name, value in values.items()}
        if "loss" in values:
            self.newest = values
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def last_evaluation(self, split: str) -> dict[str, float]:
        """The figures of the newest evaluation in the file; empty when there is none."""
        lines = [json.loads(line) for line in self._path.read_text().splitlines()]
        prefix = f"{split}/"
        found = [line for line in lines if any(name.startswith(prefix) for name in line)]
        return (
            {name.removeprefix(prefix): value for name, value in found[-1].items() if name != "step"} if found else {}
        )

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


class Progress:
    """Rates between calls, and the time that is left at the last one."""

    def __init__(self, *, step: int, total: int, batch_size: int) -> None:
        self._step, self._total, self._batch_size = step, total, batch_size
        self._since = time.monotonic()

    def line(self, step: int, metrics: Mapping[str, Any]) -> str:
        """'step 150/3000  loss 3.912 (icl ...)  0.412 s/step  155 examples/s  19 min 34 s left'"""
        now = time.monotonic()
        seconds = (now - self._since) / max(1, step - self._step)
        self._step, self._since = step, now
        parts = " ".join(
            f"{name} {metrics[name]:.3f}" for name in ("icl", "frame_icl", "pmd", "pfr") if name in metrics
        )
        return (
            f"step {step}/{self._total}  loss {metrics['loss']:.4f} ({parts})  {seconds:.3f} s/step  "
            f"{self._batch_size / seconds:.0f} examples/s  {duration((self._total - step) * seconds)} left"
        )

    def pause(self) -> None:
        """Starts the clock anew: what was done since (an evaluation) is not a step's time."""
        self._since = time.monotonic()


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
