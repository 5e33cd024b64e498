"""Identities of processes, and what is done with the temporary files of those that ended."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import owner
from data_pipeline.format.tfrecord import write_file
from data_pipeline.owner import Owner, remove_abandoned, temporary_name, this_process


def named_by(process: Owner, monkeypatch: pytest.MonkeyPatch, path: Path) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(owner, "_identity", lambda pid: process)
        return temporary_name(path)


def ended() -> Owner:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = this_process()
    return Owner(here.host, here.boot, here.namespace, child.pid, here.start)


def test_a_process_runs_until_it_ends() -> None:
    assert this_process().runs() is True
    assert ended().runs() is False


def test_no_two_temporary_names_are_equal_on_any_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = this_process()
    far = Owner("far", "another boot", here.namespace, here.pid, here.start)
    names = {temporary_name(tmp_path / "a"), temporary_name(tmp_path / "a"), named_by(far, monkeypatch, tmp_path / "a")}
    assert len(names) == 3
    assert sum(".far-" in path.name for path in names) == 1
    assert all(owner.TEMPORARY.fullmatch(path.name) for path in names)


def test_only_files_of_processes_that_ended_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, dead = this_process(), ended()
    far = Owner("far", "another boot", here.namespace, dead.pid, dead.start)
    kept = [temporary_name(tmp_path / "mine"), named_by(far, monkeypatch, tmp_path / "fresh")]
    kept += [tmp_path / name for name in (".thesis.tmp", ".a.123.tmp", "a.tmp")]  # a user's
    gone = [named_by(dead, monkeypatch, tmp_path / "dead"), named_by(far, monkeypatch, tmp_path / "old")]
    folder = named_by(dead, monkeypatch, tmp_path / "folder")
    for path in (*kept, *gone):
        path.write_bytes(b"x")
    folder.mkdir()
    (folder / "frame.jpg").write_bytes(b"x")
    for path in (gone[1], kept[2]):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_the_age_of_a_file_elsewhere_is_by_the_clock_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This host's clock is an hour ahead of the server's: a file that is being written now looks an hour old."""
    fresh = named_by(Owner("far", "another boot", "n", 7, "1"), monkeypatch, tmp_path / "fresh")
    fresh.write_bytes(b"x")
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600)
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [fresh]


def test_a_file_that_is_being_written_names_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: seen.append(self.name) or replace(self, target))
    write_file(tmp_path / "a", b"x")
    (name,) = seen
    assert owner.TEMPORARY.fullmatch(name) and f"-{os.getpid()}-" in name
