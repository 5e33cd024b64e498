"""A run's folder that others use meanwhile: readers, another run with the lease, a user's files, a slow file server."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from data_pipeline.system.lease import LeaseLostError
from rice_jax.checkpoints import reading, step_folder, store
from rice_jax.checkpoints.orbax import Orbax
from rice_jax.checkpoints.reading import MissingError, meaning
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.training.step import State

STATE = State(jnp.int32(3), {"kernel": jnp.arange(60000.0).reshape(200, 300)}, {"mu": jnp.ones(40)}, {})
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAUSES", {MissingError: (0.0,), OSError: (0.0, 0.0)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, kept=2) as checkpoints:
        checkpoints.save(3, STATE, {"data": "hash"})
        checkpoints.save(6, STATE, {"data": "hash"})
    return workdir


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def names(workdir: Path) -> list[str]:
    return sorted(os.listdir(workdir / "checkpoints"))


def flip_largest(step: Path) -> tuple[Path, bytes]:
    """Flips a bit in the middle of the largest file of the weights, and returns its path and what it was."""
    path = max((step / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    before = path.read_bytes()
    assert len(before) > step_folder.SMALL
    path.write_bytes(
        before[: len(before) // 2] + bytes([before[len(before) // 2] ^ 8]) + before[len(before) // 2 + 1 :]
    )
    return path, before


# --- A reader, while the run saves and deletes ------------------------------------------------------------------------


def go_on(workdir: Path) -> None:
    """Saves step 9 as a run that keeps one step: 3 and 6 are deleted."""
    with Checkpoints(workdir, kept=1) as run:
        run.save(9, STATE, {"data": "hash"})
    assert names(workdir) == ["9"]


def test_a_reader_goes_on_with_the_step_that_was_saved_meanwhile(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = Checkpoints(workdir)
    go_on(workdir)
    assert reader.meta(6)["data"] == "hash"
    assert reader.restore_params(ABSTRACT)[0] == 9 and reader.meta(9)["step"] == 9
    assert reader.latest() == 9 and capsys.readouterr().err == ""  # a step that was deleted is no damage


def test_steps_deleted_between_the_listing_and_the_look_are_listed_again(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, listed = Checkpoints._names, []

    def list_first(self: Checkpoints) -> list[str]:
        found = real(self)
        listed.append(found)
        if len(listed) == 2:  # the second: the first is for the names that are no steps
            monkeypatch.setattr(Checkpoints, "_names", real)
            go_on(workdir)
        return found

    monkeypatch.setattr(Checkpoints, "_names", list_first)
    reader = Checkpoints(workdir)
    assert reader.steps() == [9] and reader.latest() == 9 and capsys.readouterr().err == ""


def test_when_all_steps_were_deleted_none_is_called_damaged(workdir: Path) -> None:
    reader = Checkpoints(workdir)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ValueError, match=r"no undamaged checkpoint is left \(all were deleted\)"):
        reader.restore(ABSTRACT)


# --- A run that lost its lease ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost_after", range(6))
def test_nothing_is_written_or_deleted_after_the_lease_is_lost(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, lost_after: int
) -> None:
    """The lease is lost after each change in turn: the changes that were to follow are not made."""
    changes: list[str] = []

    def check() -> None:
        if len(changes) >= lost_after:
            raise LeaseLostError("lost")

    def counted(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(path: Path, *arguments: Any) -> Any:
            if kind == "write" or Path(path).parent == workdir / "checkpoints":
                changes.append(kind)
            return real(path, *arguments)

        return change

    flip_largest(workdir / "checkpoints" / "6")
    (workdir / "checkpoints" / "1.deleted").mkdir()
    checkpoints = Checkpoints(workdir, kept=1, check=check)
    assert checkpoints.restore(ABSTRACT)[0] == 3
    monkeypatch.setattr(store, "write_file", counted("write", store.write_file))
    monkeypatch.setattr(store.shutil, "rmtree", counted("delete", shutil.rmtree))
    monkeypatch.setattr(Path, "rename", counted("rename", Path.rename))
    if lost_after:
        checkpoints.save(7, STATE, {})
        checkpoints._join()
    else:
        with pytest.raises(LeaseLostError):
            checkpoints.save(7, STATE, {})
    assert len(changes) == min(lost_after, 5)  # delete 1.deleted, rename 6, write digest.json, rename and delete 3
    assert (workdir / "checkpoints" / "7" / "digest.json").exists() == (lost_after >= 3)


# --- What is damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "cannot build a sharding for {folder}",
        'INVALID_ARGUMENT: Error opening "zarr" driver: "codec" "zstd" is not registered',
        "INVALID_ARGUMENT: sharding does not fit",
        "OUT_OF_RANGE: Requested domain [0, 20) is outside [0, 10)",
        "FAILED_PRECONDITION: metadata of {folder}/weights mismatch",
    ],
)
@pytest.mark.parametrize("name", ["zstd-runs", "my DATA_LOSS NOT_FOUND run", "OS error 28"])
def test_words_in_an_error_or_a_path_make_no_step_damaged(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    workdir = Path(shutil.copytree(saved, tmp_path / name))
    error = ValueError(text.format(folder=workdir / "checkpoints" / "6"))

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Orbax, "restore", fails)
    with Checkpoints(workdir, kept=2) as checkpoints, pytest.raises(ValueError) as raised:
        checkpoints.restore(ABSTRACT)
    assert raised.value is error and names(workdir) == ["3", "6"] and checkpoints.steps() == [3, 6]


def test_an_unknown_error_is_damage_if_a_file_is_no_longer_as_listed(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Orbax.restore

    def shortened(self: Orbax, folder: Path, items: dict[str, Any]) -> dict[str, Any]:
        if folder.name == "6":
            (folder / "weights" / "_METADATA").write_text("{")
            raise ValueError("INVALID_ARGUMENT: something")
        return real(self, folder, items)

    monkeypatch.setattr(Orbax, "restore", shortened)
    assert Checkpoints(workdir).restore(ABSTRACT)[0] == 3
    assert "_METADATA has 1 bytes in place of" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["DATA_LOSS", "zstd", "NOT_FOUND", "RESOURCE_EXHAUSTED", "[OS error 12: ENOMEM]"])
def test_a_quoted_name_has_no_meaning(word: str) -> None:
    assert meaning(ValueError(f'no such key: "a {word} b"')) is meaning(ValueError(f"x /data/{word}/y")) is None


# --- A damaged step whose times change --------------------------------------------------------------------------------


def touch(path: Path) -> None:
    os.utime(path)


@pytest.mark.parametrize("change", [touch, lambda path: path.chmod(0o600), lambda path: touch(path.parent)])
def test_a_damaged_step_stays_out_when_only_its_times_change(workdir: Path, change: Callable[[Path], None]) -> None:
    path, _ = flip_largest(workdir / "checkpoints" / "6")
    with Checkpoints(workdir, kept=2) as checkpoints:
        assert checkpoints.restore(ABSTRACT)[0] == 3
        change(path)
        checkpoints.save(4, STATE, {})
    assert names(workdir) == ["3", "4", "6.damaged"]


def test_a_damaged_step_that_is_replaced_by_a_sound_copy_counts_again(workdir: Path) -> None:
    path, before = flip_largest(workdir / "checkpoints" / "6")
    checkpoints = Checkpoints(workdir, kept=2)
    assert checkpoints.restore(ABSTRACT)[0] == 3
    path.write_bytes(before)
    with pytest.raises(ValueError, match="step 6 is there"):
        checkpoints.save(4, STATE, {})
    assert checkpoints.restore(ABSTRACT)[0] == 6 and names(workdir) == ["3", "6"]


# --- What cannot be deleted, and what must not be ---------------------------------------------------------------------


def save_three(workdir: Path) -> None:
    with Checkpoints(workdir, kept=1) as checkpoints:
        for step in (8, 9, 10):
            checkpoints.save(step, STATE, {})
            checkpoints._join()
            assert checkpoints._failure is None


def test_a_step_on_another_disk_is_pruned_by_its_link(workdir: Path, tmp_path: Path, capfd: Any) -> None:
    step = workdir / "checkpoints" / "6"
    step.rename(tmp_path / "elsewhere")
    step.symlink_to(tmp_path / "elsewhere")
    save_three(workdir)
    assert names(workdir) == ["10"] and (tmp_path / "elsewhere" / "digest.json").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["notes.deleted", "mine.deleted", "best.orbax-checkpoint-tmp-keep", "9.deleted.txt"])
def test_what_a_user_put_there_stays_whatever_its_name(
    workdir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "checkpoints" / name).mkdir()
    (workdir / "checkpoints" / name / "thesis.txt").write_text("x")
    save_three(workdir)
    assert names(workdir) == sorted(["10", name]) and (workdir / "checkpoints" / name / "thesis.txt").exists()
    assert f"{name} is not named after a step and is skipped" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["2.deleted", "12.orbax-checkpoint-tmp-7"])
def test_what_cannot_be_deleted_is_warned_of_once_and_saves_go_on(
    workdir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "checkpoints" / name).write_text("a file, where a save leaves a folder")
    save_three(workdir)
    assert names(workdir) == sorted(["10", name])
    assert capsys.readouterr().err.count("could not be deleted or renamed") == 1


def test_a_deleted_step_that_another_machine_still_reads_stops_no_save(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = shutil.rmtree

    def busy(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).endswith(("3.deleted", "6.deleted")):
            raise OSError(errno.EBUSY, "Device or resource busy", f"{path}/.nfs0001")
        real(path, *arguments, **options)

    monkeypatch.setattr(store.shutil, "rmtree", busy)
    save_three(workdir)
    assert names(workdir) == ["10", "3.deleted", "6.deleted"]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 2 and "6.deleted: could not be deleted or renamed" in printed


def test_a_damaged_step_that_cannot_be_renamed_stops_no_save_of_another(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_largest(workdir / "checkpoints" / "6")
    real = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if self.name == "6":
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        return real(self, target)

    with Checkpoints(workdir, kept=2) as checkpoints:
        checkpoints.restore(ABSTRACT)
        monkeypatch.setattr(Path, "rename", busy)
        for step in (7, 8):
            checkpoints.save(step, STATE, {})
    assert names(workdir) == ["6", "7", "8"] and capsys.readouterr().err.count("could not be deleted or renamed") == 1


# --- A file server that fails once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["leaves", "files_of"])
def test_a_finished_save_is_opened_again_after_a_passing_error(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    owner: Any = Orbax if method == "leaves" else step_folder
    real, calls = getattr(owner, method), []

    def stale_once(*arguments: Any) -> Any:
        calls.append(method)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*arguments)

    with Checkpoints(workdir, kept=2) as checkpoints:
        monkeypatch.setattr(owner, method, stale_once)
        checkpoints.save(9, STATE, {})
    assert names(workdir) == ["6", "9"] and len(calls) == 2 and capsys.readouterr().err == ""
