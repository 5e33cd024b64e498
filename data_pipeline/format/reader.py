"""Reading a converted data set: records by row, columns, ids, galleries and truth.

docs/data_formats.md describes its files. Columns, and the texts of ids, are memory-mapped.
"""

import collections
import errno
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.format.manifest import (
    CLIP_COLUMNS,
    COLUMNS,
    CONVERT_AGAIN,
    IMAGE_COLUMNS,
    TABLE_FILES,
    read_manifest,
    shard_name,
)
from data_pipeline.format.retries import retried
from data_pipeline.format.schema import ClipRecord, ImageRecord, decode_clip, decode_image
from data_pipeline.format.tfrecord import file_crc, index_path, unframe_record

Record = TypeVar("Record", ClipRecord, ImageRecord)


def _open_shards() -> int:
    """Returns a quarter of the files that this process may open, at least 8 and at most 8,192."""
    try:
        import resource
    except ImportError:  # Windows
        return 128
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 8192 if limit == resource.RLIM_INFINITY else min(8192, max(8, limit // 4))


MAX_OPEN_SHARDS = _open_shards()  # of one split and kind; training reads two kinds, and also opens other files


def open_dataset(path: str | os.PathLike[str], *, verify: bool = True) -> "Dataset":
    """Opens the converted data set in the folder `path` and returns it. Its files are opened when they are needed.

    verify: compare the size of every file and the checksums of indices, columns and tables with the manifest. Hashes of
    the manifest, here, and checksums of a record, when it is read, are always compared. Raises FileNotFoundError if no
    conversion was finished there; ValueError, which names the file, for a manifest that is damaged or of another schema
    version and, with `verify`, a file that is missing or damaged; OSError for a file that cannot be read, at once
    or, where the error is one that may pass, after minutes of attempts.

    Example:
        from data_pipeline import open_dataset

        dataset = open_dataset(path)
        train = dataset.split("train")
        clip = train.clip(0)
        image = train.image(clip.image_index)
        print(f"clip {clip.id} shows product {clip.product}, {image.title!r}")
        for frame in clip.frames:
            print(f"frame {frame.id}, number {frame.position}: {len(frame.encoded)} bytes, boxes {frame.boxes}")
        assert image.id in clip.image_ids
    """
    dataset = Dataset(Path(path))
    if verify:
        dataset.verify()
    return dataset


class Dataset:
    """A converted data set; `open_dataset` returns one.

    content_hash: SHA-256 (hex) of its data. tables: by name (livestream, category, product, scale, duration, number)
    the sorted texts that the columns of this name number; a category is "ID<tab>NAME".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.content_hash: str = self.manifest["content_hash"]
        self.splits: tuple[str, ...] = tuple(self.manifest["splits"])  # their names
        self.tables: Mapping[str, Sequence[str]] = {name: _table(path, name) for name in TABLE_FILES}

    def split(self, name: str) -> "Split":
        """Returns the split of this name. Raises ValueError if `splits` does not contain it."""
        if name not in self.splits:
            raise ValueError(
                f"{self.path}: found splits {', '.join(self.splits)}, needs {name}; choose one of these, or "
                f"{CONVERT_AGAIN}, with {name}."
            )
        return Split(self.path, self.manifest, name)

    def verify(self) -> None:
        """Raises ValueError, which names the file, for the first of `disagreements`; OSError if one cannot be read."""
        for name, detail in self.disagreements():
            raise ValueError(f"{self.path / name}: {detail}")

    def disagreements(self) -> Iterator[tuple[str, str]]:
        """Yields (name, fault) of files missing or of other size or checksum (shards: size). OSError: unreadable."""
        advice = f"restore it from a copy, or {CONVERT_AGAIN}."
        for name, (size, crc) in self.manifest["files"].items():
            path = self.path / name
            try:
                found = retried(path.stat, str(path)).st_size
            except (FileNotFoundError, NotADirectoryError):
                yield name, f"found no such file, needs {size} bytes; {advice}"
                continue
            if found != size:
                yield name, f"found {found} bytes, needs {size}; {advice}"
            elif not name.endswith(".tfrecord") and retried(lambda path=path: file_crc(path), str(path)) != crc:
                yield name, f"found a checksum (CRC32C) that disagrees; {advice}"


class Texts(Sequence[str]):
    """The lines of a UTF-8 file, memory-mapped, as a sequence; a slice is a list. Reading raises OSError without it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _bytes(self) -> bytes | mmap.mmap:
        return retried(self._map, str(self.path))

    def _map(self) -> bytes | mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.flatnonzero(np.frombuffer(self._bytes, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        begin = int(self._ends[row - 1]) + 1 if row else 0
        return bytes(self._bytes[begin : int(self._ends[row])]).decode()

    def __reduce__(self) -> tuple[Any, ...]:
        return Texts, (self.path,)


def _table(dataset: Path, name: str) -> Texts:
    return Texts(dataset / COLUMNS / f"{TABLE_FILES[name]}.txt")


class Split:
    """One split of a data set: clips by row, 0 to num_clips - 1, and shop images by row, 0 to num_images - 1.

    Threads may share a split. It is picklable; its files are then opened again.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], name: str) -> None:
        self.path = path
        self.name = name
        self.manifest = manifest
        self._counts = manifest["splits"][name]
        self.num_clips: int = self._counts["clips"]["records"]
        self.num_images: int = self._counts["images"]["records"]
        self.num_truth: int = self._counts["truth"]  # queries that Recall divides by, also those without a stored clip
        self.is_evaluation = name in ("val", "test")  # its clips are queries with galleries
        self.clip_ids: Sequence[str] = Texts(self._column_path("clips-id.txt"))  # sorted, by row
        self.image_ids: Sequence[str] = Texts(self._column_path("images-id.txt"))  # also; several may be equal
        self._livestreams = _table(path, "livestream")
        self._clips = _Shards(path, name, "clips", self._counts["clips"])
        self._images = _Shards(path, name, "images", self._counts["images"])

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self.path, self.manifest, self.name)

    def clip(self, row: int) -> ClipRecord:
        """Returns the clip in a row, read from its shard. Raises IndexError for a row outside 0 to num_clips - 1.

        Raises ValueError, which names the file, for a column, shard or index that is missing or damaged, and, which
        names shard and record, for a record that is damaged or belongs to another row. I/O errors that pass are tried
        again for some minutes; then, and for one that does not pass, it raises OSError, which names shard and record.
        """
        return self._clips.read(row, self.columns["ordinal"], decode_clip)

    def image(self, row: int) -> ImageRecord:
        """Returns the shop image in a row. Raises IndexError for a row outside, else as `clip`."""
        return self._images.read(row, self.image_columns["ordinal"], decode_image)

    def where(self, kind: str, row: int) -> str:
        """Returns "SHARD record NUMBER", from 0. kind: "clip" or "image". Raises IndexError for a row outside."""
        shards = self._clips if kind == "clip" else self._images
        shard, number = shards.place(row)
        return f"{shards.paths[shard]} record {number}"

    def shard_rows(self, kind: str) -> list[tuple[int, int]]:
        """Returns (first row, last row + 1) of each shard, in order; [] without a shard. kind: "clip" or "image"."""
        ends = (self._clips if kind == "clip" else self._images).ends.tolist()
        return list(zip([0, *ends], ends, strict=False))

    @cached_property
    def columns(self) -> dict[str, NDArray[np.int32]]:
        """Columns of the clips by name, each int32 [num_clips], memory-mapped and read-only.

        image: row of this split's images. frames, original_frames: number of stored and of all frames. ordinal: index
        among the clips that the source lists. Others: index into `Dataset.tables`. -1: none. Raises ValueError for a
        file that is missing or of another type or length.
        """
        return {name: self._column(f"clips-{name}.npy", self.num_clips) for name in CLIP_COLUMNS}

    @cached_property
    def image_columns(self) -> dict[str, NDArray[np.int32]]:
        """Columns "product" (-1: none) and "ordinal", int32 [num_images]. ValueError: a missing or damaged file."""
        return {name: self._column(f"images-{name}.npy", self.num_images) for name in IMAGE_COLUMNS}

    @cached_property
    def galleries(self) -> dict[str, NDArray[np.int32]]:
        """Rows of images, int32 [n], by livestream ("" if all share one), in the source's order, repetitions kept.

        {} for train. Raises ValueError if the file of rows is missing or of another type or length.
        """
        rows = self._column("gallery.npy", self._counts["gallery_rows"])
        ends = np.cumsum(list(self._counts["galleries"].values()), dtype=np.int64)
        return dict(zip(self._counts["galleries"], np.split(rows, ends[:-1]), strict=True)) if len(ends) else {}

    def gallery_name(self, row: int) -> str:
        """Returns clip `row`'s gallery: "" if all clips share one, else its livestream (IndexError beyond the rows)."""
        return "" if "" in self.galleries else self._livestreams[self.columns["livestream"][row]]

    def gallery_of(self, row: int) -> NDArray[np.int32]:
        """Returns the rows of the images in clip `row`'s gallery, int32. Raises KeyError if its livestream has none."""
        return self.galleries[self.gallery_name(row)]

    def truth(self, row: int) -> tuple[str, ...]:
        """Returns the ids of clip `row`'s true images; () if none. Raises IndexError for a row beyond the last."""
        if self.name == "test":
            return self.truth_by_clip[self.clip_ids[row]]
        image = int(self.columns["image"][row])
        return (self.image_ids[image],) if image >= 0 else ()

    @cached_property
    def truth_by_clip(self) -> dict[str, tuple[str, ...]]:
        """Ids of the true images by clip id: of test every entry of the truth file, else every clip, () for none."""
        if self.name == "test":
            path = self._column_path("truth.json")
            truth = json.loads(retried(path.read_bytes, str(path)))
            return {clip: tuple(images) for clip, images in truth.items()}
        return {clip: self.truth(row) for row, clip in enumerate(self.clip_ids)}

    def _column_path(self, name: str) -> Path:
        return self.path / COLUMNS / f"{self.name}-{name}"

    def _column(self, name: str, length: int) -> NDArray[np.int32]:
        path = self._column_path(name)
        load = lambda: np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        try:
            column = retried(load, str(path))
        except (FileNotFoundError, ValueError, EOFError) as err:
            raise ValueError(f"{path}: found no column ({err}), needs {length} int32; {CONVERT_AGAIN}.") from err
        if column.dtype != np.int32 or column.shape != (length,):
            detail = f"found {column.dtype} {column.shape}, needs int32 ({length},); {CONVERT_AGAIN}."
            raise ValueError(f"{path}: {detail}")
        return column


def _pread(file: BinaryIO, begin: int, end: int) -> bytes:
    return os.pread(file.fileno(), end - begin, begin)


class _Shards:
    """The shards of one kind, clips or images, of one split."""

    def __init__(self, path: Path, split: str, kind: str, counts: Mapping[str, Any]) -> None:
        records = counts["shards"]
        self.paths = [path / shard_name(split, kind, number, len(records)) for number in range(len(records))]
        self.kind = kind
        self.ends = np.cumsum(records, dtype=np.int64)
        self._files: collections.OrderedDict[int, tuple[BinaryIO, NDArray[np.uint64]]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def place(self, row: int) -> tuple[int, int]:
        """Returns a row's shard number and its record number in it, from 0. Raises IndexError for a row outside."""
        total = int(self.ends[-1]) if len(self.ends) else 0
        if not 0 <= row < total:
            raise IndexError(f"found row {row}, needs 0 to {total - 1} of the split's {self.kind}.")
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return shard, int(row - (self.ends[shard - 1] if shard else 0))

    def read(self, row: int, ordinals: NDArray[np.int32], decode: Callable[[bytes], Record]) -> Record:
        """Returns decode(data) of a row's record. Raises IndexError for a row outside.

        Raises ValueError if the record is damaged or has not ordinals[row], and OSError if reading failed in all
        attempts, of which the message names shard and record.
        """
        shard, number = self.place(row)
        where = f"{self.paths[shard]} record {number}"
        framed = retried(lambda: self._framed(shard, number), where)
        try:
            record = decode(unframe_record(framed))
            if record.ordinal != ordinals[row]:
                raise ValueError(f"found ordinal {record.ordinal}, needs {ordinals[row]}: shards are mixed up")
        except ValueError as err:
            raise ValueError(f"{where}: {err}; restore the shard from a copy, or {CONVERT_AGAIN}.") from err
        return record

    def _framed(self, shard: int, number: int) -> bytes:
        """Returns a record's bytes; fewer if the shard is too short."""
        try:
            file, offsets = self._open(shard)
            begin, end = int(offsets[number]), int(offsets[number + 1])
            data = _pread(file, begin, end)
            while len(data) < end - begin and (
                more := os.pread(file.fileno(), end - begin - len(data), begin + len(data))
            ):
                data += more
        except OSError as err:
            with self._lock:  # the next attempt opens it again: the handle may be stale
                dropped = (
                    dict(self._files) if err.errno in (errno.EMFILE, errno.ENFILE) else {shard: self._files.get(shard)}
                )
                for each in dropped:
                    self._files.pop(each, None)
            raise
        return data

    def _open(self, shard: int) -> tuple[BinaryIO, NDArray[np.uint64]]:
        """Returns a shard's file, open until its last read, and uint64 offsets. ValueError: missing or damaged."""
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        opened = self._open_file(shard)  # without the lock, so that threads open shards at the same time
        closed = []  # after the lock is released
        with self._lock:
            kept = self._files.setdefault(shard, opened)  # another thread may have opened it, too
            self._files.move_to_end(shard)
            while len(self._files) > MAX_OPEN_SHARDS:
                closed.append(self._files.popitem(last=False))
        return kept

    def _open_file(self, shard: int) -> tuple[BinaryIO, NDArray[np.uint64]]:
        path = self.paths[shard]
        try:
            file = path.open("rb", buffering=0)
            offsets = np.frombuffer(index_path(path).read_bytes(), "<u8")
        except (FileNotFoundError, NotADirectoryError, ValueError) as err:
            raise ValueError(
                f"{path}: found no shard with index ({err}); restore both from a copy (or mount the disk that holds "
                f"them), or {CONVERT_AGAIN}."
            ) from err
        records = int(self.ends[shard] - (self.ends[shard - 1] if shard else 0))
        size = os.fstat(file.fileno()).st_size
        sound = len(offsets) == records + 1 and offsets[0] == 0 and (offsets[1:] > offsets[:-1]).all()
        if not sound or offsets[-1] != size:
            raise ValueError(
                f"{index_path(path)}: found {len(offsets) - 1} records up to byte {offsets[-1:]}, needs {records} "
                f"up to byte {size}; restore shard and index from a copy, or {CONVERT_AGAIN}."
            )
        return file, offsets
