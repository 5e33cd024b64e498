"""Runs from a program or notebook, their progress, what follows their end, and a reader that leaves."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_collections
import pytest

import rice_jax
from configs import smoke
from rice_jax import train


def small(data: Path, **changes: Any) -> Any:
    config = smoke.get_config()
    config.data.path = str(data)
    config.update({"num_updates": 5, "log_every": 1, "checkpoint_every": 2, **changes})
    return config


@pytest.fixture(scope="module")
def run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a frozen config and a path that is a text, and what it printed."""
    workdir, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        figures = rice_jax.train_and_evaluate(ml_collections.FrozenConfigDict(small(converted)), str(workdir))
    assert figures["queries"] == 1
    return workdir, printed.getvalue()


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_each_line_of_the_progress_has_the_loss_of_its_update(run: tuple[Path, str]) -> None:
    workdir, printed = run
    shown = [(int(step), loss) for step, loss in re.findall(r"^step (\d+)/5  loss (\S+)", printed, re.M)]
    assert shown == [(line["step"], f"{line['loss']:.3f}") for line in lines_of(workdir) if "loss" in line]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5]


def test_a_path_may_be_a_text_and_two_runs_follow_in_a_thread(run: tuple[Path, str], converted: Path) -> None:
    """Signal handlers are for the main thread only."""
    ended: list[Any] = []
    again = lambda: ended.extend(rice_jax.train_and_evaluate(small(converted), str(run[0])) for _ in range(2))
    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    assert len(ended) == 2 and ended[0] == ended[1]
    assert rice_jax.load(str(run[0])).step == 5


def test_more_updates_are_refused_with_the_way_which_works(
    run: tuple[Path, str], converted: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="num_updates: 5 -> 12") as refused:
        train.train_and_evaluate(small(converted, num_updates=12), run[0])
    assert "give another --workdir and --config.init_from=" in str(refused.value)
    way = re.search(r"--config.init_from=(\S+)", str(refused.value))
    assert way is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.train_and_evaluate(small(converted, init_from=way[1], log_every=4), tmp_path)
    assert f"starts from {run[0]}" in printed.getvalue()
    # Where a checkpoint or the end waits for all updates anyway, their lines are not lost either.
    assert re.findall(r"^step (\d+)/5  loss", printed.getvalue(), re.M) == ["4", "5"]


def test_a_fitted_batch_is_that_of_the_run(run: tuple[Path, str], converted: Path, capsys) -> None:
    """The set fits 24; this run began with 8, as one of an earlier version may have begun with another size."""
    assert train.saved_batch_size(run[0]) == 8 and train.saved_batch_size(run[0] / "none") == 0
    train.train_and_evaluate(small(converted, batch_size=0), run[0])
    assert "batches of 8 an epoch" in capsys.readouterr().out


def test_a_run_goes_on_when_nobody_reads_its_output(converted: Path, tmp_path: Path) -> None:
    words = f"-m rice_jax.train --config smoke --config.data.path={converted} --workdir run --config.log_every=1"
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {words} | head -1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    assert done.stderr == "warning: stdout cannot be written any more (Broken pipe); the work goes on.\n"
    assert (tmp_path / "run" / "checkpoints" / "6" / "digest.json").exists()
    assert "val/queries" in lines_of(tmp_path / "run")[-1]
