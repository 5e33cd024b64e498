"""One cause is one finding, with the number of its cases; what has a cause of its own stays a finding of its own."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.faults import Fault
from data_pipeline.inspection.findings import Findings
from tests.inspection.command import inspect, kinds, of_kind
from tests.lpr_layouts import IMAGE_IDS, LIVES, TEST, TRAIN, edit_lines, folder_of, make_lpr4m, make_lpr750k

LIST = "annotations/training_videoinfo_7.txt"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_lpr750k(tmp_path / "source")


def only(report: dict[str, Any], kind: str) -> dict[str, Any]:
    (fault,) = of_kind(report, kind)
    return fault


def test_a_livestream_without_gallery_is_said_once_with_its_clips(source: Path) -> None:
    edit_lines(source / "annotations/gallery_main.txt", lambda rows: rows.__setitem__(slice(None), [
        row for row in rows if LIVES[2].encode() not in row
    ]))  # fmt: skip
    fault = only(inspect(source)[1], "livestream without gallery")
    clips = [clip.id for clip in TEST if clip.live == 2]
    assert fault["cases"] == len(clips) == 2
    assert all(clip in f"{fault['subject']} {fault['detail']}" for clip in clips)
    assert LIVES[2] in fault["detail"]


def test_a_missing_folder_is_said_once(source: Path) -> None:
    shutil.rmtree(source / folder_of(TRAIN[0]))
    report = inspect(source)[1]
    fault = only(report, "missing frame")
    assert fault["file"] == folder_of(TRAIN[0])
    assert fault["cases"] == sum(clip.length for clip in TRAIN if clip.live == TRAIN[0].live)
    assert "unpack the archive" in fault["detail"]
    assert report["counts"]["missing frame"] == {"severity": "error", "count": 1, "cases": fault["cases"]}


def test_a_missing_folder_of_shop_images_is_said_once(source: Path) -> None:
    shutil.rmtree(source / "training_image")
    assert only(inspect(source)[1], "image id without an image")["file"] == "training_image"


def test_frames_missing_one_by_one_are_said_one_by_one(source: Path) -> None:
    clip = TRAIN[1]
    for frame in clip.frame_ids[:2]:
        (source / folder_of(clip) / clip.id / f"{frame}.jpg").unlink()
    assert kinds(inspect(source)[1])["missing frame"] == 2


@pytest.mark.parametrize("tars", [False, True])
def test_a_missing_shard_of_a_download_is_said_once(tmp_path: Path, tars: bool) -> None:
    source = make_lpr4m(tmp_path / "source", tars=tars)
    shard = source / "training_frame" / ("00001.tar" if tars else "00001")
    shard.unlink() if tars else shutil.rmtree(shard)
    fault = only(inspect(source)[1], "missing frame")
    assert fault["cases"] == 8


def test_a_list_with_wrong_columns_is_said_once(source: Path) -> None:
    def shorten(rows: list[bytes]) -> None:
        rows[1:] = [b"\t".join(row.split(b"\t")[: 9 - number % 2]) for number, row in enumerate(rows[1:])]

    edit_lines(source / LIST, shorten)
    fault = only(inspect(source)[1], "wrong number of columns")
    assert (fault["file"], fault["line"], fault["cases"]) == (LIST, 2, len(TRAIN) - 1)
    assert "line 3" in fault["detail"]


def test_a_list_in_another_encoding_is_said_once(source: Path) -> None:
    edit_lines(source / LIST, lambda rows: rows.__setitem__(slice(None), [
        row.replace(b"large", b"l\xe5rge") for row in rows
    ]))  # fmt: skip
    assert only(inspect(source)[1], "not UTF-8")["cases"] == len(TRAIN)


def test_an_unreadable_shop_image_of_many_clips_is_said_once(source: Path) -> None:
    (source / f"training_image/{IMAGE_IDS[0]}.jpg").write_bytes(b"")
    assert only(inspect(source)[1], "empty picture")["cases"] == 1


def test_a_duplicated_list_is_said_once(source: Path) -> None:
    edit_lines(source / LIST, lambda rows: rows.extend(rows[:]))
    assert only(inspect(source)[1], "duplicate clip id")["cases"] == len(TRAIN)


def test_a_fault_added_again_is_no_new_case() -> None:
    findings = Findings()
    fault = Fault("truncated picture", "a.jpg", "found 3 bytes")
    findings.add([fault, fault])
    findings.add([fault])
    assert (findings.counts["truncated picture"], findings.cases["truncated picture"]) == (1, 1)


def test_all_are_counted_beyond_those_that_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.inspection.findings.MAX_LISTED", 3)
    findings = Findings()
    faults = [Fault("truncated picture", f"{number}.jpg", "found 3 bytes") for number in range(10)]
    findings.add(faults)
    findings.add(faults)
    report = findings.as_json()
    assert report["counts"]["truncated picture"]["count"] == 10
    assert len(report["faults"]) == 3
