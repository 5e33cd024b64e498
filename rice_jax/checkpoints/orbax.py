"""Orbax' checkpointer, which reads and writes the parts of a step, whatever name the run's folder has.

Orbax and etils interpret a path: `[`, `*` and `?` are a pattern, `name:` before a slash and /gs/ are an address, and
`..` is resolved without symbolic links. Therefore they get the workdir by its file descriptor, as /proc/self/fd/N,
where the system has that; elsewhere such a name is refused when a save cannot be read back.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from rice_jax.checkpoints.digests import shapes_and_dtypes

ARRAYS = ("weights", "optimizer")
ITEMS = (*ARRAYS, "meta")
DESCRIPTORS = Path("/proc/self/fd")


class Orbax:
    """Saves and restores ITEMS in one folder, a step's, below the workdir. Its errors name the real path."""

    def __init__(self, workdir: Path) -> None:
        """Touches no file. `workdir` is absolute; it must exist when the first step is saved or read."""
        # Without named handlers a fresh process cannot read the metadata of what an earlier process saved.
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in ARRAYS:
            handler = ocp.StandardCheckpointHandler()
            registry.add(name, ocp.args.StandardSave, handler)
            registry.add(name, ocp.args.StandardRestore, handler)
        registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        # Not Orbax' CheckpointManager: it takes any folder named by a number for a step, and deletes by its own rules.
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=registry))
        self._workdir, self._alias = workdir, workdir

    @contextlib.contextmanager
    def _plain(self, folder: Path) -> Iterator[epath.Path]:
        """Yields the folder's path as Orbax may see it. An error that the block raises gets the real path."""
        if self._alias == self._workdir and DESCRIPTORS.exists():
            descriptor = os.open(self._workdir, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, descriptor)
            self._alias = DESCRIPTORS / str(descriptor)
        try:
            yield epath.Path(self._alias / folder.relative_to(self._workdir))
        except Exception as error:
            error.args = tuple(self._real(value) for value in error.args)
            if isinstance(error, OSError):
                error.filename = self._real(error.filename)
            raise

    def _real(self, value: Any) -> Any:
        return value.replace(f"{self._alias}/", f"{self._workdir}/") if isinstance(value, str) else value

    def save(self, folder: Path, items: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts to save arrays, {name in ARRAYS: tree}, and JSON. Returns when the arrays may be changed on devices.

        Raises what Orbax raises.
        """
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._plain(folder) as path:
            self._checkpointer.save(path, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))

    def wait_until_finished(self) -> None:
        """Waits until the folder is complete and has its name. Raises what Orbax raised in the background."""
        with self._plain(self._workdir):
            self._checkpointer.wait_until_finished()

    def leaves(self, folder: Path, names: Sequence[str]) -> dict[str, str]:
        """Returns shapes_and_dtypes of the named items by opening, but not reading, each of their arrays.

        Raises what Orbax and TensorStore raise.
        """
        with self._plain(folder) as path:
            metadata = self._checkpointer.metadata(path).item_metadata
            return shapes_and_dtypes({name: metadata[name] for name in names})

    def restore(self, folder: Path, items: dict[str, Any]) -> dict[str, Any]:
        """Returns `items` with arrays, in their shardings, in place of ShapeDtypeStructs. Raises what Orbax raises."""
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        with self._plain(folder) as path:
            restored = self._checkpointer.restore(path, args=ocp.args.Composite(**args))
            return {name: restored[name] for name in items}

    def close(self) -> None:
        self._checkpointer.close()
