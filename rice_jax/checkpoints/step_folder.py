"""One step's folder: checks that it is complete, and restores arrays whose digests are those that were saved."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rice_jax.checkpoints.digests import as_text, digests, shapes_and_dtypes
from rice_jax.errors import warn
from rice_jax.version import __version__

ITEMS = ("weights", "optimizer", "meta")
DIGEST_FILE = "digest.json"
SCHEMA = 2  # of digest.json; steps of schema 1 have no such file

UNREADABLE = (  # what Orbax, TensorStore and JSON raise for bytes that they did not write
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, OSError, RuntimeError,
)  # fmt: skip


class DamagedError(ValueError):
    """A step's folder is incomplete, unreadable, or has other numbers than were saved. Another step may be used."""


def sha256_of(value: Any) -> str:
    """Returns the hex SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `value` with its sha256_of as "sha256". No later schema may change this: it shows damage."""
    return {**value, "sha256": sha256_of(value)}


def make_checkpointer() -> ocp.AsyncCheckpointer:
    """Returns a checkpointer that saves and restores ITEMS in one folder."""
    # Without named handlers a fresh process cannot read the metadata of what an earlier process saved.
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in ITEMS[:2]:
        handler = ocp.StandardCheckpointHandler()
        registry.add(name, ocp.args.StandardSave, handler)
        registry.add(name, ocp.args.StandardRestore, handler)
    registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    # Not Orbax' CheckpointManager: it takes any folder with a number as its name for a step, and deletes by own rules.
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=registry))


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """Returns the dict that the step was saved with. Raises DamagedError if unreadable, missing or no JSON object."""
    path = folder / "meta" / "metadata"  # the file name of Orbax' JSON handler
    with _damage_in(path):
        meta = json.loads(path.read_text())
        if not isinstance(meta, dict):
            raise ValueError("no JSON object")
        return meta


def read_digests(folder: epath.Path) -> dict[str, Any]:
    """Returns the content of digest.json without its "sha256"; an empty dict for a complete step of schema 1.

    Raises DamagedError if the step is not complete, or digest.json does not fit the rest of the folder, and a plain
    ValueError if a newer version saved the step.
    """
    missing = [name for name in ITEMS if not (folder / name).exists()]
    if missing:
        raise DamagedError(f"{folder} lacks {', '.join(missing)}")
    meta = read_meta(folder)
    if not (folder / DIGEST_FILE).exists():
        if "schema" in meta:
            raise DamagedError(f"{folder} has no {DIGEST_FILE}: its save was not finished")
        return {}
    with _damage_in(folder / DIGEST_FILE):
        found = dict(json.loads((folder / DIGEST_FILE).read_text()))
        if found.pop("sha256") != sha256_of(found):
            raise ValueError("other bytes than were saved")
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


def restore_items(
    checkpointer: ocp.AsyncCheckpointer, folder: epath.Path, saved: dict[str, str], items: dict[str, Any]
) -> dict[str, Any]:
    """Returns `items` ("weights", "optimizer" or both) with the step's arrays in place of ShapeDtypeStructs.

    `saved` is the "leaves" of digest.json, {path: "16 hex digits (32, 16) float32"}; empty for a step of schema 1, and
    then a warning says that its numbers could not be checked. The arrays have the shardings in `items`. Raises
    DamagedError if they cannot be read or have other digests than were saved, and a plain ValueError if the step has
    other leaves than `items`, or leaves of other shapes or dtypes.
    """
    wanted = shapes_and_dtypes(items)
    saved = {name: text for name, text in saved.items() if name.partition("/")[0] in items}
    found = {name: text[17:] for name, text in saved.items()}
    if not saved:
        with _damage_in(folder):
            metadata = checkpointer.metadata(folder).item_metadata
            found = shapes_and_dtypes({name: metadata[name] for name in items})
            if not found:
                raise ValueError("its metadata name no array")
    _check_same_model(folder, found, wanted)
    with _damage_in(folder):
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        restored = checkpointer.restore(folder, args=ocp.args.Composite(**args))
        items = {name: restored[name] for name in items}
    if not saved:
        warn(f"{folder} is of a version without digests: whether its numbers are those saved cannot be checked.")
        return items
    restored_digests = zip(wanted, as_text(np.asarray(digests(items))), strict=True)
    wrong = [name for name, text in restored_digests if saved[name][:16] != text]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise DamagedError(f"{folder} is damaged (other numbers than were saved in {shown})")
    return items


def _check_same_model(folder: epath.Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises ValueError, naming up to 20, if leaves differ in path, shape or dtype: Orbax casts dtypes silently."""
    faults = [
        f"{name}: checkpoint {found.get(name, 'has none')}, config {wanted.get(name, 'has none')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if faults:
        shown = "\n  ".join(faults[:20])
        raise ValueError(f"{folder} is of another model ({len(faults)} leaves differ):\n  {shown}")


@contextlib.contextmanager
def _damage_in(path: epath.Path) -> Iterator[None]:
    """Raises DamagedError, which names `path`, for any of the UNREADABLE errors in its block; others pass."""
    try:
        yield
    except UNREADABLE as error:
        raise DamagedError(f"{path} is damaged ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, at most 200 characters; without a message the error's class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
