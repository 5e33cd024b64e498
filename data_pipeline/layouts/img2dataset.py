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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault, WrongUseError, counted
from data_pipeline.format.schema import Picture
from data_pipeline.layouts.listing import Layout
from data_pipeline.layouts.pictures import SHARD_AGAIN, SUFFIXES

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
TABLE_TEXTS, TABLE_SIZES = ("url", "key", "status"), ("original_width", "original_height")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
SUFFIX_IN_URL = re.compile(rf"(.+?)({'|'.join(map(re.escape, SUFFIXES))})(?![a-z0-9]).*", re.IGNORECASE | re.DOTALL)
Entry = tuple[str, int, bool, tuple[int, int]]  # of a download: name, key, stored or not, size of the original in px
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # of an entry


@dataclass(frozen=True)
class BadEntry:
    """An entry that cannot be read."""

    file: str  # the sidecar or table
    error: Exception


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
        size = (int(place["width"]), int(place["height"]))
        if self.tars:
            path = f"{self.folder}/{shard}.tar"
            return Picture(name, path, int(place["offset"]), int(place["size"]), member, size)
        return Picture(name, f"{self.folder}/{shard}/{member}", original_size=size)


def find_download(source: Path, kind: str) -> Download:
    """Returns the download `kind`, such as training_frame. Raises WrongUseError if none has numbered shards."""
    found = ""
    for above in FOLDERS_ABOVE:
        folder = Path(above) / kind
        if not (source / folder).is_dir():
            continue
        names = sorted(os.listdir(source / folder))
        tars = tuple(name.removesuffix(".tar") for name in names if re.fullmatch(r"\d+\.tar", name))
        shards = tars or tuple(name for name in names if re.fullmatch(r"\d+", name))
        if shards:
            return Download(source, folder.as_posix(), bool(tars), shards)
        found = found or f"{folder.as_posix()}: found {_unread_content(names)}"
    if found:
        raise WrongUseError(f"{source}/{found} Or leave the split out with --splits.")
    raise WrongUseError(
        f"{source}: found no folder {kind}, files/{kind} or webdataset/{kind} with img2dataset's numbered shards, "
        f"needs one; rename the output folder, or leave the split out with --splits."
    )


def _unread_content(names: Sequence[str]) -> str:
    """Returns what a folder of these names has in place of the shards of `files` or `webdataset`, and what to do."""
    again = "download again with --output_format webdataset (or files)."
    for pattern, what in (
        (r"\d+\.(tar\.\w+|tgz)", "compressed tars ({}), needs them plain; decompress them, such as with gunzip."),
        (r"\d+\.tfrecord", f"img2dataset's output_format tfrecord ({{}}), needs webdataset or files; {again}"),
        (r"\d+\.parquet", f"tables, as of img2dataset's output_format parquet ({{}}), but no pictures; {again}"),
        (r"\d+_stats\.json", f"statistics, as of img2dataset's output_format dummy ({{}}), but no pictures; {again}"),
    ):
        if matching := [name for name in names if re.fullmatch(pattern, name)]:
            return what.format(matching[0])
    others = ", ".join(names[:3]) or "nothing"
    return f"{others}, needs img2dataset's numbered shards (00000.tar or 00000/); move or rename them."


def name_of(text: str) -> str:
    """Returns the frame or image id in an id, a path or a URL: the last part without a picture's suffix.

    In a URL a server's options may follow the suffix, as in x.jpg!w300, x.jpg_300x300.jpg or x.jpg/w/300.
    """
    if "://" in text:
        text = urllib.parse.unquote(text.partition("?")[0].partition("#")[0])
        for part in reversed(text.split("/")[3:]):
            if match := SUFFIX_IN_URL.fullmatch(part):
                return match[1]
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
    has_table: bool = True  # and it was read
    faults: list[Fault] = field(default_factory=list)  # at most one of each cause


@dataclass
class Members:
    """What one shard contains, by key. Offset and size are as in PLACE."""

    pictures: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)  # digits, suffix, offset, size
    sidecars: dict[int, tuple[str, int, int]] = field(default_factory=dict)  # file name, offset, size
    faults: list[BadInputError] = field(default_factory=list)  # those members are missing


def scan_shard(layout: Layout, download: Download, number: int, hashes_file: Path) -> ShardScan:
    """Returns the wanted names in shard `number`. hashes_file: their sorted hashes. Runs in a worker.

    What cannot be read of a shard gives the scan a fault, and counts as a failed download if its name is known. Raises
    WrongUseError if there is a table but no sidecars, and pyarrow is not installed, and OSError if a tar or folder
    cannot be opened.
    """
    wanted = np.load(hashes_file, mmap_mode="r")
    scan = ShardScan(np.zeros(0, np.uint64), np.zeros(0, PLACE))
    members = _members(download, number)
    entries, scan.has_table, errors = _read_entries(download, number, members)
    errors += members.faults
    rows: list[tuple] = []
    bad: list[BadEntry] = []
    lost: list[int] = []
    for entry in entries:
        if isinstance(entry, BadEntry):
            bad.append(entry)
            continue
        name, key, stored, size = entry
        scan.listed += 1
        scan.failed += not stored
        picture = members.pictures.get(key) if stored else None
        if stored and not picture:
            lost.append(key)
        digits, suffix, offset, length = picture or (0, 0, 0, 0)
        rows.append((name, key, offset, length, number, *size, digits, suffix, STORED if picture else FAILED))
    errors += _bad_entries(bad)
    if lost and not members.faults:
        detail = f"found no picture of {counted(len(lost), 'download')} that succeeded (first key {lost[0]}), needs "
        errors.append(BadInputError("missing pictures", f"{detail}KEY.jpg or another suffix; {SHARD_AGAIN}."))
    scan.faults = [error.at(f"{download.folder}/{download.shards[number]}") for error in errors]
    hashes = hash_names([name for name, *_ in rows])
    at = np.searchsorted(wanted, hashes)
    chosen = np.flatnonzero(at < len(wanted))
    chosen = chosen[wanted[at[chosen]] == hashes[chosen]]
    scan.hashes = hashes[chosen]
    scan.places = np.array([rows[row][1:] for row in chosen], PLACE)
    return scan


def _bad_entries(bad: Sequence[BadEntry]) -> list[BadInputError]:
    """Returns one error for a shard's entries that cannot be read, which names the first, or none."""
    if not bad:
        return []
    more = f", nor can {len(bad) - 1} more of this shard" if len(bad) > 1 else ""
    detail = f"{bad[0].file} cannot be read ({bad[0].error!r:.100}){more}; {SHARD_AGAIN}."
    return [BadInputError("unreadable sidecar" if bad[0].file.endswith(".json") else "unreadable table", detail)]


def _members(download: Download, number: int) -> Members:
    """Returns a shard's members, by base name. Raises OSError for a tar or folder that cannot be read.

    Of a path that a tar has twice, the last counts. Several paths with other content, of one key, are a fault.
    """
    members = Members()
    shard = download.source / download.folder / download.shards[number]
    known: dict[tuple[int, bool], tuple[str, int, int]] = {}  # the last path, offset and size by key and kind
    differing: dict[tuple[int, bool], str] = {}
    try:
        for path, offset, size in (
            _tar_members(shard) if download.tars else ((name, 0, 0) for name in sorted(os.listdir(shard)))
        ):
            name = os.path.basename(path)
            key, suffix = os.path.splitext(name)
            is_picture = suffix.lower() in SUFFIXES
            if not re.fullmatch(r"\d{1,18}", key, re.ASCII) or not (is_picture or suffix == ".json"):
                continue
            item, member = (int(key), is_picture), (path, offset, size)
            before = known.setdefault(item, member)
            if before[0] != path and _read_member(download, number, *before) != _read_member(download, number, *member):
                differing.setdefault(item, f"{before[0]} and {path}")
            known[item] = member
            if is_picture:
                members.pictures[int(key)] = len(key), SUFFIX_LIST.index(suffix.lower()), offset, size
            else:
                members.sidecars[int(key)] = name, offset, size
    except BadInputError as err:
        members.faults.append(err)
    if differing:
        for doubtful, is_picture in differing:
            del (members.pictures if is_picture else members.sidecars)[doubtful]
        more = f" and {len(differing) - 1} more such pairs" if len(differing) > 1 else ""
        detail = (
            f"found {next(iter(differing.values()))}{more}, which differ, needs one picture and one sidecar a key; "
        )
        members.faults.append(BadInputError("key twice", f"{detail}take the others out of the shard."))
    return members


def _read_member(download: Download, number: int, path: str, offset: int, size: int, limit: int | None = None) -> bytes:
    """Returns a member's bytes, at most `limit`, None for all. Raises OSError if they cannot be read."""
    shard = f"{download.source / download.folder / download.shards[number]}"
    with open(f"{shard}.tar" if download.tars else f"{shard}/{path}", "rb") as file:
        file.seek(offset)
        return file.read(min(size, limit or size) if download.tars else limit)


def _tar_members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Yields (path, offset, size) of the files of a tar; of a link, those of the file before it that it names.

    Raises BadInputError where the tar is damaged or cut short.
    """
    files: dict[str, tuple[int, int]] = {}
    try:
        total = os.path.getsize(f"{shard}.tar")
        with tarfile.open(f"{shard}.tar", "r:") as tar:
            for member in tar:
                path = os.path.normpath(member.name)
                if member.isreg() and not member.issparse() and member.size <= MAX_MEMBER_BYTES:
                    if member.offset_data + member.size > total:
                        raise tarfile.ReadError(f"it is cut short in {member.name:.100}")
                    files[path] = member.offset_data, member.size
                elif member.islnk() or member.issym():
                    folder = os.path.dirname(path) if member.issym() else ""
                    target = os.path.normpath(os.path.join(folder, member.linkname))
                    if target in files:
                        files[path] = files[target]
                if path in files:
                    yield path, *files[path]
            with open(f"{shard}.tar", "rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # where tarfile stops without an error
                    raise tarfile.ReadError(f"it is cut short or damaged at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError, ValueError) as err:
        with open(f"{shard}.tar", "rb") as file:
            head = file.read(4)
        packed = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), "")
        detail = f"cannot be read as a tar ({err}); {SHARD_AGAIN}."
        if packed:
            detail = f"cannot be read as a tar, as it is compressed; decompress it: {packed} -dc < FILE > NEW."
        raise BadInputError("unreadable archive", detail) from err


def _table_path(download: Download, number: int) -> Path:
    return download.source / download.folder / f"{download.shards[number]}.parquet"


def _read_table(download: Download, number: int) -> list[Entry | BadEntry] | None:
    """Returns the entries of a shard's table; None without a table or pyarrow. BadInputError: it cannot be read."""
    path = _table_path(download, number)
    if not path.exists():
        return None
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        return None
    try:
        metadata = parquet.read_metadata(path)
        if path.stat().st_size > MAX_TABLE_BYTES or metadata.num_rows > MAX_TABLE_ROWS:
            raise ValueError(f"found over {MAX_TABLE_BYTES:,} bytes or {MAX_TABLE_ROWS:,} rows, needs fewer")
        fields = [metadata.schema.column(index) for index in range(metadata.num_columns)]
        kinds = {each.name: each.physical_type for each in fields}
        if missing := [name for name in TABLE_TEXTS if name not in kinds]:
            raise ValueError(f"found no column {', '.join(missing)}")
        names = [name for name in (*TABLE_TEXTS, *TABLE_SIZES) if name in kinds]
        # Texts are read as dictionaries: a text of a million rows is in memory once.
        texts = [name for name in TABLE_TEXTS if kinds[name] == "BYTE_ARRAY"]
        table = parquet.read_table(path, columns=names, read_dictionary=texts)
        _refuse_long_texts(table.select(texts))
        columns = table.to_pydict()
    except (OSError, ValueError, KeyError, TypeError, OverflowError, NotImplementedError, MemoryError) as err:
        detail = f"{path.name} cannot be read ({err}); {SHARD_AGAIN}."
        raise BadInputError("unreadable table", detail) from err
    rows = zip(*(columns[name] for name in names), strict=True)
    return [_entry_or_bad(path.name, dict(zip(names, row, strict=True))) for row in rows]


def _refuse_long_texts(table: Any) -> None:
    """Raises ValueError for a text over MAX_URL_BYTES: a table of a few kilobytes can contain gigabytes of texts."""
    compute = importlib.import_module("pyarrow.compute")
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        longest = compute.max(compute.binary_length(getattr(chunk, "dictionary", chunk))).as_py() or 0
        if longest > MAX_URL_BYTES:
            raise ValueError(f"found a text of {longest:,} bytes, needs at most {MAX_URL_BYTES:,}")


def _entry(row: Any) -> Entry:
    """Returns a download's entry; a missing size is 0. Raises one of UNREADABLE for a bad or missing value."""
    key = row["key"]
    if isinstance(key, int | float) and key == int(key):  # tables of other tools
        key = str(int(key))
    size = _side(row.get("original_width")), _side(row.get("original_height"))
    if not re.fullmatch(r"\d{1,18}", key, re.ASCII) or not 0 <= min(size) <= max(size) <= MAX_SIDE:
        raise ValueError(f"found the key {key!r:.40} and an original of {size[0]} x {size[1]} pixels")
    return name_of(row["url"]), int(key), row["status"] == "success", size


def _side(value: Any) -> int:
    return 0 if value is None or value != value else int(value or 0)  # some tables have NaN for no value


def _entry_or_bad(file: str, row: Any) -> Entry | BadEntry:
    try:
        return _entry(row)
    except UNREADABLE as err:
        return BadEntry(file, err)


def _read_sidecars(download: Download, number: int, members: Members) -> Iterator[Entry | BadEntry]:
    """Yields the entry of each download in a shard that has a sidecar; failed ones have none."""
    for key, (name, offset, size) in members.sidecars.items():
        try:
            data = _read_member(download, number, name, offset, size, MAX_SIDECAR_BYTES)
            if not data:
                raise ValueError("found 0 bytes")
            yield _entry(json.loads(data) | {"key": key})
        except UNREADABLE as err:
            yield BadEntry(name, err)


def _read_entries(
    download: Download, number: int, members: Members | None = None
) -> tuple[Iterable[Entry | BadEntry], bool, list[BadInputError]]:
    """Returns a shard's entries from its table, else its sidecars; whether from the table; the table's error, if any.

    members: the shard's, if they are read already. Raises WrongUseError and OSError as `scan_shard` does.
    """
    errors: list[BadInputError] = []
    try:
        table = _read_table(download, number)
        if table is not None:
            return table, True, errors
    except BadInputError as err:
        errors.append(err)
    members = members or _members(download, number)
    if not members.sidecars and not errors and (path := _table_path(download, number)).exists():
        raise WrongUseError(
            f"{path}: found no sidecars (.json) beside the pictures, needs pyarrow to read their names from this "
            "table; pip install 'rice_jax[parquet]'."
        )
    return _read_sidecars(download, number, members), False, errors


def list_names(download: Download) -> Iterator[str]:
    """Yields each download's name, shard by shard, but those that cannot be read, which `scan_shard` makes faults.

    Raises WrongUseError and OSError as `scan_shard` does.
    """
    for number in range(len(download.shards)):
        entries, _, _ = _read_entries(download, number)
        yield from (entry[0] for entry in entries if not isinstance(entry, BadEntry))


def compare_shard(layout: Layout, download: Download, number: int) -> list[Fault]:
    """Returns faults of a shard with a table that can be read: sidecars unlike it, and those that cannot be read."""
    shard = f"{download.folder}/{download.shards[number]}"
    try:
        table = _read_table(download, number)
    except BadInputError:
        return []  # a fault of `scan_shard`
    if not table:
        return []
    faults: list[Fault] = []
    bad: list[BadEntry] = []
    listed = {entry[1]: (entry[0], entry[2]) for entry in table if not isinstance(entry, BadEntry)}
    members = _members(download, number)
    for entry in _read_sidecars(download, number, members):
        if isinstance(entry, BadEntry):
            bad.append(entry)
            continue
        name, key, stored, _ = entry
        if listed.get(key) != (name, stored):
            file = members.sidecars[key][0]
            detail = f"found {name} ({'stored' if stored else 'failed'}) of key {key} in its sidecar and "
            detail += f"{listed.get(key, ('nothing',))[0]} in the table, needs the same; {SHARD_AGAIN}."
            faults.append(Fault("table and sidecar differ", f"{shard}/{file}", detail))
    return faults + [error.at(shard) for error in _bad_entries(bad)]
