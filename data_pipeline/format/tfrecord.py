"""TFRecord shards: framing of records with checksums, atomic writing of files, and the index of a shard.

A record is <length u64><masked CRC of the length u32><data><masked CRC of the data u32>, little-endian, CRC32C.
SHARD.tfrecord.idx is the shard's index: n + 1 u64, the offset of each of its n records and, last, the shard's size.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from data_pipeline.owner import temporary_name

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
OVERHEAD = HEADER.size + FOOTER.size
READ_BYTES = 1 << 22
INDEX_SUFFIX = ".idx"


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame_record(data: bytes) -> bytes:
    """Returns the bytes of a record in its shard: length, its checksum, the data, their checksum."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, FOOTER.pack(masked_crc(length)), data, FOOTER.pack(masked_crc(data))))


def unframe_record(framed: bytes) -> bytes:
    """Returns the data of a framed record. Raises ValueError if it is too short, or length or checksum disagrees."""
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


def file_crc(path: Path) -> int:
    """Returns the CRC32C of a whole file, an int. Raises OSError if it cannot be read."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            crc = google_crc32c.extend(crc, chunk)
    return crc


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the `with` block ends; after an error, which passes, deletes it."""
    # In the same folder, since a rename is atomic only within a file system.
    temporary = temporary_name(path)
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
    """Flushes a folder's entries to the disk, so that its files survive a power cut. Raises OSError if that fails."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file atomically; an older one of that name is replaced. Raises OSError if that fails."""
    with atomic_file(path) as file:
        file.write(data)


class ShardWriter:
    """Writes records to a shard's file. offsets: of each record, then the size; crc: the CRC32C of all bytes so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offsets = [0]
        self.crc = 0

    def write(self, data: bytes) -> None:
        framed = frame_record(data)
        self._file.write(framed)
        self.crc = google_crc32c.extend(self.crc, framed)
        self.offsets.append(self.offsets[-1] + len(framed))


@contextlib.contextmanager
def new_shard(path: Path) -> Iterator[ShardWriter]:
    """Yields a writer of the shard `path`. The block's end writes it and its index; an error, which passes, neither."""
    with atomic_file(path) as file:
        writer = ShardWriter(file)
        yield writer
    write_file(index_path(path), np.array(writer.offsets, "<u8").tobytes())


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)
