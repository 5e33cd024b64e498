"""JSON objects that contain a digest of themselves."""

import hashlib
import json
from typing import Any


def sha256_of(value: Any) -> str:
    """Returns the hex SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Returns `value` with its digest as "sha256". No later schema may change this, by which damage shows."""
    return {**value, "sha256": sha256_of(value)}


def unseal(sealed: Any) -> dict[str, Any]:
    """Returns the dict that was sealed. Raises ValueError, TypeError or KeyError for anything else."""
    value = dict(sealed)
    if value.pop("sha256") != sha256_of(value):
        raise ValueError("other bytes than were saved")
    return value
