"""Each benchmark runs at a tiny size, and its report has the figures that RESULTS.md quotes. No time is judged."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import breakdown, checkpoint, conversion, integrity, memory, one_image, pipeline, training_step, turns
from tests.lpr_layouts import make_lpr750k

MACHINE = {"device", "processor", "cores", "load_average", "versions"}
TINY = [
    "--config.batch_size=4", "--config.data.num_frames=2", "--config.data.image_size=32", "--config.data.resize=32",
    "--config.model.patch_size=16", "--config.model.width=32", "--config.model.layers=1", "--config.model.heads=2",
    "--config.model.hidden=64", "--config.model.embedding=16", "--config.model.decoder_heads=2",
]  # fmt: skip
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed: pip install 'rice_jax[torch]'"
)
PARTS = ["input", "encoder", "mining", "decoder", "reconstruction", "optimiser"]


def report_of(benchmark: Any, output: Path, *words: object) -> dict[str, Any]:
    arguments = benchmark.parse([*map(str, words), "--repeats", "1", "--output", str(output / "report.json")])
    benchmark.main(arguments)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    assert report.keys() >= MACHINE
    return report


def test_candidates_are_timed_in_turn_after_one_call_that_does_not_count() -> None:
    calls: list[str] = []
    seconds = turns.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert list(seconds) == ["a", "b"] and all(taken.wall >= 0 for taken in seconds.values())
    assert turns.ratio(turns.Seconds(6, 2), turns.Seconds(3, 4)) == {"wall": 2, "processor": 0.5}


def test_the_official_transforms_and_ours_read_the_same_pictures(converted: Path, tmp_path: Path) -> None:
    report = report_of(
        pipeline, tmp_path, "--data", converted, "--clips", 4, "--batch_size", 2, "--threads", 1,
    )  # fmt: skip
    assert report["examples"] == 4 and report["pictures"] >= 8
    assert report["level_difference"] == 0
    assert report["examples_per_second"].keys() == {"official", "ours"}
    assert report["times_faster"]["wall"] > 0


def test_conversion_and_copy_write_the_same_files_and_leave_none(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "lpr750k")
    scratch = tmp_path / "scratch"
    report = report_of(
        conversion, tmp_path, "--layout", "lpr750k", "--source", source, "--workers", 1, "--scratch", scratch
    )
    files = [path for path in source.rglob("*") if path.is_file()]
    assert report["files"] == len(files)
    assert report["megabytes"] == pytest.approx(sum(path.stat().st_size for path in files) / 1e6)
    assert report["megabytes_per_second"].keys() == {"copy", "convert"}
    assert report["convert_over_copy"]["wall"] > 0
    assert not list(scratch.iterdir())
    with pytest.raises(SystemExit) as end:
        report_of(conversion, tmp_path, "--layout", "lpr750k", "--source", scratch, "--scratch", scratch)
    assert end.value.code == 2 and not list(scratch.iterdir())


def test_the_parts_of_a_step_add_up_to_input_and_step(converted: Path, tmp_path: Path) -> None:
    report = report_of(breakdown, tmp_path, "--config", "default", f"--config.data.path={converted}", *TINY)
    assert list(report["percent_of_step"]["wall"]) == PARTS
    for unit in turns.Seconds._fields:
        pieces = {name: seconds[unit] for name, seconds in report["pieces_seconds"].items()}
        assert sum(report["parts_seconds"][unit].values()) == pytest.approx(pieces["input"] + pieces["step"])
        assert sum(report["percent_of_step"][unit].values()) == pytest.approx(100)


def test_one_picture_is_timed_in_a_model_of_any_batch_size(tmp_path: Path) -> None:
    report = report_of(one_image, tmp_path, "--config", "smoke", "--gallery", 3)
    calls = report["models"]["smoke"]
    assert list(calls) == ["encode_images", "encode_clips", "match"]
    for call in calls.values():
        assert list(call["seconds"]) == ["batch_size 16", "batch_size 1"] and call["ratio"]["processor"] > 0


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory can be set back on Linux only"
)
def test_steps_take_about_the_memory_that_preflight_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS")  # those of the tests compile other programs than a run does
    memory.main(memory.parse(["--batch_size", "64", "--output", str(tmp_path / "report.json")]))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [case["micro_batches"] for case in report["cases"]] == [False, True]
    for case in report["cases"]:
        assert 0.75 < case["predicted_over_measured"] < 1.25
    whole, micro = (case["measured_bytes"] for case in report["cases"])
    assert micro < whole / 2


@needs_torch
def test_the_step_in_torch_computes_what_ours_does(tmp_path: Path) -> None:
    report = report_of(training_step, tmp_path, "--size", "tiny")
    tiny = report["steps"]["tiny"]
    assert tiny["differences"]["loss"] < 1e-5 and tiny["differences"]["gradient"] < 1e-4
    assert tiny["seconds"].keys() == {"torch", "ours"}
    assert tiny["times_faster"]["wall"] > 0


@needs_torch
def test_steps_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training_step, "differences", lambda *_: {"loss": float("nan"), "gradient": 0.0, "parameters": 0.0}
    )
    with pytest.raises(ValueError, match="tiny: the two steps differ by"):
        training_step.compare("tiny", repeats=1)


def test_without_torch_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        training_step.parse([])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: torch is not installed; pip install 'rice_jax[torch]'\n"


def test_the_report_of_integrity_has_the_share_of_the_checksums(converted: Path, tmp_path: Path) -> None:
    report = report_of(integrity, tmp_path, "--data", converted, "--passes", 2)
    assert report["records"] == 24
    assert report["microseconds_a_clip"]["input"] > report["microseconds_a_clip"]["checking"]


def test_a_save_is_timed_apart_from_what_comes_after_it(tmp_path: Path) -> None:
    report = report_of(checkpoint, tmp_path, "--config", "smoke", "--scratch", tmp_path)
    assert report["seconds"].keys() == {"blocked", "digest", "alone", "after_save", "written"}
    assert report["median_seconds"]["written"] > report["median_seconds"]["blocked"] > 0
    assert report["disk_bytes"] > 0.8 * report["state_bytes"]  # numbers like a run's, which do not compress
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
