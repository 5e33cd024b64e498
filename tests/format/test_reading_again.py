"""Reading over I/O errors that pass, by threads at once, and from sets of millions of rows."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import convert
from data_pipeline.format import manifest, reader, retries
from data_pipeline.format.reader import Split, open_dataset
from data_pipeline.format.tfrecord import file_crc
from data_pipeline.input.batches import clip_batches
from data_pipeline.input.options import FrameOptions
from rice_jax.errors import reason
from tests.lpr_layouts import make_lpr750k

ROOT = Path(__file__).parents[2]
PASSING = ["EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ECONNRESET", "EBUSY", "EINTR", "ENOTCONN"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    convert.convert(convert.Options("lpr750k", make_lpr750k(folder / "source"), folder / "records", clips_per_shard=3))
    return folder / "records"


@pytest.fixture
def train(converted: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    """A split whose reader pauses for a moment only before it tries again."""
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)
    return open_dataset(converted).split("train")


def failing(times: int, error: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which first raises an OSError so many times."""
    left = [times]

    def attempt(*arguments: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))
        return call(*arguments, **named)

    return attempt


# --- errors that pass, and others -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", PASSING)
def test_a_read_that_failed_for_a_moment_is_done_again(
    error: str, train: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader.os, "pread", failing(3, error, os.pread))
    assert train.clip(0).id == train.clip_ids[0]


@pytest.mark.parametrize("error", PASSING)
def test_a_shard_that_could_not_be_opened_for_a_moment_is_opened_again(
    error: str, train: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(train.columns["ordinal"]) == train.num_clips
    monkeypatch.setattr(Path, "open", failing(2, error, Path.open))
    assert train.clip(0).id == train.clip_ids[0]


def test_after_an_error_the_file_is_opened_anew(train: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that is stale stays stale for ever."""
    train.clip(0)
    stale = {file.fileno() for file, _ in train._clips._files.values()}
    kept = [file for file, _ in train._clips._files.values()]  # so that no new file gets its number

    def pread(descriptor: int, *where: int, real: Callable[..., bytes] = os.pread) -> bytes:
        if descriptor in stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(descriptor, *where)

    monkeypatch.setattr(reader.os, "pread", pread)
    assert train.clip(1).id == train.clip_ids[1]
    assert len(kept) == 1


@pytest.mark.parametrize("place", ["manifest", "column", "index", "ids", "size"])
def test_opening_a_set_outlasts_a_moment_without_its_server(
    place: str, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)
    if place in ("manifest", "index"):
        monkeypatch.setattr(Path, "read_bytes", failing(2, "EIO", Path.read_bytes))
    elif place == "size":
        monkeypatch.setattr(Path, "stat", failing(2, "EIO", Path.stat))
    elif place == "column":
        monkeypatch.setattr(reader.np, "load", failing(2, "EIO", np.load))
    else:
        monkeypatch.setattr(reader.mmap, "mmap", failing(2, "EIO", reader.mmap.mmap))
    train = open_dataset(converted, verify=place == "size").split("train")
    assert train.clip(0).id == train.clip_ids[0]


def test_an_error_that_stays_says_what_failed_and_not_to_convert_again(
    train: Split, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(retries, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(reader.os, "pread", failing(-1, "EIO", os.pread))
    with pytest.raises(OSError) as found:
        train.clip(4)
    assert found.value.errno == errno.EIO
    text = str(found.value)
    assert "train-clips-00001-of-00003.tfrecord record 1" in text and "look at the disk, mount or network" in text
    assert "convert again" not in text
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "record 1: Input/output error; it is tried again for up to" in warned


def test_too_many_open_files_are_not_blamed_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError) as found:
        retries.retried(failing(-1, "EMFILE", str), "a shard", seconds=0)
    text = reason(found.value)
    assert text.startswith("a shard: ") and "disk" not in text
    assert text.endswith("s; allow more open files (ulimit -n), then run the same command again.")


def test_such_an_error_ends_the_batches_as_itself(train: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a bad record, for which the advice would be to skip the clip."""
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(reader.os, "pread", failing(-1, "EIO", os.pread))
    with clip_batches(train, range(2), FrameOptions(num_frames=1), 2) as batches, pytest.raises(OSError, match="disk"):
        next(batches)


def test_pauses_grow_and_the_attempts_last_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retries.time, "monotonic", lambda: sum(pauses))
    monkeypatch.setattr(retries.time, "sleep", pauses.append)
    with pytest.raises(OSError, match="in every attempt of"):
        retries.retried(failing(-1, "EIO", bool), "a file")
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8] and sorted(pauses) == pauses and max(pauses) == retries.LONGEST_PAUSE
    assert 180 < sum(pauses) <= 300


@pytest.mark.parametrize("error", ["EACCES", "EPERM", "EISDIR"])
def test_an_error_that_does_not_pass_is_itself_at_once(
    error: str, train: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: pytest.fail("paused"))
    monkeypatch.setattr(Path, "open", failing(-1, error, Path.open))
    train.columns  # noqa: B018 - they are read by another call
    with pytest.raises(OSError) as found:
        train.clip(0)
    assert found.value.errno == getattr(errno, error)


@pytest.mark.parametrize("damage", ["shorter", "missing", "bit"])
def test_damage_is_told_at_once(damage: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    copy = shutil.copytree(converted, tmp_path / "copy")
    shard = copy / "train-clips-00000-of-00003.tfrecord"
    train = open_dataset(copy).split("train")
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "bit":
        data[100] ^= 1
        shard.write_bytes(data)
    else:
        train.clip(0)  # the file is open when it becomes shorter
        shard.write_bytes(data[: len(data) // 4])
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: pytest.fail("paused"))
    with pytest.raises(ValueError, match=r"train-clips-00000-of-00003.*restore.*convert again"):
        train.clip(2 if damage == "shorter" else 0)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_two_threads_open_two_shards_at_once(train: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits, while it opens a shard, until the other is opening one, too."""
    opening = {f"train-clips-0000{number}-of-00003.tfrecord": threading.Event() for number in (0, 1)}
    real = reader.index_path

    def index_path(shard: Path) -> Path:
        opening[shard.name].set()
        for event in opening.values():
            assert event.wait(20), "the other thread waits for a lock"
        return real(shard)

    assert len(train.columns["ordinal"])
    monkeypatch.setattr(reader, "index_path", index_path)
    found: list[str] = []
    threads = [threading.Thread(target=lambda row=row: found.append(train.clip(row).id)) for row in (0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted([train.clip_ids[0], train.clip_ids[3]])


def test_a_shard_that_does_not_open_stops_no_other_thread(train: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, over = threading.Event(), threading.Event()
    real = reader.index_path

    def index_path(shard: Path) -> Path:
        if "-00000-" in shard.name:
            hangs.set()
            over.wait(60)
        return real(shard)

    assert len(train.columns["ordinal"])
    monkeypatch.setattr(reader, "index_path", index_path)
    waiting = threading.Thread(target=train.clip, args=(0,))
    waiting.start()
    try:
        assert hangs.wait(20)
        assert [train.clip(row).id for row in (3, 4, 6)] == [train.clip_ids[row] for row in (3, 4, 6)]
    finally:
        over.set()
        waiting.join()


def test_a_process_that_may_open_no_more_files_closes_some(train: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [train.clip(row).id for row in (0, 3)] == [train.clip_ids[row] for row in (0, 3)]
    real = reader._Shards._open_file

    def open_file(shards: Any, shard: int) -> Any:
        if shards._files:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(shards, shard)

    monkeypatch.setattr(reader._Shards, "_open_file", open_file)
    assert train.clip(6).id == train.clip_ids[6]


@pytest.mark.parametrize(("limit", "shards"), [(1024, 256), (20_000, 5000), (resource.RLIM_INFINITY, 8192), (16, 8)])
def test_the_number_of_open_shards_follows_from_the_limit_of_open_files(
    limit: int, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    assert reader._open_shards() == shards


# --- millions of rows -------------------------------------------------------------------------------------------------

CLIPS, SHARDS, IMAGES = 4_000_000, 4000, 300_000
MEASURE = """
import resource, sys, time
from data_pipeline.format.reader import open_dataset
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
train = open_dataset(sys.argv[1]).split("train")
assert all(len(column) == 4_000_000 for column in train.columns.values())
assert train.columns["product"][3_999_999] == 0 and train.where("clip", 3_999_999).endswith("record 999")
print(time.monotonic() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_set_of_four_million_clips_opens_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """Columns and shards are sparse: they have their full size and next to no blocks on the disk."""

    def sparse(name: str, size: int, head: bytes = b"") -> None:
        with (tmp_path / name).open("wb") as file:
            file.write(head)
            file.truncate(size)

    (tmp_path / "columns").mkdir()
    lengths = {f"clips-{name}": CLIPS for name in manifest.CLIP_COLUMNS}
    lengths |= {f"images-{name}": IMAGES for name in manifest.IMAGE_COLUMNS}
    for name, length in (lengths | {"gallery": 0}).items():
        head = np.lib.format.magic(1, 0)
        text = repr({"descr": "<i4", "fortran_order": False, "shape": (length,)}).encode()
        text += b" " * (-(len(head) + 2 + len(text) + 1) % 64) + b"\n"
        head += len(text).to_bytes(2, "little") + text
        sparse(f"columns/train-{name}.npy", len(head) + 4 * length, head)
    for name in ("clips-id", "images-id"):
        (tmp_path / f"columns/train-{name}.txt").write_bytes(b"x\n")
    for table in manifest.TABLE_FILES.values():
        (tmp_path / f"columns/{table}.txt").write_bytes(b"x\n")
    counts = {"clips": {"records": CLIPS, "shards": [CLIPS // SHARDS] * SHARDS}}
    counts |= {"images": {"records": IMAGES, "shards": [IMAGES]}}
    for kind, number in (("clips", SHARDS), ("images", 1)):
        for shard in range(number):
            sparse(manifest.shard_name("train", kind, shard, number), 150_000_000)
    files = {
        str(path.relative_to(tmp_path)): [path.stat().st_size, 0 if path.suffix == ".tfrecord" else file_crc(path)]
        for path in tmp_path.rglob("*") if path.is_file()
    }  # fmt: skip
    split = counts | {"galleries": {}, "gallery_rows": 0, "truth": CLIPS}
    whole: dict[str, Any] = {"schema_version": 1, "identity": {}, "files": files, "splits": {"train": split}}
    whole |= {"content_hash": manifest.content_hash(whole)}
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    start = time.monotonic()
    words = [sys.executable, "-c", MEASURE, str(tmp_path)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    seconds, mebibytes = map(float, ended.stdout.split())
    assert seconds < 10 and mebibytes < 64, (ended.stdout, time.monotonic() - start)
