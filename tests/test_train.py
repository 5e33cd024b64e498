"""Training as a user runs it: a run, a killed run, a run on the wrong folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rice_jax
from configs import smoke
from data_pipeline.frames import centre_crop, decode, load
from data_pipeline.records import open_dataset
from rice_jax import config as configuration
from rice_jax import retrieval, train


def smoke_config(data: Path, **changes: Any) -> Any:
    config = smoke.get_config()
    config.data.path = str(data)
    config.update(changes)
    return config


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(smoke_config(converted), workdir)
    return workdir


def test_a_run_leaves_metrics_checkpoints_config_and_tensorboard(run: Path) -> None:
    lines = lines_of(run)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    first = lines[0]
    assert first["loss"] == pytest.approx(first["icl"] + first["pmd"] + first["pfr"], rel=1e-5)
    assert first["learning_rate"] == 0 and lines[1]["learning_rate"] > 0  # SPEC 7.4
    assert len({line["ledger"] for line in lines if "loss" in line}) == 6
    assert "val/recall@1" in lines[-1]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "6"]
    assert configuration.from_json((run / "config.json").read_text()).batch_size == 8
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines[:6]])


def test_the_step_compiles_once(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = train.make_train_step
    monkeypatch.setattr(train, "make_train_step", lambda *a: made.append(real(*a)) or made[-1])
    train.train_and_evaluate(smoke_config(converted, num_updates=3), tmp_path)
    assert made[0]._cache_size() == 1


def test_a_finished_run_is_left_as_it_is(run: Path, converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    figures = train.train_and_evaluate(smoke_config(converted), run)
    assert "all 6 updates are done" in capsys.readouterr().out
    assert figures["queries"] == 1
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_workdir_refuses_another_config_and_names_the_fields(run: Path, converted: Path) -> None:
    config = smoke_config(converted, seed=1)
    config.optimizer.learning_rate = 0.5
    with pytest.raises(
        ValueError, match=r"(?s)holds a run with another config.*optimizer.learning_rate: 0.001 -> 0.5.*seed: 42 -> 1"
    ):
        train.train_and_evaluate(config, run)


def test_a_workdir_may_go_on_with_other_intervals(run: Path, converted: Path) -> None:
    train.train_and_evaluate(smoke_config(converted, log_every=1, checkpoints_kept=1), run)


def test_other_data_than_the_checkpoint_was_trained_on_is_refused(run: Path) -> None:
    now = {"plan": "0123", "data": "4567"}
    with pytest.raises(ValueError, match="holds other clips"):
        train.check_plan({"plan": "89ab", "data": "cdef"}, now)


def test_fewer_clips_than_one_batch_is_an_error(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"24 clips.*batch of 32.*set batch_size to 24 or less"):
        train.train_and_evaluate(smoke_config(converted, batch_size=32), tmp_path)


def test_skipped_clips_are_left_out_and_a_mistyped_one_is_named(converted: Path, tmp_path: Path) -> None:
    config = smoke_config(converted)
    config.data.skip_clips = ("no-such-clip",)
    with pytest.raises(ValueError, match="no-such-clip"):
        train.train_and_evaluate(config, tmp_path)


def command(data: Path, workdir: Path) -> list[str]:
    return [
        sys.executable, "-m", "rice_jax.train", "--config", "smoke", f"--config.data.path={data}",
        "--workdir", str(workdir),
        "--config.num_updates=40", "--config.checkpoint_every=5", "--config.log_every=1",
    ]  # fmt: skip


def one_device_environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}


def test_after_kill_9_the_same_command_gives_the_undisturbed_run(converted: Path, tmp_path: Path) -> None:
    """The same batches (ledger) and bit for bit the same losses, gradient norms and figures."""
    environment = one_device_environment()
    subprocess.run(command(converted, tmp_path / "whole"), env=environment, check=True, timeout=300)
    killed = subprocess.Popen(command(converted, tmp_path / "killed"), env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "checkpoints" / "10").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(lines_of(tmp_path / "killed")) < 40
    subprocess.run(command(converted, tmp_path / "killed"), env=environment, check=True, timeout=300)
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")


def test_wrong_use_exits_with_2_and_failure_with_1(converted: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "rice_jax.train", *arguments, "--workdir", str(tmp_path)],
            capture_output=True,
            text=True,
            env=one_device_environment(),
            cwd=tmp_path,  # installed, the commands work from any folder
            check=False,
        )
        return done.returncode, done.stderr

    assert call("--config", "smoke", "--config.model.widht=64") == (
        2,
        "error: --config.model.widht: the config has no such field; the nearest is --config.model.width.\n",
    )
    status, text = call("--config", "nowhere.py")
    assert status == 2 and "shipped are default, " in text
    status, text = call("--config", "smoke", f"--config.data.path={tmp_path}/empty")
    assert status == 1 and text.startswith("error: ") and "empty" in text and text.count("\n") == 1


# --- what a trained run gives -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(run: Path) -> rice_jax.Model:
    return rice_jax.load(run)


def test_python_and_command_give_the_same_embeddings(loaded: rice_jax.Model, converted: Path) -> None:
    """encode_clips and encode_images on pictures decoded by hand against what evaluate encodes."""
    split = open_dataset(converted).split("test")
    options = retrieval.frame_options(loaded.config.data, train=False)
    picture = lambda data: centre_crop(load(data, options, train=False), options)
    clip = split.clip(1)
    frames = np.stack([picture(frame) for frame in clip.frames])[None]
    ours = loaded.encode_clips(frames, np.ones(frames.shape[:2], np.int32))
    image = loaded.encode_images(picture(split.image(0).encoded)[None])
    store = retrieval.EmbeddingStore(None)
    clips, images = retrieval.embed(loaded, split, np.array([1]), np.array([0]), store=store, show_progress=False)
    np.testing.assert_allclose(ours, clips, atol=1e-6)
    np.testing.assert_allclose(image, images, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert decode(clip.frames[0]).ndim == 3


def test_padding_slots_do_not_move_the_clip_embedding(loaded: rice_jax.Model) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32, 3), np.uint8)
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], np.int32)
    before = loaded.encode_clips(frames, mask)
    frames[0, 1:] = 255
    np.testing.assert_array_equal(loaded.encode_clips(frames, mask), before)


def test_any_number_of_pictures_is_encoded(loaded: rice_jax.Model) -> None:
    images = np.random.default_rng(0).integers(0, 256, (loaded.batch_size + 3, 32, 32, 3), np.uint8)
    whole = loaded.encode_images(images)
    np.testing.assert_allclose(whole[-3:], loaded.encode_images(images[-3:]), atol=1e-6)
    assert loaded.encode_images(images[:0]).shape == (0, 16)


def test_a_clip_without_frames_and_another_size_are_refused(loaded: rice_jax.Model) -> None:
    frames = np.zeros((1, 3, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one 1"):
        loaded.encode_clips(frames, np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match=r"ending in \(32, 32, 3\)"):
        loaded.encode_images(np.zeros((1, 16, 16, 3), np.uint8))


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        rice_jax.load(tmp_path)


def test_a_checkpoint_of_eight_devices_opens_on_one(run: Path) -> None:
    from tests.official import one_device

    alone = rice_jax.load(run, mesh=one_device())
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(alone.encode_images(images), rice_jax.load(run).encode_images(images), atol=1e-6)
    assert jax.tree.leaves(alone.params)[0].sharding.mesh.size == 1
