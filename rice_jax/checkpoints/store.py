"""Checkpoints: one folder a step, written by Orbax in the background, and complete only with our digest of every leaf.

    checkpoints/6/{weights,optimizer,meta}    Orbax', put in place by a rename
    checkpoints/6/digest.json                 ours, written last

Orbax restores flipped bits in silence and takes any folder with a number's name for a step. Hence a step counts only
with its digest.json, and what is restored must have the digests that were saved; else the step before it is used, and
the bad one is renamed to 6.damaged before anything is saved anew.
"""

import contextlib
import errno
import functools
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rice_jax.checkpoints.digests import as_text, digests, shapes_and_dtypes
from rice_jax.checkpoints.seal import seal, sha256_of, unseal, write_whole
from rice_jax.errors import warn
from rice_jax.parallel import hosts
from rice_jax.training.step import State
from rice_jax.version import __version__

ITEMS = ("weights", "optimizer", "meta")


MARK = "digest.json"


SCHEMA = 2  # 1: without digests


UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax is writing


ASIDE, DELETED = ".damaged", ".deleted"


RETRY_SECONDS = 60.0


FINAL_PAUSES = (0.0, 1.0, 5.0)  # seconds before each attempt at the last save


# What Orbax, TensorStore and JSON raise on bytes that are not what they wrote.
UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    OSError,
    RuntimeError,
)


UNWRITABLE = (ValueError, OSError, RuntimeError)


Read = TypeVar("Read")


class DamagedError(ValueError):
    """A step that is not what was saved; whoever can use another one catches it."""


class Checkpoints:
    """The checkpoints of a workdir, saved asynchronously; step N means N updates done, which is the data's position."""

    def __init__(
        self, workdir: str | Path, *, kept: int | None = None, kept_every: int = 0, kept_best: bool = False
    ) -> None:
        """Looks at what is there and changes nothing; what is no checkpoint is told of.

        Args:
          workdir: of the run; its folder `checkpoints` is made by the first save.
          kept: newest steps to keep; None only reads.
          kept_every: steps that divide by it are kept for good; 0: none.
          kept_best: the step with the highest of `figures` is kept too.

        Raises:
          ValueError: a step that a newer version saved.
        """
        self.path = epath.Path(workdir).absolute() / "checkpoints"  # epath: object stores too
        self.figures: dict[int, float] = {}  # recall@1 by step, as evaluations come in
        self._kept, self._kept_every, self._kept_best = kept, kept_every, kept_best
        self._marks: dict[int, dict[str, Any]] = {}  # of the complete steps; empty where the schema had none
        self._bad: dict[int, str] = {}
        self._saving: threading.Thread | None = None
        self._failure: tuple[float, str] | None = None  # when and why the newest save failed
        # Named handlers: without them a fresh process cannot read the metadata of what an earlier one saved.
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in ITEMS[:2]:
            handler = ocp.StandardCheckpointHandler()
            registry.add(name, ocp.args.StandardSave, handler)
            registry.add(name, ocp.args.StandardRestore, handler)
        registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        _silence_orbax()
        # Not its CheckpointManager, which counts folders by their names and deletes by its own rules.
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=registry))
        self._look()

    # --- What is there ---

    def _look(self) -> None:
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        for name in names:
            if UNFINISHED in name or ASIDE in name or name.endswith(DELETED):
                continue
            if not name.isdecimal() or str(int(name)) != name:
                if hosts.is_first():
                    warn(f"{self.path}/{name} has no step's name and is passed over; move it elsewhere.")
                continue
            try:
                self._marks[int(name)] = self._examine(int(name))
            except DamagedError as error:
                self._pass_over(int(name), error)

    def _pass_over(self, step: int, error: DamagedError) -> None:
        self._marks.pop(step, None)
        self._bad[step] = str(error)
        if hosts.is_first():
            then = "" if self._kept is None else f" and becomes {step}{ASIDE} at the next save"
            warn(f"{error}; it is passed over{then}.")

    def _examine(self, step: int) -> dict[str, Any]:
        """The step's digest.json, empty for a step of schema 1; DamagedError if the step is not complete."""
        folder = self.path / str(step)
        missing = [name for name in ITEMS if not (folder / name).exists()]
        if missing:
            raise DamagedError(f"{folder} lacks {', '.join(missing)}")
        meta = self.meta(step)
        if not (folder / MARK).exists():
            if "schema" in meta:
                raise DamagedError(f"{folder} has no {MARK}: its save was not finished")
            return {}
        with self._readable(folder / MARK):
            mark = unseal(json.loads((folder / MARK).read_text()))
        if mark["schema"] > SCHEMA:
            raise ValueError(
                f"{folder} has schema {mark['schema']} of version {meta.get('version')}, and this is version "
                f"{__version__} with schema {SCHEMA}; use that version or a newer one."
            )
        if mark["meta"] != sha256_of(meta):
            raise DamagedError(f"{folder}/meta is damaged (other bytes than were saved)")
        if mark["step"] != step:
            raise DamagedError(f"{folder} holds step {mark['step']}")
        return mark

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._marks)

    def latest(self) -> int | None:
        """Newest complete step; None where nothing was ever saved, or the first save was interrupted.

        Raises:
          ValueError: there are steps, and none of them is complete.
        """
        if not self._marks and (len(self._bad) > 1 or any(MARK not in reason for reason in self._bad.values())):
            raise self._nothing_left()
        return max(self._marks, default=None)

    def _nothing_left(self) -> ValueError:
        found = ", ".join(map(str, sorted(self._bad)))
        return ValueError(
            f"{self.path}: no whole checkpoint is left (damaged: {found}); bring one back from a copy, or remove that "
            "folder to train anew."
        )

    def meta(self, step: int) -> dict[str, Any]:
        path = self.path / str(step) / "meta" / "metadata"  # as Orbax' JSON handler names it
        with self._readable(path):
            meta = json.loads(path.read_text())
            if not isinstance(meta, dict):
                raise ValueError("no JSON object")
            return meta

    # --- Restoring ---

    def newest_state(self, abstract: State) -> tuple[int, State]:
        """The newest whole step and its state, as `restore`; one that turns out damaged is told of and passed over.

        Raises:
          ValueError: none is left, or they are of another model.
        """
        return self._newest(lambda step: self.restore(step, abstract))

    def newest_params(self, abstract: State) -> tuple[int, Any]:
        """The same of restore_params."""
        return self._newest(lambda step: self.restore_params(step, abstract))

    def _newest(self, read: Callable[[int], Read]) -> tuple[int, Read]:
        for step in reversed(hosts.ask_first(self.steps)):
            found: list[Read] = []
            try:
                found.append(read(step))
            except DamagedError as error:
                self._pass_over(step, error)
            if all(hosts.gather(bool(found))):
                return step, found[0]
            self._marks.pop(step, None)  # damaged where another process read it
        raise self._nothing_left()

    def restore(self, step: int, abstract: State) -> State:
        """The state of a step in the shardings of `abstract`, whatever mesh it was saved from.

        Raises:
          DamagedError: other numbers than were saved, or files that cannot be read.
          ValueError: a leaf of another shape or dtype, or one too many or too few, each named.
        """
        parts = self._restore(step, _split(abstract))
        return State(**parts["weights"], **parts["optimizer"])

    def restore_params(self, step: int, abstract: State) -> Any:
        """The parameters to use, without the optimiser's: their average, where the run keeps one. Errors as above."""
        weights = self._restore(step, {"weights": _split(abstract)["weights"]})["weights"]
        return weights["average"] or weights["params"]

    def _restore(self, step: int, parts: dict[str, Any]) -> dict[str, Any]:
        folder, wanted = self.path / str(step), shapes_and_dtypes(parts)
        recorded = {name: text for name, text in self._leaves(step).items() if name.partition("/")[0] in parts}
        if recorded:
            self._refuse_other_model(step, {name: text[17:] for name, text in recorded.items()}, wanted)
        else:
            with self._readable(folder):
                metadata = self._orbax.metadata(folder).item_metadata
                found = shapes_and_dtypes({name: metadata[name] for name in parts})
                if not found:
                    raise ValueError("its metadata name no array")
            self._refuse_other_model(step, found, wanted)
        with self._readable(folder):
            args = {name: ocp.args.StandardRestore(part) for name, part in parts.items()}
            restored = self._orbax.restore(folder, args=ocp.args.Composite(**args))
            parts = {name: restored[name] for name in parts}
        if not recorded:
            warn(f"{folder} is of a version without digests: whether its numbers are those saved cannot be told.")
            return parts
        now = dict(zip(wanted, as_text(np.asarray(digests(parts))), strict=True))
        wrong = [name for name, text in now.items() if recorded[name][:16] != text]
        if wrong:
            shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise DamagedError(f"{folder} is damaged (other numbers than were saved in {shown})")
        return parts

    def _leaves(self, step: int) -> dict[str, str]:
        """{path: '16 hex digits (32, 16) float32'} of what was saved; empty for a step of schema 1."""
        leaves: dict[str, str] = self._marks.get(step, {}).get("leaves", {})
        return leaves

    def _refuse_other_model(self, step: int, found: dict[str, str], wanted: dict[str, str]) -> None:
        """ValueError with the leaves that differ: Orbax casts another dtype in silence, and names no leaf."""
        faults = [
            f"{name}: checkpoint {found.get(name, 'has none')}, config {wanted.get(name, 'has none')}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if faults:
            shown = "\n  ".join(faults[:20])
            raise ValueError(f"{self.path}/{step} is of another model ({len(faults)} leaves differ):\n  {shown}")

    @contextlib.contextmanager
    def _readable(self, path: epath.Path) -> Iterator[None]:
        """What is raised on damaged files, as a DamagedError of one line."""
        try:
            yield
        except UNREADABLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise DamagedError(f"{path} is damaged ({reason})") from error

    # --- Saving ---

    def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Starts a save and returns; the state may be donated at once. A step that is there already is left alone.

        A save that fails is told of when it does, and `failed` says so; nothing is raised for it.

        Raises:
          ValueError: a newer step is there.
        """
        self._join()
        if step in self._marks:
            return
        if any(other > step for other in self._marks):
            raise ValueError(
                f"{self.path}: step {step} was not saved, because a newer one is there; remove that folder."
            )
        meta = {"step": step, "version": __version__, "schema": SCHEMA, **meta}
        parts = _split(state)
        words = digests(parts)  # the device makes them before what comes next, and nobody waits
        if jax.default_backend() == "cpu":
            # What is on the device is what Orbax writes: the next step would wait to take it over until all is written.
            parts = _copies(parts)
        mark = {"schema": SCHEMA, "step": step, "meta": sha256_of(meta), "leaves": shapes_and_dtypes(parts)}
        begin: Callable[[], object] = functools.partial(self._begin, step, parts, meta)
        self._failure = None
        if jax.default_backend() != "cpu" or jax.process_count() > 1:
            # Here: it copies to the host what the next step takes over, and several processes must do it in turn.
            try:
                begin()
            except UNWRITABLE as error:
                self._fail(step, error)
                return
            begin = bool  # does nothing
        self._saving = threading.Thread(target=self._commit, args=(step, mark, words, begin), name="checkpoint")
        self._saving.start()

    def _begin(self, step: int, parts: dict[str, Any], meta: dict[str, Any]) -> None:
        self._clear()
        items = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
        self._orbax.save(self.path / str(step), args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))

    def _commit(self, step: int, mark: dict[str, Any], words: jax.Array, begin: Callable[[], object]) -> None:
        """In a thread: begins unless that is done, waits for Orbax, writes digest.json, removes what no rule keeps."""
        try:
            begin()
            self._orbax.wait_until_finished()
            texts = as_text(np.asarray(words))
            mark["leaves"] = {
                name: f"{text} {about}" for text, (name, about) in zip(texts, mark["leaves"].items(), strict=True)
            }
            if hosts.is_first():
                write_whole(self.path / str(step) / MARK, json.dumps(seal(mark), indent=1))
        except UNWRITABLE as error:
            self._fail(step, error)
            return
        self._marks[step] = mark
        self._prune()

    def _fail(self, step: int, error: Exception) -> None:
        full = "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        reason = "no space left there" if full else (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        self._failure = time.monotonic(), reason
        warn(f"{self.path}: the checkpoint of step {step} was not saved ({reason}); the run goes on and tries again.")
        if hosts.is_first():
            for remains in (f"{step}{UNFINISHED}*", str(step)):
                for folder in self.path.glob(remains):
                    with contextlib.suppress(OSError):  # an attempt to make space; the next save tries it again
                        folder.rmtree()

    def failed(self) -> bool:
        """Whether the newest save failed long enough ago to try it again.

        Never with several processes, whose clocks do not agree: they wait for the next step that is due.
        """
        failure = self._failure
        return failure is not None and jax.process_count() == 1 and time.monotonic() - failure[0] > RETRY_SECONDS

    def finish(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Saves unless that step is there, and waits until it is on disk.

        Raises:
          ValueError: it could not be saved, in several attempts.
        """
        for pause in FINAL_PAUSES:
            time.sleep(pause)
            self.save(step, state, meta)
            self._join()
            if all(hosts.gather(step in self._marks)):
                return
            self._marks.pop(step, None)
        newest = max(self._marks, default=None)
        raise ValueError(
            f"{self.path}: the checkpoint of step {step} could not be saved ({self._why()}); mend that and run the "
            f"same command again, which goes on from {'the start' if newest is None else f'step {newest}'}."
        )

    def _why(self) -> str:
        return self._failure[1] if self._failure is not None else "another process says why"

    def _join(self) -> None:
        if self._saving is not None:
            self._saving.join()
            self._saving = None

    def _clear(self) -> None:
        """Moves aside what is no whole step and removes what killed saves left, just before anything is saved anew."""
        if not hosts.is_first():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in list(self.path.iterdir()):
            name = entry.name
            if UNFINISHED in name or name.endswith(DELETED):
                entry.rmtree()
            elif name.isdecimal() and str(int(name)) == name and int(name) not in self._marks:
                target, number = self.path / (name + ASIDE), 1
                while target.exists():
                    number += 1
                    target = self.path / f"{name}{ASIDE}-{number}"
                entry.rename(target)

    def _prune(self) -> None:
        """Removes complete steps that no rule keeps; those are forgotten first, so a kill leaves no half of one."""
        steps = self.steps()
        keep = set(steps[-(self._kept or len(steps)) :])
        keep |= {step for step in steps if self._kept_every and step % self._kept_every == 0}
        judged = {step: self.figures[step] for step in steps if step in self.figures}
        if self._kept_best and judged:
            keep.add(max(judged, key=lambda step: (judged[step], step)))
        for step in sorted(set(steps) - keep):
            del self._marks[step]
            if hosts.is_first():
                try:
                    (self.path / str(step)).rename(self.path / f"{step}{DELETED}").rmtree()
                except OSError as error:
                    warn(f"{self.path}/{step}: could not be removed ({error}); remove it yourself.")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Waits until what was started is on disk, however the block ended.

        Raises:
          ValueError: the newest save failed, and the block did not.
        """
        self._join()
        self._orbax.close()
        if kind is None and self._failure is not None:
            raise ValueError(f"{self.path}: the newest checkpoint was not saved ({self._why()}); mend that, try again.")


@functools.cache
def _silence_orbax() -> None:
    """For one file that cannot be read or written, Orbax' coroutines complain dozens of times of being dropped.

    They do so in TensorStore's threads too, and later; hence for good. What went wrong is raised all the same.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if "coroutine" not in repr(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _split(state: State) -> dict[str, Any]:
    """In two items, so that whoever only encodes reads a third of the bytes."""
    weights = {"params": state.params, "average": state.average}
    return {"weights": weights, "optimizer": {"step": state.step, "opt_state": state.opt_state}}


@jax.jit
def _copies(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
