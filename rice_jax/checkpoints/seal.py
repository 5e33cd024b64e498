"""JSON objects that contain a digest of themselves."""

import hashlib
import json
from pathlib import Path
from typing import Any

from etils import epath


def sha256_of(value: Any) -> str:
    """Returns the hex SHA-256 of a JSON value, written with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Returns `value` with the digest of all its fields as "sha256".

    No later schema may change this: the digest tells a file of a newer version from a damaged one.
    """
    return {**value, "sha256": sha256_of(value)}


def unseal(sealed: Any) -> dict[str, Any]:
    """Returns the dict that was sealed.

    Raises:
      ValueError: the digest is not that of the other fields.
      TypeError, KeyError: `sealed` is no dict, or has no digest.
    """
    value = dict(sealed)
    if value.pop("sha256") != sha256_of(value):
        raise ValueError("other bytes than were saved")
    return value


def write_whole(path: Path | epath.Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that an interrupted write leaves no part of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)
