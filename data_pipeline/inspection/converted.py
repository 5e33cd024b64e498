"""Inspects a converted set: the manifest, every checksum, every record against the columns, every picture."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.manifest import COLUMNS, CONVERT_AGAIN, MANIFEST, TABLE_FILES
from data_pipeline.format.reader import Dataset, Split, open_dataset
from data_pipeline.format.schema import ClipRecord, ImageRecord, Picture
from data_pipeline.format.tfrecord import file_crc
from data_pipeline.inspection import fingerprints
from data_pipeline.inspection.fingerprints import Fingerprints
from data_pipeline.inspection.neighbours import Rows
from data_pipeline.inspection.source import box_faults
from data_pipeline.inspection.store import KnownFingerprints
from data_pipeline.inspection.summary import InspectedData, PartResult, SplitSummary
from data_pipeline.layouts.listing import NONE, TABLES
from data_pipeline.system.workers import Workers


@dataclasses.dataclass(frozen=True)
class ConvertedContext:
    """The set, as the workers share it."""

    path: Path
    splits: Mapping[str, Split]
    tables: Mapping[str, Sequence[str]]
    known: KnownFingerprints


class InspectedSet(InspectedData):
    """A converted set. `inspect` fills in the results."""

    knows_products = True
    then = f", in the source, and {CONVERT_AGAIN}"

    def __init__(self, path: Path, workers: int, **shared: Any) -> None:
        """shared: the arguments of `InspectedData`."""
        super().__init__(**shared)
        self.path, self.workers = path, workers
        self.splits: dict[str, Split] = {}
        self.rows: dict[str, dict[str, Rows]] = {}  # by split, then "clip" or "image": what is inspected

    def inspect(self, known: KnownFingerprints) -> None:
        """Fills in the results, as far as the set is sound; what is wrong is added to `findings`, a bad manifest too.

        known: fingerprints of earlier runs. Raises OSError if a file is unreadable.
        """
        try:
            dataset = open_dataset(self.path, verify=False)
        except (ValueError, FileNotFoundError) as err:
            self.findings.add([Fault("bad manifest", MANIFEST, _without(err, self.path / MANIFEST))])
            return
        wrong = dict(dataset.disagreements())
        self.findings.add(Fault("damaged file", name, detail) for name, detail in wrong.items())
        expected = {MANIFEST, *dataset.manifest["files"]}
        self.findings.add(
            Fault("file of no manifest", name, "found a shard that the manifest does not name; remove it.")
            for name in sorted(path.name for path in self.path.glob("*.tfrecord*"))
            if name not in expected
        )
        if any(f"{COLUMNS}/{file}.txt" in wrong for file in TABLE_FILES.values()):
            return  # without the tables the columns have no meaning
        self.tables = {name: list(texts) for name, texts in dataset.tables.items()}
        self.splits = {name: dataset.split(name) for name in dataset.splits}
        with Workers(self.workers, ConvertedContext(self.path, self.splits, dataset.tables, known)) as workers:
            damaged = self._check_shards(dataset, workers, set(wrong))
            for name, split in self.splits.items():
                if any(file.startswith(f"{COLUMNS}/{name}-") for file in wrong):
                    continue  # already a fault; records cannot be compared with damaged columns
                rows = self.rows[name] = self._chosen(split)
                images, clips = (self._inspect(workers, split, kind, rows[kind], damaged) for kind in ("image", "clip"))
                self.findings.add(_split_faults(split, rows["clip"]))
                self.summaries.append(_summary(split, rows, images, clips))

    def _chosen(self, split: Split) -> dict[str, Rows]:
        """Returns the rows to inspect, ascending: of the sample's clips and the images that they show, or all."""
        if not self.sample:
            return {"clip": np.arange(split.num_clips), "image": np.arange(split.num_images)}
        clips = self.sample.rows(split.clip_ids)
        images = np.unique(split.columns["image"][clips]).astype(np.int64)
        return {"clip": clips, "image": images[(images >= 0) & (images < split.num_images)]}

    def _check_shards(self, dataset: Dataset, workers: Workers, wrong: set[str]) -> set[str]:
        """Returns `wrong` and shards of another checksum, which become faults. Raises OSError if one is unreadable."""
        shards = [name for name in dataset.manifest["files"] if name.endswith(".tfrecord") and name not in wrong]
        tasks = ((name,) for name in shards)
        crcs = workers.run(shard_crc, tasks, "shards: checksums", total=len(shards), unit="shard")
        unsound = [name for name, crc in zip(shards, crcs, strict=True) if crc != dataset.manifest["files"][name][1]]
        detail = f"found a checksum (CRC32C) that disagrees; restore the shard from a copy, or {CONVERT_AGAIN}."
        self.findings.add(Fault("damaged file", name, detail) for name in unsound)
        return {*wrong, *unsound}

    def _inspect(self, workers: Workers, split: Split, kind: str, rows: Rows, damaged: set[str]) -> PartResult:
        shards = ((begin, rows[(rows >= begin) & (rows < end)]) for begin, end in split.shard_rows(kind))
        tasks = (
            (split.name, kind, chosen, _shard(split, kind, begin) not in damaged)
            for begin, chosen in shards
            if len(chosen)
        )
        label, weigh = f"{split.name}: {kind}s", lambda task: len(task[2])
        parts = workers.run(inspect_shard, tasks, label, total=len(rows), unit=kind, weigh=weigh)
        return self.join_parts(parts, f"{split.name}-{kind}s")

    # --- access -------------------------------------------------------------------------------------------------------

    def frame_name(self, summary: SplitSummary, clip: int, frame: int) -> str:
        return f"{self._where(summary, 'clip', clip)} frame {frame}"

    def image_name(self, summary: SplitSummary, image: int) -> str:
        return self._where(summary, "image", image)

    def clip_source(self, summary: SplitSummary, clip: int) -> tuple[str, int]:
        return self._where(summary, "clip", clip), 0

    def frame(self, summary: SplitSummary, clip: int, frame: int) -> bytes:
        return self.splits[summary.split].clip(self._row(summary, "clip", clip)).frames[frame].encoded

    def image(self, summary: SplitSummary, image: int) -> bytes:
        return self.splits[summary.split].image(self._row(summary, "image", image)).encoded

    def _row(self, summary: SplitSummary, kind: str, row: int) -> int:
        return int(self.rows[summary.split][kind][row])

    def _where(self, summary: SplitSummary, kind: str, row: int) -> str:
        return _where(self.splits[summary.split], kind, self._row(summary, kind, row))

    def faulty_picture(self, file: str) -> bytes | None:
        return None


def _where(split: Split, kind: str, row: int) -> str:
    """Returns "SHARD record N", SHARD relative to the set's folder. Raises IndexError for a row outside."""
    return split.where(kind, row).removeprefix(f"{split.path}/")


def _shard(split: Split, kind: str, row: int) -> str:
    return _where(split, kind, row).rpartition(" record ")[0]


def _without(error: Exception, place: object) -> str:
    return str(error).removeprefix(f"{place}: ")


# --- tasks ------------------------------------------------------------------------------------------------------------


def shard_crc(context: ConvertedContext, name: str) -> int:
    return file_crc(context.path / name)


def inspect_shard(context: ConvertedContext, split_name: str, kind: str, rows: Rows, sound: bool) -> PartResult:
    """Returns the fingerprints, frame counts (1 an image) and faults of some rows of a shard.

    Its records are read and compared with the columns, and their pictures inspected, unless their fingerprints are
    known. What is damaged is a fault; ValueError is not raised. sound: whether the shard has the manifest's checksum;
    otherwise its known fingerprints are not used.
    """
    split = context.splits[split_name]
    inspected: list[Fingerprints] = []
    new: list[Fingerprints] = []
    faults: list[Fault] = []
    counts = []
    for row in rows.tolist():
        count = int(split.columns["frames"][row]) if kind == "clip" else 1
        keys = [_key(split, kind, row, frame) for frame in range(count)]
        counts.append(count)
        known = [each for key in keys if sound and (each := context.known.find(key)) is not None]
        if sound and len(known) == count:
            inspected += known
            continue
        found, wrong = _inspect_record(context, split, kind, row, keys)
        inspected += found
        new += found if not wrong else []
        faults += wrong
    faults = list(dict.fromkeys(faults))  # a fault of the whole shard comes once for each record
    of_all, of_new = (np.array(each, fingerprints.FINGERPRINT) for each in (inspected, new))
    return PartResult(of_all, of_new, faults, counts, np.zeros(0, np.uint64))


def _inspect_record(
    context: ConvertedContext, split: Split, kind: str, row: int, keys: Sequence[int]
) -> tuple[list[Fingerprints], list[Fault]]:
    """Returns a fingerprint per key, NO_FINGERPRINT where no picture is sound, and the faults; raises none of them."""
    place, where = split.where(kind, row), _where(split, kind, row)
    subject = f"{kind} {(split.clip_ids if kind == 'clip' else split.image_ids)[row]}"
    found: list[Fingerprints] = len(keys) * [fingerprints.NO_FINGERPRINT]
    try:
        record: ClipRecord | ImageRecord = split.clip(row) if kind == "clip" else split.image(row)
    except ValueError as err:
        if str(err).startswith(place):
            return found, [Fault("damaged record", where, _without(err, place), subject=subject)]
        detail = str(err).removeprefix(f"{split.path}/")
        return found, [Fault("damaged file", _shard(split, kind, row), detail)]
    errors = list(_disagreements(context, split, row, record))
    frames = record.frames if isinstance(record, ClipRecord) else []
    pictures = [frame.encoded for frame in frames] if isinstance(record, ClipRecord) else [record.encoded]
    for frame, (data, key) in enumerate(zip(pictures, keys, strict=False)):
        name = f"{where} frame {frame}" if kind == "clip" else where
        try:
            inspected = fingerprints.inspect_picture(data, name, key, named=False)
        except BadInputError as err:
            errors.append(_of_source(err))
            continue
        found[frame] = inspected.fingerprint
        errors += map(_of_source, inspected.problems)
        if frames and (boxes := frames[frame].boxes):
            errors += map(_of_source, box_faults(boxes, Picture(name, name), inspected.fingerprint, name))
    return found, [Fault(err.reason, err.file or where, err.detail, subject=subject) for err in errors]


def _of_source(error: BadInputError) -> BadInputError:
    """Returns the error with what to do in a converted set, whose records cannot be edited."""
    found, semicolon, remedy = error.detail.rpartition("; ")
    detail = f"{found}; in the source, {remedy.removesuffix('.')}, and {CONVERT_AGAIN}." if semicolon else error.detail
    return BadInputError(error.reason, detail, error.file)


def _key(split: Split, kind: str, row: int, frame: int) -> int:
    """Returns a picture's key, 64 bits, not 0; it changes with its shard's checksum, which every start verifies."""
    size, crc = split.manifest["files"][_shard(split, kind, row)]
    return fingerprints.key_of(f"{fingerprints.VERSION}\0{_where(split, kind, row)}\0{size}\0{crc}\0{frame}")


def _disagreements(
    context: ConvertedContext, split: Split, row: int, record: ClipRecord | ImageRecord
) -> Iterator[BadInputError]:
    """Yields an error for each value in which a record differs from the columns."""
    pairs: dict[str, tuple[str | int, str | int]]
    if isinstance(record, ImageRecord):
        product = int(split.image_columns["product"][row])
        pairs = {"id": (record.id, split.image_ids[row]), "product": (record.product_index, product)}
    else:
        pairs = {"id": (record.id, split.clip_ids[row])}
        texts = {name: getattr(record, name) for name in TABLES if name != "category"}
        texts["category"] = f"{record.category}\t{record.category_name}"
        for name, text in texts.items():
            number = int(split.columns[name][row])
            column = context.tables[name][number] if number != NONE else ""
            # Earlier versions left out the tab of a category without id or name.
            pairs[name] = (text.strip("\t"), column.strip("\t")) if name == "category" else (text, column)
        pairs["image"] = record.image_index, int(split.columns["image"][row])
        pairs["frames"] = len(record.frames), int(split.columns["frames"][row])
        pairs["original_frames"] = record.original_frames, int(split.columns["original_frames"][row])
    for name, (found, needed) in pairs.items():
        if found != needed:
            detail = f"found {name} {found!r:.80}, needs {needed!r:.80} as the columns say; {CONVERT_AGAIN}."
            yield BadInputError("record against its columns", detail)


# --- a split as a whole -----------------------------------------------------------------------------------------------


def _split_faults(split: Split, clips: Rows) -> Iterator[Fault]:
    """Yields faults: gallery rows outside, clips without image, queries without gallery, truth, or true image in it."""
    galleries = split.galleries
    for name, rows in galleries.items():
        if np.any((rows < 0) | (rows >= split.num_images)):
            detail = f"found rows outside 0 to {split.num_images - 1} in the gallery of {name}; {CONVERT_AGAIN}."
            yield Fault("bad gallery", f"{COLUMNS}/{split.name}-gallery.npy", detail)
    for row in clips.tolist():
        clip_id = split.clip_ids[row]
        where, subject = _where(split, "clip", row), f"clip {clip_id}"
        if not 0 <= split.columns["image"][row] < split.num_images:
            detail = f"found shop image {split.columns['image'][row]}, needs a row of 0 to {split.num_images - 1}; "
            yield Fault("clip without shop image", where, f"{detail}{CONVERT_AGAIN}.", subject=subject)
        if not split.is_evaluation:
            continue
        name = split.gallery_name(row)
        gallery = galleries.get(name, np.zeros(0, np.int32))
        truth = set(split.truth_by_clip.get(clip_id, ()))
        if not len(gallery):
            detail = f"found no shop image in the gallery of {name or split.name}, needs some; {CONVERT_AGAIN}."
            yield Fault("livestream without gallery", where, detail, subject=subject)
        elif not truth:
            detail = f"found no true image, needs one; {CONVERT_AGAIN}."
            yield Fault("query without truth", where, detail, subject=subject)
        elif not truth & {split.image_ids[image] for image in gallery if 0 <= image < split.num_images}:
            detail = f"found none of {', '.join(sorted(truth))} in its gallery, needs one; {CONVERT_AGAIN}."
            yield Fault("true image not in its gallery", where, detail, subject=subject)


def _summary(split: Split, rows: Mapping[str, Rows], images: PartResult, clips: PartResult) -> SplitSummary:
    renumber = np.full(split.num_images + 1, NONE, np.int32)  # the last entry maps rows outside to NONE
    renumber[rows["image"]] = np.arange(len(rows["image"]))
    inside = lambda values: renumber[np.where((values >= 0) & (values < split.num_images), values, NONE)]
    shown = {name: inside(np.asarray(gallery)) for name, gallery in split.galleries.items()}
    clip_ids = [split.clip_ids[row] for row in rows["clip"].tolist()]
    truth = split.truth_by_clip if split.name == "test" else {}
    return SplitSummary(
        split=split.name,
        clip_ids=clip_ids,
        image_ids=[split.image_ids[row] for row in rows["image"].tolist()],
        clip_images=inside(split.columns["image"][rows["clip"]]),
        columns={name: split.columns[name][rows["clip"]] for name in TABLES},
        image_products=split.image_columns["product"][rows["image"]],
        galleries={name: gallery[gallery != NONE] for name, gallery in shown.items()},
        truth=truth if len(clip_ids) == split.num_clips else {each: truth[each] for each in clip_ids if each in truth},
        frame_counts=np.asarray(clips.frame_counts),
        frame_fingerprints=clips.fingerprints,
        image_fingerprints=images.fingerprints,
    )
