"""The manifest of a converted set: names of its files and columns, and its hashes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.format.retries import retried
from data_pipeline.format.schema import SCHEMA_VERSION

MANIFEST = "manifest.json"
CONVERT_AGAIN = "convert again into another folder"  # a conversion never changes a finished set
COLUMNS = "columns"  # the folder
SPLITS = ("train", "val", "test")
CLIP_COLUMNS = (
    "image", "product", "livestream", "category", "scale", "duration", "number", "frames", "original_frames", "ordinal",
)  # fmt: skip
IMAGE_COLUMNS = ("product", "ordinal")
TABLE_FILES = {  # column: the file of its texts without .txt; a number in the column is a line of the file, from 0
    "livestream": "livestreams",
    "category": "categories",
    "product": "products",
    "scale": "scales",
    "duration": "durations",
    "number": "numbers",
}


def content_hash(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hex) of the entries schema_version, files and splits. Raises KeyError if one is missing."""
    content = {"schema_version": manifest["schema_version"], "files": manifest["files"], "splits": manifest["splits"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hex) of all entries of a manifest except this hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def shard_name(split: str, kind: str, number: int, count: int) -> str:
    """Returns "SPLIT-KIND-00000-of-00002.tfrecord" for shard number 0 of a count of 2. kind: "clips" or "images"."""
    return f"{split}-{kind}-{number:05d}-of-{count:05d}.tfrecord"


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of the converted set in the folder `path`, after a check of its version and its hashes.

    Raises FileNotFoundError if there is none, ValueError if damaged, edited or of another version, else OSError.
    """
    try:
        text = retried((path / MANIFEST).read_bytes, str(path / MANIFEST)).decode("utf-8")
        manifest = json.loads(text)
        version = manifest["schema_version"]
    except (FileNotFoundError, NotADirectoryError) as err:
        raise FileNotFoundError(
            f"{path / MANIFEST}: found no manifest, needs a finished conversion; correct the path, or run "
            "python -m data_pipeline.convert (again: it goes on where it stopped)."
        ) from err
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise ValueError(f"{path / MANIFEST}: found no manifest of a conversion ({err}); {CONVERT_AGAIN}.") from err
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path / MANIFEST}: found schema version {version}, needs {SCHEMA_VERSION}; "
            f"{CONVERT_AGAIN}, or use the version of rice_jax that wrote it."
        )
    try:
        sound = manifest["content_hash"] == content_hash(manifest)
        sound &= manifest.get("manifest_hash", manifest_hash(manifest)) == manifest_hash(manifest)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path / MANIFEST}: found a hash that disagrees with the file's content; restore it from a copy, or "
            f"{CONVERT_AGAIN}."
        )
    return manifest
