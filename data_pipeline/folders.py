"""An output folder: one writer at a time, one job from the first file to the last, whatever it held before refused."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.faults import WrongUseError
from data_pipeline.tfrecord import write_file

WORK = ".work"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps a second writer out of the folder; the system lets go when this process ends, however it ends."""
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise WrongUseError(
                f"{output}: found another run at work in it, needs it alone; wait for it, or take another --output."
            ) from err
        yield
    finally:
        os.close(folder)


def claim(output: Path, identity: dict[str, Any], finished: Path) -> bool:
    """Marks the folder as this job's; whether the job is done already. WrongUseError if it holds anything else.

    identity: what makes the job this one. finished: the file that it writes last, a JSON object with the identity.
    """
    mark = output / WORK / "identity.json"
    if finished.exists():
        try:
            found = json.loads(finished.read_bytes())["identity"]
        except (ValueError, KeyError, TypeError) as err:
            raise WrongUseError(f"{finished}: found no identity in it; take another --output.") from err
        _refuse_difference(output, found, identity)
        return True
    if mark.exists():
        _refuse_difference(output, json.loads(mark.read_bytes()), identity)
    elif strangers := sorted(path.name for path in output.iterdir() if path.name != WORK):
        raise WrongUseError(
            f"{output}: found {', '.join(strangers[:3])}, needs an empty folder or unfinished work of the same "
            "command; take another --output."
        )
    mark.parent.mkdir(exist_ok=True)
    write_file(mark, json.dumps(identity).encode())
    return False


def _refuse_difference(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if names:
        differences = ", ".join(f"{name} {found.get(name)}, needs {wanted.get(name)}" for name in names)
        raise WrongUseError(f"{output}: found other work ({differences}); take another --output, or delete it.")
