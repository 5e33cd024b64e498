"""img2dataset's output: which numbered picture is which frame, and which downloads failed (SPEC 8.7).

A picture is called by shard and key; its name stands only in the url of the sidecar KEY.json or of the shard's table
SHARD.parquet. LPR4M has 473 million of them, so an index holds those alone that somebody asks for (40 million sampled
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
from data_pipeline.layouts.listing import Layout, Run
from data_pipeline.layouts.pictures import SUFFIXES

FOLDERS_ABOVE = ("", "files/", "webdataset/")  # where an output of img2dataset is looked for, in this order
ABSENT, STORED, FAILED = range(3)
PLACE = np.dtype(
    [
        ("key", "<u8"),
        ("offset", "<u8"),  # in the tar
        ("size", "<u4"),
        ("shard", "<u4"),  # place in Download.shards
        ("width", "<u4"),  # of the original, before the download shrank it
        ("height", "<u4"),
        ("digits", "u1"),  # of the key, as written
        ("suffix", "u1"),  # place in SUFFIXES
        ("state", "u1"),
    ]
)
SUFFIX_LIST = tuple(SUFFIXES)
MAX_SIDECAR_BYTES = 1 << 20
MAX_TABLE_BYTES, MAX_TABLE_ROWS = 1 << 28, 1_000_000  # of a shard's table; the largest shards have 50,000 downloads
MAX_URL_BYTES = 1 << 14
MAX_SIDE = 1 << 24  # px, of an original picture
MAX_MEMBER_BYTES = (1 << 32) - 1  # PLACE's size
TABLE_COLUMNS = ["url", "key", "status", "original_width", "original_height"]


@dataclass(frozen=True)
class Download:
    """One output folder of img2dataset, written as `files` or as `webdataset`."""

    source: Path
    folder: str  # relative to the source
    tars: bool
    shards: tuple[str, ...]

    def picture(self, name: str, place: np.void) -> Picture:
        """The picture of a stored download."""
        shard = self.shards[place["shard"]]
        member = f"{int(place['key']):0{int(place['digits'])}d}{SUFFIX_LIST[place['suffix']]}"
        original = (int(place["width"]), int(place["height"]))
        size = original if all(original) else None
        if self.tars:
            path = f"{self.folder}/{shard}.tar"
            return Picture(name, path, int(place["offset"]), int(place["size"]), member, size)
        return Picture(name, f"{self.folder}/{shard}/{member}", original_size=size)


def find_download(source: Path, kind: str) -> Download:
    """The output folder `kind` (training_frame, ...), in the source or in its files/ or webdataset/."""
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
        f"needs one; call the output folder so, or leave the split out with --splits."
    )


def name_of(text: str) -> str:
    """A frame or image id from an id, a path or a url."""
    if "://" in text:
        text = urllib.parse.unquote(text.partition("?")[0].partition("#")[0])
    stem, suffix = os.path.splitext(os.path.basename(text))
    return stem if suffix.lower() in SUFFIXES else stem + suffix


def hash_names(names: Sequence[str]) -> NDArray[np.uint64]:
    """64 bits of each name. Among LPR4M's 473 million names one is taken for another of 40 million with chance 1e-3."""
    digests = b"".join(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8")


# --- reading a shard --------------------------------------------------------------------------------------------------


@dataclass
class ShardScan:
    """What a shard knows of the wanted names."""

    hashes: NDArray[np.uint64]  # of the names found
    places: NDArray[np.void]  # PLACE of each
    listed: int = 0
    failed: int = 0
    has_table: bool = True
    fault: Fault | None = None


def scan_shard(layout: Layout, download: Download, number: int, hashes_file: Path) -> ShardScan:
    """Finds the wanted names (sorted hashes in a file) in one shard (in a worker)."""
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
    """By key: pictures (suffix, offset, size) and sidecars (offset, size); 0, 0 for files of their own."""
    pictures: dict[str, tuple[int, int, int]] = {}
    sidecars: dict[str, tuple[int, int]] = {}
    for name, offset, size in _tar_members(download, number) if download.tars else _files(download, number):
        key, suffix = os.path.splitext(name)
        if not re.fullmatch(r"\d{1,18}", key):
            continue
        if suffix == ".json":
            sidecars[key] = offset, size
        elif suffix.lower() in SUFFIXES:
            pictures[key] = SUFFIX_LIST.index(suffix.lower()), offset, size
    return pictures, sidecars


def _files(download: Download, number: int) -> Iterator[tuple[str, int, int]]:
    for name in os.listdir(download.source / download.folder / download.shards[number]):
        yield name, 0, 0


def _tar_members(download: Download, number: int) -> Iterator[tuple[str, int, int]]:
    path = download.source / download.folder / f"{download.shards[number]}.tar"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse() and member.size <= MAX_MEMBER_BYTES:
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, EOFError, ValueError) as err:
        raise BadInputError(
            "unreadable archive", f"cannot be read as a tar ({err}); download the shard again."
        ) from err


def _read_table(download: Download, number: int) -> list[tuple[str, str, bool, tuple[int, int]]] | None:
    """(name, key, stored, original size) of every download, failed ones too; None: no table, or nothing to read it."""
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
        texts = ["url", "key", "status"]  # read as dictionaries: one text in a million rows is one text in memory
        table = parquet.read_table(path, columns=TABLE_COLUMNS, read_dictionary=texts)
        _refuse_long_texts(table.select(texts))
        columns = table.to_pydict()
        rows = zip(*(columns[name] for name in TABLE_COLUMNS), strict=True)
        return [_entry(*row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, NotImplementedError, MemoryError) as err:
        raise BadInputError(
            "unreadable table", f"{path.name} cannot be read ({err}); download the shard again."
        ) from err


def _refuse_long_texts(table: Any) -> None:
    """A few kilobytes of a table can be gigabytes of texts."""
    compute = importlib.import_module("pyarrow.compute")
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        longest = compute.max(compute.binary_length(getattr(chunk, "dictionary", chunk))).as_py() or 0
        if longest > MAX_URL_BYTES:
            raise ValueError(f"found a text of {longest:,} bytes, needs at most {MAX_URL_BYTES:,}")


def _entry(url: Any, key: Any, status: Any, width: Any, height: Any) -> tuple[str, str, bool, tuple[int, int]]:
    """(name, key, stored, original size) of one download; an exception that its reader names if it is none."""
    size = int(width or 0), int(height or 0)
    if not re.fullmatch(r"\d{1,18}", key) or not 0 <= min(size) <= max(size) <= MAX_SIDE:
        raise ValueError(f"found the key {key!r:.40} and an original of {size[0]} x {size[1]} pixels")
    return name_of(url), key, status == "success", size


def _read_sidecars(
    download: Download, number: int, sidecars: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, str, bool, tuple[int, int]]]:
    """The same from the sidecars, which only stored pictures have."""
    folder, shard = download.source / download.folder, download.shards[number]
    if not sidecars and (folder / f"{shard}.parquet").exists():
        raise WrongUseError(
            f"{folder / shard}.parquet: found no sidecars (.json) beside the pictures, so that only this table can "
            "name them, and no pyarrow to read it; pip install 'rice_jax[parquet]'."
        )
    for key, (offset, size) in sidecars.items():
        path = folder / (f"{shard}.tar" if download.tars else f"{shard}/{key}.json")
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                entry = json.loads(file.read(min(size or MAX_SIDECAR_BYTES, MAX_SIDECAR_BYTES)))
            yield _entry(entry["url"], key, entry["status"], entry["original_width"], entry["original_height"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
            raise BadInputError(
                "unreadable sidecar", f"{key}.json cannot be read ({err!r:.100}); download the shard again."
            ) from err


def list_names(download: Download) -> Iterator[str]:
    """Every name that a download knows of, shard by shard."""
    for number in range(len(download.shards)):
        table = _read_table(download, number)
        for name, *_ in table if table is not None else _read_sidecars(download, number, _members(download, number)[1]):
            yield name


def compare_shard(layout: Layout, download: Download, number: int) -> list[Fault]:
    """Sidecars that say otherwise than the shard's table, which is the one that is believed (in a worker)."""
    faults: list[Fault] = []
    shard = f"{download.folder}/{download.shards[number]}"
    try:
        _, sidecars = _members(download, number)
        table = _read_table(download, number)
        told = {key: (name, stored) for name, key, stored, _ in table or ()}
        for name, key, stored, _ in _read_sidecars(download, number, sidecars) if table and sidecars else ():
            if told.get(key) != (name, stored):
                detail = f"found {name} ({'stored' if stored else 'failed'}) of key {key} in its sidecar and "
                detail += f"{told.get(key, ('nothing',))[0]} in the table, needs the same; download the shard again."
                faults.append(Fault("table and sidecar differ", f"{shard}/{key}.json", detail))
    except BadInputError as err:
        faults.append(err.at(shard))  # once more what the reader of the lists may have said
    return faults


# --- the index --------------------------------------------------------------------------------------------------------


class Index:
    """Where the wanted names of one download are. Picklable; hashes and places are mapped from files."""

    def __init__(self, download: Download, folder: Path) -> None:
        self.download = download
        name = download.folder.replace("/", "-")
        self.hashes_file, self.places_file = folder / f"{name}.hashes.npy", folder / f"{name}.places.npy"
        self.complete = True  # every shard's table was read: what is not listed was never asked for
        self.listed = 0
        self.failed = 0
        self.faults: list[Fault] = []
        self._save(np.zeros(0, np.uint64), np.zeros(0, PLACE))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("hashes", "places")}

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        return np.load(self.hashes_file, mmap_mode="r")

    @cached_property
    def places(self) -> NDArray[np.void]:
        return np.load(self.places_file, mmap_mode="r")

    def add(self, hashes: NDArray[np.uint64], run: Run) -> None:
        """Looks for names in every shard. Names that the index has already are not looked for again."""
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
            better = places["state"][at] != STORED  # a name that was asked for twice: any success will do
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
            path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
            np.save(path, values)

    def stored(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which names are there as pictures."""
        return self.find(hashes)["state"] == STORED

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.void]:
        """PLACE of each name; names that nobody added are ABSENT."""
        if not len(self.hashes):
            return np.zeros(len(hashes), PLACE)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        found = np.array(self.places[at])
        found["state"][self.hashes[at] != hashes] = ABSENT
        return found
