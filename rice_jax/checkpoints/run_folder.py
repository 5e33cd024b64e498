"""The config in a run's folder."""

from pathlib import Path

from data_pipeline.format.tfrecord import write_file


def write_config(workdir: Path, text: str) -> None:
    """Writes config.json, before the first checkpoint exists, or replaces it; makes the folder. Raises OSError."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_file(workdir / "config.json", text.encode())


def read_config(workdir: Path) -> str | None:
    """Returns the text of config.json; None if there is no such file. Raises OSError if it cannot be read."""
    path = workdir / "config.json"
    return path.read_text() if path.exists() else None


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
