"""The manifest of a converted set: names of its files and columns, and its hashes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.format.schema import SCHEMA_VERSION

MANIFEST = "manifest.json"


COLUMNS = "columns"  # the folder


EVALUATION_SPLITS = ("val", "test")


CLIP_COLUMNS = (
    "image", "product", "livestream", "category", "scale", "duration", "number", "frames", "original_frames", "ordinal",
)  # fmt: skip


IMAGE_COLUMNS = ("product", "ordinal")


TABLE_FILES = {  # column: what its numbers mean, a text a line
    "product": "products",
    "livestream": "livestreams",
    "category": "categories",
    "scale": "scales",
    "duration": "durations",
    "number": "numbers",
}


def content_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over what the data set holds: names, sizes and checksums of shards, indices and columns.

    Source, options and converter version are not in it: the same data are the same data.
    """
    content = {"schema_version": manifest["schema_version"], "files": manifest["files"], "splits": manifest["splits"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over all that a manifest says, but for this hash."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def shard_name(split: str, kind: str, number: int, count: int) -> str:
    """kind: clips or images."""
    return f"{split}-{kind}-{number:05d}-of-{count:05d}.tfrecord"


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes().decode("utf-8"))
        version = manifest["schema_version"]
    except (FileNotFoundError, NotADirectoryError) as err:
        raise FileNotFoundError(
            f"{path / MANIFEST}: found no manifest, needs a finished conversion; "
            "run python -m data_pipeline.convert (again: it goes on where it stopped)."
        ) from err
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise ValueError(f"{path / MANIFEST}: found no manifest of a conversion ({err}); convert again.") from err
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path / MANIFEST}: found schema version {version}, needs {SCHEMA_VERSION}; "
            "convert the source again, or use the version of rice_jax that wrote it."
        )
    try:
        sound = manifest["content_hash"] == content_hash(manifest)
        sound &= manifest.get("manifest_hash", manifest_hash(manifest)) == manifest_hash(manifest)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path / MANIFEST}: found a hash that disagrees with what the file says; restore it, or convert again."
        )
    return manifest
