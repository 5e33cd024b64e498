"""An output folder: one writer at a time, one job from the first file to the last, whatever it held before refused.

Or one that appears whole, when its job is done.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.faults import WrongUseError
from data_pipeline.format.tfrecord import write_file

WORK = ".work"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps a second writer out of the folder; the system lets go when this process ends, however it ends."""
    import fcntl  # here, not above: Windows has none, and new_folder does without

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


def claim(output: Path, identity: dict[str, Any], finished: Path, *, may_change: tuple[str, ...] = ()) -> bool:
    """Marks the folder as this job's; whether the job is done already. WrongUseError if it holds anything else.

    identity: what makes the job this one. finished: the file that it writes last, a JSON object with the identity.
    may_change: of the identity, between the runs of a job that is not done.
    """
    mark = output / WORK / "identity.json"
    if finished.exists():
        try:
            found = json.loads(finished.read_bytes())["identity"]
        except (ValueError, KeyError, TypeError) as err:
            raise WrongUseError(f"{finished}: found no identity in it; take another --output.") from err
        _refuse_difference(output, found, identity)
        shutil.rmtree(output / WORK, ignore_errors=True)  # of a run that ended just behind `finished`
        return True
    if mark.exists():
        same = dict.fromkeys(may_change)
        _refuse_difference(output, json.loads(mark.read_bytes()) | same, identity | same)
    elif strangers := sorted(path.name for path in output.iterdir() if path.name != WORK):
        raise WrongUseError(
            f"{output}: found {', '.join(strangers[:3])}, needs an empty folder or unfinished work of the same "
            "command; take another --output."
        )
    mark.parent.mkdir(exist_ok=True)
    for left_over in (*output.glob(".*.tmp"), *mark.parent.glob(".*.tmp")):
        left_over.unlink(missing_ok=True)  # of a writer that was killed
    write_file(mark, json.dumps(identity).encode())
    return False


def _refuse_difference(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if names:
        first = names[0]
        raise WrongUseError(
            f"{output}: found other work, which differs in {', '.join(names)} "
            f"({first} {json.dumps(found.get(first))[:200]}, needs {json.dumps(wanted.get(first))[:200]}); "
            "take another --output, or delete it."
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes it when the block ends well, and goes when it does not.

    Raises:
      ValueError: something is there already.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: holds something already; give a folder that is empty or not there yet.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as around:
        folder = Path(around) / output.name  # a folder of its own: the one around it is closed to others
        folder.mkdir()
        yield folder
        folder.rename(output)
