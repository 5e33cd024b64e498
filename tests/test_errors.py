"""What commands print: warnings of libraries as one line each, and errors with what to do."""

import errno
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rice_jax import errors

ORBAX = "/usr/lib/python3/site-packages/orbax/checkpoint/_src/path.py"


def record(text: str, *values: object, file: str = ORBAX, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("absl", level, file, 1, text, values, None)


def test_a_warning_of_a_library_is_one_line_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    handler = errors._OneLine()
    handler.handle(record("Skipping merge of\n  %s:\t%d parts.", "x", 0))
    handler.handle(record("An NVIDIA GPU may be present", file="/env/lib/python3.12/dist-packages/jax/_src/xla.py"))
    handler.handle(record("mine", file="/home/me/train_it.py", level=logging.ERROR))
    printed = capsys.readouterr().err
    assert printed == (
        "warning: orbax: Skipping merge of x: 0 parts.\nwarning: jax: An NVIDIA GPU may be present\n"
        "warning: train_it: mine\n"
    )


def test_a_warning_that_differs_only_in_numbers_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = errors._OneLine()
    for step in range(5):
        handler.handle(record("[process=%d][thread=save-%d] slow", 0, step))
        handler.handle(record("another"))
    assert capsys.readouterr().err.count("\n") == 2


def test_only_errors_that_orbax_raises_too_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    handler = errors._OneLine()
    for file, level in ((ORBAX, logging.ERROR), (ORBAX, logging.WARNING), ("/x/grain.py", logging.ERROR)):
        found = record(f"failed at {level}", file=file, level=level)
        found.exc_info = (ValueError, ValueError("x"), None)
        handler.handle(found)
    handler.handle(record("an error without an exception", level=logging.ERROR))
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == ["orbax", "grain", "orbax"]


def test_a_command_passes_on_what_orbax_and_python_warn_of() -> None:
    """A step without its _CHECKPOINT_METADATA, about which Orbax warns when it opens it."""
    code = """
import tempfile, warnings
from pathlib import Path
import numpy as np
from rice_jax import errors
from rice_jax.checkpoints.orbax import ARRAYS, Orbax

def main(folder):
    warnings.warn("a warning\\nof Python")
    orbax = Orbax(folder)
    orbax.save(folder / "1", {name: {"x": np.ones(2)} for name in ARRAYS}, {})
    orbax.wait_until_finished()
    (folder / "1" / "_CHECKPOINT_METADATA").unlink()
    for _ in range(3):
        orbax.leaves(folder / "1", ARRAYS)
    raise ValueError("the end")

with tempfile.TemporaryDirectory() as folder:
    errors.run(main, Path(folder))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    first, second, last = done.stderr.splitlines()
    assert first == "warning: <string>: a warning of Python" and last == "error: the end" and done.returncode == 1
    assert second.startswith(f"warning: orbax: Metadata file does not exist: {Path(tempfile.gettempdir()).resolve()}/")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ESTALE, "Stale file handle", "/d/x"), "/d/x: Stale file handle; look at the disk, or"),
        (OSError(errno.EMFILE, "Too many open files"), "allow more open files"),
        (OSError(errno.EACCES, "Permission denied", "/d/x"), "/d/x: Permission denied; look at the permissions"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/d/x"), "directory; give a path that exists."),
        (FileExistsError(errno.EEXIST, "File exists", "/d/x"), "there is a file of that name; give another path."),
        (OSError(errno.EROFS, "Read-only file system", "/d/x"), "give a path on another file system."),
        (OSError(errno.EHOSTDOWN, "Host is down", "/d/x"), "or at the file server"),
        (MemoryError("too little"), "too little"),
        (MemoryError(), "this machine's memory is exhausted"),
    ],
)
def test_an_error_says_what_to_look_at(error: BaseException, text: str) -> None:
    assert text in errors.reason(error)


def test_too_little_memory_ends_a_command_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def main(_: Path) -> None:
        raise MemoryError(f"{tmp_path}: memory ran out")

    with pytest.raises(SystemExit) as ended:
        errors.run(main, tmp_path)
    assert ended.value.code == 1 and capsys.readouterr().err == f"error: {tmp_path}: memory ran out\n"
