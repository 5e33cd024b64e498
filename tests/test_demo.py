"""The demo at a tiny size: each of its commands, its report and its picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

from rice_jax import demo

TINY = [
    "--config.num_updates=2", "--config.batch_size=8", "--config.optimizer.warmup_updates=1", "--config.model.width=24",
    "--config.model.stem_channels=8,8,8,8", "--config.model.stem_blocks=0,0,0,0", "--config.model.layers=1",
    "--config.model.hidden=24", "--config.model.embedding=16", "--config.data.image_size=32", "--config.data.resize=32",
    "--config.loss.pmd=0", "--config.loss.pfr=0",
]  # fmt: skip


def test_the_demo_runs_its_commands_and_reports_recall_of_chance_histogram_and_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(demo, "SHOP", ("--products", "12", "--clips", "48"))
    demo.demo(tmp_path / "demo", TINY)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert list(report) == ["chance", "colour_histogram", "untrained", "trained"]
    assert all(0 <= figures["recall@1"] <= 100 for figures in report.values())
    figures = json.loads((tmp_path / "demo" / "evaluation" / "metrics.json").read_text())
    assert report["trained"]["recall@1"] == figures["recall@1"]
    assert report["chance"]["recall@1"] == figures["chance_recall@1"] > 0
    with Image.open(tmp_path / "demo" / "queries.png") as sheet:
        assert sheet.width > 1000
    printed = capfd.readouterr().out
    assert printed.count("$ python -m") == 5 and "colour histogram" in printed


def test_a_command_that_fails_ends_the_demo_with_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        demo.run_command(
            "data_pipeline.convert", "--layout", "lpr750k", "--source", tmp_path, "--output", tmp_path / "out"
        )
    assert end.value.code == 2 and "data_pipeline.convert ended with status 2; remove" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        demo.parse(["--colour", "blue"])
    assert end.value.code == 2
