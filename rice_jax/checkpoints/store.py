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
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
from rice_jax.checkpoints.run_folder import read_config
from rice_jax.checkpoints.step_folder import DIGEST_FILE, SCHEMA, seal, sha256_of
from rice_jax.errors import warn
from rice_jax.parallel import hosts
from rice_jax.training.step import State, own_switches
from rice_jax.version import __version__

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax is writing
DAMAGED, DELETED = ".damaged", ".deleted"
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
        self._complete: dict[int, dict[str, Any]] = {}  # each complete step's digest.json; empty for schema 1
        # Why each other step cannot be used, and its newest change (nanoseconds) when that was found.
        self._damaged: dict[int, tuple[DamagedError, int]] = {}
        self._saving: threading.Thread | None = None
        self._failure: tuple[float, str] | None = None  # when and why the newest save failed
        self._orbax = Orbax(self.path.parent)
        for name in self._names():
            ours = _is_step(name) or UNFINISHED in name or DAMAGED in name or name.endswith(DELETED)
            if not ours and hosts.is_first():
                warn(f"{self.path}/{name} is not named after a step and is skipped; move it elsewhere.")
        self._scan()

    # --- Steps that are there ---

    def _names(self) -> list[str]:
        """Returns the names in the folder; [] if there is none. Raises OSError if it cannot be read."""
        return patiently(self.path, lambda: sorted(os.listdir(self.path)) if os.path.lexists(self.path) else [])

    def _scan(self) -> None:
        """Reads the steps that are new, or that were damaged and have changed since. Raises as __init__ does."""
        new = [int(name) for name in self._names() if _is_step(name) and int(name) not in self._complete]
        new = [step for step in new if step not in self._damaged or self._damaged[step][1] != _changed(self._at(step))]
        with ThreadPoolExecutor() as pool:  # those that seem damaged are waited for together
            found = list(pool.map(self._read, new))
        for step, digest_file in zip(new, found, strict=True):
            if not isinstance(digest_file, DamagedError):
                self._complete[step] = digest_file
                self._damaged.pop(step, None)
            elif self._at(step).exists():
                self._skip(step, digest_file)

    def _read(self, step: int) -> dict[str, Any] | DamagedError:
        try:
            return patiently(self._at(step), lambda: step_folder.read_digests(self._at(step)))
        except DamagedError as error:
            return error

    def _at(self, step: int) -> Path:
        return self.path / str(step)

    def _skip(self, step: int, error: DamagedError) -> None:
        self._complete.pop(step, None)
        self._damaged[step] = error, _changed(self._at(step))
        if hosts.is_first():
            then = "" if self._kept is None else f" and becomes {step}{DAMAGED} at the next save"
            warn(f"{error}; it is skipped{then}.")

    def steps(self) -> list[int]:
        """Returns the complete steps, oldest first; [] if there is none."""
        return sorted(self._complete)

    def latest(self) -> int | None:
        """Returns the newest complete step; None if nothing was saved yet, or only a first save that was interrupted.

        Raises ValueError if there are steps, other than such a first save, and none of them is complete.
        """
        faults = [error for error, _ in self._damaged.values()]
        interrupted = len(faults) == 1 and isinstance(faults[0], UnfinishedError)
        if faults and not self._complete and not interrupted:
            raise self._none_left()
        return max(self._complete, default=None)

    def _none_left(self) -> ValueError:
        found = ", ".join(map(str, sorted(self._damaged)))
        return ValueError(
            f"{self.path}: no undamaged checkpoint is left (damaged: {found}); restore one from a copy, or remove that "
            "folder to train anew."
        )

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the dict the step was saved with, and step, version, schema.

        Raises DamagedError if it is missing or damaged, and OSError if it cannot be read.
        """
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

        Unless given, the step is the newest undamaged one; damaged steps are skipped with a warning. Raises ValueError
        if no undamaged step is left, or leaves are missing, unexpected, or of another shape or dtype than in `abstract`
        (all named); its subclass DamagedError if the given step is damaged. What is no damage leads to no other step:
        OSError if a file cannot be read in three attempts, MemoryError if memory runs out, and errors of programs.
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
            return step, self._restore_step(step, items)
        for newest in reversed(hosts.ask_first(self.steps)):
            restored, fault = None, ""
            try:
                restored = self._restore_step(newest, items)
            except DamagedError as error:
                fault = str(error)
            faults = [text for text in hosts.gather(fault) if text]
            if restored is not None and not faults:
                return newest, restored
            self._skip(newest, DamagedError(faults[0]))
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
        digest_file = {"schema": SCHEMA, "step": step, "meta": sha256_of(meta), "leaves": shapes_and_dtypes(items)}
        begin: Callable[[], object] = functools.partial(self._begin, step, items, meta)
        self._failure = None
        if jax.default_backend() != "cpu" or jax.process_count() > 1:
            # In this thread: it copies to the host what the next step reuses, and processes must do so in one order.
            try:
                begin()
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
        folder = self.path / f"trial{DELETED}"
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
                f"{self.path}: a checkpoint cannot be saved there ({first_line(error)}); give another --workdir, such "
                "as one with a short name of letters and digits on a disk with space."
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
            leaves = zip(as_text(np.asarray(words)), digest_file["leaves"].items(), strict=True)
            sealed = {**digest_file, "leaves": {name: f"{text} {about}" for text, (name, about) in leaves}}
            if hosts.is_first():
                folder = self._at(step)
                step_folder.check_saved(self._orbax, folder, digest_file["leaves"])
                sealed["files"] = step_folder.files_of(folder)
                write_file(folder / DIGEST_FILE, json.dumps(seal(sealed), indent=1).encode())
        except LeaseLostError:
            return  # the step stays incomplete, and the next save or line of metrics raises the error in the loop
        except Exception as error:  # nobody else would see it
            self._fail(step, error, remains)
            return
        self._complete[step] = sealed
        self._prune()

    def _fail(self, step: int, error: Exception, remains: Sequence[str] = ()) -> None:
        """Warns that a save failed, and deletes what it left: unfinished folders, and those named in `remains`."""
        full = system_error(error) in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left there" if full else first_line(error)
        self._failure = time.monotonic(), reason
        warn(f"{self.path}: the checkpoint of step {step} was not saved ({reason}); the run goes on and tries again.")
        if hosts.is_first():
            with contextlib.suppress(LeaseLostError, OSError):
                self._check()  # or the step of the run that has the lease now would be deleted
                for name in os.listdir(self.path):
                    if name in remains or name.startswith(f"{step}{UNFINISHED}"):
                        with contextlib.suppress(OSError):  # an attempt to free space; the next save repeats it
                            shutil.rmtree(self.path / name)

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
            if UNFINISHED in name or name.endswith(DELETED):
                shutil.rmtree(folder)
            elif _is_step(name) and int(name) in self._damaged and self._damaged[int(name)][1] == _changed(folder):
                target, number = self.path / (name + DAMAGED), 1
                while target.exists():
                    number += 1
                    target = self.path / f"{name}{DAMAGED}-{number}"
                folder.rename(target)
                del self._damaged[int(name)]

    def _prune(self) -> None:
        """Deletes complete steps that no rule keeps, renamed first, so a kill leaves no part. Warns if it cannot."""
        recall = self.recall if self._kept_best else {}
        keep = steps_to_keep(self.steps(), newest=self._kept, every=self._kept_every, recall=recall)
        for step in sorted(self._complete.keys() - keep):
            del self._complete[step]
            if hosts.is_first():
                try:
                    shutil.rmtree((self._at(step)).rename(self.path / f"{step}{DELETED}"))
                except OSError as error:
                    warn(f"{self.path}/{step}: could not be removed ({error}); remove it yourself.")

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


def steps_to_keep(steps: Sequence[int], *, newest: int | None, every: int, recall: Mapping[int, float]) -> set[int]:
    """Returns those of `steps`, oldest first, that at least one rule keeps.

    Kept are the `newest` last ones (all for None or 0), those that `every` divides (none for 0), and of those that have
    a recall@1 in `recall` the one with the highest; of equal ones the newest.
    """
    keep = set(steps[-(newest or len(steps)) :])
    keep |= {step for step in steps if every and step % every == 0}
    evaluated = [step for step in steps if step in recall]
    if evaluated:
        keep.add(max(evaluated, key=lambda step: (recall[step], step)))
    return keep


def _is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name


def _changed(folder: Path) -> int:
    """Returns when a folder or something in it changed last, in nanoseconds; 0 if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return max(path.lstat().st_ctime_ns for path in (folder, *folder.rglob("*")))
    return 0


def _split(state: State) -> dict[str, Any]:
    """Returns {"weights": {params, average}, "optimizer": {step, opt_state}}: weights are a third of the bytes."""
    weights = {"params": state.params, "average": state.average}
    return {"weights": weights, "optimizer": {"step": state.step, "opt_state": state.opt_state}}


_copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
