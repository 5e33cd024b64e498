"""The config in a run's folder."""

from pathlib import Path

from data_pipeline.format.tfrecord import write_file


def write_config(workdir: Path, text: str) -> None:
    """Writes config.json, which describes the run before its first checkpoint exists. Makes the folder."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_file(workdir / "config.json", text.encode())


def read_config(workdir: Path) -> str | None:
    """Returns the text of config.json; None if there is no such file."""
    path = workdir / "config.json"
    return path.read_text() if path.exists() else None


def is_run(folder: Path) -> bool:
    """Returns whether a folder contains checkpoints: those of a training run, or imported weights."""
    return (folder / "checkpoints").is_dir()
