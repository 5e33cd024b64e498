"""Writing of one shard, in a worker: find and check its pictures, write its records, and note the result.

A finished shard has a note in the work folder, with a digest of its inputs and the checksum of its bytes. After a kill
the same command verifies the shards that have notes and writes the others. A shard is the same in every run. The digest
has the size and time of each picture's file, since a picture may be replaced between a failed run and the next.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.schema import SCHEMA_VERSION, Box, Clip, Picture, ShopImage, encode_clip, encode_image
from data_pipeline.format.tfrecord import ShardWriter, file_crc, index_path, new_shard, write_file
from data_pipeline.layouts.listing import NONE, ClipEntry, ClipListing, ClipSource, FoundFrame, Layout, RowLocation
from data_pipeline.layouts.pictures import PictureReader, decode_picture, oddities


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:  # a clip or shop image to write
    ordinal: int
    id: str
    source: ClipSource | ShopImage
    product: str
    product_index: int
    image_index: int = NONE  # of a clip: row of its shop image


Found = list[tuple[Entry, Clip | Picture]]  # entries with what is to be stored of them


@dataclasses.dataclass
class ShardNote:
    """The result of writing a shard, kept as JSON. The first three lists have an entry a record, in order."""

    inputs: str  # digest of what decides the shard's bytes
    size: int = 0
    crc: int = 0
    index_size: int = 0
    index_crc: int = 0
    ordinals: list[int] = dataclasses.field(default_factory=list)
    frames: list[int] = dataclasses.field(default_factory=list)  # number of stored frames; none for shop images
    original_frames: list[int] = dataclasses.field(default_factory=list)
    failed_downloads: int = 0
    lost_boxes: int = 0  # number of frames whose boxes `scale_boxes` cannot place
    faults: list[Fault] = dataclasses.field(default_factory=list)
    left_out: list[int] = dataclasses.field(default_factory=list)  # ordinals with a picture that exists and is at fault
    odd_pictures: dict[str, int] = dataclasses.field(default_factory=dict)  # numbers of stored ones, by ODDITIES


def write_shard(
    layout: Layout, entries: Sequence[Entry], split: str, path: Path, work: Path, skip_faults: bool
) -> ShardNote:
    """Writes a shard, its index and its note in `work`, and returns the note. Keeps a finished shard of equal inputs.

    skip_faults: leave out entries at fault. Otherwise a fault prevents all writing, and the note returned has it.
    """
    faults: list[Fault] = []
    found = _find_pictures(layout, entries, split, faults)
    # The digest has what decides the shard's bytes. A clip's RowLocation changes when another line is corrected.
    state = functools.cache(functools.partial(_file_state, layout.source))  # the pictures of a tar share one file
    states = [[state(picture.path) for picture in _pictures_of(item)] for _, item in found]
    decisive = [
        (entry.ordinal, entry.image_index, entry.product, entry.product_index, item)
        if isinstance(item, Clip)
        else (entry, item)
        for entry, item in found
    ]
    inputs = hashlib.sha256(repr((SCHEMA_VERSION, decisive, states, faults)).encode()).hexdigest()
    note_path = work / f"{path.name}.json"
    pictures = PictureReader(layout.source)
    if (finished := _finished(path, note_path, inputs)) and (
        not finished.faults or (skip_faults and _still_at_fault(pictures, found, finished.left_out))
    ):
        return finished
    note = ShardNote(inputs, faults=faults)
    try:
        with new_shard(path) as writer:
            _write_records(writer, pictures, found, note)
            if note.faults and not skip_faults:
                raise _FaultsError
    except _FaultsError:
        return note
    note.size, note.crc = writer.offsets[-1], writer.crc
    note.index_size, note.index_crc = index_path(path).stat().st_size, file_crc(index_path(path))
    write_file(note_path, json.dumps(dataclasses.asdict(note)).encode())
    return note


def _pictures_of(item: Clip | Picture) -> Sequence[Picture]:
    return item.frames if isinstance(item, Clip) else (item,)


def _file_state(source: Path, path: str) -> tuple[int, int] | None:
    """Returns a file's size in bytes and time of change in ns, None if it cannot be asked: reading it is a fault."""
    try:
        stat = os.stat(source / path)
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns


class _FaultsError(Exception):
    """Ends a shard that must not be written."""


def _write_records(writer: ShardWriter, pictures: PictureReader, found: Found, note: ShardNote) -> None:
    odd: collections.Counter[str] = collections.Counter()
    for entry, item in found:
        pictures.odd.clear()
        try:
            data, lost_boxes = _encode(pictures, entry, item)
        except BadInputError as err:
            note.faults.append(_fault(err, entry))
            note.left_out.append(entry.ordinal)
            continue
        writer.write(data)
        odd.update(pictures.odd)
        note.ordinals.append(entry.ordinal)
        if isinstance(item, Clip):
            note.frames.append(len(item.frames))
            note.original_frames.append(item.original_frames)
            note.failed_downloads += item.failed_downloads
            note.lost_boxes += lost_boxes
    note.odd_pictures = dict(odd)


def _find_pictures(layout: Layout, entries: Sequence[Entry], split: str, faults: list[Fault]) -> Found:
    found: Found = []
    for entry in entries:
        try:
            if isinstance(entry.source, ShopImage):
                found.append((entry, layout.find_image(entry.source, split)))
            else:
                found.append((entry, make_clip(*layout.find_frames(entry.source, split))))
        except BadInputError as err:
            faults.append(_fault(err, entry))
    return found


def make_clip(listed: ClipEntry, found: Sequence[FoundFrame]) -> Clip:
    """Returns the clip that `Layout.find_frames` found, with the frames to store and boxes in original pixels.

    Raises BadInputError if a frame has no picture although its download did not fail, or if no frame has one.
    """
    pictures: dict[int, Picture] = {}  # by position
    for frame in found:
        if isinstance(frame.picture, BadInputError):
            raise frame.picture
        if frame.picture is not None:
            pictures[frame.position] = frame.picture
    if not pictures:
        detail = f"found none of its {len(listed.frames)} frames (all downloads failed), needs one; "
        detail += "download them again (delete their shards' _stats.json first, or img2dataset skips these), or "
        raise BadInputError("clip without frames", f"{detail}convert with --on-error=skip, which leaves the clip out.")
    failed = len(found) - len(pictures)
    only_in_rows = ("product", "category", "category_name", "scale", "duration", "number")
    return Clip(
        id=listed.clip_id,
        livestream=listed.livestream,
        frames=tuple(pictures.values()),
        positions=tuple(pictures),
        original_frames=len(listed.frames) - failed,
        image_ids=listed.truth if isinstance(listed, ClipListing) else (listed.image_id,),
        boxes=None if listed.boxes is None else tuple(listed.boxes[position] for position in pictures),
        title=listed.title if isinstance(listed, ClipListing) else listed.image_title,
        speech=listed.speech,
        failed_downloads=failed,
        **{name: getattr(listed, name, "") for name in only_in_rows},
    )


def _encode(pictures: PictureReader, entry: Entry, item: Clip | Picture) -> tuple[bytes, int]:
    """Returns the data of an entry's record, and the number of its frames whose boxes cannot be placed.

    Raises BadInputError for a picture that cannot be used.
    """
    if isinstance(item, Picture):
        assert isinstance(entry.source, ShopImage)
        data, _ = _read(pictures, item)
        return encode_image(entry.source, data, ordinal=entry.ordinal, product_index=entry.product_index), 0
    frames = [_read(pictures, picture) for picture in item.frames]
    lost_boxes = 0
    if item.boxes is not None:
        boxes = list(map(scale_boxes, item.boxes, item.frames, [size for _, size in frames]))
        lost_boxes = boxes.count(None)
        item = dataclasses.replace(item, boxes=tuple(each or () for each in boxes))
    clip = dataclasses.replace(item, product=entry.product)
    indices = {"image_index": entry.image_index, "product_index": entry.product_index}
    return encode_clip(clip, [data for data, _ in frames], ordinal=entry.ordinal, **indices), lost_boxes


def _read(pictures: PictureReader, picture: Picture) -> tuple[bytes, tuple[int, int]]:
    """Returns a picture's bytes and (width, height), decoded as a check. Raises BadInputError if it cannot be used."""
    data = pictures.read(picture)
    decoded = decode_picture(data, f"{picture.path}/{picture.member}" if picture.member else picture.path)
    pictures.odd.update(oddities(decoded, picture.member or picture.path))
    return data, decoded.size


def scale_boxes(boxes: Sequence[Box], picture: Picture, size: tuple[int, int]) -> tuple[Box, ...] | None:
    """Returns boxes in the original's pixels in those of the stored picture, of `size` (w, h); equal if not shrunk.

    None if there are boxes, but the picture has not its original's shape, so that it was padded or cropped, or a
    download does not tell the original's size.
    """
    if picture.original_size is None or not boxes:
        return tuple(boxes)
    if not _same_shape(size, picture.original_size):
        return None
    x, y = (stored / original for stored, original in zip(size, picture.original_size, strict=True))
    return tuple((left * x, top * y, right * x, bottom * y) for left, top, right, bottom in boxes)


def _same_shape(size: tuple[int, int], original: tuple[int, int]) -> bool:
    """Returns whether a picture of `size` (w, h) can be the whole original, shrunk, with a side rounded to pixels."""
    width, height = size
    return all(original) and (
        abs(width - height * original[0] / original[1]) <= 1 or abs(height - width * original[1] / original[0]) <= 1
    )


def _fault(error: BadInputError, entry: Entry) -> Fault:
    source = entry.source
    if isinstance(source, ShopImage):
        return error.at(error.file or source.reference, 0, f"image {entry.id}")
    return error.at(source.file, source.number if isinstance(source, RowLocation) else 0, f"clip {entry.id}")


def _finished(path: Path, note_path: Path, inputs: str) -> ShardNote | None:
    """Returns a finished shard's note; None if there is none, inputs differ, or shard or index have other bytes."""
    try:
        note = ShardNote(**json.loads(note_path.read_bytes()))
        sound = note.inputs == inputs and (note.size, note.crc) == (path.stat().st_size, file_crc(path))
        sound = sound and note.index_crc == file_crc(index_path(path))
    except (OSError, ValueError, TypeError):
        return None
    note.faults = [Fault(**fault) for fault in note.faults]  # type: ignore[arg-type]
    return note if sound else None


def _still_at_fault(pictures: PictureReader, found: Found, left_out: Sequence[int]) -> bool:
    """Returns whether no entry that a finished shard left out can be encoded now: no picture was corrected."""
    for entry, item in found:
        if entry.ordinal in left_out:
            with contextlib.suppress(BadInputError):
                _encode(pictures, entry, item)
                return False
    return True
