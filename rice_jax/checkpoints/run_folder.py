"""A run's folder: its config and its checkpoints."""

from pathlib import Path


def write_config(workdir: Path, text: str) -> None:
    """The config beside the checkpoints: what a run is, from its first minute."""
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / "config.json.tmp"
    temporary.write_text(text)
    temporary.rename(workdir / "config.json")


def read_config(workdir: Path) -> str | None:
    path = workdir / "config.json"
    return path.read_text() if path.exists() else None


def is_run(folder: Path) -> bool:
    """Returns whether a folder contains checkpoints: those of a training run, or imported weights."""
    return (folder / "checkpoints").is_dir()
