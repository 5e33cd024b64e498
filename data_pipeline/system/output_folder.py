"""Output folders: locked against a second writer, bound to one job, refused if they contain anything else."""

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

WORK = ".work"  # folder in an output folder for notes of unfinished work


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Locks a folder for the `with` block. Raises WrongUseError if another process has it, OSError if it is missing."""
    import fcntl  # here, since Windows has none and `new_folder` does not need it. SIGKILL unlocks, too.

    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise WrongUseError(
                f"{output}: found another run that writes to it, needs no other; wait for it, or use another --output."
            ) from err
        yield
    finally:
        os.close(folder)


def claim(output: Path, identity: dict[str, Any], finished: Path, *, may_change: tuple[str, ...] = ()) -> bool:
    """Marks the folder as this job's. Returns True if the job is done, False if work remains.

    identity: the options and inputs that define the job, as JSON. finished: the file that the job writes last, a JSON
    object with the identity. may_change: keys of the identity that may differ in an unfinished run. Temporary files are
    deleted. Raises WrongUseError if the folder has another job's identity, or none and any other file, or `finished`
    has none, and OSError if the folder cannot be read or written.
    """
    mark = output / WORK / "identity.json"
    if finished.exists():
        try:
            found = json.loads(finished.read_bytes())["identity"]
        except (ValueError, KeyError, TypeError) as err:
            raise WrongUseError(f"{finished}: found no identity, needs one; use another --output.") from err
        _refuse_difference(output, found, identity)
        shutil.rmtree(output / WORK, ignore_errors=True)  # left if an earlier run was killed after `finished`
        return True
    if mark.exists():
        same = dict.fromkeys(may_change)
        _refuse_difference(output, json.loads(mark.read_bytes()) | same, identity | same)
    elif others := sorted(path.name for path in output.iterdir() if path.name != WORK):
        raise WrongUseError(
            f"{output}: found {', '.join(others[:3])}, needs an empty folder or unfinished work of the same command; "
            "use another --output."
        )
    mark.parent.mkdir(exist_ok=True)
    for temporary in (*output.glob(".*.tmp"), *mark.parent.glob(".*.tmp")):
        temporary.unlink(missing_ok=True)
    write_file(mark, json.dumps(identity).encode())
    return False


def _refuse_difference(output: Path, found: dict[str, Any], needed: dict[str, Any]) -> None:
    if names := [name for name in sorted({*found, *needed}) if found.get(name) != needed.get(name)]:
        values = [json.dumps(identity.get(names[0]))[:200] for identity in (found, needed)]
        raise WrongUseError(
            f"{output}: found other work, which differs in {', '.join(names)} "
            f"({names[0]} {values[0]}, needs {values[1]}); use another --output, or delete it."
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields an empty temporary folder. It is renamed to `output` when the `with` block ends, deleted after an error.

    Errors pass. Raises ValueError if `output` is a file or a folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: found content there, needs an empty or new folder; choose another.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as around:
        folder = Path(around) / output.name  # a folder inside, since other users may not read the one around it
        folder.mkdir()
        yield folder
        folder.rename(output)
