"""A converted data set, opened for reading: splits with their records at random, columns, ids, galleries and truth.

    dataset = open_dataset(path)
    split = dataset.split("train")
    split.clip(i).frames, split.image(split.columns["image"][i]).encoded

Layout of the folder: SPLIT-clips-NNNNN-of-MMMMM.tfrecord and SPLIT-images-... with their .idx, columns/ (memory-mapped,
one entry a row), manifest.json, written last. docs/data_formats.md has it in full.
"""

import collections
import json
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.format.manifest import (
    CLIP_COLUMNS,
    COLUMNS,
    EVALUATION_SPLITS,
    IMAGE_COLUMNS,
    read_manifest,
    shard_name,
)
from data_pipeline.format.schema import ClipRecord, ImageRecord, decode_clip, decode_image
from data_pipeline.format.tfrecord import file_crc, index_path, unframe_record

MAX_OPEN_SHARDS = 256  # of thousands: a process may hold 1,024 files


def open_dataset(path: str | os.PathLike[str], *, verify: bool = True) -> "Dataset":
    """Opens a converted data set.

    verify: check the manifest against its hash, every shard's size and every column's checksum (not the shards': each
    record's is checked when it is read). FileNotFoundError: no conversion there, or an unfinished one. ValueError:
    another schema version, or a shard or column that is missing, short or damaged.
    """
    dataset = Dataset(Path(path))
    if verify:
        dataset.verify()
    return dataset


class Dataset:
    """A converted data set; open_dataset makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.content_hash: str = self.manifest["content_hash"]
        self.splits: tuple[str, ...] = tuple(self.manifest["splits"])

    def split(self, name: str) -> "Split":
        if name not in self.splits:
            raise ValueError(
                f"{self.path}: found splits {', '.join(self.splits)}, needs {name}; convert it, or choose."
            )
        return Split(self.path, self.manifest, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.path,)

    def _table(self, name: str) -> "Texts":
        return Texts(self.path / COLUMNS / f"{name}.txt")

    @cached_property
    def products(self) -> Sequence[str]:
        return self._table("products")

    @cached_property
    def livestreams(self) -> Sequence[str]:
        return self._table("livestreams")

    @cached_property
    def categories(self) -> Sequence[str]:
        """Names, by the category column."""
        return [text.rpartition("\t")[2] for text in self._table("categories")]

    @cached_property
    def scales(self) -> Sequence[str]:
        return self._table("scales")

    @cached_property
    def durations(self) -> Sequence[str]:
        return self._table("durations")

    @cached_property
    def numbers(self) -> Sequence[str]:
        return self._table("numbers")

    def verify(self) -> None:
        for name, detail in self.disagreements():
            raise ValueError(f"{self.path / name}: {detail}")

    def disagreements(self) -> Iterator[tuple[str, str]]:
        """File and what is wrong with it, of all that disagree with the manifest; of shards only their size is read."""
        for name, (size, crc) in self.manifest["files"].items():
            path = self.path / name
            try:
                found = path.stat().st_size
            except OSError:
                yield name, f"found no such file, needs {size} bytes; restore it, or convert again."
                continue
            if found != size:
                yield name, f"found {found} bytes, needs {size}; restore it, or convert again."
            elif not name.endswith(".tfrecord") and file_crc(path) != crc:
                yield name, "found a checksum (CRC32C) that disagrees; restore it, or convert again."


class Texts(Sequence[str]):
    """Lines of a UTF-8 file, memory-mapped: 4 million clip ids are not 4 million objects."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _bytes(self) -> bytes | mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.path.stat().st_size else b""

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

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Texts, (self.path,)


class Split:
    """One split: rows of clips, rows of shop images. Safe for threads, picklable (files are opened anew)."""

    def __init__(self, path: Path, manifest: dict[str, Any], name: str) -> None:
        self.path = path
        self.name = name
        self.manifest = manifest
        self._counts = manifest["splits"][name]
        self.num_clips: int = self._counts["clips"]["records"]
        self.num_images: int = self._counts["images"]["records"]
        self.num_truth: int = self._counts["truth"]  # queries that count, those without a record included
        self.is_evaluation = name in EVALUATION_SPLITS
        self._clips = _Shards(path, name, "clips", self._counts["clips"])
        self._images = _Shards(path, name, "images", self._counts["images"])

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self.path, self.manifest, self.name)

    def clip(self, row: int) -> ClipRecord:
        """The clip in a row, read from its shard. ValueError names shard and record, and what is wrong with it."""
        record: ClipRecord = self._clips.read(row, self.columns["ordinal"], decode_clip)
        return record

    def image(self, row: int) -> ImageRecord:
        """The shop image in a row, read from its shard. ValueError names shard and record, and what is wrong."""
        record: ImageRecord = self._images.read(row, self.image_columns["ordinal"], decode_image)
        return record

    def where(self, kind: str, row: int) -> str:
        """Shard and record of a row; kind: clip or image."""
        shards = self._clips if kind == "clip" else self._images
        shard, place = shards.place(row)
        return f"{shards.paths[shard]} record {place}"

    def shard_rows(self, kind: str) -> list[tuple[int, int]]:
        """First row and end of each shard."""
        ends = (self._clips if kind == "clip" else self._images).ends.tolist()
        return list(zip([0, *ends], ends, strict=False))

    @cached_property
    def clip_ids(self) -> Sequence[str]:
        return Texts(self._column_path("clips-id.txt"))

    @cached_property
    def image_ids(self) -> Sequence[str]:
        return Texts(self._column_path("images-id.txt"))

    @cached_property
    def columns(self) -> dict[str, NDArray[np.int32]]:
        """int32 by clip row, memory-mapped: rows of this split's images, entries of the data set's tables, counts."""
        return {name: self._column(f"clips-{name}.npy", self.num_clips) for name in CLIP_COLUMNS}

    @cached_property
    def image_columns(self) -> dict[str, NDArray[np.int32]]:
        """int32 by image row, memory-mapped."""
        return {name: self._column(f"images-{name}.npy", self.num_images) for name in IMAGE_COLUMNS}

    @cached_property
    def galleries(self) -> dict[str, NDArray[np.int32]]:
        """Livestream id -> rows of images in the file's order, doubles kept. Validation of a download has one: ""."""
        rows = self._column("gallery.npy", self._counts["gallery_rows"])
        ends = np.cumsum(list(self._counts["galleries"].values()), dtype=np.int64)
        return dict(zip(self._counts["galleries"], np.split(rows, ends[:-1]), strict=True)) if len(ends) else {}

    def gallery_name(self, row: int) -> str:
        """Which of the galleries clip `row` is matched against."""
        return "" if "" in self.galleries else self._livestreams[self.columns["livestream"][row]]

    def gallery_of(self, row: int) -> NDArray[np.int32]:
        """Rows of the images that clip `row` is matched against."""
        return self.galleries[self.gallery_name(row)]

    @cached_property
    def _livestreams(self) -> Texts:
        return Texts(self.path / COLUMNS / "livestreams.txt")

    @cached_property
    def _truth(self) -> dict[str, list[str]]:
        truth: dict[str, list[str]] = json.loads(self._column_path("truth.json").read_bytes())
        return truth

    def truth(self, row: int) -> tuple[str, ...]:
        """Ids of the clip's true images (SPEC 10.2 matches ids, not rows)."""
        if self.name == "test":
            return tuple(self._truth[self.clip_ids[row]])
        image = int(self.columns["image"][row])
        return (self.image_ids[image],) if image >= 0 else ()

    @cached_property
    def truth_by_clip(self) -> dict[str, tuple[str, ...]]:
        """Clip id -> ids of its true images, for every query that counts: also those that no clip was found for."""
        if self.name == "test":
            return {clip: tuple(images) for clip, images in self._truth.items()}
        return {clip: self.truth(row) for row, clip in enumerate(self.clip_ids)}

    def _column_path(self, name: str) -> Path:
        return self.path / COLUMNS / f"{self.name}-{name}"

    def _column(self, name: str, length: int) -> NDArray[np.int32]:
        path = self._column_path(name)
        try:
            column = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as err:
            raise ValueError(f"{path}: found no column ({err}), needs {length} int32; convert again.") from err
        if column.dtype != np.int32 or column.shape != (length,):
            raise ValueError(f"{path}: found {column.dtype} {column.shape}, needs int32 ({length},); convert again.")
        return column


class _Shards:
    """The shards of one kind of one split, read at random."""

    def __init__(self, path: Path, split: str, kind: str, counts: Mapping[str, Any]) -> None:
        records = counts["shards"]
        self.paths = [path / shard_name(split, kind, number, len(records)) for number in range(len(records))]
        self.kind = kind
        self.ends = np.cumsum(records, dtype=np.int64)
        self._files: collections.OrderedDict[int, tuple[BinaryIO, NDArray[np.uint64]]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def place(self, row: int) -> tuple[int, int]:
        """Number of the shard that holds a row, and which of its records that is."""
        total = int(self.ends[-1]) if len(self.ends) else 0
        if not 0 <= row < total:
            raise IndexError(f"found row {row}, needs 0 to {total - 1} of the split's {self.kind}.")
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return shard, int(row - (self.ends[shard - 1] if shard else 0))

    def read(self, row: int, ordinals: NDArray[np.int32], decode: Any) -> Any:
        shard, place = self.place(row)
        file, offsets = self._open(shard)
        begin, end = int(offsets[place]), int(offsets[place + 1])
        try:
            record = decode(unframe_record(os.pread(file.fileno(), end - begin, begin)))
            if record.ordinal != ordinals[row]:
                raise ValueError(
                    f"found number {record.ordinal} of its kind, needs {ordinals[row]}: shards are mixed up"
                )
        except (ValueError, OSError) as err:
            raise ValueError(
                f"{self.paths[shard]} record {place}: {err}; restore the shard from a copy, or convert again."
            ) from err
        return record

    def _open(self, shard: int) -> tuple[BinaryIO, NDArray[np.uint64]]:
        """The shard's file and offsets. A file that falls out of the cache closes when its last reader lets go."""
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
            path = self.paths[shard]
            try:
                file = path.open("rb", buffering=0)
                offsets = np.frombuffer(index_path(path).read_bytes(), "<u8")
            except (OSError, ValueError) as err:
                raise ValueError(f"{path}: found no shard with index ({err}); restore it, or convert again.") from err
            records = int(self.ends[shard] - (self.ends[shard - 1] if shard else 0))
            size = os.fstat(file.fileno()).st_size
            sound = len(offsets) == records + 1 and offsets[0] == 0 and (offsets[1:] > offsets[:-1]).all()
            if not sound or offsets[-1] != size:
                raise ValueError(
                    f"{index_path(path)}: found {len(offsets) - 1} records up to byte {offsets[-1:]}, needs {records} "
                    f"up to byte {size}; restore shard and index, or convert again."
                )
            self._files[shard] = file, offsets
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
            return file, offsets
