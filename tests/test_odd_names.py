"""Folders with odd names: a set is converted there, a run is trained, killed, gone on with, evaluated and exported."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import smoke
from data_pipeline.convert import Options, convert
from rice_jax import evaluate, train
from rice_jax.weights.writers import export_run
from tests.odd_names import ODD_NAMES

EACH = 4  # names of a path
PATHS = [ODD_NAMES[start : start + EACH] for start in range(0, len(ODD_NAMES), EACH)]


class Folders:
    """Where one trial reads and writes: each folder below all names, and itself called by one of them."""

    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        below = root.joinpath(*names)
        self.download, self.records, self.run, self.export = (
            below / (names[number % len(names)] + ending) for number, ending in enumerate(("", " 2", " 3", " 4"))
        )


def shortened(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that stay below 255 bytes when something is added."""
    return tuple(name if len(os.fsencode(name)) < 250 else name[:100] for name in names)


def convert_and_die(folders: Folders) -> None:
    """Converts, trains, and is killed after the first checkpoint."""
    convert(Options(layout="lpr750k", source=folders.download, output=folders.records, workers=1))
    real, batches = train.to_global, []

    def to_global(*arguments: Any) -> Any:
        batches.append(1)
        while len(batches) == 5:
            if (folders.run / "checkpoints" / "3" / "digest.json").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        return real(*arguments)

    train.to_global = to_global
    train_there(folders)


def train_there(folders: Folders) -> None:
    config = smoke.get_config()
    config.data.path = str(folders.records)
    train.train_and_evaluate(config, folders.run)


def go_on_and_use(folders: Folders) -> None:
    train_there(folders)
    evaluate.command([f"--workdir={folders.run}", f"--data={folders.records}"])
    export_run(folders.run, folders.export, "official")


def status_of(function: Callable[[Folders], None], folders: Folders) -> int | None:
    """Returns the exit status of a process in which `function` runs; negative: the signal that ended it."""
    context = multiprocessing.get_context("forkserver")  # imports jax once for all
    context.set_forkserver_preload(["tests.test_odd_names"])
    process = context.Process(target=function, args=(folders,))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("names", PATHS, ids=[ascii(names[0])[1:-1] for names in PATHS])
def test_folders_of_any_name_are_converted_trained_evaluated_and_exported(
    converted: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folders = Folders(tmp_path, shortened(names))
    shutil.copytree(converted.parent / "lpr750k", folders.download)
    assert status_of(convert_and_die, folders) == -signal.SIGKILL
    assert os.listdir(folders.run / "checkpoints") == ["3"]
    assert status_of(go_on_and_use, folders) == 0
    assert sorted(os.listdir(folders.run / "checkpoints")) == ["3", "6"]
    assert (folders.run / "evaluation-test" / "metrics.json").exists() and any(folders.export.iterdir())
