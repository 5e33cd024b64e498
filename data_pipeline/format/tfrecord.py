"""TFRecord shards with offsets and checksums: the framing, the atomic writer, one record at random.

A record is <length u64><masked CRC of the length u32><data><masked CRC of the data u32>, little-endian, CRC32C.
Beside SHARD.tfrecord lies SHARD.tfrecord.idx: n + 1 u64, where each record begins and, last, the shard's size.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
OVERHEAD = HEADER.size + FOOTER.size
READ_BYTES = 1 << 22
INDEX_SUFFIX = ".idx"


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame_record(data: bytes) -> bytes:
    """The record's bytes in the shard."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, FOOTER.pack(masked_crc(length)), data, FOOTER.pack(masked_crc(data))))


def unframe_record(framed: bytes) -> bytes:
    """The data of a record's bytes in the shard; ValueError if either checksum or the length disagrees."""
    if len(framed) < OVERHEAD:
        raise ValueError(f"found {len(framed)} bytes, needs at least {OVERHEAD}")
    length, length_crc = HEADER.unpack_from(framed)
    if masked_crc(framed[:8]) != length_crc:
        raise ValueError("found a length whose checksum (CRC32C) disagrees")
    if length != len(framed) - OVERHEAD:
        raise ValueError(f"found a length of {length} bytes, needs {len(framed) - OVERHEAD} as the index says")
    data = framed[HEADER.size : -FOOTER.size]
    if FOOTER.unpack_from(framed, len(framed) - FOOTER.size)[0] != masked_crc(data):
        raise ValueError("found data whose checksum (CRC32C) disagrees")
    return data


def scan(path: Path) -> NDArray[np.uint64]:
    """The offsets of a shard (what its .idx holds), read from the shard itself with every checksum verified."""
    offsets = [0]
    size = path.stat().st_size
    with path.open("rb") as file:
        while offsets[-1] < size:
            header = file.read(HEADER.size)
            length = HEADER.unpack(header)[0] if len(header) == HEADER.size else size
            if length > size - offsets[-1] - OVERHEAD:
                raise ValueError(
                    f"{path} record {len(offsets) - 1}: found {size - offsets[-1]} bytes from byte {offsets[-1]}, "
                    f"needs more; the shard is cut short or damaged: convert again."
                )
            try:
                unframe_record(header + file.read(length + FOOTER.size))
            except ValueError as err:
                raise ValueError(f"{path} record {len(offsets) - 1}: {err}; convert again.") from err
            offsets.append(offsets[-1] + length + OVERHEAD)
    return np.array(offsets, "<u8")


def file_crc(path: Path) -> int:
    """CRC32C of a whole file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            crc = google_crc32c.extend(crc, chunk)
    return crc


# --- writing: all or nothing ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when the block ends without an error, and then whole.

    Written under a temporary name in the same folder, as a rename is atomic within a file system only. The process id
    is in that name: two writers of one file never share it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk: files that a manifest names must outlive a power cut as it does."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


class ShardWriter:
    """Writes one shard and its index, in a `with` block; `discard()` or an error leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = [0]
        self.crc = 0
        self._stack = contextlib.ExitStack()
        self._kept = True

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(atomic_file(self.path))
        return self

    def write(self, data: bytes) -> None:
        framed = frame_record(data)
        self._file.write(framed)
        self.crc = google_crc32c.extend(self.crc, framed)
        self.offsets.append(self.offsets[-1] + len(framed))

    def discard(self) -> None:
        self._kept = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and not self._kept:
            with contextlib.suppress(_DiscardedError):
                self._stack.__exit__(_DiscardedError, _DiscardedError(), None)
            return
        self._stack.__exit__(kind, error, traceback)
        if kind is None:
            write_file(index_path(self.path), np.array(self.offsets, "<u8").tobytes())


class _DiscardedError(Exception):
    """Ends the temporary file of a shard that nobody wants."""


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)
