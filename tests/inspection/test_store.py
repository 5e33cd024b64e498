"""Fingerprints on disk survive a kill, are found by their keys, and take little memory, whatever their number."""

import pickle
import tracemalloc
from pathlib import Path

import numpy as np

from data_pipeline.inspection import fingerprints
from data_pipeline.inspection.store import GrowingArray, KnownFingerprints, append_fingerprints


def rows(*keys: int) -> fingerprints.Fingerprints:
    made = np.zeros(len(keys), fingerprints.FINGERPRINT)
    made["key"] = keys
    made["digest"] = [10 * key for key in keys]
    return made


def test_fingerprints_are_found_by_their_keys_in_another_process_too(tmp_path: Path) -> None:
    log = tmp_path / "log.bin"
    assert KnownFingerprints(log).find(5) is None
    append_fingerprints(log, rows(5, 3, 9))
    append_fingerprints(log, rows(7, 5))
    for known in (KnownFingerprints(log), pickle.loads(pickle.dumps(KnownFingerprints(log)))):
        assert known.count == 4
        assert [int(known.find(key)["digest"]) for key in (3, 5, 7, 9)] == [30, 50, 70, 90]
        assert [known.find(key) for key in (1, 4, 10)] == [None, None, None]


def test_a_block_that_a_kill_left_half_written_is_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "log.bin"
    append_fingerprints(log, rows(5, 3, 9))
    append_fingerprints(log, rows(5))
    sound_size = log.stat().st_size
    with log.open("ab") as file:
        file.write(log.read_bytes()[:50])
    assert KnownFingerprints(log).count == 3
    assert log.stat().st_size == sound_size
    flipped = bytearray(log.read_bytes())
    flipped[20] ^= 1
    log.write_bytes(flipped)
    assert KnownFingerprints(log).count == 0


def test_a_search_does_not_copy_the_keys(tmp_path: Path) -> None:
    log = tmp_path / "log.bin"
    append_fingerprints(log, rows(*range(1, 20_001)))
    known = KnownFingerprints(log)
    known.find(1)
    tracemalloc.start()
    for key in range(1, 200):
        assert known.find(key) is not None
    assert tracemalloc.get_traced_memory()[1] < 20_000
    tracemalloc.stop()


def test_an_index_takes_tens_of_bytes_a_fingerprint(tmp_path: Path) -> None:
    log = tmp_path / "log.bin"
    for begin in range(1, 100_001, 5_000):
        append_fingerprints(log, rows(*range(begin, begin + 5_000)))
    tracemalloc.start()
    assert KnownFingerprints(log).count == 100_000
    assert tracemalloc.get_traced_memory()[1] < 100_000 * 56 + 3_000_000  # and a block or two
    tracemalloc.stop()


def test_an_array_that_grew_on_disk_is_mapped(tmp_path: Path) -> None:
    array = GrowingArray(tmp_path / "array.run", np.int32)
    array.append(np.arange(3))
    array.append(np.zeros(0, np.int32))
    array.append(np.arange(3, 5))
    mapped = array.mapped()
    assert isinstance(mapped, np.memmap)
    assert mapped.tolist() == [0, 1, 2, 3, 4]
    assert GrowingArray(tmp_path / "none.run", np.int32).mapped().tolist() == []
