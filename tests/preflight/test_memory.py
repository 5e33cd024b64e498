"""A device whose memory is exhausted: one error that says what to set, and settings that help."""

import argparse
from pathlib import Path
from typing import Any

import jax
import pytest

from configs import default
from rice_jax import errors, evaluate, train
from rice_jax.checkpoints.reading import meaning
from rice_jax.config import FREE
from rice_jax.preflight.advice import evaluation_remedies, memory_advice, remedies, resume_remedies, with_changes
from tests.test_train import lines_of, smoke_config

OUT = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 97,710,505,984 bytes.\nBufferAssignment OOM Debugging."
)


def exhaust(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError(OUT)


def said(capsys: pytest.CaptureFixture[str], config: Any, workdir: Path) -> list[str]:
    """Returns the lines of stderr of a training that fails with status 1."""
    with pytest.raises(SystemExit) as end:
        errors.run(train.main, argparse.Namespace(config=config, workdir=workdir))
    assert end.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :]


def tiny(data: Path, **changes: Any) -> Any:
    """Returns a config whose step compiles fast, with two rows on each of the eight devices."""
    return smoke_config(data, **{"batch_size": 16, "num_updates": 3, "loss": {"pmd": 0.0, "pfr": 0.0}} | changes)


ADVICE = [
    "error: the memory of a device is too small (RESOURCE_EXHAUSTED: Out of memory while trying to allocate "
    "97,710,505,984 bytes.). End what else uses the device, or run the same command with the first of these that fits; "
    "only another batch_size changes the loss:",
    "  --config.model.remat=dots",
    "  --config.model.remat=full",
    "  --config.model.remat=full --config.mesh.data=2 --config.mesh.fsdp=4",
    "  --config.model.remat=full --config.batch_size=8",
]


@pytest.mark.parametrize("place", ["make_train_step", "init_state"])
def test_training_that_exhausts_the_memory_prints_what_to_set(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.setattr(train, place, exhaust if place == "init_state" else lambda *_: exhaust)
    assert said(capsys, tiny(converted), tmp_path / "run") == ADVICE


def test_what_it_says_can_be_done_in_the_same_workdir(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(converted)
    with monkeypatch.context() as patched:
        patched.setattr(train, "make_train_step", lambda *_: exhaust)
        assert said(capsys, config, tmp_path / "run") == ADVICE
    changed = with_changes(config, {"model.remat": "dots"})
    train.train_and_evaluate(changed, tmp_path / "run")
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line] == [1, 2, 3]

    # Now there is a checkpoint, so only fields that may change on resume are named.
    monkeypatch.setattr(train.Checkpoints, "restore", exhaust)
    assert said(capsys, changed, tmp_path / "run")[1:] == ["  --config.mesh.data=2 --config.mesh.fsdp=4"]


def test_an_evaluation_that_exhausts_the_memory_loses_no_update(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(converted, eval_every=2, eval_batch_size=32)
    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate_split", exhaust)
        lines = said(capsys, config, tmp_path / "run")
    assert lines[1:] == ["  --config.eval_batch_size=16", "  --config.eval_batch_size=8"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    train.train_and_evaluate(with_changes(config, {"eval_batch_size": 16}), tmp_path / "run")
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line] == [1, 2, 3]

    arguments = evaluate.parse(["--workdir", str(tmp_path / "run"), "--data", str(converted)])
    monkeypatch.setattr(evaluate.evaluation, "evaluate_split", exhaust)
    with pytest.raises(SystemExit) as end:
        errors.run(evaluate.evaluate, arguments)
    assert end.value.code == 1
    assert capsys.readouterr().err.endswith("that fits:\n  --config.eval_batch_size=8\n")


def test_chunks_as_large_as_a_devices_share_are_no_remedy() -> None:
    """One row of 11 pictures a device: nothing to cut; of 12 rows, 132 pictures can be cut and 12 pairs cannot."""
    config = with_changes(default.get_config(), {"batch_size": 8})
    assert next(remedies(config, 8)) == {"model.remat": "dots"}
    assert next(remedies(with_changes(config, {"batch_size": 96}), 8)) == {"loss.micro_batch": 128}
    assert next(remedies(with_changes(config, {"batch_size": 96}), 1)) == {
        "loss.micro_batch": 128, "loss.pair_chunk": 16,
    }  # fmt: skip


def test_other_errors_of_jax_pass() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_advice(list):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")


def test_a_run_with_a_checkpoint_is_told_of_what_may_change_and_fsdp_divides_a_slice() -> None:
    config = default.get_config()
    assert resume_remedies(config, 16, 8) == [{"mesh.data": 4, "mesh.fsdp": 4}]
    assert resume_remedies(config, 16, 16) == [{"mesh.data": 4, "mesh.fsdp": 4}, {"mesh.data": 1, "mesh.fsdp": 16}]
    assert resume_remedies(config, 1, 1) == []
    assert all(name in FREE for changes in resume_remedies(config, 16, 16) for name in changes)
    assert all(changes.get("mesh.fsdp", 1) in (1, 4) for changes in remedies(config, 16, 8))


def test_an_evaluation_with_one_clip_a_device_has_nothing_left_to_set() -> None:
    config = with_changes(default.get_config(), {"eval_batch_size": 64})
    assert evaluation_remedies(config, 8) == [{"eval_batch_size": size} for size in (32, 16, 8)]
    assert evaluation_remedies(config, 64) == []


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: no room", "INTERNAL: Failed to launch\nRESOURCE_EXHAUSTED: no room",
        "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: no room", "UNKNOWN: a\nb\nOut of memory while trying to allocate 5 bytes.",
        "INTERNAL: hipErrorOutOfMemory", "INTERNAL: CUDNN_STATUS_ALLOC_FAILED",
    ],
)  # fmt: skip
def test_exhausted_memory_is_recognised_in_any_line_and_its_line_is_shown(text: str) -> None:
    line = text.splitlines()[-1]
    with pytest.raises(MemoryError) as found, memory_advice(lambda: [{"model.remat": "dots"}]):
        raise jax.errors.JaxRuntimeError(text)
    assert f"the memory of a device is too small ({line})" in str(found.value) and "--config.model.remat=dots" in str(
        found.value
    )
    assert meaning(RuntimeError(text)) is MemoryError


def test_another_error_of_a_device_passes() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="illegal address"), memory_advice(list):
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal address")
