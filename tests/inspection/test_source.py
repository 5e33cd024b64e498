"""The doctor looks at what a conversion stores, and passes over what machines leave behind."""

from pathlib import Path

import pytest

from data_pipeline import convert
from data_pipeline.format.reader import open_dataset
from data_pipeline.inspection import fingerprints
from tests.inspection.command import inspect, kinds
from tests.lpr_layouts import TRAIN, make_lpr4m, make_lpr750k

LONG = TRAIN[2]


@pytest.mark.parametrize("failed", [[0], [3], [11], [0, 5, 11], []])
def test_the_sampled_frames_are_those_that_a_conversion_stores(
    failed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_lpr4m(tmp_path / "source", failed=[LONG.frame_ids[number] for number in failed])
    convert.convert(convert.Options("lpr4m", source, tmp_path / "records", splits=("train",)))
    train = open_dataset(tmp_path / "records").split("train")
    stored = {frame.id for row in range(train.num_clips) for frame in train.clip(row).frames}
    read: set[str] = set()
    whole = fingerprints.PictureReader.read
    monkeypatch.setattr(
        fingerprints.PictureReader, "read", lambda self, found: read.add(found.name) or whole(self, found)
    )
    inspect(source, "--frames=sampled")
    assert {name for name in read if name.startswith(LONG.id)} == {name for name in stored if name.startswith(LONG.id)}


def test_what_machines_leave_behind_is_passed_over(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    before = inspect(source)[1]
    for name in ("query/._a.jpg", "gallery/@eaDir/thumb.jpg", "query/.ipynb_checkpoints/b-checkpoint.png"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"no picture")
    after = inspect(source)[1]
    assert (kinds(after), after["remarks"]) == (kinds(before), before["remarks"])


def test_pictures_of_no_list_are_counted_and_inspected(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    before = inspect(source)[1]["remarks"]
    (source / "stray").mkdir()
    for number in range(3):
        (source / f"stray/{number}.jpg").write_bytes(b"text")
    report = inspect(source)[1]
    assert report["counts"]["not a picture"] == {"severity": "warning", "count": 3, "cases": 3}
    assert before[0].startswith("2 pictures") and report["remarks"][0].startswith("5 pictures")
