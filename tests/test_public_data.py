"""The public names of data_pipeline: imported when they are used, documented, with examples that run."""

import doctest
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import data_pipeline
from data_pipeline import open_dataset

ROOT = Path(__file__).parents[1]
PUBLIC = ("FrameOptions", "Plan", "clip_batches", "image_batches", "open_dataset", "train_batches")
HEAVY = {"grain", "jax", "numpy", "PIL", "google_crc32c"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a new process has imported after running the code."""
    code += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def example_of(name: str) -> str:
    """The indented block below "Example:" in the docstring of a public name."""
    found = re.search(r"^Example:\n((?: +.*\n|\n)+)", f"{inspect.getdoc(getattr(data_pipeline, name))}\n", re.MULTILINE)
    assert found, f"the docstring of data_pipeline.{name} has no block below `Example:`"
    return textwrap.dedent(found[1])


def run_example(code: str, records: Path) -> None:
    """Runs an example with the paths that it opens replaced by `records`; sessions (>>>) must print what they show."""
    code = re.sub(r"open_dataset\(([\"']).*?\1", lambda _: f"open_dataset({str(records)!r}", code)
    if ">>>" not in code:
        exec(compile(code, "<example>", "exec"), {})
        return
    results = doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(code, {}, "example", None, 0))
    assert results.attempted and not results.failed


def test_the_import_is_light_and_a_name_brings_its_own_module_only() -> None:
    assert not HEAVY & modules_after("import data_pipeline; dir(data_pipeline)")
    assert not {"grain", "jax"} & modules_after("from data_pipeline import open_dataset, Plan, FrameOptions")
    assert "grain" in modules_after("from data_pipeline import train_batches")


@pytest.mark.parametrize("command", ["convert", "doctor", "synthetic"])
def test_commands_import_neither_grain_nor_jax(command: str) -> None:
    assert not {"grain", "jax"} & modules_after(f"import data_pipeline.{command}")


def test_the_public_names_are_listed_and_others_are_refused() -> None:
    assert sorted(data_pipeline.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(data_pipeline))
    for name in PUBLIC:
        assert getattr(data_pipeline, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'data_pipeline' has no attribute 'open_datasets'"):
        _ = data_pipeline.open_datasets


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_runs(name: str, converted: Path) -> None:
    code = example_of(name)
    assert name in code
    run_example(code, converted)


def test_the_example_of_the_format_runs(converted: Path) -> None:
    text = (ROOT / "docs" / "data_formats.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "data_pipeline" in block)
    run_example(code, converted)


def test_examples_that_print_something_else_are_noticed(converted: Path) -> None:
    with pytest.raises(AssertionError):
        run_example(">>> 1 + 1\n3\n", converted)


def test_a_record_has_frames_image_ids_and_texts(converted: Path) -> None:
    split = open_dataset(converted).split("train")
    record = split.clip(5)
    assert [frame.id for frame in record.frames] == [f"{record.id}-{frame.position:04d}" for frame in record.frames]
    assert all(frame.encoded.startswith(b"\xff\xd8\xff") and frame.seconds is None for frame in record.frames)
    assert record.image_ids == [split.image_ids[record.image_index]]
    assert record.texts == {"title": record.title, "speech": "", "category_name": record.category_name}
    assert record.title and record.category_name
