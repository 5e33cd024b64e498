"""The end of a conversion: columns, tables, galleries and truth of the clips that were stored, and the manifest."""

import dataclasses
import io
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.conversion.shards import ShardNote
from data_pipeline.faults import Fault
from data_pipeline.format.manifest import CLIP_COLUMNS, COLUMNS, TABLE_FILES, content_hash, manifest_hash, shard_name
from data_pipeline.format.schema import SCHEMA_VERSION
from data_pipeline.format.tfrecord import file_crc, index_path, write_file
from data_pipeline.layouts.listing import NONE, TABLES, Listing, reasons


@dataclasses.dataclass
class Converted:
    """One split with its shards on disk. Rows count stored records, ordinals count listed ones."""

    listing: Listing
    images: list[ShardNote]
    image_rows: NDArray[np.int32]  # row of each listed image; NONE: left out. One longer, so that NONE gives NONE
    true_rows: NDArray[np.int32]  # row of each listed clip's shop image in its gallery; NONE: left out
    clips: list[ShardNote] = dataclasses.field(default_factory=list)

    @classmethod
    def with_images(cls, listing: Listing, images: list[ShardNote], *, skip_faults: bool) -> Self:
        """Rows of the images that were stored; of all that are listed if faults are to be mended, not skipped.

        The clips' shards then are what they will be when the images are mended, and stay.
        """
        stored = [ordinal for note in images for ordinal in note.ordinals]
        ordinals = stored if skip_faults else list(range(len(listing.images)))
        rows = np.full(len(listing.images) + 1, NONE, np.int32)
        rows[ordinals] = np.arange(len(ordinals))
        return cls(listing, images, rows, rows[listing.columns["image"]])

    @cached_property
    def without_image(self) -> frozenset[int]:
        """Clips that are left out because their shop image is, or because the list was at fault."""
        return frozenset(np.flatnonzero(self.true_rows == NONE).tolist())

    @property
    def faults(self) -> list[Fault]:
        return [*self.listing.faults, *(fault for note in (*self.images, *self.clips) for fault in note.faults)]

    @property
    def reasons(self) -> dict[str, int]:
        """Fault -> how many, and clips left out for their shop image's."""
        left_out = np.count_nonzero((self.true_rows == NONE) & (self.listing.columns["image"] != NONE))
        return reasons(self.faults) | ({"shop image left out": int(left_out)} if left_out else {})

    @property
    def num_clips(self) -> int:
        return sum(len(note.ordinals) for note in self.clips)

    @property
    def num_images(self) -> int:
        return sum(len(note.ordinals) for note in self.images)

    @property
    def skipped_clips(self) -> int:
        return self.listing.listed - self.num_clips

    @property
    def skipped_images(self) -> int:
        return self.listing.lost_images + len(self.listing.images) - self.num_images

    @cached_property
    def galleries(self) -> dict[str, list[int]]:
        """Livestream -> rows of the images that were stored, in the order of the file."""
        return {
            livestream: [int(row) for row in self.image_rows[shelf] if row != NONE]
            for livestream, shelf in sorted(self.listing.galleries.items())
        }


def make_manifest(
    output: Path, identity: dict[str, Any], converted: Sequence[Converted], tables: dict[str, list[str]]
) -> dict[str, Any]:
    """Writes all that lies beside the shards, removes shards that an earlier list left; the manifest, unwritten."""
    files: dict[str, list[int]] = {}
    for split in converted:
        for kind, notes in (("images", split.images), ("clips", split.clips)):
            for number, note in enumerate(notes):
                name = shard_name(split.listing.split, kind, number, len(notes))
                files[name] = [note.size, note.crc]
                files[index_path(Path(name)).name] = [note.index_size, note.index_crc]
    for stale in {path.name for path in output.glob("*.tfrecord*")} - set(files):
        (output / stale).unlink()
    (output / COLUMNS).mkdir(exist_ok=True)
    contents = {f"{TABLE_FILES[name]}.txt": _lines(texts) for name, texts in tables.items()}
    for split in converted:
        contents |= {f"{split.listing.split}-{name}": data for name, data in _column_files(split).items()}
    for name, data in contents.items():
        path = output / COLUMNS / name
        write_file(path, data)
        files[f"{COLUMNS}/{name}"] = [len(data), file_crc(path)]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "stored_frames": identity["stored_frames"],
        "splits": {split.listing.split: _counts(split) for split in converted},
        "files": dict(sorted(files.items())),
    }
    manifest = {"content_hash": content_hash(manifest), **manifest}
    return {"manifest_hash": manifest_hash(manifest), **manifest}


def _column_files(split: Converted) -> dict[str, bytes]:
    listing = split.listing
    clips = np.array([ordinal for note in split.clips for ordinal in note.ordinals], np.int32)
    images = np.array([ordinal for note in split.images for ordinal in note.ordinals], np.int32)
    columns = {name: listing.columns[name][clips] for name in TABLES}
    columns["image"] = split.true_rows[clips]
    columns["frames"] = np.array([count for note in split.clips for count in note.frames], np.int32)
    columns["original_frames"] = np.array([count for note in split.clips for count in note.original_frames], np.int32)
    columns["ordinal"] = clips
    files = {f"clips-{name}.npy": _npy(columns[name]) for name in CLIP_COLUMNS}
    files["clips-id.txt"] = _lines([clip_id.decode() for clip_id in listing.clip_ids[clips]])
    files["images-id.txt"] = _lines([listing.images[ordinal].id for ordinal in images])
    files["images-product.npy"] = _npy(listing.image_products[images])
    files["images-ordinal.npy"] = _npy(images)
    files["gallery.npy"] = _npy(np.array([row for shelf in split.galleries.values() for row in shelf], np.int32))
    if listing.split == "test":
        files["truth.json"] = encode_json(listing.truth)
    return files


def _counts(split: Converted) -> dict[str, Any]:
    """What the manifest says of a split. Queries of the truth file count in Recall even without a record."""
    truth = len(split.listing.truth) if split.listing.split == "test" else split.num_clips
    return {
        "clips": {"records": split.num_clips, "shards": [len(note.ordinals) for note in split.clips]},
        "images": {"records": split.num_images, "shards": [len(note.ordinals) for note in split.images]},
        "frames": sum(sum(note.frames) for note in split.clips),
        "galleries": {livestream: len(shelf) for livestream, shelf in split.galleries.items()},
        "gallery_rows": sum(map(len, split.galleries.values())),
        "truth": truth,
    }


def encode_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _lines(texts: Sequence[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def _npy(values: NDArray[np.int32]) -> bytes:
    file = io.BytesIO()
    np.save(file, values.astype("<i4"), allow_pickle=False)
    return file.getvalue()
