"""A sample inspects some clips, the same ones each time, and says so."""

from pathlib import Path

import pytest

from data_pipeline import convert
from data_pipeline.inspection.summary import Sample
from tests.inspection.command import inspect
from tests.lpr_layouts import make_lpr4m, make_lpr750k


def counted(report: dict) -> dict:
    return {
        split: (each["clips"], each["frames"], each["shop_images"]) for split, each in report["distributions"].items()
    }


def test_a_sample_is_fixed_by_seed_and_ids() -> None:
    ids = [f"clip {number}" for number in range(100)]
    chosen = Sample(10, 0).rows(ids)
    assert len(chosen) == 10 and sorted(chosen.tolist()) == chosen.tolist()
    assert Sample(10, 0).rows(ids).tolist() == chosen.tolist() != Sample(10, 1).rows(ids).tolist()
    shorter = Sample(10, 0).rows(ids[:90])
    assert {ids[row] for row in chosen if row < 90} <= {ids[row] for row in shorter}
    assert Sample(10, 0).rows(ids[:3]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", ["lpr750k", "lpr4m", "converted"])
def test_a_sample_is_inspected_and_named(layout: str, tmp_path: Path) -> None:
    source = (make_lpr4m if layout == "lpr4m" else make_lpr750k)(tmp_path / "source")
    if layout == "converted":
        convert.convert(convert.Options("lpr750k", source, tmp_path / "records", clips_per_shard=2))
        source = tmp_path / "records"
    _, report = inspect(source, "--sample=2", "--seed=3")
    assert report["sample"] == {"clips": 2, "seed": 3}
    assert {split: clips for split, (clips, _, _) in counted(report).items()} == {"train": 2, "val": 1, "test": 2}
    assert all(1 <= images <= clips for clips, _, images in counted(report).values())
    assert "A sample: 2 clips of each split (seed 3)" in report["remarks"][0]
    assert "A sample: 2 clips" in (tmp_path / "checked/report.html").read_text()
    assert counted(inspect(source, "--sample=2", "--seed=3")[1]) == counted(report)


def test_without_a_sample_none_is_named(tmp_path: Path) -> None:
    _, report = inspect(make_lpr750k(tmp_path / "source"))
    assert report["sample"] is None and not any("sample" in remark for remark in report["remarks"])
