"""The doctor takes the options that its messages name, and its page stays small and harmless."""

from pathlib import Path

import pytest

from data_pipeline import convert, doctor
from tests.inspection.command import inspect
from tests.lpr_layouts import edit_cell, make_lpr750k

LIST = "annotations/training_videoinfo_7.txt"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_lpr750k(tmp_path / "source")


def test_a_training_list_is_chosen_and_splits_are_left_out(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = (source / LIST).read_bytes().split(b"\n")[0]
    (source / "annotations/training_videoinfo_9.txt").write_bytes(first + b"\n")
    assert doctor.main([str(source), f"--output={source.parent / 'out'}"]) == 2
    assert "choose with --train-annotation NAME" in capsys.readouterr().err
    _, report = inspect(source, "--train-annotation=training_videoinfo_9", "--splits=train,test")
    assert {split: each["clips"] for split, each in report["distributions"].items()} == {"train": 1, "test": 3}


def test_a_converted_set_takes_no_splits(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.convert(convert.Options("lpr750k", source, source.parent / "records"))
    arguments = [str(source.parent / "records"), f"--output={source.parent / 'out'}", "--splits=train"]
    assert doctor.main(arguments) == 2
    assert "leave them out" in capsys.readouterr().err


def test_a_cell_of_a_million_characters_and_hundreds_of_faults_do_not_swell_the_page(source: Path) -> None:
    edit_cell(source / LIST, 1, 6, "<b>" + "x" * 1_000_000)
    for number in range(600):
        (source / f"stray{number}.jpg").write_bytes(b"text")
    _, report = inspect(source)
    assert report["counts"]["not a picture"]["count"] == 600
    page = (source.parent / "checked/report.html").read_text()
    assert len(page) < 2_000_000
    assert "<b>x" not in page and "&lt;b&gt;x" in page and "(1,000,00" in page
    assert "... and 400 more" in page
    assert "default-src 'none'" in page
