"""The public names of rice_jax: light imports that change nothing, documentation, and examples that run."""

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import rice_jax
from data_pipeline.format.reader import open_dataset

ROOT = Path(__file__).parents[1]
PUBLIC = ("Model", "load", "train_and_evaluate")
HEAVY = ("jax", "orbax", "grain", "flax", "optax", "tensorflow", "numpy", "PIL", "absl")


def run(code: str) -> str:
    """Runs Python code in a new process and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_are_light_quick_and_change_nothing_in_the_interpreter() -> None:
    code = f"""
import logging, sys, threading, time, warnings

def state():
    hooks = sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook
    loggers = logging.root.level, logging.root.handlers[:], sorted(logging.root.manager.loggerDict)
    return hooks, loggers, list(warnings.filters), warnings.showwarning, sys.stdout, sys.stderr

before, start = state(), time.process_time()
import rice_jax, data_pipeline
seconds = time.process_time() - start
assert state() == before
found = {HEAVY!r} & {{name.partition(".")[0] for name in sys.modules}}
assert not found, found
assert seconds < 1, seconds
dir(rice_jax), rice_jax.__version__
assert "jax" not in sys.modules
"""
    run(code.replace(repr(HEAVY), repr(set(HEAVY))))


@pytest.mark.parametrize("command", ["convert", "doctor", "synthetic"])
def test_help_of_a_data_command_imports_no_jax_grain_or_orbax(command: str) -> None:
    words = [sys.executable, "-X", "importtime", "-m", f"data_pipeline.{command}", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"jax", "grain", "orbax", "flax", "tensorflow"}


def test_the_public_names_are_listed_and_others_are_refused() -> None:
    assert {*rice_jax.__all__} == {*PUBLIC, "__version__"} <= {*dir(rice_jax)}
    assert all(getattr(rice_jax, name).__name__ == name for name in PUBLIC)
    with pytest.raises(AttributeError, match="module 'rice_jax' has no attribute 'laod'"):
        _ = rice_jax.laod
    assert run("from rice_jax import load, train; print(load.__module__, train.__name__)").split() == [
        "rice_jax.retrieval.model", "rice_jax.train",
    ]  # fmt: skip


def methods() -> list[str]:
    """The public names of rice_jax.Model that a user calls."""
    return [name for name, value in vars(rice_jax.Model).items() if inspect.isfunction(value) and name[0] != "_"]


def test_public_functions_document_their_result_and_their_errors() -> None:
    for function in (
        rice_jax.load,
        rice_jax.train_and_evaluate,
        *(getattr(rice_jax.Model, name) for name in methods()),
    ):
        text = inspect.getdoc(function) or ""
        assert re.search(r"\b[Rr]eturns\b", text), function
        assert "Raises:" in text or function is rice_jax.Model.run, function
        arguments = [name for name in inspect.signature(function).parameters if name != "self"]
        assert all(re.search(rf"\b{name}\b", text) for name in arguments), (function, arguments)


def test_the_examples_of_the_public_names_run(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of use: the first one trains the run that the others load."""
    split = open_dataset(converted).split("test")
    pictures = [split.image(row).encoded for row in range(4)]
    for name, picture in zip(("shop/cola.jpg", "shop/tea.jpg", "clip/0.jpg", "clip/1.jpg"), pictures, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "records").symlink_to(converted)
    monkeypatch.chdir(tmp_path)
    found = {}
    for name in ("train_and_evaluate", "load", "Model"):
        (code,) = re.findall(
            r"^Example:\n((?:  .*\n|\n)+)", f"{inspect.getdoc(getattr(rice_jax, name))}\n", re.MULTILINE
        )
        found[name] = {"rice_jax": rice_jax}
        exec(compile(textwrap.dedent(code), f"<example of {name}>", "exec"), found[name])
    assert found["train_and_evaluate"]["figures"]["queries"] == 1
    assert found["load"]["model"].config.eval_flip
    example = found["Model"]
    assert example["cosine"].shape == example["score"].shape == (1, 2)
    assert abs(example["cosine"]).max() <= 1.0001 and example["images"].shape == (2, 32, 32, 3)
