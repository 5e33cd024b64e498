"""Leases: of several that want a folder one gets it, and the others are told whose it is."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import owner
from data_pipeline.owner import Owner, this_process
from data_pipeline.system.lease import LEASE, FileSlot, HeldError, Holder, Lease, LeaseLostError

ROOT = Path(__file__).parents[2]
NEVER = 3600.0  # seconds that no test waits for: what it allows to happen only then must not happen

# A process that holds a lease until its stdin ends, and then says whether it still has it.
HOLD = """
import sys, time
from pathlib import Path
from data_pipeline import owner
from data_pipeline.system.lease import Lease
{before}
try:
    with Lease(Path(sys.argv[1]), renew_seconds=0.2, dead_seconds=float(sys.argv[2])) as lease:
        print("held", flush=True)
        sys.stdin.read()
        lease.check()
        print("still held", flush=True)
except ValueError as error:
    print(type(error).__name__, error, flush=True)
"""
# As seen by the others, the process is on another host, whose clock is ELSEWHERE seconds ahead.
ELSEWHERE = """
here = owner.this_process()
owner._identity = lambda pid: owner.Owner("far", "another boot", here.namespace, here.pid, here.start)
now, time.gmtime = time.time, lambda seconds=None, gmtime=time.gmtime: gmtime(now() + {ahead})
time.time = lambda: now() + {ahead}
"""


class Holding:
    """A process that runs HOLD."""

    def __init__(self, folder: Path, *, before: str = "", dead_seconds: float = NEVER) -> None:
        words = [sys.executable, "-c", HOLD.format(before=before), str(folder), str(dead_seconds)]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ends(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@contextlib.contextmanager
def holding(folder: Path, **options: Any) -> Iterator[Holding]:
    held = Holding(folder, **options)
    try:
        assert held.says() == "held"
        yield held
    finally:
        held.process.kill()
        held.process.wait()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ended_process() -> Owner:
    """A process of this machine that ran and ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = this_process()
    return Owner(here.host, here.boot, here.namespace, child.pid, here.start)


def lease_of(held_by: Owner, token: str = "t") -> bytes:
    return json.dumps({"token": token, **vars_of(held_by), "since": "2026-01-01 00:00:00 UTC", "counter": 1}).encode()


def vars_of(held_by: Owner) -> dict[str, Any]:
    return {name: getattr(held_by, name) for name in ("host", "boot", "namespace", "pid", "start")}


# --- one of many ------------------------------------------------------------------------------------------------------


def takers(folder: Path, count: int, **options: Any) -> list[Lease | str]:
    """So many threads enter a lease of the folder at one moment; each one's lease, or why it has none."""
    results: list[Lease | str] = []
    together = threading.Barrier(count)

    def take() -> None:
        lease = Lease(folder, **options)
        together.wait()
        try:
            results.append(lease.__enter__())
        except HeldError as error:
            results.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("before", ["nothing", "of a dead process", "damaged", "half taken"])
def test_of_many_that_start_at_one_moment_one_has_the_folder(before: str, tmp_path: Path) -> None:
    dead = lease_of(ended_process())
    for _ in range(10):
        if before == "of a dead process":
            (tmp_path / LEASE).write_bytes(dead)
        elif before == "damaged":
            (tmp_path / LEASE).write_bytes(b"")
        elif before == "half taken":
            (tmp_path / f"{LEASE}.new").write_bytes(dead)
        results = takers(tmp_path, 6, renew_seconds=0.1, dead_seconds=0.2 if before == "damaged" else NEVER)
        (winner,) = [result for result in results if isinstance(result, Lease)]
        winner.check()
        assert sum(f"process {os.getpid()} on host" in str(result) for result in results) == 5
        winner.__exit__()
        assert names_in(tmp_path) == []


def test_of_many_processes_one_has_the_folder_and_the_others_name_it(tmp_path: Path) -> None:
    # They wait for one moment, so that the start of Python does not space them out.
    before = f"while time.time() < {time.time() + 3}: pass"
    processes = [Holding(tmp_path, before=before) for _ in range(6)]
    try:
        said = [process.says() for process in processes]
        (winner,) = [process for process, text in zip(processes, said, strict=True) if text == "held"]
        assert sum(f"HeldError {tmp_path}: found another run" in text for text in said) == 5
        assert sum(f"(process {winner.process.pid} on host" in text for text in said) == 5
        winner.ends()
        assert winner.says() == "still held"
        winner.process.wait()
        assert names_in(tmp_path) == []
    finally:
        for process in processes:
            process.process.kill()
            process.process.wait()


def test_a_lease_that_was_released_leaves_no_file_and_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with Lease(tmp_path, renew_seconds=0.01) as lease:
            time.sleep(0.1)
            lease.check()
            assert LEASE in names_in(tmp_path)
        assert names_in(tmp_path) == []


# --- holders of this machine ------------------------------------------------------------------------------------------


def test_a_process_at_work_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holding(tmp_path) as held:
        start = time.monotonic()
        named = rf"found another run that writes to it \(process {held.process.pid} on host .*, since 20.* UTC\)"
        with pytest.raises(HeldError, match=named), Lease(tmp_path):
            pass
        assert time.monotonic() - start < 5
        assert capsys.readouterr().err == ""


def test_a_stopped_process_of_this_machine_is_still_at_work(tmp_path: Path) -> None:
    with holding(tmp_path) as held:
        held.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        with pytest.raises(HeldError), Lease(tmp_path, renew_seconds=0.1, dead_seconds=0.2):
            pass


def test_the_lease_of_a_killed_process_is_taken_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holding(tmp_path) as held:
        held.process.kill()
        time.sleep(0.2)  # not waited for: it may be a zombie, which is nobody at work
        start = time.monotonic()
        with Lease(tmp_path, dead_seconds=NEVER) as lease:
            lease.check()
        assert time.monotonic() - start < 5
        assert capsys.readouterr().err == ""
    assert names_in(tmp_path) == []


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(tmp_path: Path) -> None:
    here = this_process()
    earlier = Owner(here.host, here.boot, here.namespace, here.pid, str(int(here.start) - 1))
    (tmp_path / LEASE).write_bytes(lease_of(earlier))
    with Lease(tmp_path, dead_seconds=NEVER) as lease:
        lease.check()


def test_without_proc_a_dead_holder_is_known_and_one_at_work_is_seen_by_its_counter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has no /proc: a process number tells that its process ended, and cannot tell that it is the same one."""
    monkeypatch.setattr(owner, "PROC", Path("/proc of nobody"))
    monkeypatch.setattr(owner.uuid, "getnode", lambda: 0x02_11_22_33_44_55)
    owner._identity.cache_clear()
    try:
        assert (this_process().boot, this_process().start) == ("021122334455", "")
        with Lease(tmp_path, renew_seconds=0.1), pytest.raises(HeldError), Lease(tmp_path, dead_seconds=5.0):
            pass
        (tmp_path / LEASE).write_bytes(lease_of(ended_process()))
        with Lease(tmp_path, dead_seconds=NEVER):
            pass
        monkeypatch.setattr(owner.uuid, "getnode", lambda: 0x01_11_22_33_44_55)  # random: no address of the machine
        owner._identity.cache_clear()
        assert this_process().runs() is None
    finally:
        owner._identity.cache_clear()


# --- holders elsewhere ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_a_holder_elsewhere_at_work_is_named_whatever_its_clock(
    ahead: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holding(tmp_path, before=ELSEWHERE.format(ahead=ahead)):
        start = time.monotonic()
        with pytest.raises(HeldError, match="on host far, since 20"), Lease(tmp_path, dead_seconds=10.0):
            pass
        assert time.monotonic() - start < 5
        assert f"{tmp_path}: found the lease of process" in capsys.readouterr().err


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_a_holder_elsewhere_that_stood_still_finds_its_lease_taken_when_it_wakes(ahead: int, tmp_path: Path) -> None:
    with holding(tmp_path, before=ELSEWHERE.format(ahead=ahead), dead_seconds=1.0) as held:
        held.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with Lease(tmp_path, renew_seconds=0.2, dead_seconds=1.0) as lease:
            assert 1.0 <= time.monotonic() - start < 10.0
            held.process.send_signal(signal.SIGCONT)
            time.sleep(1.0)  # time for it to renew what is no longer its own
            lease.check()
            held.ends()
            lost = held.says()
            assert lost.startswith(f"LeaseLostError {tmp_path}: this run lost its lease (process {os.getpid()} on host")
            assert "writes nothing more" in lost
            held.process.wait()
            lease.check()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "changed",
    [{"namespace": "pid:[1]"}, {"boot": "another"}, {"host": "far", "boot": "another"}, {"boot": ""}],
    ids=str,
)
def test_equal_process_numbers_of_other_containers_and_hosts_mean_nothing(
    changed: dict[str, str], tmp_path: Path
) -> None:
    """Neither is the holder at work, because this process has its number, nor dead, because no process has it."""
    for pid in (os.getpid(), ended_process().pid):
        other = Owner(**(vars_of(this_process()) | {"pid": pid} | changed))
        (tmp_path / LEASE).write_bytes(lease_of(other))
        start = time.monotonic()
        with Lease(tmp_path, renew_seconds=0.1, dead_seconds=0.5) as lease:
            assert time.monotonic() - start >= 0.5
            lease.check()


# --- files that are no lease, and folders that cannot be written ----------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}', lease_of(Owner("h", "b", "n", 0, "1"))])
def test_a_damaged_lease_is_watched_and_then_taken(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Holder.parse(content) is None
    (tmp_path / LEASE).write_bytes(content)
    start = time.monotonic()
    with Lease(tmp_path, renew_seconds=0.1, dead_seconds=0.5) as lease:
        assert time.monotonic() - start >= 0.5
        lease.check()
    assert "found a damaged lease, which is watched" in capsys.readouterr().err
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(("content", "told"), [(b"", "its file is damaged"), (None, "its file was removed")])
def test_a_holder_whose_file_is_not_its_own_may_write_nothing(content: bytes | None, told: str, tmp_path: Path) -> None:
    with Lease(tmp_path, renew_seconds=0.05) as lease:
        (tmp_path / LEASE).unlink()
        if content is not None:
            (tmp_path / LEASE).write_bytes(content)
        time.sleep(0.2)
        with pytest.raises(LeaseLostError, match=rf"lost its lease \({told}.*writes nothing more"):
            lease.check()
    assert names_in(tmp_path) == ([] if content is None else [LEASE])


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        # root may write everywhere, so this is tried as nobody.
        before = "import os\nif os.geteuid() == 0: os.setuid(65534)"
        words = [sys.executable, "-c", HOLD.format(before=before), folder, "5"]
        ended = subprocess.run(words, cwd=ROOT, input="", capture_output=True, text=True, check=False, timeout=60)
        assert ended.returncode == 1 and f"PermissionError: [Errno 13] Permission denied: '{folder}" in ended.stderr


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Lease(tmp_path / "missing"):
        pass


# --- the swap ---------------------------------------------------------------------------------------------------------


def test_a_slot_changes_only_from_the_version_that_was_read(tmp_path: Path) -> None:
    slot = FileSlot(tmp_path / LEASE)
    assert slot.read() is None
    assert slot.write(b"one", None) and not slot.write(b"two", None)
    data, version = slot.read() or (b"", "")
    assert data == b"one"
    assert slot.write(b"two", version) and not slot.write(b"three", version) and not slot.delete(version)
    data, version = slot.read() or (b"", "")
    assert data == b"two" and slot.delete(version) and slot.read() is None
    assert names_in(tmp_path) == []


def test_what_a_dead_process_left_in_the_middle_of_a_swap_is_removed(tmp_path: Path) -> None:
    slot = FileSlot(tmp_path / LEASE, dead_seconds=0.3)
    for left, seconds in (
        (lease_of(ended_process()), 0.0),
        (b"", 0.3),
        (lease_of(Owner("far", "b", "n", 1, "1")), 0.3),
    ):
        (tmp_path / f"{LEASE}.new").write_bytes(left)
        start = time.monotonic()
        while not slot.write(b"one", None):
            time.sleep(0.01)
            assert time.monotonic() - start < 5
        assert time.monotonic() - start >= seconds
        assert names_in(tmp_path) == [LEASE]
        (tmp_path / LEASE).unlink()


def test_what_a_process_at_work_has_in_the_middle_of_a_swap_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f"{LEASE}.new").write_bytes(lease_of(this_process()))
    slot = FileSlot(tmp_path / LEASE, dead_seconds=0.0)
    assert not slot.write(b"one", None) and not slot.write(b"one", None)
    assert names_in(tmp_path) == [f"{LEASE}.new"]


@pytest.mark.parametrize("name", [LEASE, f"{LEASE}.new"])
def test_a_copy_of_a_folder_whose_run_is_at_work_can_be_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, copy, renamed = tmp_path / "run", tmp_path / "copy", tmp_path / "renamed"
    run.mkdir()
    with holding(run) as held:
        shutil.copytree(run, copy)
        (copy / LEASE).rename(copy / name)  # the other name: it was copied in the middle of a renewal
        begin = time.monotonic()
        with Lease(copy, renew_seconds=0.1, dead_seconds=0.5) as lease:
            lease.check()
        assert time.monotonic() - begin >= 0.5  # it was watched: inodes alone are no proof on every file system
        assert ("is watched" in capsys.readouterr().err) == (name == LEASE) and names_in(copy) == []
        run.rename(renamed)
        with pytest.raises(HeldError, match="found another run"), Lease(renamed, dead_seconds=0.5):
            pass
        renamed.rename(run)
        held.ends()
        assert held.says() == "still held"


def test_a_folder_with_a_new_inode_is_not_taken_from_a_run_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding(tmp_path):
        monkeypatch.setattr("data_pipeline.system.lease._identity", lambda folder: "7:9")
        with pytest.raises(HeldError, match="found another run"), Lease(tmp_path, renew_seconds=0.1, dead_seconds=10):
            pass
