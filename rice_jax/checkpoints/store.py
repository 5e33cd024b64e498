"""Checkpoints: one folder a step, written by Orbax in the background, complete only with a digest of every leaf.

    checkpoints/6/{weights,optimizer,meta}    by Orbax, which renames them into place
    checkpoints/6/digest.json                 by us, written last

Orbax restores flipped bits without an error. Hence a step counts only if it has its digest.json, written after the step
was opened again, and restored arrays must have the digests that were saved. If they do not, the step before is used,
and the damaged one is renamed to 6.damaged just before the next save. An error that is no damage (reading.py) never
leads to an older step, and no sound step is ever renamed.
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.format.tfrecord import write_file
from data_pipeline.system.lease import LeaseLostError
from rice_jax.checkpoints import step_folder
from rice_jax.checkpoints.digests import as_text, digests, shapes_and_dtypes
from rice_jax.checkpoints.orbax import ARRAYS, Orbax
from rice_jax.checkpoints.reading import DamagedError, UnfinishedError, first_line, patiently, system_error
from rice_jax.checkpoints.retention import steps_to_keep
from rice_jax.checkpoints.run_folder import read_config
from rice_jax.checkpoints.step_folder import DIGEST_FILE, SCHEMA, seal, sha256_of
from rice_jax.errors import warn
from rice_jax.parallel import hosts
from rice_jax.training.step import State, own_switches
from rice_jax.version import __version__

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax is writing
DAMAGED, DELETED = ".damaged", ".deleted"
TRIAL = f"trial{DELETED}"
REMAINS = re.compile(r"\d+\.deleted|(\d+|trial\.deleted)\.orbax-checkpoint-tmp(-.*)?")  # what a killed save leaves
RETRY_SECONDS = 60.0
FINAL_PAUSES = (0.0, 1.0, 5.0)  # seconds before each attempt at the last save


class Checkpoints:
    """The checkpoints of a workdir, saved asynchronously. Step N means N updates done, and the data's position N."""

    def __init__(
        self, workdir: str | Path, *, kept: int | None = None, kept_every: int = 0, kept_best: bool = False,
        check: Callable[[], object] = bool,
    ) -> None:  # fmt: skip
        """Scans the folder without changing it, and warns about damaged steps and entries that are no checkpoints.

        The first save makes the folder `checkpoints`. `kept` is the number of newest steps to keep; None (to read only)
        or 0: all. Steps that `kept_every` divides are kept for good (0: none), and if `kept_best` also that with the
        highest `recall`. `check` raises LeaseLostError if this run may no longer write there. Raises ValueError if a
        newer version saved one of the steps or the path is not UTF-8, and OSError if the folder cannot be read.
        """
        self.path = Path(workdir).absolute() / "checkpoints"
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            folder = os.fsencode(self.path.parent)
            raise ValueError(f"{folder!r}: the name of this folder is not UTF-8; rename it.") from None
        self.recall: dict[int, float] = {}  # recall@1 by step, which the caller fills in after each evaluation
        self._kept, self._kept_every, self._kept_best = kept, kept_every, kept_best
        self._check = check  # called before a step is committed and before anything is renamed or deleted
        self._complete: dict[int, dict[str, Any]] = {}  # read_digests of each complete step
        # Why each other step cannot be used, its newest change (nanoseconds) when that was found, and its content_of.
        self._damaged: dict[int, tuple[DamagedError, int, str]] = {}
        self._stuck: set[Path] = set()  # what could not be deleted or renamed, and was warned of
        self._saving: threading.Thread | None = None
        self._failure: tuple[float, str] | None = None  # when and why the newest save failed
        self._orbax = Orbax(self.path.parent)
        for name in self._names():
            ours = _is_step(name) or DAMAGED in name or name == TRIAL or REMAINS.fullmatch(name)
            if not ours and hosts.is_first():
                warn(f"{self.path}/{name} is not named after a step and is skipped; move it elsewhere.")
        self._scan()

    # --- Steps that are there ---

    def _names(self) -> list[str]:
        """Returns the names in the folder; [] if there is none. Raises OSError if it cannot be read."""
        return patiently(self.path, lambda: sorted(os.listdir(self.path)) if os.path.lexists(self.path) else [])

    def _scan(self) -> None:
        """Reads the steps that are new, or that were damaged and have changed since. Raises as __init__ does.

        If a step vanishes meanwhile, as another run deletes old ones, it lists the folder again.
        """
        there = [int(name) for name in self._names() if _is_step(name)]
        self._damaged = {step: found for step, found in self._damaged.items() if step in there}
        new = [step for step in there if step not in self._complete]
        new = [step for step in new if step not in self._damaged or self._has_changed(step)]
        with ThreadPoolExecutor() as pool:  # those that seem damaged are waited for together
            found = list(pool.map(self._read, new))
        for step, digest_file in zip(new, found, strict=True):
            if not isinstance(digest_file, DamagedError):
                self._complete[step] = digest_file
                self._damaged.pop(step, None)
            else:
                self._skip(step, digest_file)
        if not all(os.path.lexists(self._at(step)) for step in new):
            self._scan()

    def _read(self, step: int) -> dict[str, Any] | DamagedError:
        try:
            return patiently(self._at(step), lambda: step_folder.read_digests(self._at(step)))
        except DamagedError as error:
            return error

    def _at(self, step: int) -> Path:
        return self.path / str(step)

    def _skip(self, step: int, error: DamagedError) -> None:
        """Forgets a step that is gone, and remembers, with a warning, that another one is damaged."""
        self._complete.pop(step, None)
        self._damaged.pop(step, None)
        folder = self._at(step)
        if not os.path.lexists(folder):
            return
        self._damaged[step] = error, step_folder.newest_change(folder), step_folder.content_of(folder)
        if hosts.is_first():
            then = "" if self._kept is None else f" and becomes {step}{DAMAGED} at the next save"
            warn(f"{error}; it is skipped{then}.")

    def _has_changed(self, step: int) -> bool:
        """Returns whether a damaged step has another content than when that was found: a new time is no change."""
        error, before, content = self._damaged[step]
        changed = step_folder.newest_change(self._at(step))
        same = changed == before or step_folder.content_of(self._at(step)) == content
        if same:
            self._damaged[step] = error, changed, content
        return not same

    def steps(self) -> list[int]:
        """Returns the complete steps, oldest first; [] if there is none."""
        return sorted(self._complete)

    def latest(self) -> int | None:
        """Returns the newest complete step; None if nothing was saved yet, or only a first save that was interrupted.

        Raises ValueError if there are steps, other than such a first save, and none of them is complete.
        """
        faults = [error for error, *_ in self._damaged.values()]
        interrupted = len(faults) == 1 and isinstance(faults[0], UnfinishedError)
        if faults and not self._complete and not interrupted:
            raise self._none_left()
        return max(self._complete, default=None)

    def _none_left(self) -> ValueError:
        found = f"damaged: {', '.join(map(str, sorted(self._damaged)))}" if self._damaged else "all were deleted"
        return ValueError(
            f"{self.path}: no undamaged checkpoint is left ({found}); restore one from a copy, or move that folder "
            "away to begin anew."
        )

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the dict the step was saved with, and step, version, schema.

        A complete step's was read with its digests, and is there even if the step was deleted since. Raises
        DamagedError if it is missing or damaged, and OSError if it cannot be read.
        """
        if "meta" in self._complete.get(step, {}):
            return self._complete[step]["meta"]
        folder = self._at(step)
        return patiently(folder, lambda: step_folder.read_meta(folder))

    def config(self, step: int | None) -> str | None:
        """Returns config.json, or else, as in a copy of the checkpoints alone, the config that `step` was saved with.

        It is a JSON text; None if there is neither. Raises as `meta` does.
        """
        text = read_config(self.path.parent)
        return text if text is not None or step is None else self.meta(step).get("config")

    # --- Restoring ---

    def restore(self, abstract: State, step: int | None = None) -> tuple[int, State]:
        """Returns a step and its state in the shardings of `abstract`, whatever mesh it was saved from.

        Unless given, the step is the newest undamaged one; damaged steps are skipped with a warning, and those that
        another run has deleted since without. Raises ValueError if no undamaged step is left, or leaves are missing,
        unexpected, or of another shape or dtype than in `abstract` (all named); its subclass DamagedError if the given
        step is damaged. What is no damage leads to no other step: OSError if a file cannot be read in three attempts,
        MemoryError if memory runs out, and errors of programs.
        """
        step, items = self._restore(step, _split(abstract))
        return step, State(**items["weights"], **items["optimizer"])

    def restore_params(self, abstract: State, step: int | None = None) -> tuple[int, Any]:
        """Returns a step and its parameters (their moving average if there is one), in `abstract`'s shardings.

        The optimiser's state is not read, and may be damaged. Unless given, the step is the newest undamaged one.
        Raises as `restore` does.
        """
        step, items = self._restore(step, {"weights": _split(abstract)["weights"]})
        return step, items["weights"]["average"] or items["weights"]["params"]

    def _restore(self, step: int | None, items: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if step is not None:
            try:
                return step, self._restore_step(step, items)
            except DamagedError as error:
                others = ", ".join(str(other) for other in self.steps() if other != step)
                do = f", or take another step ({others})" if others else ""
                raise DamagedError(f"{error}; restore it from a copy{do}.") from error
        # All use what process 0 read, so that all compute the same digests.
        while (found := hosts.ask_first(lambda: max(self._complete.items(), default=None))) is not None:
            newest, self._complete[newest] = found
            restored, fault = None, ""
            try:
                restored = self._restore_step(newest, items)
            except DamagedError as error:
                fault = str(error)
            faults = [text for text in hosts.gather(fault) if text]
            if restored is not None and not faults:
                return newest, restored
            self._skip(newest, DamagedError(faults[0]))
            self._scan()  # the run that writes there may have saved a newer step, and deleted this one
        raise self._none_left()

    def _restore_step(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        saved, folder = self._complete.get(step, {}), self._at(step)
        return patiently(folder, lambda: step_folder.restore_items(self._orbax, folder, saved, items))

    # --- Saving ---

    def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Starts a save and returns; the caller may donate the state at once. Does nothing if the step is complete.

        A save that fails prints a warning when it does, and raises nothing; `failed` says when to try again. Raises
        ValueError if a newer step is there.
        """
        self._join()
        newest = hosts.ask_first(self._newest_now)
        if newest == step:
            self._complete.setdefault(step, {})
            return
        self._check()
        if newest > step:
            raise ValueError(
                f"{self.path}: step {step} was not saved, because step {newest} is there; if another run writes there, "
                "give this one another --workdir."
            )
        meta = {"step": step, "version": __version__, "schema": SCHEMA, **meta}
        items = _split(state)
        words = digests(items)  # the device computes them before the next step, and nothing here waits for it
        if jax.default_backend() == "cpu":
            # Orbax writes from the arrays on the device: the next step could not reuse them until all is written.
            items = _copies(items)
        digest_file = {"schema": SCHEMA, "step": step, "meta": meta, "leaves": shapes_and_dtypes(items)}
        begin: Callable[[], object] = functools.partial(self._begin, step, items, meta)
        self._failure = None
        if jax.default_backend() != "cpu" or jax.process_count() > 1:
            # In this thread: it copies to the host what the next step reuses, and processes must do so in one order.
            try:
                begin()
            except LeaseLostError:
                raise
            except (ValueError, OSError, RuntimeError) as error:
                self._fail(step, error)
                return
            begin = bool  # does nothing
        self._saving = threading.Thread(target=self._commit, args=(step, digest_file, words, begin), name="checkpoint")
        self._saving.start()

    def _newest_now(self) -> int:
        with contextlib.suppress(OSError):  # the save fails at the same fault, and says so
            self._scan()
        return max(self._complete, default=-1)

    def try_out(self) -> None:
        """Saves small arrays, opens and deletes them. Raises ValueError if that fails: then no step could be saved."""
        folder = self.path / TRIAL
        items = {name: {"trial": np.zeros(1)} for name in ARRAYS}
        try:
            if hosts.is_first():
                self.path.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(folder, ignore_errors=True)  # of a killed process
            self._orbax.save(folder, items, {})
            self._orbax.wait_until_finished()
            if hosts.is_first():
                step_folder.check_saved(self._orbax, folder, shapes_and_dtypes(items))
                step_folder.files_of(folder)
                shutil.rmtree(folder)
        except (ValueError, OSError, RuntimeError, LookupError) as error:
            raise ValueError(
                f"{self.path}: a checkpoint cannot be saved there ({first_line(error)}); remove the cause, or "
                "give another --workdir, such as one with a short name of letters and digits on a disk with space."
            ) from error

    def _begin(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
        self._clear()
        self._orbax.save(self._at(step), items, meta)

    @own_switches()
    def _commit(self, step: int, digest_file: dict[str, Any], words: jax.Array, begin: Callable[[], object]) -> None:
        """Calls `begin` in a thread, waits for Orbax, opens the step, writes digest.json, prunes. Errors only warn."""
        remains: list[str] = []
        try:
            begin()
            self._orbax.wait_until_finished()
            self._check()
            remains = [str(step)]  # from here on it is ours
            pairs = zip(as_text(np.asarray(words)), digest_file["leaves"].items(), strict=True)
            leaves = {name: f"{text} {about}" for text, (name, about) in pairs}
            sealed = {**digest_file, "meta": sha256_of(digest_file["meta"]), "leaves": leaves}
            if hosts.is_first():
                folder = self._at(step)
                patiently(folder, lambda: step_folder.check_saved(self._orbax, folder, digest_file["leaves"]))
                sealed["files"] = patiently(folder, lambda: step_folder.files_of(folder))
                self._check()  # again: this run may have stood still since
                write_file(folder / DIGEST_FILE, json.dumps(seal(sealed), indent=1).encode())
            self._complete[step] = {**sealed, "meta": digest_file["meta"]}
            remains = []
            self._prune()
        except LeaseLostError:
            return  # the step stays incomplete, and the next save or line of metrics raises the error in the loop
        except Exception as error:  # nobody else would see it
            self._fail(step, error, remains)

    def _fail(self, step: int, error: Exception, remains: Sequence[str] = ()) -> None:
        """Warns that a save failed, and deletes what it left: unfinished folders, and those named in `remains`."""
        full = system_error(error) in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left there" if full else first_line(error)
        self._failure = time.monotonic(), reason
        warn(f"{self.path}: the checkpoint of step {step} was not saved ({reason}); the run goes on and tries again.")
        if hosts.is_first():
            with contextlib.suppress(LeaseLostError, OSError):
                for name in os.listdir(self.path):
                    if name in remains or (name.startswith(f"{step}{UNFINISHED}") and REMAINS.fullmatch(name)):
                        self._delete(self.path / name)

    def failed(self) -> bool:
        """Returns whether the newest save failed more than RETRY_SECONDS ago; always False with several processes."""
        # Several processes wait for the next due step, because their clocks do not agree.
        failure = self._failure
        return failure is not None and jax.process_count() == 1 and time.monotonic() - failure[0] > RETRY_SECONDS

    def finish(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Saves the step and waits for the disk. Raises ValueError if 3 attempts fail or a newer step is there."""
        for pause in FINAL_PAUSES:
            time.sleep(pause)
            self.save(step, state, meta)
            self._join()
            if all(hosts.gather(step in self._complete)):
                return
            self._complete.pop(step, None)
        newest = max(self._complete, default=None)
        raise ValueError(
            f"{self.path}: the checkpoint of step {step} could not be saved ({self._why()}); fix that and run the "
            f"same command again, which goes on from {'the start' if newest is None else f'step {newest}'}."
        )

    def _why(self) -> str:
        return self._failure[1] if self._failure is not None else "another process says why"

    def _join(self) -> None:
        if self._saving is not None:
            self._saving.join()
            self._saving = None

    def _clear(self) -> None:
        """Makes the folder, renames steps that were found damaged, deletes unfinished saves. Raises OSError."""
        if not hosts.is_first():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(self.path):
            folder = self.path / name
            if REMAINS.fullmatch(name):
                self._delete(folder)
            elif _is_step(name) and int(name) in self._damaged and not self._has_changed(int(name)):
                target, number = self.path / (name + DAMAGED), 1
                while os.path.lexists(target):
                    number += 1
                    target = self.path / f"{name}{DAMAGED}-{number}"
                if self._change(folder, functools.partial(folder.rename, target)):
                    del self._damaged[int(name)]

    def _change(self, path: Path, change: Callable[[], object]) -> bool:
        """Returns whether change(), which deletes or renames `path`, succeeds. If not, it warns, once a path.

        Raises LeaseLostError, and changes nothing, if another run writes there now.
        """
        try:
            self._check()
            change()
        except OSError as error:
            if path not in self._stuck and os.path.lexists(path):
                self._stuck.add(path)
                warn(f"{path}: could not be deleted or renamed ({error.strerror or error}); remove it yourself.")
            return False
        return True

    def _delete(self, path: Path) -> None:
        """Deletes a folder, and of a link, as to a step on another disk, the link alone."""
        self._change(path, path.unlink if path.is_symlink() else functools.partial(shutil.rmtree, path))

    def _prune(self) -> None:
        """Deletes complete steps that no rule keeps, renamed first, so a kill leaves no part. Warns if it cannot."""
        recall = self.recall if self._kept_best else {}
        keep = steps_to_keep(self.steps(), newest=self._kept, every=self._kept_every, recall=recall)
        for step in sorted(self._complete.keys() - keep):
            if hosts.is_first():
                target = self.path / f"{step}{DELETED}"
                if self._change(self._at(step), functools.partial(self._at(step).rename, target)):
                    self._delete(target)
            del self._complete[step]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Waits until a started save is on disk. Raises ValueError if it failed and the block raised nothing."""
        self._join()
        self._orbax.close()
        if kind is None and self._failure is not None:
            raise ValueError(
                f"{self.path}: the newest checkpoint was not saved ({self._why()}); fix that and try again."
            )


def _is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name


def _split(state: State) -> dict[str, Any]:
    """Returns {"weights": {params, average}, "optimizer": {step, opt_state}}: weights are a third of the bytes."""
    weights = {"params": state.params, "average": state.average}
    return {"weights": weights, "optimizer": {"step": state.step, "opt_state": state.opt_state}}


_copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
