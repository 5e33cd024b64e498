"""A run's folder: its one writer, and its config."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.format.tfrecord import write_file
from data_pipeline.owner import remove_abandoned
from data_pipeline.system.lease import Lease
from rice_jax.parallel import hosts


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[Callable[[], object]]:
    """Makes a folder that all processes share, and holds its lease, in process 0, for the `with` block.

    Yields a function that raises LeaseLostError, in process 0, if another run has taken the lease over: to be called
    before each write that others rely on. Raises ValueError in all processes if another run has the lease (HeldError,
    which names the holder) or a process does not see the folder, OSError if it cannot be written.
    """
    hosts.check_shared(folder)
    with contextlib.ExitStack() as held:
        check: Callable[[], object] = bool  # does nothing
        if hosts.is_first():
            check = held.enter_context(Lease(folder)).check
            remove_abandoned(folder)
        hosts.gather(None)  # no process goes on before the first one has the lease
        yield check


def write_config(workdir: Path, text: str) -> None:
    """Writes config.json, before the first checkpoint exists, or replaces it; makes the folder. Raises OSError."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_file(workdir / "config.json", text.encode())


def read_config(workdir: Path) -> str | None:
    """Returns the text of config.json; None if there is no such file.

    Raises ValueError if it is not UTF-8, OSError if it cannot be read.
    """
    path = workdir / "config.json"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; restore it, or remove it: the checkpoints have a copy."
        ) from error


def is_run(folder: Path) -> bool:
    """Returns whether `folder` is a run or imported weights: its subfolder `checkpoints` has a step or no file at all.

    Other programs have a folder of that name too, with files such as epoch_3.pt.
    """
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        return False
    entries = list(checkpoints.iterdir())
    return any(entry.name.isdecimal() and entry.is_dir() for entry in entries) or not any(
        entry.suffix and entry.is_file() for entry in entries
    )
