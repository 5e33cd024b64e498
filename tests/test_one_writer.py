"""One writer a folder: two commands in one workdir or output, and a run that finds another one in its place."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from data_pipeline.convert import main as convert_main
from data_pipeline.doctor import main as doctor_main
from data_pipeline.owner import Owner
from data_pipeline.synthetic import main as synthetic_main
from data_pipeline.system.lease import LEASE, HeldError, Lease, LeaseLostError
from rice_jax import evaluate, train
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.training.logs import Log, Progress
from rice_jax.training.step import State
from rice_jax.weights.writers import import_weights
from tests.parallel.test_hosts import run_script
from tests.system.test_lease import lease_of
from tests.test_train import command, command_that_at, lines_of, one_device_environment, smoke_config

OTHER = Owner("far", "another boot", "n", 7, "1")


def take_over(folder: Path) -> None:
    (folder / LEASE).write_bytes(lease_of(OTHER, "another token"))


def files_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_second_training_ends_at_once_and_one_after_a_kill_goes_on_at_once(converted: Path, tmp_path: Path) -> None:
    environment, workdir = one_device_environment(), tmp_path / "run"
    first = subprocess.Popen(
        command_that_at(8, "time.sleep(600)", converted, workdir), env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while not (workdir / "checkpoints" / "5" / "digest.json").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.01)
        time.sleep(1)  # the first run has reached its long sleep
        before = {name: time for name, time in files_of(workdir).items() if not name.startswith(LEASE)}
        second = subprocess.run(
            command(converted, workdir), env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        assert second.returncode == 1 and "Traceback" not in second.stderr
        named = f"error: {workdir}: found another run that writes to it (process {first.pid} on host "
        assert f"{named}{socket.gethostname()}, since 20" in second.stderr, second.stderr
        assert {name: time for name, time in files_of(workdir).items() if not name.startswith(LEASE)} == before
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert (workdir / LEASE).exists()
    last = [*command(converted, workdir), "--config.num_updates=40"]
    third = subprocess.run(last, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert third.returncode == 0 and "watched" not in third.stderr, third.stderr
    assert "from update 5 to 40" in third.stdout
    assert not (workdir / LEASE).exists()


def test_a_run_whose_lease_was_taken_ends_and_writes_nothing_more(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a long stop: in the middle of the run another run takes the folder."""
    line, left = Progress.line, dict[str, int]()

    def taken(self: Progress, done: int, *rest: Any) -> str:
        if done == 4:
            while not (tmp_path / "checkpoints" / "3" / "digest.json").exists():
                time.sleep(0.01)  # or how far it came would depend on chance
            take_over(tmp_path)
            left.update(files_of(tmp_path))
        return line(self, done, *rest)

    monkeypatch.setattr(Progress, "line", taken)
    with pytest.raises(LeaseLostError, match=r"lost its lease \(process 7 on host far, .*writes nothing more"):
        train.train_and_evaluate(smoke_config(converted, log_every=1, checkpoint_every=3), tmp_path)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert [each["step"] for each in lines_of(tmp_path)] == [
        1,
        2,
        3,
        4,
    ]  # the line of update 4 is printed after its metrics are written
    after = files_of(tmp_path)
    changed = {name for name in left if after[name] != left[name]}
    assert after.keys() == left.keys() and all(name.startswith("tensorboard") for name in changed), changed
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "another token"


def test_a_run_that_failed_leaves_no_lease(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is nothing"):
        train.train_and_evaluate(smoke_config(converted, init_from=str(tmp_path / "is nothing")), tmp_path / "run")
    assert not (tmp_path / "run" / LEASE).exists()


ONE_WRITER = """
    from pathlib import Path
    from rice_jax.checkpoints.run_folder import one_writer
    with one_writer(Path("{folder}")):
        print("at work")
"""


def test_of_several_processes_the_first_has_the_lease_and_all_end_when_it_is_refused(tmp_path: Path) -> None:
    script, folder = ONE_WRITER.format(folder=tmp_path / "run"), tmp_path / "run"
    folder.mkdir()
    with Lease(folder):
        for end in run_script(tmp_path, script):
            assert end.status == 1 and not end.out, end
            assert f"found another run that writes to it (process {os.getpid()} on host" in end.error, end
    for end in run_script(tmp_path, script):
        assert end.status == 0, end
    assert list(folder.iterdir()) == []


# --- checkpoints and metrics ------------------------------------------------------------------------------------------


class Leased:
    """A check that passes until it is told that another run has the lease."""

    def __init__(self) -> None:
        self.lost = False

    def __call__(self) -> None:
        if self.lost:
            raise LeaseLostError("lost")


def state_of(step: int) -> State:
    return State(jnp.int32(step), {"w": jnp.ones(3) * step}, {}, {})


def test_a_step_is_not_committed_by_a_run_that_lost_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Leased()
    checkpoints = Checkpoints(tmp_path, kept=1, check=check)
    checkpoints.finish(1, state_of(1), {})
    waits = checkpoints._orbax.wait_until_finished

    def lost_meanwhile() -> None:
        waits()
        check.lost = True

    monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", lost_meanwhile)
    with pytest.raises(LeaseLostError):
        checkpoints.finish(2, state_of(2), {})
    assert not (tmp_path / "checkpoints" / "2" / "digest.json").exists()
    assert (tmp_path / "checkpoints" / "1" / "digest.json").exists()  # which `kept` would have deleted
    with pytest.raises(LeaseLostError):
        checkpoints.save(3, state_of(3), {})
    assert not (tmp_path / "checkpoints" / "3").exists()


def test_a_failed_save_deletes_no_step_of_the_run_that_took_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check, theirs = Leased(), tmp_path / "checkpoints" / "2"
    checkpoints = Checkpoints(tmp_path, kept=1, check=check)

    def fails() -> None:
        check.lost = True
        theirs.mkdir(parents=True, exist_ok=True)
        (theirs / "digest.json").write_text("theirs")
        raise ValueError("the folder is gone")

    monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", fails)
    checkpoints.save(2, state_of(2), {})
    checkpoints._join()
    assert "was not saved (the folder is gone)" in capsys.readouterr().err
    assert (theirs / "digest.json").read_text() == "theirs"


def test_a_line_of_metrics_is_not_written_by_a_run_that_lost_its_lease(tmp_path: Path) -> None:
    check = Leased()
    with Log(tmp_path, step=0, check=check) as log:
        log.write_updates([(1, {"loss": 1.0})], lambda *_: None)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        assert b'"loss": 1.0' in before  # nothing waits to be written
        check.lost = True
        with pytest.raises(LeaseLostError):
            log.write_updates([(2, {"loss": 2.0})], lambda *_: None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(LeaseLostError):
        Log(tmp_path, step=0, check=check)  # which would cut the file
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# --- other writers ----------------------------------------------------------------------------------------------------


def test_an_evaluation_shares_its_output_with_no_other(converted: Path, tmp_path: Path) -> None:
    train.train_and_evaluate(smoke_config(converted, num_updates=1, optimizer={"warmup_updates": 0}), tmp_path / "run")
    output = tmp_path / "run" / "evaluation-test"
    arguments = evaluate.parse(["--workdir", str(tmp_path / "run"), "--data", str(converted)])
    output.mkdir()
    with Lease(output), pytest.raises(HeldError, match=f"{output}: found another run"):
        evaluate.evaluate(arguments)
    assert list(output.iterdir()) == []
    with Lease(tmp_path / "run"):  # a run may be evaluated while it trains
        evaluate.evaluate(arguments)
    assert sorted(path.name for path in output.iterdir()) == ["embeddings", "metrics.json", "rankings.jsonl"]


def test_weights_are_not_imported_into_the_folder_of_a_run_at_work(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with Lease(tmp_path / "run"), pytest.raises(HeldError, match=rf"run: found another run.*process {os.getpid()}"):
        import_weights(tmp_path / "weights.pth", tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_import_that_failed_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        import_weights(tmp_path / "weights.pth", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["convert", "doctor", "synthetic"])
def test_a_second_command_ends_with_the_name_of_the_first(
    name: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = converted.parent / "lpr750k", f"--output={tmp_path}"
    commands = {
        "convert": lambda: convert_main(["--layout=lpr750k", f"--source={source}", output, "--workers=1"]),
        "doctor": lambda: doctor_main([str(source), output, "--workers=1"]),
        "synthetic": lambda: synthetic_main([output, "--products=16", "--clips=40", "--workers=1"]),
    }
    with Lease(tmp_path):
        assert commands[name]() == 2
    named = f"{tmp_path}: found another run that writes to it (process {os.getpid()} on host "
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_lost_its_lease_writes_no_manifest(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import convert

    written = convert.make_manifest

    def taken(output: Path, *rest: Any) -> Any:
        take_over(output)
        return written(output, *rest)

    monkeypatch.setattr(convert, "make_manifest", taken)
    source = converted.parent / "lpr750k"
    assert convert_main(["--layout=lpr750k", f"--source={source}", f"--output={tmp_path}", "--workers=1"]) == 1
    assert "lost its lease (process 7 on host far" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists() and (tmp_path / LEASE).exists()
