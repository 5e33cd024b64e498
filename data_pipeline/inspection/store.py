"""Fingerprints on disk: those of earlier runs, and the arrays of a run, which may have hundreds of millions of rows.

New fingerprints of sound pictures are appended to a log in blocks, each with its checksum. So a run after a kill
decodes a picture again only if its file has another size or modification time.
"""

import functools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.format.tfrecord import FOOTER, HEADER, OVERHEAD, frame_record, unframe_record
from data_pipeline.inspection.fingerprints import FINGERPRINT, Fingerprints

MAX_BLOCK = 1 << 30  # bytes; a longer block is damage
CHUNK = 1 << 20  # rows that are in memory at once


def append_fingerprints(log: Path, fingerprints: Fingerprints) -> None:
    if len(fingerprints):
        with log.open("ab") as file:
            file.write(frame_record(fingerprints.tobytes()))


class KnownFingerprints:
    """The fingerprints of a log by key. Small when pickled: each worker maps the log and two arrays beside it."""

    def __init__(self, log: Path) -> None:
        """Indexes the log, which need not exist, and cuts it off where damage begins.

        Takes 32 bytes of memory a fingerprint while it does so. Raises OSError if the log cannot be read or cut.
        """
        self.log = log
        keys, offsets = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for begin, block in _blocks(log):
            rows = np.frombuffer(block, FINGERPRINT)
            keys.append(rows["key"].copy())  # a view would keep the block in memory
            offsets.append(begin + FINGERPRINT.itemsize * np.arange(len(rows), dtype=np.uint64))
        unique, first = np.unique(np.concatenate(keys), return_index=True)
        self.count = len(unique)
        for file, values in ((self._keys_file, unique), (self._offsets_file, np.concatenate(offsets)[first])):
            file.unlink(missing_ok=True)  # and not overwritten, since an old one may still be mapped
            np.save(file, values)

    _keys_file = property(lambda self: self.log.with_suffix(".keys.npy"))
    _offsets_file = property(lambda self: self.log.with_suffix(".offsets.npy"))

    def __getstate__(self) -> dict[str, Any]:
        return {"log": self.log, "count": self.count}

    # Two arrays, since a search in a column of a table would copy the column each time.
    @functools.cached_property
    def _keys(self) -> NDArray[np.uint64]:
        return np.load(self._keys_file, mmap_mode="r")

    @functools.cached_property
    def _offsets(self) -> NDArray[np.uint64]:
        return np.load(self._offsets_file, mmap_mode="r")

    @functools.cached_property
    def _bytes(self) -> mmap.mmap:
        with self.log.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def find(self, key: int) -> Fingerprints | None:
        """Returns the fingerprint with this key, shape [], or None. Raises OSError if a file cannot be read."""
        row = int(np.searchsorted(self._keys, np.uint64(key))) if self.count else 0
        if row >= self.count or int(self._keys[row]) != key:
            return None
        return np.frombuffer(self._bytes, FINGERPRINT, 1, int(self._offsets[row])).reshape(())


def _blocks(log: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, data) of the log's sound blocks, then cuts the file off where damage begins."""
    end = 0
    if not log.exists():
        return
    with log.open("rb") as file:
        while header := file.read(HEADER.size):
            size = HEADER.unpack(header)[0] if len(header) == HEADER.size else MAX_BLOCK + 1
            if size > MAX_BLOCK or size % FINGERPRINT.itemsize:
                break
            try:
                block = unframe_record(header + file.read(size + FOOTER.size))
            except ValueError:
                break
            yield end + HEADER.size, block
            end += size + OVERHEAD
    if end < log.stat().st_size:
        os.truncate(log, end)


class GrowingArray:
    """An array of one dimension that is written to a file part by part, and then mapped."""

    def __init__(self, path: Path, dtype: np.dtype | type) -> None:
        """Creates the file, in place of an older one. Raises OSError if it cannot."""
        path.unlink(missing_ok=True)
        self.path, self.dtype = path, np.dtype(dtype)
        self._file = path.open("wb")

    def append(self, values: NDArray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).tobytes())

    def mapped(self) -> NDArray:
        """Ends the writing and returns the array, which may be changed in place. Raises OSError if it is unreadable."""
        self._file.close()
        empty = not self.path.stat().st_size
        return np.zeros(0, self.dtype) if empty else np.memmap(self.path, self.dtype, "r+")


def chunks(array: NDArray) -> Iterator[NDArray]:
    """Yields the rows of a mapped array in parts of CHUNK, each in memory."""
    for begin in range(0, len(array), CHUNK):
        yield np.array(array[begin : begin + CHUNK])
