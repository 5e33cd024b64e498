"""Makes the mistakes of tests/mistakes in a copy of the code, one at a time, and sees which tests notice.

`make mutations`, or `python -m tests.mutations [WORD ...]` for those whose name holds one of the words. Prints a table,
writes build/mutations.json, and exits with 1 when a mistake goes unnoticed or its text is not in the code exactly once.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.mistakes import Mistake, data, model

ROOT = Path(__file__).parent.parent
COPIED = ("rice_jax", "data_pipeline", "configs", "tests", "pyproject.toml")
MISTAKES = (*model.MISTAKES, *data.MISTAKES)


@contextlib.contextmanager
def made(mistake: Mistake, folder: Path) -> Iterator[None]:
    """The code under `folder` with the mistake in it; ValueError unless each text stands in its file exactly once."""
    before = {name: (folder / name).read_text() for name, _, _ in mistake.changes}
    try:
        for name, old, new in mistake.changes:
            text = (folder / name).read_text()
            if text.count(old) != 1:
                raise ValueError(f"{name}: {old!r} stands there {text.count(old)} times, needs once; mend MISTAKES.")
            (folder / name).write_text(text.replace(old, new))
        yield
    finally:
        for name, text in before.items():
            (folder / name).write_text(text)


def failing(folder: Path, tests: tuple[str, ...]) -> list[str]:
    """Names of the tests that fail in a copy of the code."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=no", *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    lines = [line.split(" - ")[0].split() for line in done.stdout.splitlines()]
    names = [words[1] for words in lines if len(words) > 1 and words[0] in ("FAILED", "ERROR")]
    if done.returncode not in (0, 1) or bool(names) != (done.returncode == 1):
        raise RuntimeError(f"pytest exited with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return names


def copy_of_the_code(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    command = [sys.executable, "-c", "import rice_jax; print(rice_jax.__file__)"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_relative_to(folder):
        raise RuntimeError(f"the tests would import {found}, not the copy in {folder}.")


def main(words: list[str]) -> int:
    chosen = [m for m in MISTAKES if not words or any(word in m.name for word in words)]
    found: dict[str, list[str]] = {}
    output = ROOT / "build" / "mutations.json"
    output.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_code(folder)
        for m in chosen:  # every text is looked for before an hour of running
            with made(m, folder):
                pass
        for tests in dict.fromkeys(m.tests for m in chosen):
            if names := failing(folder, tests):
                print(f"error: without any mistake {', '.join(names)} fail; mend them first.", file=sys.stderr)
                return 1
        for m in chosen:
            with made(m, folder):
                found[m.name] = failing(folder, m.tests)
            output.write_text(json.dumps(found, indent=2) + "\n")  # after each, so that an interruption costs one
            print(f"{m.name:64}  {', '.join(dict.fromkeys(map(short, found[m.name]))) or 'NOT NOTICED'}", flush=True)
    survivors = [name for name, tests in found.items() if not tests]
    print(f"{len(found) - len(survivors)} of {len(found)} mistakes are noticed; {output.relative_to(ROOT)}")
    return int(bool(survivors))


def short(test: str) -> str:
    """'tests/test_golden.py::test_losses[rice_w64]' as 'losses'."""
    return test.split("::test_")[-1].split("[")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
