"""A converted set examined: the manifest, every checksum, every record against the columns, every picture."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.manifest import COLUMNS, MANIFEST, TABLE_FILES
from data_pipeline.format.reader import Dataset, Split, open_dataset
from data_pipeline.format.schema import ClipRecord, ImageRecord, Picture
from data_pipeline.format.tfrecord import file_crc
from data_pipeline.inspection.fingerprints import FINGERPRINT, NOTHING, VERSION, inspect_picture, key_of
from data_pipeline.inspection.source import box_faults
from data_pipeline.inspection.summary import OnNewFingerprints, PartResult, SplitSummary
from data_pipeline.layouts.listing import NONE, TABLES
from data_pipeline.system.workers import Workers

MEND = "restore the shard from a copy, or convert again."


class ConvertedSet:
    """The converted set as a patient; `examine` fills the charts."""

    knows_products = True

    def __init__(self, path: Path, workers: int) -> None:
        self.path, self.workers = path, workers
        self.charts: list[SplitSummary] = []
        self.tables: Mapping[str, Sequence[str]] = {}
        self.faults: list[Fault] = []
        self.remarks: list[str] = []
        self.splits: dict[str, Split] = {}

    def examine(self, known_file: Path, remember: OnNewFingerprints) -> None:
        try:
            dataset = open_dataset(self.path, verify=False)
        except (ValueError, FileNotFoundError) as err:
            self.faults.append(Fault("bad manifest", MANIFEST, _without(err, self.path / MANIFEST)))
            return
        wrong = dict(dataset.disagreements())
        self.faults += [Fault("damaged file", name, detail) for name, detail in wrong.items()]
        listed = {MANIFEST, *dataset.manifest["files"]}
        strangers = sorted(each.name for each in self.path.glob("*.tfrecord*") if each.name not in listed)
        self.faults += [
            Fault("file of no manifest", name, "found a shard that the manifest does not name; remove it.")
            for name in strangers
        ]
        if any(f"{COLUMNS}/{file}.txt" in wrong for file in TABLE_FILES.values()):
            return  # nobody could say what the columns mean
        self.tables = {name: list(texts) for name, texts in dataset.tables.items()}
        with Workers(self.workers, ConvertedContext(dataset, known_file)) as workers:
            damaged = self._check_shards(dataset, workers, set(wrong))
            for name in dataset.splits:
                if any(each.startswith(f"{COLUMNS}/{name}-") for each in wrong):
                    continue  # told; its rows cannot be held against columns that are wrong themselves
                split = self.splits[name] = dataset.split(name)
                parts = {kind: self._look(workers, split, kind, damaged, remember) for kind in ("image", "clip")}
                chart = _chart(split, parts["image"], parts["clip"])
                self.faults += _wrong_rows(split)
                self.charts.append(chart)

    def _check_shards(self, dataset: Dataset, workers: Workers, wrong: set[str]) -> set[str]:
        """Checksums of whole shards: they tell of bytes that no record holds, and of shards in each other's place."""
        shards = [name for name in dataset.manifest["files"] if name.endswith(".tfrecord") and name not in wrong]
        tasks = ((name,) for name in shards)
        crcs = workers.run(shard_crc, tasks, "shards: checksums", total=len(shards), unit="shard")
        sound = {name for name, crc in zip(shards, crcs, strict=True) if crc == dataset.manifest["files"][name][1]}
        for name in shards:
            if name not in sound:
                self.faults.append(Fault("damaged file", name, f"found a checksum (CRC32C) that disagrees; {MEND}"))
        return {*wrong, *shards} - sound

    def _look(
        self, workers: Workers, split: Split, kind: str, damaged: set[str], remember: OnNewFingerprints
    ) -> list[PartResult]:
        total = split.num_clips if kind == "clip" else split.num_images
        tasks = (
            (split.name, kind, begin, end, _shard(split, kind, begin) not in damaged)
            for begin, end in split.shard_rows(kind)
        )
        parts = []
        for part in workers.run(
            examine_shard, tasks, f"{split.name}: {kind}s", total=total, unit=kind, weigh=lambda each: each[3] - each[2]
        ):
            remember(part.fresh)
            self.faults += part.faults
            parts.append(part)
        return parts

    # --- for a person -------------------------------------------------------------------------------------------------

    def frame_name(self, chart: SplitSummary, clip: int, frame: int) -> str:
        return f"{_where(self.splits[chart.split], 'clip', clip)} frame {frame}"

    def image_name(self, chart: SplitSummary, image: int) -> str:
        return _where(self.splits[chart.split], "image", image)

    def clip_source(self, chart: SplitSummary, clip: int) -> tuple[str, int]:
        return _where(self.splits[chart.split], "clip", clip), 0

    def frame(self, chart: SplitSummary, clip: int, frame: int) -> bytes:
        return self.splits[chart.split].clip(clip).frames[frame].encoded

    def image(self, chart: SplitSummary, image: int) -> bytes:
        return self.splits[chart.split].image(image).encoded

    def picture(self, fault: Fault) -> bytes | None:
        return None


def _where(split: Split, kind: str, row: int) -> str:
    return split.where(kind, row).removeprefix(f"{split.path}/")


def _shard(split: Split, kind: str, row: int) -> str:
    return _where(split, kind, row).rpartition(" record ")[0]


def _without(error: Exception, place: object) -> str:
    return str(error).removeprefix(f"{place}: ")


# --- tasks ------------------------------------------------------------------------------------------------------------


class ConvertedContext:
    """What the workers share: the set, and what earlier runs saw."""

    def __init__(self, dataset: Dataset, known_file: Path) -> None:
        self.dataset, self.known_file = dataset, known_file

    def __reduce__(self) -> tuple[type["Ward"], tuple[Dataset, Path]]:
        return ConvertedContext, (self.dataset, self.known_file)

    @functools.cached_property
    def splits(self) -> dict[str, Split]:
        return {name: self.dataset.split(name) for name in self.dataset.splits}

    @functools.cached_property
    def known(self) -> dict[int, NDArray[np.void]]:
        looks = np.load(self.known_file, mmap_mode="r")
        return dict(zip(looks["key"].tolist(), looks, strict=True))


def shard_crc(ward: ConvertedContext, name: str) -> int:
    return file_crc(ward.dataset.path / name)


def examine_shard(ward: ConvertedContext, split_name: str, kind: str, begin: int, end: int, sound: bool) -> PartResult:
    """Reads a shard's records, holds them against the columns and looks at their pictures (in a worker).

    sound: its checksum is the manifest's, so that what an earlier run saw in it is there still.
    """
    split, result = ward.splits[split_name], PartResult()
    looks: list[NDArray[np.void]] = []
    fresh: list[NDArray[np.void]] = []
    for row in range(begin, end):
        count = int(split.columns["frames"][row]) if kind == "clip" else 1
        keys = [_key(split, kind, row, frame) for frame in range(count)]
        result.counts.append(count)
        if sound and all(key in ward.known for key in keys):
            looks += [ward.known[key] for key in keys]
            continue
        seen, faults = _examine_record(ward, split, kind, row, keys)
        looks += seen
        fresh += seen if not faults else []
        result.faults += faults
    result.faults = list(dict.fromkeys(result.faults))  # what is wrong with a shard as a whole, every record tells
    result.looks, result.fresh = np.array(looks, FINGERPRINT), np.array(fresh, FINGERPRINT)
    return result


def _examine_record(
    ward: ConvertedContext, split: Split, kind: str, row: int, keys: Sequence[int]
) -> tuple[list[NDArray[np.void]], list[Fault]]:
    """A look at each of a record's pictures, as many as the columns say, and what is wrong with the record."""
    place, where = split.where(kind, row), _where(split, kind, row)
    subject = f"{kind} {(split.clip_ids if kind == 'clip' else split.image_ids)[row]}"
    try:
        record: ClipRecord | ImageRecord = split.clip(row) if kind == "clip" else split.image(row)
    except ValueError as err:
        if str(err).startswith(place):
            fault = Fault("damaged record", where, _without(err, place), subject=subject)
        else:
            fault = Fault("damaged file", _shard(split, kind, row), str(err).removeprefix(f"{split.path}/"))
        return len(keys) * [NOTHING], [fault]
    errors = list(_disagreements(ward, split, row, record))
    frames = record.frames if isinstance(record, ClipRecord) else []
    pictures = [frame.encoded for frame in frames] if isinstance(record, ClipRecord) else [record.encoded]
    looks = len(keys) * [NOTHING]
    for frame, (data, key) in enumerate(zip(pictures, keys, strict=False)):
        name = f"{where} frame {frame}" if kind == "clip" else where
        try:
            seen = inspect_picture(data, name, key, named=False)
        except BadInputError as err:
            errors.append(err)
            continue
        looks[frame] = seen.look
        errors += seen.problems
        if frames and (boxes := frames[frame].boxes):
            errors += box_faults(boxes, Picture(name, name), seen.look, name)
    return looks, [Fault(err.reason, err.file or where, err.detail, subject=subject) for err in errors]


def _key(split: Split, kind: str, row: int, frame: int) -> int:
    """64 bits of which picture of which shard: its checksum in the manifest, which is verified at every start."""
    place = _where(split, kind, row)
    size, crc = split.manifest["files"][_shard(split, kind, row)]
    return key_of(f"{VERSION}\0{place}\0{size}\0{crc}\0{frame}")


def _disagreements(
    ward: ConvertedContext, split: Split, row: int, record: ClipRecord | ImageRecord
) -> Iterator[BadInputError]:
    """What a record says otherwise than the columns."""
    pairs: dict[str, tuple[str | int, str | int]]
    if isinstance(record, ImageRecord):
        pairs = {"id": (record.id, split.image_ids[row])}
        pairs["product"] = record.product_index, int(split.image_columns["product"][row])
    else:
        pairs = {"id": (record.id, split.clip_ids[row])}
        texts = {name: getattr(record, name) for name in TABLES if name != "category"}
        texts["category"] = f"{record.category}\t{record.category_name}".strip("\t")
        for name, text in texts.items():
            number = int(split.columns[name][row])
            pairs[name] = text, ward.dataset.tables[name][number] if number != NONE else ""
        pairs["image"] = record.image_index, int(split.columns["image"][row])
        pairs["frames"] = len(record.frames), int(split.columns["frames"][row])
        pairs["original_frames"] = record.original_frames, int(split.columns["original_frames"][row])
    for name, (found, needed) in pairs.items():
        if found != needed:
            detail = f"found {name} {found!r:.80}, needs {needed!r:.80} as the columns say; convert again."
            yield BadInputError("record against its columns", detail)


# --- a split as a whole -----------------------------------------------------------------------------------------------


def _wrong_rows(split: Split) -> Iterator[Fault]:
    """Clips without a shop image of the split; queries without gallery, truth, or their truth in the gallery."""
    galleries = split.galleries
    for name, rows in galleries.items():
        if np.any((rows < 0) | (rows >= split.num_images)):
            detail = f"found rows outside 0 to {split.num_images - 1} in the gallery of {name}; convert again."
            yield Fault("bad gallery", f"{COLUMNS}/{split.name}-gallery.npy", detail)
    for row, clip_id in enumerate(split.clip_ids):
        where, subject = _where(split, "clip", row), f"clip {clip_id}"
        if not 0 <= split.columns["image"][row] < split.num_images:
            detail = f"found shop image {split.columns['image'][row]}, needs a row of 0 to {split.num_images - 1}; "
            yield Fault("clip without shop image", where, f"{detail}convert again.", subject=subject)
        if not split.is_evaluation:
            continue
        shelf = galleries.get(split.gallery_name(row), np.zeros(0, np.int32))
        truth = set(split.truth_by_clip.get(clip_id, ()))
        if not len(shelf):
            detail = "found no shop image in its livestream's gallery, needs some; convert again."
            yield Fault("livestream without gallery", where, detail, subject=subject)
        elif not truth:
            yield Fault("query without truth", where, "found no true image, needs one; convert again.", subject=subject)
        elif not truth & {split.image_ids[image] for image in shelf if 0 <= image < split.num_images}:
            detail = f"found none of {', '.join(sorted(truth))} in its gallery, needs one; convert again."
            yield Fault("true image not in its gallery", where, detail, subject=subject)


def _chart(split: Split, images: Sequence[PartResult], clips: Sequence[PartResult]) -> SplitSummary:
    rows = split.columns["image"]
    return SplitSummary(
        split=split.name,
        clip_ids=list(split.clip_ids),
        image_ids=list(split.image_ids),
        images_of=np.where((rows >= 0) & (rows < split.num_images), rows, NONE).astype(np.int32),
        columns={name: np.asarray(split.columns[name]) for name in TABLES},
        image_products=np.asarray(split.image_columns["product"]),
        galleries={name: shelf[(shelf >= 0) & (shelf < split.num_images)] for name, shelf in split.galleries.items()},
        truth=split.truth_by_clip if split.name == "test" else {},
        counts=np.array([count for part in clips for count in part.counts], np.int64),
        looks=np.concatenate([np.zeros(0, FINGERPRINT), *(part.looks for part in clips)]),
        image_looks=np.concatenate([np.zeros(0, FINGERPRINT), *(part.looks for part in images)]),
    )
