"""The config in a run's folder."""

from pathlib import Path

from data_pipeline.format.tfrecord import write_file


def write_config(workdir: Path, text: str) -> None:
    """Writes config.json, before the first checkpoint exists, or replaces it; makes the folder. Raises OSError."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_file(workdir / "config.json", text.encode())


def read_config(workdir: Path) -> str | None:
    """Returns the text of config.json; None if there is no such file. Raises OSError if it cannot be read."""
    try:
        return (workdir / "config.json").read_text()
    except FileNotFoundError:
        return None


def is_run(folder: Path) -> bool:
    """Returns whether `folder` has a subfolder `checkpoints`, as runs and imported weights have; it may be empty."""
    return (folder / "checkpoints").is_dir()
