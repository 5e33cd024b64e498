"""Faults of a list name the line that an editor shows, whatever the list's length, parts and empty lines."""

from pathlib import Path

import pytest

from data_pipeline import convert
from data_pipeline.conversion import survey
from tests.lpr_layouts import edit_cell, edit_lines, make_lpr750k

LIST = "annotations/training_videoinfo_7.txt"


def faults_of(source: Path, output: Path, *more: str) -> list[str]:
    """Returns the lines of faults.txt after a conversion that must fail."""
    words = [
        f"--source={source}",
        f"--output={output}",
        "--layout=lpr750k",
        "--workers=1",
        "--clips-per-shard=1",
        *more,
    ]
    assert convert.main(words) != 0
    return (output / "faults.txt").read_text().splitlines()


def empty_lines(lines: list[bytes]) -> None:
    """Puts 1, 2, 3, ... empty lines before the rows, so that no row keeps its number."""
    for row in reversed(range(len(lines))):
        lines[row:row] = [b""] * (row + 1)


@pytest.mark.parametrize("line_end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("part_bytes", [1 << 24, 1, 64, 700, 1500])
def test_a_fault_names_its_line_in_every_part_of_a_list(
    part_bytes: int, line_end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "PART_BYTES", part_bytes)
    source = make_lpr750k(tmp_path / "source")
    for row in (0, 3, 6):
        edit_cell(source / LIST, row, 1, f"[no list of row {row}]")
    edit_lines(source / LIST, empty_lines)
    lines = (source / LIST).read_bytes().split(b"\n")
    (source / LIST).write_bytes(line_end.join(lines[:-1]) + b"\n")
    expected = {number for number, line in enumerate(lines, 1) if b"no list of row" in line}
    found = [fault for fault in faults_of(source, tmp_path / "records") if "needs a list of" in fault]
    assert len(found) == 3
    assert {int(fault.removeprefix(f"{LIST} line ").split()[0]) for fault in found} == expected


def test_the_row_with_another_number_of_columns_is_named_though_it_is_the_first(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")

    def widen(lines: list[bytes]) -> None:
        lines[0] += b"\tanother column"

    edit_lines(source / LIST, widen)
    (fault,) = faults_of(source, tmp_path / "records")
    assert fault.startswith(f"{LIST} line 1 ") and "found 14 columns between tabs, needs 13" in fault


def test_shards_of_an_earlier_list_are_removed_when_a_shorter_one_is_converted(tmp_path: Path) -> None:
    source, output = make_lpr750k(tmp_path / "source"), tmp_path / "records"
    edit_cell(source / LIST, 2, 1, "[]")
    faults_of(source, output)  # the other shards are written, named by the number of shards
    before = {path.name for path in output.glob("train-clips*.tfrecord")}
    edit_lines(source / LIST, lambda lines: lines.__delitem__(slice(2, 4)))
    words = [f"--source={source}", f"--output={output}", "--layout=lpr750k", "--workers=1", "--clips-per-shard=1"]
    assert convert.main(words) == 0
    after = {path.name for path in output.glob("train-clips*.tfrecord")}
    assert before and len(after) == 5 and all(name.endswith("-of-00005.tfrecord") for name in after), (before, after)
