"""metrics.jsonl: cut at a resume, read once, and never kept in memory."""

import json
import tracemalloc
from pathlib import Path

import pytest

from rice_jax.training.logs import Log, Progress, cut_lines

FIGURES = {"queries": 4, "recall@1": 25.0, "strict_recall@1": float("nan")}


def write(path: Path, *lines: object, end: str = "") -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + end)


def update(step: int) -> dict[str, object]:
    return {"step": step, "loss": 1 / step, "ledger": "0" * 16}


def evaluation(step: int, recall: float, split: str = "val") -> dict[str, object]:
    return {"step": step, f"{split}/queries": 4, f"{split}/recall@1": recall}


def test_lines_after_the_restored_step_and_a_half_line_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [update(1), update(2), evaluation(2, 10.0), update(3), evaluation(3, 20.0)]
    for step, left in ((0, 0), (1, 1), (2, 3), (3, 5), (9, 5)):
        write(path, *lines, end='{"step": 3, "lo')
        whole = path.read_text().splitlines(keepends=True)
        assert cut_lines(path, step) == [line for line in lines[:left] if "val/queries" in line]
        assert path.read_text() == "".join(whole[:left])
    assert cut_lines(tmp_path / "none.jsonl", 3) == []


def test_lines_of_another_writer_are_understood_and_others_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1.0, "step": 1}\n{"step":2}\n{"step": 3}\n')
    cut_lines(path, 2)
    assert path.read_text() == '{"loss": 1.0, "step": 1}\n{"step":2}\n'
    for bad in ("no JSON\n", '{"loss": 1}\n', '{"step": 2, "val/queries": \n', "7\n"):
        path.write_text('{"step": 1}\n' + bad)
        with pytest.raises(ValueError, match=r"metrics.jsonl line 2: is no line of metrics .*; restore the file"):
            cut_lines(path, 5)
        assert path.read_text() == '{"step": 1}\n' + bad


def test_figures_come_from_memory_and_are_those_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", update(1), evaluation(1, 10.0), evaluation(1, 90.0, "test"), update(2))
    with Log(tmp_path, step=1) as log:
        log.write(2, {"loss": 0.5})
        log.write_evaluation(2, "val", FIGURES)
        assert log.recalls("val") == {1: 10.0, 2: 25.0} and log.recalls("test") == {1: 90.0}
        assert log.last_evaluation("val") == FIGURES | {"strict_recall@1": None} and log.last_evaluation("none") == {}
        assert log.has_evaluation(2, "val") and not log.has_evaluation(2, "test")
        (tmp_path / "metrics.jsonl").rename(tmp_path / "moved.jsonl")  # nothing of this reads it again
        assert log.recalls("val") == {1: 10.0, 2: 25.0}
    with_text = json.loads((tmp_path / "moved.jsonl").read_text().splitlines()[-1])
    assert with_text == {"step": 2, "val/queries": 4, "val/recall@1": 25.0, "val/strict_recall@1": None}


def test_a_long_log_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(update(step) for step in range(1, 20_001)), evaluation(20_000, 50.0))
    tracemalloc.start()
    assert len(cut_lines(path, 20_000)) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 < path.stat().st_size


def test_the_speed_is_of_the_updates_since_the_last_line() -> None:
    progress = Progress(total=100, batch_size=8)
    progress.start(1)
    progress._since -= 24.5  # seconds
    line = progress.line(50, {"loss": 3.5, "icl": 3.5})
    assert line.startswith("step 50/100  loss 3.500 (icl 3.500)  0.50") and "25 s left" in line
