"""Files sealed with a digest of their own text."""

import hashlib
import json
from typing import Any

from etils import epath


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """With a digest of itself, which no later schema may change: by it a newer file is told from a damaged one."""
    return {**value, "sha256": sha256_of(value)}


def unseal(sealed: Any) -> dict[str, Any]:
    value = dict(sealed)
    if value.pop("sha256") != sha256_of(value):
        raise ValueError("other bytes than were saved")
    return value


def write_whole(path: epath.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)
