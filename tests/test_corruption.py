"""Corruption of a converted set: no changed byte passes unnoticed. `make corruption` changes 10,000 of them."""

from pathlib import Path

import pytest

from data_pipeline.format import reader as records
from data_pipeline.format import tfrecord
from data_pipeline.format.reader import Dataset
from tests import corruption


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return corruption.make_set(tmp_path)


def test_every_changed_byte_is_refused_by_name_or_changes_nothing(folder: Path) -> None:
    report = corruption.study(folder, 300, seed=1)
    assert report["wrong"] == []
    assert set(report["outcomes"]) <= set(corruption.RIGHT)
    assert sum(report["outcomes"].values()) == 300
    assert report["outcomes"]["refused"] > 250
    assert len(report["by_file"]) == 6
    assert report["unchanged_at_the_end"]


def test_the_study_would_notice_a_reader_without_checksums(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "unframe_record", lambda framed: framed[tfrecord.HEADER.size : -tfrecord.FOOTER.size])
    assert corruption.study(folder, 100, seed=1)["outcomes"]["silent"] > 10


def test_the_study_would_notice_a_set_opened_unseen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "verify", lambda dataset: None)
    outcomes = corruption.study(folder, 200, seed=1)["outcomes"]
    assert set(outcomes) - set(corruption.RIGHT)
