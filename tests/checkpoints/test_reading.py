"""What is damage and what is not: only damage leads to the step before, and no sound step is renamed."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rice_jax import errors
from rice_jax.checkpoints import reading, step_folder, store
from rice_jax.checkpoints.orbax import Orbax
from rice_jax.checkpoints.reading import DamagedError, MissingError, patiently
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.training.step import State

STATE = State(jnp.int32(3), {"kernel": jnp.arange(6000.0).reshape(20, 300)}, {"mu": jnp.ones(40)}, {})
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)
OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, in place of waiting."""
    waited: list[float] = []
    monkeypatch.setattr(reading.time, "sleep", waited.append)
    return waited


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, kept=2) as checkpoints:
        checkpoints.save(3, STATE, {"plan": "p", "config": "{}"})
        checkpoints.save(6, jax.tree.map(lambda x: x + 1, STATE), {"plan": "p", "config": "{}"})
    return workdir


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def names(workdir: Path) -> list[str]:
    return sorted(os.listdir(workdir / "checkpoints"))


def failing(monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException, times: int) -> list[str]:
    """Makes a method of Orbax raise `error` the first `times` it is called; returns a list that counts calls."""
    real, calls = getattr(Orbax, method), list[str]()

    def call(self: Orbax, *arguments: Any) -> Any:
        calls.append(method)
        if len(calls) <= times:
            raise error
        return real(self, *arguments)

    monkeypatch.setattr(Orbax, method, call)
    return calls


DISK = {
    "stale": OSError(errno.ESTALE, "Stale file handle", "/data/run/checkpoints/6/weights/manifest.ocdbt"),
    "no permission": PermissionError(errno.EACCES, "Permission denied", "/data/run/checkpoints/6/weights"),
    "I/O": OSError(errno.EIO, "Input/output error"),
    "too many open files": OSError(errno.EMFILE, "Too many open files"),
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "timed out": TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    "open files, by TensorStore": ValueError(
        'RESOURCE_EXHAUSTED: Error reading local file "/x": Failed to open [OS error 24: EMFILE Too many open files]'
    ),
    "permission, by TensorStore": ValueError(
        'PERMISSION_DENIED: Error reading local file "/x": Failed to open [OS error 13: EACCES Permission denied]'
    ),
    "unavailable": RuntimeError("UNAVAILABLE: the server does not answer"),
    "late": RuntimeError("DEADLINE_EXCEEDED: no answer"),
    "without a number": OSError("the file server is gone"),
}
PROGRAM = {
    "AttributeError": AttributeError("'NoneType' object has no attribute 'shape'"),
    "TypeError": TypeError("unsupported operand"),
    "AssertionError": AssertionError(),
    "KeyError": KeyError("weights"),
    "XLA": jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Executable expected parameter 0 of another size"),
    "NotImplementedError": NotImplementedError("no"),
}


@pytest.mark.parametrize("name", DISK)
def test_a_disk_that_fails_twice_is_read_again_and_the_newest_step_is_used(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], name: str
) -> None:
    calls = failing(monkeypatch, "restore", DISK[name], times=2)
    with Checkpoints(workdir, kept=2) as checkpoints:
        assert checkpoints.restore(ABSTRACT)[0] == 6 and len(calls) == 3
        assert len(pauses) == 2 and 0 < pauses[0] < pauses[1]
        checkpoints.save(7, STATE, {})
    assert names(workdir) == ["6", "7"]


@pytest.mark.parametrize("name", DISK)
def test_a_disk_that_keeps_failing_ends_the_command_and_changes_nothing(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, "restore", DISK[name], times=99)
    with pytest.raises(OSError) as raised:
        Checkpoints(workdir, kept=2).restore(ABSTRACT)
    text = errors.reason(raised.value)
    assert "3 attempts" in text and str(getattr(DISK[name], "filename", None) or workdir) in text and "\n" not in text
    assert names(workdir) == ["3", "6"] and capsys.readouterr().err == "" and "remove" not in text


def test_what_to_look_at_depends_on_the_error(workdir: Path, monkeypatch: pytest.MonkeyPatch, pauses: object) -> None:
    wanted = {"stale": "the file server", "no permission": "permissions", "too many open files": "ulimit -n"}
    for name, advice in wanted.items():
        with monkeypatch.context() as patch:
            failing(patch, "restore", DISK[name], times=99)
            with pytest.raises(OSError) as raised:
                Checkpoints(workdir).restore_params(ABSTRACT)
        assert advice in errors.reason(raised.value)


@pytest.mark.parametrize("name", PROGRAM)
def test_an_error_of_a_program_passes_unchanged(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], name: str
) -> None:
    failing(monkeypatch, "restore", PROGRAM[name], times=1)
    with pytest.raises(type(PROGRAM[name])) as raised:
        Checkpoints(workdir, kept=2).restore(ABSTRACT)
    assert raised.value is PROGRAM[name] and not pauses and names(workdir) == ["3", "6"]


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_too_little_memory_is_no_damage(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], error: BaseException
) -> None:
    failing(monkeypatch, "restore", error, times=1)
    with pytest.raises(MemoryError, match="checkpoints/6: memory ran out while this checkpoint was restored"):
        Checkpoints(workdir, kept=2).restore(ABSTRACT)
    assert not pauses and names(workdir) == ["3", "6"]


def test_a_folder_that_cannot_be_listed_is_not_a_new_run(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    def stale(path: object = ".") -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(store.os, "listdir", stale)
    with pytest.raises(OSError, match="Stale file handle, after 3 attempts"):
        Checkpoints(workdir, kept=2)


# --- Damage -----------------------------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("change", [flipped, shortened, emptied, Path.unlink])
def test_only_the_step_before_is_used_whatever_file_is_damaged(
    saved: Path,
    tmp_path: Path,
    pauses: list[float],
    change: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each file of a step, one at a time. Of Orbax' notes of the time nothing depends: the step stays the newest."""
    step = saved / "checkpoints" / "6"
    files = sorted(path.relative_to(step) for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) >= 20
    for file in files:
        workdir = Path(shutil.copytree(saved, tmp_path / "run"))
        change(workdir / "checkpoints" / "6" / file)
        harmless = file.name in ("commit_success.txt", "_CHECKPOINT_METADATA")
        with Checkpoints(workdir, kept=2) as checkpoints:
            number, state = checkpoints.restore(ABSTRACT)
            assert number == (6 if harmless else 3), file
            np.testing.assert_array_equal(state.params["kernel"], STATE.params["kernel"] + harmless)
            printed = capsys.readouterr().err
            assert printed.count("\n") == (not harmless) and names(workdir) == ["3", "6"], file
            checkpoints.save(6, STATE, {})
        if not harmless:
            assert "it is skipped and becomes 6.damaged" in printed
            assert names(workdir) == ["3", "6", "6.damaged"], file
        shutil.rmtree(workdir)


def test_large_files_of_arrays_are_found_damaged_by_their_digests(
    tmp_path: Path, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Random numbers, so that a file is larger than those whose bytes have a digest."""
    state = STATE._replace(params={"kernel": jax.random.normal(jax.random.key(0), (1000, 300))})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(tmp_path / "saved", kept=2) as checkpoints:
        checkpoints.save(3, state, {})
        checkpoints.save(6, state, {})
    weights = tmp_path / "saved" / "checkpoints" / "6" / "weights"
    (large,) = (path for path in weights.rglob("*") if path.stat().st_size > step_folder.SMALL)
    gone_back = 0
    for bit in range(0, 8 * large.stat().st_size, 8 * large.stat().st_size // 12):
        run = Path(shutil.copytree(tmp_path / "saved", tmp_path / "run"))
        path = run / large.relative_to(tmp_path / "saved")
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        checkpoints = Checkpoints(run, kept=2)
        step, found = checkpoints.restore(abstract)
        # A byte that belongs to no array, as at the end of the file, leaves all numbers as they were saved.
        assert step == 3 or np.array_equal(found.params["kernel"], state.params["kernel"]), bit
        assert checkpoints.restore_params(abstract)[0] == step and names(run) == ["3", "6"]
        gone_back += step == 3
        shutil.rmtree(run)
    assert gone_back >= 10
    assert not pauses


def test_a_missing_file_is_looked_for_again_after_ten_seconds(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a file server that lags: digest.json at the first look, an array's file at the second."""
    step = workdir / "checkpoints" / "6"
    (array,) = list((step / "weights" / "d").iterdir()) or list((step / "weights").rglob("d/*"))[:1]
    hidden = {path: path.read_bytes() for path in (step / "digest.json", array)}
    for path in hidden:
        path.unlink()
    waited = []

    def appear(seconds: float) -> None:
        waited.append(seconds)
        path = list(hidden)[len(waited) - 1]
        path.write_bytes(hidden[path])

    monkeypatch.setattr(reading.time, "sleep", appear)
    assert Checkpoints(workdir, kept=2).restore(ABSTRACT)[0] == 6
    assert waited == [10.0, 10.0] and capsys.readouterr().err == ""


def test_a_step_that_appears_later_is_read_and_not_renamed(workdir: Path, pauses: list[float], tmp_path: Path) -> None:
    (workdir / "checkpoints" / "6").rename(tmp_path / "6")
    checkpoints = Checkpoints(workdir, kept=2)
    assert checkpoints.steps() == [3]
    (tmp_path / "6").rename(workdir / "checkpoints" / "6")
    with pytest.raises(ValueError, match="step 4 was not saved, because step 6 is there"):
        checkpoints.save(4, STATE, {})
    assert names(workdir) == ["3", "6"] and checkpoints.steps() == [3, 6]
    checkpoints.finish(7, STATE, {})
    assert names(workdir) == ["6", "7"]


def test_a_damaged_step_that_was_mended_is_not_renamed(workdir: Path, pauses: list[float], tmp_path: Path) -> None:
    digest_file = workdir / "checkpoints" / "6" / "digest.json"
    digest_file.rename(tmp_path / "digest.json")
    checkpoints = Checkpoints(workdir, kept=3)
    assert checkpoints.restore(ABSTRACT)[0] == 3
    (tmp_path / "digest.json").rename(digest_file)
    checkpoints.finish(7, STATE, {})
    assert names(workdir) == ["3", "6", "7"] and checkpoints.steps() == [3, 6, 7]


def test_a_damaged_digest_file_alone_does_not_begin_the_run_again(workdir: Path, pauses: list[float]) -> None:
    shutil.rmtree(workdir / "checkpoints" / "3")
    flipped(workdir / "checkpoints" / "6" / "digest.json")
    with pytest.raises(ValueError, match="no undamaged checkpoint is left"):
        Checkpoints(workdir, kept=2).latest()


@pytest.mark.parametrize(
    "text",
    [
        "DATA_LOSS: Error reading",
        "Error opening driver: Error decoding manifest: Truncated Zstd-compressed stream; at byte 9",
        "FAILED_PRECONDITION: Error reading: ZSTD_decompressStream() failed: Unknown frame descriptor; at byte 0",
        "OUT_OF_RANGE: Error reading: Requested byte range [0, 10) is not valid for value of size 0",
    ],
)
def test_what_tensorstore_says_of_bad_bytes_is_damage(text: str) -> None:
    assert reading.meaning(ValueError(text)) is DamagedError


def test_an_error_without_such_words_is_no_damage() -> None:
    assert reading.meaning(ValueError("no status at all")) is None
    assert reading.meaning(MissingError("x")) is MissingError


def test_the_first_answer_is_returned_without_a_pause(pauses: list[float]) -> None:
    assert patiently(Path("x"), lambda: 5) == 5 and not pauses


# --- Saves that cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["weights/manifest.ocdbt", "optimizer/manifest.ocdbt", "weights/_METADATA"])
def test_a_save_that_cannot_be_read_back_is_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Orbax.wait_until_finished

    def incomplete(self: Orbax) -> None:
        real(self)
        (tmp_path / "checkpoints" / "5" / lost).unlink()

    with Checkpoints(tmp_path, kept=2) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(Orbax, "wait_until_finished", incomplete)
            checkpoints.save(5, STATE, {})
            checkpoints._join()
        assert "the checkpoint of step 5 was not saved (" in capsys.readouterr().err
        assert checkpoints.steps() == [] and names(tmp_path) == []
        checkpoints.save(6, STATE, {})
    assert Checkpoints(tmp_path).restore(ABSTRACT)[0] == 6


def test_a_failed_save_deletes_no_step_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may have saved it since the last look."""
    checkpoints = Checkpoints(tmp_path, kept=2)
    sound = tmp_path / "checkpoints" / "5" / "digest.json"

    def collides(*_: object) -> None:
        sound.parent.mkdir(parents=True)
        sound.write_text("{}")
        raise ValueError("Destination 5 already exists.")

    monkeypatch.setattr(checkpoints._orbax, "save", collides)
    checkpoints.save(5, STATE, {})
    checkpoints._join()
    assert sound.exists()


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "_METADATA"])
def test_a_trial_that_cannot_be_read_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    real = step_folder.check_saved

    def check(orbax: Orbax, folder: Path, leaves: dict[str, str]) -> None:
        (folder / "weights" / lost).unlink()
        real(orbax, folder, leaves)

    monkeypatch.setattr(step_folder, "check_saved", check)
    with pytest.raises(ValueError, match="a checkpoint cannot be saved there"):
        Checkpoints(tmp_path, kept=1).try_out()
