"""The Colab notebook runs from top to bottom, and the committed outputs show a picture and no error."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_demo import TINY

NOTEBOOK = Path(__file__).parent.parent / "colab" / "quickstart.ipynb"
SIZES = """
PRODUCTS, CLIPS, UPDATES = 12, 48, 150
STOP_AFTER, CHECKPOINT_EVERY = 40, 10
MORE = "{}"
""".format(" ".join(word for word in TINY if "num_updates" not in word))


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Smaller sizes replace the parameters. The installation is not run: the package is installed already.
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "install")]
    next(cell for cell in notebook.cells if tagged(cell, "parameters")).source += SIZES
    done = NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    # The second training starts where the first one was stopped, or ended before the stop.
    starts = [int(start) for start in re.findall(r"from update (\d+) to 150", printed)]
    assert starts[0] == 0 < starts[1] and "R@1" in printed
    assert printed.count("shop images a gallery") == 3  # three evaluations: all, seen, unseen
    assert "(12, 16) shop images" in printed
    assert "Traceback" not in printed and "error:" not in printed.replace("error: interrupted", "")
    shown = [
        output for cell in done.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 1


def test_the_committed_notebook_shows_a_picture_and_no_error() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(word in str(output) for output in outputs for word in ("/home/", "/root/", "/tmp/", "Traceback"))
