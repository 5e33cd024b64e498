"""The end of a conversion: columns, tables, galleries and truth of the stored clips, and the manifest."""

import collections
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
from data_pipeline.layouts.listing import NONE, TABLES, Listing


@dataclasses.dataclass
class Converted:
    """One split with the notes of its shards. Rows count stored records, ordinals count listed ones."""

    listing: Listing
    images: list[ShardNote]
    image_rows: NDArray[np.int32]  # row by ordinal of a shop image; NONE: left out. One entry more maps NONE to NONE.
    true_rows: NDArray[np.int32]  # row of the true shop image by ordinal of a clip; NONE: clip or image is at fault
    clips: list[ShardNote] = dataclasses.field(default_factory=list)

    @classmethod
    def with_images(cls, listing: Listing, images: list[ShardNote], *, skip_faults: bool) -> Self:
        """Returns the split without clips yet, its shop images numbered by row.

        With skip_faults only stored images get a row. Otherwise all listed ones do, so that the clip shards written now
        stay valid when the images at fault are corrected.
        """
        stored = [ordinal for note in images for ordinal in note.ordinals]
        ordinals = stored if skip_faults else list(range(len(listing.images)))
        rows = np.full(len(listing.images) + 1, NONE, np.int32)
        rows[ordinals] = np.arange(len(ordinals))
        return cls(listing, images, rows, rows[listing.columns["image"]])

    @property
    def faults(self) -> list[Fault]:
        return [*self.listing.faults, *(fault for note in (*self.images, *self.clips) for fault in note.faults)]

    @property
    def reasons(self) -> dict[str, int]:
        """Number of faults by reason, sorted; last, unless 0, "shop image left out": clips whose image has no row."""
        counts = collections.Counter(fault.reason for fault in self.faults)
        left_out = np.count_nonzero((self.true_rows == NONE) & (self.listing.columns["image"] != NONE))
        return dict(sorted(counts.items())) | ({"shop image left out": int(left_out)} if left_out else {})

    @cached_property
    def clip_ordinals(self) -> NDArray[np.int32]:
        """Ordinals of the stored clips, by row. Cached: `clips` must be complete."""
        return np.array([ordinal for note in self.clips for ordinal in note.ordinals], np.int32)

    @cached_property
    def image_ordinals(self) -> NDArray[np.int32]:
        """Ordinals of the stored shop images, by row."""
        return np.array([ordinal for note in self.images for ordinal in note.ordinals], np.int32)

    @property
    def num_frames(self) -> int:
        return sum(sum(note.frames) for note in self.clips)

    @property
    def lost_boxes(self) -> int:
        return sum(note.lost_boxes for note in self.clips)

    @property
    def skipped_clips(self) -> int:
        return self.listing.listed - len(self.clip_ordinals)

    @property
    def skipped_images(self) -> int:
        return self.listing.lost_images + len(self.listing.images) - len(self.image_ordinals)

    @cached_property
    def galleries(self) -> dict[str, list[int]]:
        """Rows of each livestream's gallery, images without one left out, in the source's order; livestreams sorted."""
        return {
            livestream: [int(row) for row in self.image_rows[images] if row != NONE]
            for livestream, images in sorted(self.listing.galleries.items())
        }


def make_manifest(
    output: Path, identity: dict[str, Any], converted: Sequence[Converted], tables: dict[str, list[str]]
) -> dict[str, Any]:
    """Writes columns and tables (sorted texts by column), deletes stale shards, and returns the unwritten manifest."""
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
    contents = {f"{TABLE_FILES[name]}.txt": _encode_lines(texts) for name, texts in tables.items()}
    for split in converted:
        contents |= {f"{split.listing.split}-{name}": data for name, data in _column_files(split).items()}
    for name, data in contents.items():
        path = output / COLUMNS / name
        write_file(path, data)
        files[f"{COLUMNS}/{name}"] = [len(data), file_crc(path)]
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "stored_frames": identity["stored_frames"],
        "splits": {split.listing.split: _counts(split) for split in converted},
        "files": dict(sorted(files.items())),
    }
    manifest = {"content_hash": content_hash(manifest), **manifest}
    return {"manifest_hash": manifest_hash(manifest), **manifest}


def _column_files(split: Converted) -> dict[str, bytes]:
    """Returns the contents of a split's files in columns/, by name without the split; truth.json only for test."""
    listing, clips, images = split.listing, split.clip_ordinals, split.image_ordinals
    columns = {name: listing.columns[name][clips] for name in TABLES}
    columns["image"] = split.true_rows[clips]
    columns["frames"] = np.array([count for note in split.clips for count in note.frames], np.int32)
    columns["original_frames"] = np.array([count for note in split.clips for count in note.original_frames], np.int32)
    columns["ordinal"] = clips
    rows = [row for gallery in split.galleries.values() for row in gallery]
    return {
        **{f"clips-{name}.npy": _encode_npy(columns[name]) for name in CLIP_COLUMNS},
        "clips-id.txt": _encode_lines([clip_id.decode() for clip_id in listing.clip_ids[clips]]),
        "images-id.txt": _encode_lines([listing.images[ordinal].id for ordinal in images]),
        "images-product.npy": _encode_npy(listing.image_products[images]),
        "images-ordinal.npy": _encode_npy(images),
        "gallery.npy": _encode_npy(np.array(rows, np.int32)),
        **({"truth.json": encode_json(listing.truth)} if listing.split == "test" else {}),
    }


def _counts(split: Converted) -> dict[str, Any]:
    """Returns a split's counts in the manifest. "truth": of test all entries of its truth, else the stored clips."""
    return {
        "clips": {"records": len(split.clip_ordinals), "shards": [len(note.ordinals) for note in split.clips]},
        "images": {"records": len(split.image_ordinals), "shards": [len(note.ordinals) for note in split.images]},
        "frames": split.num_frames,
        "galleries": {livestream: len(rows) for livestream, rows in split.galleries.items()},
        "gallery_rows": sum(map(len, split.galleries.values())),
        "truth": len(split.listing.truth) if split.listing.split == "test" else len(split.clip_ordinals),
    }


def encode_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _encode_lines(texts: Sequence[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def _encode_npy(values: NDArray[np.int32]) -> bytes:
    file = io.BytesIO()
    np.save(file, values.astype("<i4"), allow_pickle=False)
    return file.getvalue()
