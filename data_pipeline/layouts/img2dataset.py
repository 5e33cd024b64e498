"""Downloads by img2dataset: which numbered picture is which frame, and which downloads failed (docs/official.md 8.7).

A picture's file is named by shard and key. Its own name is only in the URL in the sidecar KEY.json or in the shard's
table SHARD.parquet. LPR4M has 473 million pictures, so an index has only those that are looked up (40 million sampled
frames), 42 bytes each, by a hash of the name, in a file that the workers map.
"""

import hashlib
import importlib
import json
import os
import re
import tarfile
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault, WrongUseError
from data_pipeline.format.schema import Picture
from data_pipeline.layouts.listing import Layout, RunTasks
from data_pipeline.layouts.pictures import SUFFIXES

FOLDERS_ABOVE = ("", "files/", "webdataset/")  # of a download in the source folder, tried in this order
ABSENT, STORED, FAILED = range(3)
PLACE = np.dtype(
    [
        ("key", "<u8"),
        ("offset", "<u8"),  # bytes, in the tar; 0: a file of its own
        ("size", "<u4"),  # bytes; 0: a file of its own
        ("shard", "<u4"),  # index into Download.shards
        ("width", "<u4"),  # of the original, before the download shrank it
        ("height", "<u4"),
        ("digits", "u1"),  # of the key, as written
        ("suffix", "u1"),  # index into SUFFIX_LIST
        ("state", "u1"),  # ABSENT, STORED or FAILED
    ]
)
SUFFIX_LIST = tuple(SUFFIXES)
MAX_SIDECAR_BYTES = 1 << 20
MAX_TABLE_BYTES, MAX_TABLE_ROWS = 1 << 28, 1_000_000  # of a shard's table; the largest shards have 50,000 downloads
MAX_URL_BYTES = 1 << 14
MAX_SIDE = 1 << 24  # px, of an original picture
MAX_MEMBER_BYTES = (1 << 32) - 1  # PLACE's size
TABLE_COLUMNS = ["url", "key", "status", "original_width", "original_height"]
Entry = tuple[str, str, bool, tuple[int, int]]  # of a download: name, key, stored or not, size of the original in px


@dataclass(frozen=True)
class Download:
    """One output folder of img2dataset, such as training_frame."""

    source: Path
    folder: str  # relative to the source folder
    tars: bool  # its format: `webdataset`, a tar a shard, or `files`, a folder a shard
    shards: tuple[str, ...]  # their numbers as written, sorted

    def picture(self, name: str, place: np.void) -> Picture:
        """Returns the location, in a tar or as a file, of the picture `name` of a stored download. place: its PLACE."""
        shard = self.shards[place["shard"]]
        member = f"{int(place['key']):0{int(place['digits'])}d}{SUFFIX_LIST[place['suffix']]}"
        original = (int(place["width"]), int(place["height"]))
        size = original if all(original) else None
        if self.tars:
            path = f"{self.folder}/{shard}.tar"
            return Picture(name, path, int(place["offset"]), int(place["size"]), member, size)
        return Picture(name, f"{self.folder}/{shard}/{member}", original_size=size)


def find_download(source: Path, kind: str) -> Download:
    """Returns the download `kind`, such as training_frame. Raises WrongUseError if none has numbered shards."""
    for above in FOLDERS_ABOVE:
        folder = Path(above) / kind
        if not (source / folder).is_dir():
            continue
        names = sorted(os.listdir(source / folder))
        tars = tuple(name.removesuffix(".tar") for name in names if re.fullmatch(r"\d+\.tar", name))
        shards = tars or tuple(name for name in names if re.fullmatch(r"\d+", name))
        if shards:
            return Download(source, folder.as_posix(), bool(tars), shards)
    raise WrongUseError(
        f"{source}: found no folder {kind}, files/{kind} or webdataset/{kind} with img2dataset's numbered shards, "
        f"needs one; rename the output folder, or leave the split out with --splits."
    )


def name_of(text: str) -> str:
    """Returns the frame or image id in an id, a path or a URL: the last part without a picture's suffix."""
    if "://" in text:
        text = urllib.parse.unquote(text.partition("?")[0].partition("#")[0])
    stem, suffix = os.path.splitext(os.path.basename(text))
    return stem if suffix.lower() in SUFFIXES else stem + suffix


def hash_names(names: Sequence[str]) -> NDArray[np.uint64]:
    """Returns 64 bits of BLAKE2b of each name, uint64 [len(names)]. The probability of a confusion in LPR4M is 1e-3."""
    digests = b"".join(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8")


# --- reading a shard --------------------------------------------------------------------------------------------------


@dataclass
class ShardScan:
    """The wanted names that one shard lists."""

    hashes: NDArray[np.uint64]  # of these names
    places: NDArray[np.void]  # PLACE of each
    listed: int = 0  # number of downloads in the shard, wanted or not
    failed: int = 0  # number of them that failed
    has_table: bool = True  # and pyarrow is installed
    fault: Fault | None = None  # the shard cannot be read


def scan_shard(layout: Layout, download: Download, number: int, hashes_file: Path) -> ShardScan:
    """Returns the wanted names in shard `number`. hashes_file: their sorted hashes. Runs in a worker.

    A shard that cannot be read gives the scan a `fault`. Raises WrongUseError if there is a table but no sidecars, and
    pyarrow is not installed, and OSError if a tar or folder cannot be opened.
    """
    wanted = np.load(hashes_file, mmap_mode="r")
    scan = ShardScan(np.zeros(0, np.uint64), np.zeros(0, PLACE))
    rows: list[tuple] = []
    try:
        pictures, sidecars = _members(download, number)
        table = _read_table(download, number)
        scan.has_table = table is not None
        for name, key, stored, size in table if table is not None else _read_sidecars(download, number, sidecars):
            scan.listed += 1
            scan.failed += not stored
            picture = pictures.get(key) if stored else (0, 0, 0)
            if picture is not None:
                suffix, offset, length = picture
                state = STORED if stored else FAILED
                rows.append((name, int(key), offset, length, number, *size, len(key), suffix, state))
    except BadInputError as err:
        scan.fault = err.at(f"{download.folder}/{download.shards[number]}")
    hashes = hash_names([name for name, *_ in rows])
    at = np.searchsorted(wanted, hashes)
    chosen = np.flatnonzero(at < len(wanted))
    chosen = chosen[wanted[at[chosen]] == hashes[chosen]]
    scan.hashes = hashes[chosen]
    scan.places = np.array([rows[row][1:] for row in chosen], PLACE)
    return scan


def _members(download: Download, number: int) -> tuple[dict[str, tuple[int, int, int]], dict[str, tuple[int, int]]]:
    """Returns a shard's pictures (suffix, offset, size) and sidecars (offset, size), both by key, numbers as in PLACE.

    Raises BadInputError for a tar that is damaged, OSError for a tar or folder that cannot be opened.
    """
    pictures: dict[str, tuple[int, int, int]] = {}
    sidecars: dict[str, tuple[int, int]] = {}
    shard = download.source / download.folder / download.shards[number]
    members = _tar_members(shard) if download.tars else ((name, 0, 0) for name in os.listdir(shard))
    for name, offset, size in members:
        key, suffix = os.path.splitext(name)
        if not re.fullmatch(r"\d{1,18}", key):
            continue
        if suffix == ".json":
            sidecars[key] = offset, size
        elif suffix.lower() in SUFFIXES:
            pictures[key] = SUFFIX_LIST.index(suffix.lower()), offset, size
    return pictures, sidecars


def _tar_members(shard: Path) -> Iterator[tuple[str, int, int]]:
    try:
        with tarfile.open(f"{shard}.tar", "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse() and member.size <= MAX_MEMBER_BYTES:
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, EOFError, ValueError) as err:
        detail = f"cannot be read as a tar ({err}); download the shard again."
        raise BadInputError("unreadable archive", detail) from err


def _read_table(download: Download, number: int) -> list[Entry] | None:
    """Returns every download's entry; None without a table or pyarrow. Raises BadInputError if it cannot be read."""
    path = download.source / download.folder / f"{download.shards[number]}.parquet"
    if not path.exists():
        return None
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        return None
    try:
        if path.stat().st_size > MAX_TABLE_BYTES or parquet.read_metadata(path).num_rows > MAX_TABLE_ROWS:
            raise ValueError(f"found over {MAX_TABLE_BYTES:,} bytes or {MAX_TABLE_ROWS:,} rows, needs fewer")
        texts = ["url", "key", "status"]  # read as dictionaries: a text of a million rows is in memory once
        table = parquet.read_table(path, columns=TABLE_COLUMNS, read_dictionary=texts)
        _refuse_long_texts(table.select(texts))
        columns = table.to_pydict()
        rows = zip(*(columns[name] for name in TABLE_COLUMNS), strict=True)
        return [_entry(*row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, NotImplementedError, MemoryError) as err:
        detail = f"{path.name} cannot be read ({err}); download the shard again."
        raise BadInputError("unreadable table", detail) from err


def _refuse_long_texts(table: Any) -> None:
    """Raises ValueError for a text over MAX_URL_BYTES: a table of a few kilobytes can contain gigabytes of texts."""
    compute = importlib.import_module("pyarrow.compute")
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        longest = compute.max(compute.binary_length(getattr(chunk, "dictionary", chunk))).as_py() or 0
        if longest > MAX_URL_BYTES:
            raise ValueError(f"found a text of {longest:,} bytes, needs at most {MAX_URL_BYTES:,}")


def _entry(url: Any, key: Any, status: Any, width: Any, height: Any) -> Entry:
    """Returns a download's entry; a missing size is 0. Raises ValueError, TypeError or OverflowError for bad values."""
    size = int(width or 0), int(height or 0)
    if not re.fullmatch(r"\d{1,18}", key) or not 0 <= min(size) <= max(size) <= MAX_SIDE:
        raise ValueError(f"found the key {key!r:.40} and an original of {size[0]} x {size[1]} pixels")
    return name_of(url), key, status == "success", size


def _read_sidecars(download: Download, number: int, sidecars: dict[str, tuple[int, int]]) -> Iterator[Entry]:
    """Yields the entry of each download in a shard that has a sidecar; failed ones have none.

    Raises WrongUseError if there are no sidecars but a table, and BadInputError if a sidecar cannot be read.
    """
    folder, shard = download.source / download.folder, download.shards[number]
    if not sidecars and (folder / f"{shard}.parquet").exists():
        raise WrongUseError(
            f"{folder / shard}.parquet: found no sidecars (.json) beside the pictures, needs pyarrow to read their "
            "names from this table; pip install 'rice_jax[parquet]'."
        )
    for key, (offset, size) in sidecars.items():
        path = folder / (f"{shard}.tar" if download.tars else f"{shard}/{key}.json")
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                entry = json.loads(file.read(min(size or MAX_SIDECAR_BYTES, MAX_SIDECAR_BYTES)))
            yield _entry(entry["url"], key, entry["status"], entry["original_width"], entry["original_height"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
            detail = f"{key}.json cannot be read ({err!r:.100}); download the shard again."
            raise BadInputError("unreadable sidecar", detail) from err


def list_names(download: Download) -> Iterator[str]:
    """Yields each download's name, shard by shard. Raises as `_members`, `_read_table` and `_read_sidecars` do."""
    for number in range(len(download.shards)):
        table = _read_table(download, number)
        entries = table if table is not None else _read_sidecars(download, number, _members(download, number)[1])
        yield from (name for name, *_ in entries)


def compare_shard(layout: Layout, download: Download, number: int) -> list[Fault]:
    """Returns faults: of each sidecar unlike its shard's table, if both exist, and of what of them cannot be read."""
    faults: list[Fault] = []
    shard = f"{download.folder}/{download.shards[number]}"
    try:
        _, sidecars = _members(download, number)
        table = _read_table(download, number)
        listed = {key: (name, stored) for name, key, stored, _ in table or ()}
        for name, key, stored, _ in _read_sidecars(download, number, sidecars) if table and sidecars else ():
            if listed.get(key) != (name, stored):
                detail = f"found {name} ({'stored' if stored else 'failed'}) of key {key} in its sidecar and "
                detail += f"{listed.get(key, ('nothing',))[0]} in the table, needs the same; download the shard again."
                faults.append(Fault("table and sidecar differ", f"{shard}/{key}.json", detail))
    except BadInputError as err:
        faults.append(err.at(shard))  # perhaps a repetition of `scan_shard`'s fault
    return faults


# --- the index --------------------------------------------------------------------------------------------------------


class Index:
    """An index of the wanted names of one download. Picklable, since it maps its arrays from files in `folder`."""

    def __init__(self, download: Download, folder: Path) -> None:
        self.download = download
        name = download.folder.replace("/", "-")
        self.hashes_file, self.places_file = folder / f"{name}.hashes.npy", folder / f"{name}.places.npy"
        self.complete = True  # every shard's table was read, so that a name which is not listed was never downloaded
        self.listed = self.failed = 0  # numbers of all downloads
        self.faults: list[Fault] = []  # of shards
        self._save(np.zeros(0, np.uint64), np.zeros(0, PLACE))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("hashes", "places")}

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        return np.load(self.hashes_file, mmap_mode="r")

    @cached_property
    def places(self) -> NDArray[np.void]:
        return np.load(self.places_file, mmap_mode="r")

    def add(self, hashes: NDArray[np.uint64], run: RunTasks) -> None:
        """Looks up new hashes in every shard; sets counts, `complete` and `faults`. Raises as `scan_shard` does."""
        wanted = np.setdiff1d(hashes, self.hashes)
        if not len(wanted):
            return
        wanted_file = self.hashes_file.with_suffix(".wanted.npy")
        np.save(wanted_file, wanted)
        places = np.zeros(len(wanted), PLACE)
        self.listed = self.failed = 0
        shards = range(len(self.download.shards))
        tasks = ((self.download, number, wanted_file) for number in shards)
        for scan in run(scan_shard, tasks, f"{self.download.folder}: shards", total=len(shards), unit="shard"):
            at = np.searchsorted(wanted, scan.hashes)
            better = places["state"][at] != STORED  # of a name that was downloaded twice, a success counts
            places[at[better]] = scan.places[better]
            self.listed, self.failed = self.listed + scan.listed, self.failed + scan.failed
            self.complete &= scan.has_table
            if scan.fault and scan.fault not in self.faults:
                self.faults.append(scan.fault)
        all_hashes, all_places = np.concatenate([self.hashes, wanted]), np.concatenate([self.places, places])
        order = np.argsort(all_hashes)
        self._save(all_hashes[order], all_places[order])

    def _save(self, hashes: NDArray[np.uint64], places: NDArray[np.void]) -> None:
        for name, values, path in (("hashes", hashes, self.hashes_file), ("places", places, self.places_file)):
            self.__dict__.pop(name, None)
            path.unlink(missing_ok=True)  # and not overwritten, since the old file may still be mapped
            np.save(path, values)

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.void]:
        """Returns the PLACE of each name, by its hash. The state is ABSENT for names not indexed or in no shard."""
        if not len(self.hashes):
            return np.zeros(len(hashes), PLACE)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        found = np.array(self.places[at])
        found["state"][self.hashes[at] != hashes] = ABSENT
        return found
