"""Checkpoints: one Orbax item a step, holding the state and what is needed to know that it belongs to this run."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from rice_jax.config import warn
from rice_jax.step import State
from rice_jax.version import __version__

ITEMS = ("weights", "optimizer", "meta")


class Checkpoints:
    """The checkpoints of a workdir, saved asynchronously; step N means N updates done, which is the data's position."""

    def __init__(self, workdir: str | Path, *, kept: int | None = None) -> None:
        self.path = epath.Path(workdir).absolute() / "checkpoints"  # epath: object stores too
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept, cleanup_tmp_directories=kept is not None, create=kept is not None
        )
        # Named handlers: without them a fresh process cannot read the metadata of what an earlier one saved.
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in ITEMS[:2]:
            handler = ocp.StandardCheckpointHandler()
            registry.add(name, ocp.args.StandardSave, handler)
            registry.add(name, ocp.args.StandardRestore, handler)
        handler = ocp.JsonCheckpointHandler()
        registry.add("meta", ocp.args.JsonSave, handler)
        registry.add("meta", ocp.args.JsonRestore, handler)
        self._manager = ocp.CheckpointManager(self.path, options=options, handler_registry=registry)

    def steps(self) -> list[int]:
        """Steps that are there with all their parts, oldest first.

        An interrupted save leaves a folder of another name, which Orbax does not count; a step's folder that lacks a
        part is told of and passed over.
        """
        whole = []
        for step in sorted(self._manager.all_steps()):
            missing = [name for name in ITEMS if not (self.path / str(step) / name).exists()]
            if missing:
                warn(f"{self.path}/{step}: lacks {', '.join(missing)} and is passed over; remove that folder.")
            else:
                whole.append(step)
        return whole

    def latest(self) -> int | None:
        """Newest complete step."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Starts a save and returns; the state may be donated at once. A step that is there already is left alone.

        Raises:
          ValueError: the disk is full, or Orbax would not save this step (its own answer is a silent False).
        """
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(part) for name, part in _split(state).items()}
        items["meta"] = ocp.args.JsonSave({"step": step, "version": __version__, **meta})
        with self._told():  # also what went wrong in the save before, which went on in the background
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            raise ValueError(
                f"{self.path}: step {step} was not saved, because a newer one is there; remove that folder."
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            if "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
                raise ValueError(
                    f"{self.path}: no space left for a checkpoint; free some and run the same command again, which "
                    "goes on from the newest complete one."
                ) from error
            raise

    def meta(self, step: int) -> dict[str, Any]:
        return self._read(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def restore(self, step: int, abstract: State) -> State:
        """The state of a step in the shardings of `abstract`, whatever mesh it was saved from.

        Raises:
          ValueError: a leaf of another shape or dtype, or one too many or too few, each named.
        """
        parts = self._restore(step, _split(abstract))
        return State(**parts["weights"], **parts["optimizer"])

    def restore_params(self, step: int, abstract: State) -> Any:
        """The parameters to use, without the optimiser's: their average, where the run keeps one. Errors as above."""
        weights = self._restore(step, {"weights": _split(abstract)["weights"]})["weights"]
        return weights["average"] or weights["params"]

    def _restore(self, step: int, parts: dict[str, Any]) -> dict[str, Any]:
        self._check(step, parts)
        return self._read(step, {name: ocp.args.StandardRestore(part) for name, part in parts.items()})

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        with self._readable(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            return {name: restored[name] for name in items}

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """What Orbax raises on a damaged step, as one line."""
        try:
            yield
        except (ValueError, KeyError, OSError, jax.errors.JaxRuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(
                f"{self.path}/{step} is damaged ({reason}); remove that folder, and the same command goes on from the "
                "step before it."
            ) from error

    def _check(self, step: int, parts: dict[str, Any]) -> None:
        # Orbax casts another dtype in silence, and names no leaf when shapes differ.
        with self._readable(step):
            metadata = self._manager.item_metadata(step)
            found = _shapes({name: metadata[name] for name in parts})
            if not found:
                raise ValueError("its metadata name no array")
        wanted = _shapes(parts)
        faults = [
            f"{name}: checkpoint {found.get(name, 'has none')}, config {wanted.get(name, 'has none')}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if faults:
            shown = "\n  ".join(faults[:20])
            raise ValueError(f"{self.path}/{step} is of another model ({len(faults)} leaves differ):\n  {shown}")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until what was started is on disk, however the block ended; raises what went wrong on the way."""
        with self._told():
            self._manager.wait_until_finished()
        self._manager.close()


def _split(state: State) -> dict[str, Any]:
    """In two items, so that whoever only encodes reads a third of the bytes."""
    weights = {"params": state.params, "average": state.average}
    return {"weights": weights, "optimizer": {"step": state.step, "opt_state": state.opt_state}}


def _shapes(tree: Any) -> dict[str, str]:
    """{path: 'shape dtype'}; Orbax' metadata spells containers otherwise than the state, names are what agrees."""

    def name(path: tuple[Any, ...]) -> str:
        return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    return {name(path): f"{tuple(leaf.shape)} {leaf.dtype}" for path, leaf in leaves}


def write_config(workdir: Path, text: str) -> None:
    """The config beside the checkpoints: what a run is, from its first minute."""
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / "config.json.tmp"
    temporary.write_text(text)
    temporary.rename(workdir / "config.json")


def read_config(workdir: Path) -> str | None:
    path = workdir / "config.json"
    return path.read_text() if path.exists() else None
