"""Training as users run it: a run, a killed run, a run in the wrong folder; and the use of its checkpoints."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rice_jax
from configs import smoke
from data_pipeline.format.reader import open_dataset
from data_pipeline.input.decode import centre_crop, load_picture
from rice_jax import train
from rice_jax.config import from_json
from rice_jax.retrieval.embeddings import EmbeddingStore, embed
from rice_jax.retrieval.evaluation import evaluate_split
from rice_jax.retrieval.model import frame_options
from rice_jax.training import guards, ledger
from tests import official
from tests.checkpoints.test_store import flip_data


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
    assert first["learning_rate"] == 0 and lines[1]["learning_rate"] > 0  # docs/official.md 7.4
    assert len({line["ledger"] for line in lines if "loss" in line}) == 6
    assert "val/recall@1" in lines[-1]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "6"]
    assert from_json((run / "config.json").read_text()).batch_size == 8
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
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert len(events.Scalars("loss")) == 6
    assert [event.step for event in events.Scalars("val/recall_at_1")] == [6]


def test_a_workdir_refuses_another_config_and_names_the_fields(run: Path, converted: Path) -> None:
    config = smoke_config(converted, seed=1)
    config.optimizer.learning_rate = 0.5
    fields = r"(?s)holds a run with another config.*optimizer.learning_rate: 0.001 -> 0.5.*seed: 42 -> 1"
    with pytest.raises(ValueError, match=fields):
        train.train_and_evaluate(config, run)


def test_a_resumed_run_with_other_intervals_loses_no_line(converted: Path, tmp_path: Path) -> None:
    """Logging, evaluation and checkpoints that do not divide each other; the second half with other ones."""
    config = smoke_config(converted, num_updates=7, log_every=4, eval_every=2, checkpoint_every=5)
    train.train_and_evaluate(config, tmp_path / "whole")
    whole = lines_of(tmp_path / "whole")
    assert [line["step"] for line in whole if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in whole if "val/queries" in line] == [2, 4, 6, 7]

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "7")
    config.log_every, config.checkpoints_kept = 1, 1
    train.train_and_evaluate(config, tmp_path / "again")
    assert lines_of(tmp_path / "again") == whole
    events = EventAccumulator(str(tmp_path / "again" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.step for event in events.Scalars("val/recall_at_1")] == [2, 4, 6, 7]


def test_an_evaluation_that_a_kill_prevented_is_done_on_resume(converted: Path, tmp_path: Path) -> None:
    train.train_and_evaluate(smoke_config(converted, num_updates=3), tmp_path)
    whole = lines_of(tmp_path)
    assert "val/queries" in whole[-1]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole[:-1]) + '{"step": 3, "va')
    train.train_and_evaluate(smoke_config(converted, num_updates=3), tmp_path)
    assert lines_of(tmp_path) == whole


def test_other_data_than_the_checkpoint_was_trained_on_is_refused(run: Path, converted: Path, tmp_path: Path) -> None:
    from data_pipeline.convert import Options, convert

    source = converted.parent / "lpr750k"
    convert(Options(layout="lpr750k", source=source, output=tmp_path, splits=("train", "val"), clips_per_shard=5))
    with pytest.raises(ValueError, match="holds other clips; give the data set of that run, or give another --workdir"):
        train.train_and_evaluate(smoke_config(tmp_path), run)
    saved = {"plan": "1", "data": "2" * 64, "version": "0.1"}
    with pytest.raises(ValueError, match=r"another version of rice_jax made its plan; use 0.1, or give another"):
        train.refuse_other_run(
            run, (run / "config.json").read_text(), smoke_config(converted), saved, saved | {"plan": "3"}
        )


def test_a_split_without_galleries_is_refused_before_the_first_update(converted: Path, tmp_path: Path) -> None:
    config = smoke_config(converted)
    config.data.eval_split = "train"
    with pytest.raises(ValueError, match=r"data.eval_split train: .*set it to another one, val or test"):
        train.train_and_evaluate(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_begun_keeps_its_skipped_clips_and_says_how_to_train_on(run: Path, converted: Path) -> None:
    config = smoke_config(converted)
    config.data.skip_clips = (open_dataset(converted).split("train").clip_ids[0],)
    with pytest.raises(ValueError, match=rf"(?s)data.skip_clips: .*another --workdir and --config.init_from={run}"):
        train.train_and_evaluate(config, run)


def test_a_set_without_validation_clips_trains_without_evaluation(converted: Path, tmp_path: Path) -> None:
    config = smoke_config(converted, num_updates=3)
    config.data.eval_split = ""
    assert train.train_and_evaluate(config, tmp_path) == {}
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_refused_command_does_not_claim_the_workdir(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set batch_size to 24 or less"):
        train.train_and_evaluate(smoke_config(converted, batch_size=500), tmp_path)
    train.train_and_evaluate(smoke_config(converted, num_updates=1, optimizer={"warmup_updates": 0}), tmp_path)
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_diverged_run_keeps_its_parameters_warns_and_stops(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = smoke_config(converted, num_updates=9, max_nonfinite_updates=2, checkpoint_every=1)
    config.optimizer.learning_rate = 1e30
    with pytest.raises(ValueError, match=r"was not finite for 3 updates in a row.* lower optimizer.learning_rate"):
        train.train_and_evaluate(config, tmp_path)
    errors = capsys.readouterr().err
    assert errors.count("warning: update") == 1 and "largest of update 2: " in errors
    bad = [line for line in lines_of(tmp_path) if not line["finite"]]
    assert len(bad) == 3 and bad[0]["loss"] is None
    assert bad[0]["logit_scale"] == bad[1]["logit_scale"]  # nothing moved
    assert bad[0]["ledger"] != bad[1]["ledger"]  # but the data went on
    reports = [json.loads(line) for line in (tmp_path / "not_finite.jsonl").read_text().splitlines()]
    assert [report["step"] for report in reports] == [line["step"] for line in bad]
    assert len(reports[0]["clips"]) == 8 and reports[0]["gradient_norms"]["logit_scale"] == "nan"
    split = open_dataset(converted).split("train")
    rows = [split.clip_ids.index(clip) for clip in reports[0]["clips"]]
    assert ledger.as_hex(ledger.batch_digest(np.array(rows))) == bad[0]["ledger"]


def test_evaluation_takes_the_step_before_a_damaged_one_and_changes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    flip_data(tmp_path / "run" / "checkpoints" / "6" / "weights")
    there = lambda: {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    before = there()
    assert rice_jax.load(tmp_path / "run").step == 3
    assert there() == before
    assert re.fullmatch(r"warning: .*/checkpoints/6 is damaged \(.*\); it is skipped\.\n", capsys.readouterr().err)
    with pytest.raises(ValueError, match="checkpoints/6 is damaged"):
        rice_jax.load(tmp_path / "run", step=6)


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
        "--config.num_updates=40", "--config.checkpoint_every=5", "--config.log_every=4",
    ]  # fmt: skip


def one_device_environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}


def command_that_at(step: int, does: str, data: Path, workdir: Path) -> list[str]:
    """Returns the command, changed so that it executes `does` before it prints the progress at update `step`."""
    program = f"""
import os, runpy, signal, sys, time
from rice_jax.training.logs import Progress
line = Progress.line
def interrupted(self, done, *rest):
    if done == {step}:
        {does}
    return line(self, done, *rest)
Progress.line = interrupted
sys.argv = ["rice_jax.train", *sys.argv[1:]]
runpy.run_module("rice_jax.train", run_name="__main__")
"""
    return [sys.executable, "-c", program, *command(data, workdir)[3:]]


def test_after_kill_9_the_same_command_gives_the_undisturbed_run(converted: Path, tmp_path: Path) -> None:
    """The same batches (ledger) and bit for bit the same losses, gradient norms and figures."""
    environment = one_device_environment()
    subprocess.run(command(converted, tmp_path / "whole"), env=environment, check=True, timeout=300)
    assert not (tmp_path / "whole" / "compiled").exists()  # JAX_COMPILATION_CACHE_DIR names another folder; without it:
    del environment["JAX_COMPILATION_CACHE_DIR"]
    sleeping = command_that_at(12, "time.sleep(600)", converted, tmp_path / "killed")
    killed = subprocess.Popen(sleeping, env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "checkpoints" / "10" / "digest.json").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(lines_of(tmp_path / "killed")) < 40
    subprocess.run(command(converted, tmp_path / "killed"), env=environment, check=True, timeout=300)
    assert any((tmp_path / "killed" / "compiled").iterdir())
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends_and_the_same_command_continues(
    converted: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    environment = one_device_environment()
    rare = "--config.checkpoint_every=1000"
    again = [*command(converted, tmp_path), rare]
    signalled = [*command_that_at(8, f"os.kill(os.getpid(), {number:d})", converted, tmp_path), rare]
    stopped = subprocess.run(signalled, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert stopped.returncode == status, stopped.stderr
    rest, errors = stopped.stdout, stopped.stderr
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"stopped at step {saved.name}; the same command goes on" in rest
    assert f"{number.name}: the run stops after this step" in errors and errors.count("\n") == 1
    assert lines_of(tmp_path)[-1]["step"] == int(saved.name)
    continued = subprocess.run(
        [*again, "--config.log_every=1"], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert f"from update {saved.name} to 40" in continued.stdout, continued.stderr
    assert [line["step"] for line in lines_of(tmp_path) if "loss" in line] == list(range(1, 41))


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    came_to_its_end = []

    def endless(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        came_to_its_end.append(True)

    monkeypatch.setattr(train, "evaluate_held_out", endless)
    with pytest.raises(SystemExit) as ended:
        train.train_and_evaluate(smoke_config(converted, eval_every=2), tmp_path)
    assert ended.value.code == 143 and not came_to_its_end
    assert "stopped at step 2" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "2" / "digest.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stalled_input_is_reported_with_stacks_and_the_run_continues(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The fourth batch comes only after the report, which may be late on a busy machine."""
    to_global, report = train.to_global, guards.Watch._report
    calls, reports, reported = [], [], threading.Event()

    def slow(batch: Any, mesh: Any) -> Any:
        calls.append(1)
        assert len(calls) != 4 or reported.wait(120)
        return to_global(batch, mesh)

    def record(watch: guards.Watch, wait: tuple[str, int, float], waited: float) -> None:
        report(watch, wait, waited)
        reports.append(wait[:2])
        if wait[:2] == ("input", 3):
            reported.set()

    monkeypatch.setattr(train, "to_global", slow)
    monkeypatch.setattr(guards.Watch, "_report", record)
    config = smoke_config(converted, stall_seconds=0.5, num_updates=4)
    config.data.eval_split = ""
    train.train_and_evaluate(config, tmp_path)
    assert reports.count(("input", 3)) == 1
    assert ("device", 0) not in reports  # compiling is no stall
    errors = capfd.readouterr().err
    assert "s for the input, after update 3: check the disk" in errors
    assert "Current thread" in errors and "test_train.py" in errors


def test_a_full_disk_during_a_save_is_reported_and_the_run_continues(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ocp.AsyncCheckpointer.save

    def full(self: Any, directory: Any, *arguments: Any, **options: Any) -> None:
        if directory.name == "3":
            raise OSError(28, "No space left on device")
        real(self, directory, *arguments, **options)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", full)
    train.train_and_evaluate(smoke_config(converted), tmp_path)
    assert "the checkpoint of step 3 was not saved (no space left there)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]
    assert [line["step"] for line in lines_of(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]


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


# --- the model of a trained run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(run: Path) -> rice_jax.Model:
    return rice_jax.load(run)


def test_python_and_command_give_the_same_embeddings(loaded: rice_jax.Model, converted: Path) -> None:
    """encode_clips and encode_images on pictures decoded here, against the embeddings of the evaluation."""
    split = open_dataset(converted).split("test")
    clip = split.clip(1)
    ours = loaded.encode_clips(loaded.prepare([frame.encoded for frame in clip.frames])[None])
    image = loaded.encode_images(loaded.prepare([split.image(0).encoded]))
    store = EmbeddingStore(None)
    clips, images = embed(loaded, split, np.array([1]), np.array([0]), store=store, show_progress=False)
    np.testing.assert_allclose(ours, clips, atol=1e-6)
    np.testing.assert_allclose(image, images, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


def test_pictures_are_prepared_as_in_evaluation_and_a_bad_one_is_named(
    loaded: rice_jax.Model, converted: Path, tmp_path: Path
) -> None:
    data = open_dataset(converted).split("test").image(0).encoded
    options = frame_options(loaded.config.data, train=False)
    (tmp_path / "one.jpg").write_bytes(data)
    (tmp_path / "no.jpg").write_text("text")
    prepared = loaded.prepare([str(tmp_path / "one.jpg"), tmp_path / "one.jpg", data])
    expected = centre_crop(load_picture(data, options, train=False), options)
    assert prepared.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(prepared, np.stack([expected] * 3))
    assert loaded.prepare([]).shape == (0, 32, 32, 3)
    with pytest.raises(ValueError, match=r"no.jpg: is not a picture \(starts with b'text'\), needs JPEG"):
        loaded.prepare([tmp_path / "no.jpg"])
    with pytest.raises(ValueError, match="picture 1: has 0 bytes"):
        loaded.prepare([data, b""])
    with pytest.raises(TypeError, match="several pictures"):
        loaded.prepare(str(tmp_path / "one.jpg"))


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


def test_wrong_arrays_are_refused(loaded: rice_jax.Model) -> None:
    frames, mask = np.zeros((1, 3, 32, 32, 3), np.uint8), np.ones((1, 3), np.int32)
    with pytest.raises(ValueError, match="at least one 1"):
        loaded.encode_clips(frames, np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match="a row of 0 and 1"):
        loaded.encode_clips(frames, 2 * mask)
    with pytest.raises(ValueError, match=r"need 5 axes ending in .*; model.prepare\(files\)\[None\] is one clip"):
        loaded._check(np.zeros((4, 32, 32, 3), np.uint8), axes=5)  # tests check the types of encode_clips before it
    with pytest.raises(ValueError, match=r"ending in \(32, 32, 3\)"):
        loaded.encode_images(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="pictures of float32: need uint8"):  # 0 to 1 or 0 to 255 is unknown
        loaded.encode_images(np.zeros((1, 32, 32, 3), np.float32))


def test_a_run_of_an_older_version_takes_the_defaults_of_new_fields(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    text = path.read_text()
    assert '"pool": "class_token",' in text
    path.write_text(text.replace('"pool": "class_token",', ""))
    assert rice_jax.load(tmp_path / "run").config.model.pool == "class_token"
    path.write_text(text.replace('"pool"', '"pooling"'))
    with pytest.raises(ValueError, match=r"fields of another version: model\.pooling"):
        rice_jax.load(tmp_path / "run")
    path.write_text("{")
    with pytest.raises(ValueError, match="config is no JSON"):
        rice_jax.load(tmp_path / "run")


def test_a_step_that_is_not_there_names_those_that_are(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 4; there are 3, 6"):
        rice_jax.load(run, step=4)


def test_only_what_does_not_touch_the_weights_can_be_overridden(run: Path) -> None:
    assert rice_jax.load(run, overrides={"eval_flip": "true"}).config.eval_flip
    with pytest.raises(ValueError, match="was trained with it"):
        rice_jax.load(run, overrides={"model.width": "64"})


def test_mirror_images_count_when_asked(run: Path) -> None:
    image = np.random.default_rng(2).integers(0, 256, (1, 32, 32, 3), np.uint8)
    both = np.concatenate([image, image[:, :, ::-1]])
    plain, flipped = rice_jax.load(run), rice_jax.load(run, overrides={"eval_flip": "true"})
    np.testing.assert_allclose(*flipped.encode_images(both), atol=1e-6)
    assert np.abs(np.subtract(*plain.encode_images(both))).max() > 1e-3


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        rice_jax.load(tmp_path)


def test_weights_of_another_program_are_no_run_and_the_error_says_how_they_are_imported(tmp_path: Path) -> None:
    (tmp_path / "ViT.pt").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"ViT.pt: found no checkpoint, .* with rice_jax.weights import"):
        rice_jax.load(tmp_path / "ViT.pt")


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 4)])
def test_a_checkpoint_of_eight_devices_is_evaluated_alike_on_fewer(
    run: Path, loaded: rice_jax.Model, converted: Path, sizes: tuple[int, int]
) -> None:
    fewer = rice_jax.load(run, mesh=official.mesh_of(*sizes))
    assert jax.tree.leaves(fewer.params)[0].sharding.mesh.size == sizes[0] * sizes[1]
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(fewer.encode_images(images), loaded.encode_images(images), atol=1e-6)
    split = open_dataset(converted).split("test")
    ours, theirs = (evaluate_split(m, split).figures for m in (fewer, loaded))
    for name in ("recall@1", "recall@3", "recall@5", "recall@10"):
        assert abs(ours[name] - theirs[name]) <= 1 / ours["queries"]
