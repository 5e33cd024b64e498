"""One step's folder: checks that it is complete, and restores arrays whose digests are those that were saved."""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from rice_jax.checkpoints.digests import as_text, digests, shapes_and_dtypes
from rice_jax.checkpoints.orbax import ARRAYS, ITEMS, Orbax
from rice_jax.checkpoints.reading import DamagedError, MissingError, UnfinishedError
from rice_jax.errors import warn
from rice_jax.version import __version__

DIGEST_FILE = "digest.json"
SCHEMA = 2  # of digest.json; steps of schema 1 have no such file
TIME_FILE = "commit_success.txt"  # of Orbax, which has a time and is read by nothing
SMALL = 2**16  # bytes
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def sha256_of(value: Any) -> str:
    """Returns the hex SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `value` with its sha256_of as "sha256". No later schema may change this: it shows damage."""
    return {**value, "sha256": sha256_of(value)}


# --- Files ---


def files_of(folder: Path, items: Collection[str] = ITEMS) -> dict[str, str]:
    """Returns {path below a step's folder: "BYTES SHA256"} of the files of `items`.

    Large files of arrays, whose numbers have digests, have "BYTES" alone. Raises OSError if a file cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    found = {}
    for item in items:
        for parent, _, names in os.walk(folder / item, onerror=stop):
            for path in (Path(parent, name) for name in names if name != TIME_FILE):
                size = path.stat().st_size
                is_large = path.parent.name == "d" and size > SMALL  # `d` is OCDBT's, TensorStore's file format
                sha = "" if is_large else f" {hashlib.sha256(path.read_bytes()).hexdigest()}"
                found[path.relative_to(folder).as_posix()] = f"{size}{sha}"
    return found


def check_files(folder: Path, saved: dict[str, str], items: Collection[str]) -> None:
    """Raises MissingError if a file of `items` is missing or has another size than in `saved`, DamagedError if it has
    other bytes; `saved` is files_of when the step was saved.
    """
    saved = {path: about for path, about in saved.items() if path.partition("/")[0] in items}
    try:
        found = files_of(folder, items) if saved else {}
    except GONE as error:
        raise MissingError(f"{error.filename} is missing") from error
    for path, about in saved.items():
        if path not in found:
            raise MissingError(f"{folder} is damaged ({path} is missing)")
        size, saved_size = found[path].split()[0], about.split()[0]
        if size != saved_size:
            raise MissingError(f"{folder} is damaged ({path} has {size} bytes in place of {saved_size})")
        if found[path] != about:
            raise DamagedError(f"{folder} is damaged ({path} has other bytes than were saved)")


def check_saved(orbax: Orbax, folder: Path, leaves: dict[str, str]) -> None:
    """Raises ValueError unless a step that Orbax has just written can be read: all `leaves` with shape and dtype.

    Raises also what Orbax raises.
    """
    missing = [name for name in ARRAYS if not (folder / name / "manifest.ocdbt").is_file()]
    if missing:
        raise ValueError(f"it cannot be read back: {', '.join(missing)} has no manifest.ocdbt")
    found = orbax.leaves(folder, ARRAYS)
    if found != leaves:
        wrong = sorted(name for name in found.keys() | leaves.keys() if found.get(name) != leaves.get(name))
        raise ValueError(f"it cannot be read back: {len(wrong)} arrays are missing or differ, such as {wrong[0]}")


# --- JSON of ours ---


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object. Raises MissingError if the file is missing or no JSON object, OSError if unreadable."""
    try:
        value = json.loads(path.read_bytes().decode())
    except GONE as error:
        raise MissingError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise MissingError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise MissingError(f"{path} is damaged (no JSON object)")
    return value


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns the dict that the step was saved with. Raises as read_json does."""
    return read_json(folder / "meta" / "metadata")  # the file name of Orbax' JSON handler


def read_digests(folder: Path) -> dict[str, Any]:
    """Returns the content of digest.json without its "sha256"; an empty dict for a complete step of schema 1.

    Raises DamagedError if the step is not complete, or digest.json does not fit the rest of the folder, OSError if it
    cannot be read, and a plain ValueError if a newer version saved the step.
    """
    try:
        names = set(os.listdir(folder))
    except GONE as error:
        raise MissingError(f"{folder} is no folder") from error
    if missing := [name for name in ITEMS if name not in names]:
        raise MissingError(f"{folder} lacks {', '.join(missing)}")
    meta = read_meta(folder)
    if DIGEST_FILE not in names:
        if "schema" in meta:
            raise UnfinishedError(f"{folder} has no {DIGEST_FILE}: its save was not finished")
        return {}
    found = read_json(folder / DIGEST_FILE)
    if found.pop("sha256", None) != sha256_of(found):
        raise DamagedError(f"{folder / DIGEST_FILE} is damaged (other bytes than were saved)")
    if found["schema"] > SCHEMA:
        raise ValueError(
            f"{folder} has schema {found['schema']} of version {meta.get('version')}, and this is version "
            f"{__version__} with schema {SCHEMA}; use that version or a newer one."
        )
    if found["meta"] != sha256_of(meta):
        raise DamagedError(f"{folder}/meta is damaged (other bytes than were saved)")
    if found["step"] != int(folder.name):
        raise DamagedError(f"{folder} contains step {found['step']}")
    return found


# --- Arrays ---


def restore_items(orbax: Orbax, folder: Path, saved: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """Returns `items` ("weights", "optimizer" or both) with the step's arrays in place of ShapeDtypeStructs.

    `saved` is the step's digest.json: "leaves", {path: "16 hex digits (32, 16) float32"}, and "files", as files_of. It
    is empty for a step of schema 1, and then a warning says that its numbers could not be checked. The arrays have the
    shardings in `items`. Raises DamagedError if files or numbers differ from those saved, a plain ValueError if the
    step has other leaves than `items`, or leaves of other shapes or dtypes, and else what Orbax and jax raise.
    """
    check_files(folder, saved.get("files", {}), items)
    wanted = shapes_and_dtypes(items)
    leaves = {name: text for name, text in saved.get("leaves", {}).items() if name.partition("/")[0] in items}
    found = {name: text[17:] for name, text in leaves.items()} if leaves else orbax.leaves(folder, list(items))
    if not found:
        raise DamagedError(f"{folder} is damaged (its metadata name no array)")
    _check_same_model(folder, found, wanted)
    items = orbax.restore(folder, items)
    if not leaves:
        warn(f"{folder} is of a version without digests: whether its numbers are those saved cannot be checked.")
        return items
    restored_digests = zip(wanted, as_text(np.asarray(digests(items))), strict=True)
    wrong = [name for name, text in restored_digests if leaves[name][:16] != text]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise DamagedError(f"{folder} is damaged (other numbers than were saved in {shown})")
    return items


def _check_same_model(folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises ValueError, naming up to 20, if leaves differ in path, shape or dtype: Orbax casts dtypes silently."""
    faults = [
        f"{name}: checkpoint {found.get(name, 'has none')}, config {wanted.get(name, 'has none')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if faults:
        shown = "\n  ".join(faults[:20])
        raise ValueError(f"{folder} is of another model ({len(faults)} leaves differ):\n  {shown}")
