"""Writing one shard, in a worker: read its clips or shop images, check every picture, write, say what came of it.

A finished shard has a note beside it, in the work folder, with a digest of what went in and the checksum of what came
out. The same command after a kill finds the notes, verifies the shards and writes only the others. Nothing in a shard
depends on the worker, on its neighbours or on the clock.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.schema import SCHEMA_VERSION, Box, Clip, Picture, ShopImage, encode_clip, encode_image
from data_pipeline.format.tfrecord import ShardWriter, file_crc, index_path, write_file
from data_pipeline.layouts.listing import ClipListing, Layout, RowLocation
from data_pipeline.layouts.pictures import PictureFolder, check_picture


@dataclasses.dataclass(frozen=True, slots=True)
class ClipEntry:
    """A clip to be written, by where its layout lists it."""

    ordinal: int
    id: str
    source: RowLocation | ClipListing
    image_index: int
    product: str  # of its row, or of its shop image where the layout names none for clips
    product_index: int


@dataclasses.dataclass(frozen=True, slots=True)
class ImageEntry:
    ordinal: int
    image: ShopImage
    product_index: int


Entry = ClipEntry | ImageEntry


@dataclasses.dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to be written."""

    split: str
    path: Path
    work: Path  # the folder of notes
    entries: Sequence[Entry]
    skip_faults: bool


@dataclasses.dataclass
class ShardNote:
    """What came of a shard; kept as JSON. Lists have one entry a record, in order."""

    inputs: str
    size: int = 0
    crc: int = 0
    index_size: int = 0
    index_crc: int = 0
    ordinals: list[int] = dataclasses.field(default_factory=list)
    frames: list[int] = dataclasses.field(default_factory=list)
    original_frames: list[int] = dataclasses.field(default_factory=list)
    failed_downloads: int = 0
    faults: list[Fault] = dataclasses.field(default_factory=list)
    left_out: list[int] = dataclasses.field(
        default_factory=list
    )  # ordinals whose pictures were found, and are at fault


def write_shard(layout: Layout, task: ShardTask) -> ShardNote:
    """Writes the shard unless a finished one with the same inputs lies there.

    With faults and without `skip_faults` nothing is written; the note tells them all.
    """
    faults: list[Fault] = []
    found = _find_pictures(layout, task, faults)
    inputs = _digest(found, faults)
    note_path = task.work / f"{task.path.name}.json"
    folder = PictureFolder(layout.source)
    if (finished := _finished(task.path, note_path, inputs)) and (
        not finished.faults or (task.skip_faults and _still_at_fault(folder, found, finished.left_out))
    ):
        return finished
    note = ShardNote(inputs, faults=faults)
    with ShardWriter(task.path) as writer:
        for entry, item in found:
            try:
                data = _encode(folder, entry, item)
            except BadInputError as err:
                note.faults.append(_fault(err, entry))
                note.left_out.append(entry.ordinal)
                continue
            writer.write(data)
            note.ordinals.append(entry.ordinal)
            if isinstance(item, Clip):
                note.frames.append(len(item.frames))
                note.original_frames.append(item.original_frames)
                note.failed_downloads += item.failed_downloads
        if note.faults and not task.skip_faults:
            writer.discard()
            return note
    note.size, note.crc = writer.offsets[-1], writer.crc
    note.index_size, note.index_crc = index_path(task.path).stat().st_size, file_crc(index_path(task.path))
    write_file(note_path, json.dumps(dataclasses.asdict(note)).encode())
    return note


def _digest(found: list[tuple[Entry, Clip | Picture]], faults: list[Fault]) -> str:
    """What decides a shard's bytes. Not where a clip's line stands, which moves when another line is mended."""
    inputs = [
        (entry.ordinal, entry.image_index, entry.product, entry.product_index, item)
        if isinstance(entry, ClipEntry)
        else (entry, item)
        for entry, item in found
    ]
    return hashlib.sha256(repr((SCHEMA_VERSION, inputs, faults)).encode()).hexdigest()


def _find_pictures(layout: Layout, task: ShardTask, faults: list[Fault]) -> list[tuple[Entry, Clip | Picture]]:
    found: list[tuple[Entry, Clip | Picture]] = []
    for entry in task.entries:
        try:
            if isinstance(entry, ClipEntry):
                found.append((entry, layout.read_clip(entry.source, task.split)))
            else:
                found.append((entry, layout.read_image(entry.image, task.split)))
        except BadInputError as err:
            faults.append(_fault(err, entry))
    return found


def _encode(folder: PictureFolder, entry: Entry, item: Clip | Picture) -> bytes:
    if isinstance(entry, ImageEntry):
        assert isinstance(item, Picture)
        data, _ = _read(folder, item)
        return encode_image(entry.image, data, ordinal=entry.ordinal, product_index=entry.product_index)
    assert isinstance(item, Clip)
    pictures = [_read(folder, picture) for picture in item.frames]
    if item.boxes is not None:
        sizes = [size for _, size in pictures]
        scaled = tuple(map(scale_boxes, item.boxes, item.frames, sizes))
        item = dataclasses.replace(item, boxes=scaled)
    return encode_clip(
        dataclasses.replace(item, product=entry.product),
        [data for data, _ in pictures],
        ordinal=entry.ordinal,
        image_index=entry.image_index,
        product_index=entry.product_index,
    )


def _read(folder: PictureFolder, picture: Picture) -> tuple[bytes, tuple[int, int]]:
    data = folder.read(picture)
    return data, check_picture(data, f"{picture.path}/{picture.member}" if picture.member else picture.path)


def scale_boxes(boxes: Sequence[Box], picture: Picture, size: tuple[int, int]) -> tuple[Box, ...]:
    """Boxes in pixels of the original frame, in those of the stored picture; as they are if it was never shrunk."""
    if picture.original_size is None:
        return tuple(boxes)
    x, y = (stored / original for stored, original in zip(size, picture.original_size, strict=True))
    return tuple((left * x, top * y, right * x, bottom * y) for left, top, right, bottom in boxes)


def _fault(error: BadInputError, entry: Entry) -> Fault:
    if isinstance(entry, ImageEntry):
        return error.at(error.file or entry.image.reference, 0, f"image {entry.image.id}")
    source = entry.source
    return error.at(source.file, source.number if isinstance(source, RowLocation) else 0, f"clip {entry.id}")


def _finished(path: Path, note_path: Path, inputs: str) -> ShardNote | None:
    """The note of a finished shard whose bytes are still what it says."""
    try:
        note = ShardNote(**json.loads(note_path.read_bytes()))
        sound = note.inputs == inputs and (note.size, note.crc) == (path.stat().st_size, file_crc(path))
        sound = sound and note.index_crc == file_crc(index_path(path))
    except (OSError, ValueError, TypeError):
        return None
    note.faults = [Fault(**fault) for fault in note.faults]  # type: ignore[arg-type]
    return note if sound else None


def _still_at_fault(folder: PictureFolder, found: list[tuple[Entry, Clip | Picture]], left_out: Sequence[int]) -> bool:
    """Whether all that a finished shard left out would be left out again: a picture may have been mended since."""
    for entry, item in found:
        if entry.ordinal in left_out:
            try:
                _encode(folder, entry, item)
            except BadInputError:
                continue
            return False
    return True
