"""Output folders: bound to one job, refused if they contain anything else, and new ones that appear when complete."""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.faults import WrongUseError
from data_pipeline.format.tfrecord import write_file
from data_pipeline.owner import remove_abandoned
from data_pipeline.system.lease import LEASE, Lease

WORK = ".work"  # folder in an output folder for notes of unfinished work


def claim(output: Path, identity: dict[str, Any], finished: Path, *, may_change: tuple[str, ...] = ()) -> bool:
    """Marks the folder, whose lease the caller holds, as this job's. Returns True if the job is done, False if not.

    identity: the options and inputs that define the job, as JSON. finished: the file that the job writes last, a JSON
    object with the identity. may_change: keys of the identity that may differ in an unfinished run. Temporary files of
    processes that have ended are deleted. Raises WrongUseError if the folder has another job's identity, or none and
    any other file, or `finished` has none, and OSError if the folder cannot be read or written.
    """
    mark = output / WORK / "identity.json"
    if finished.exists():
        _refuse_difference(output, _read_identity(finished, "identity"), identity)
        shutil.rmtree(output / WORK, ignore_errors=True)  # left if an earlier run was killed after `finished`
        return True
    if mark.exists():
        same = dict.fromkeys(may_change)
        _refuse_difference(output, _read_identity(mark) | same, identity | same)
    elif others := sorted(path.name for path in output.iterdir() if path.name not in (WORK, LEASE)):
        raise WrongUseError(
            f"{output}: found {', '.join(others[:3])}, needs an empty folder or unfinished work of the same command; "
            "use another --output."
        )
    mark.parent.mkdir(exist_ok=True)
    for folder in (output, mark.parent):
        remove_abandoned(folder)
    write_file(mark, json.dumps(identity).encode())
    return False


def _read_identity(file: Path, *keys: str) -> dict[str, Any]:
    """Returns the object in a JSON file, or the one under `keys` in it. Raises WrongUseError if there is none."""
    try:
        found = json.loads(file.read_bytes())
        for key in keys:
            found = found[key]
        return dict(found)
    except (ValueError, KeyError, TypeError) as err:
        raise WrongUseError(
            f"{file}: found no identity of a job ({err!r:.100}), needs the file that this command wrote; restore it "
            "from a copy, or use another --output."
        ) from err


def _refuse_difference(output: Path, found: dict[str, Any], needed: dict[str, Any]) -> None:
    if names := [name for name in sorted({*found, *needed}) if found.get(name) != needed.get(name)]:
        values = [json.dumps(identity.get(names[0]))[:200] for identity in (found, needed)]
        raise WrongUseError(
            f"{output}: found other work, which differs in {', '.join(names)} "
            f"({names[0]} {values[0]}, needs {values[1]}); use another --output, or, if you no longer need that work, "
            "delete the folder."
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields an empty temporary folder. It is renamed to `output` when the `with` block ends, deleted after an error.

    Meanwhile the lease of `output` is held. Errors pass. Raises ValueError if `output` is a file or a folder that is
    not empty, or, by HeldError, if another run has its lease.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: found a file there, needs an empty or new folder; choose another.")
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as around:
            folder = Path(around) / output.name  # a folder inside, since other users may not read the one around it
            with Lease(output) as lease:
                if others := [path.name for path in output.iterdir() if path.name != LEASE]:
                    raise ValueError(
                        f"{output}: found {', '.join(sorted(others)[:3])} there, needs an empty or new folder; choose "
                        "another."
                    )
                folder.mkdir()
                yield folder
                lease.check()
            try:
                folder.rename(output)
            except OSError as err:
                if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise ValueError(f"{output}: another run began to write there; choose another folder.") from err
    except BaseException:
        if made:
            with suppress(OSError):  # another run may be at work there
                output.rmdir()
        raise
