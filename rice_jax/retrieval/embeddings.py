"""Embeddings of the clips and shop images of a split, in blocks on disk so that an evaluation can be resumed."""

import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from data_pipeline.format.reader import Split
from data_pipeline.format.tfrecord import write_file
from data_pipeline.input.batches import clip_batches, image_batches
from data_pipeline.input.clips import Kind
from rice_jax.errors import warn
from rice_jax.parallel import hosts
from rice_jax.parallel.mesh import process_rows, to_global
from rice_jax.retrieval import inference
from rice_jax.retrieval.model import Model, frame_options

Faults = dict[Kind, dict[int, str]]  # of clips and of images: for each unreadable row of the split, what is wrong


class EmbeddingStore:
    """Blocks of embeddings in a folder. Process 0 writes them, all processes read them.

    A block's file is an array of NumPy and, after it, the SHA-256 of the names of folder and file and of the array.
    """

    BLOCK = 4096  # rows

    def __init__(self, folder: Path | None) -> None:
        """Makes `folder`, which must be named after all that decides the embeddings; None: nothing is kept."""
        self._folder = folder
        if folder is not None and hosts.is_first():
            folder.mkdir(parents=True, exist_ok=True)

    def blocks(
        self,
        kinds: Mapping[str, int],
        rows: np.ndarray,
        encode: Callable[[np.ndarray], Iterator[Sequence[np.ndarray]]],
        faults: dict[int, str],
    ) -> tuple[np.ndarray, ...]:
        """Returns the results of `encode` for `rows`: float32 [n, width] for each of `kinds`, widths by name.

        Blocks on disk are read. `encode` is called once, with the rows of all other blocks, and yields its results for
        them in order. Process 0 writes each of these blocks when it is complete, unless it contains a row of `faults`.
        `encode` adds to `faults` the rows that this process cannot read; afterwards it has those of all processes.

        A block that is damaged or cannot be read is encoded again, with a warning. Raises OSError if a block cannot be
        written.
        """
        arrays = [np.zeros((len(rows), width), np.float32) for width in kinds.values()]
        starts = range(0, len(rows), self.BLOCK)
        missing = self._read(kinds, arrays, [slice(x, min(x + self.BLOCK, len(rows))) for x in starts])
        if not missing:
            return tuple(arrays)
        positions, done = np.concatenate([np.arange(block.start, block.stop) for block in missing]), 0
        for results in encode(rows[positions]):
            at = positions[done : done + len(results[0])]
            for array, result in zip(arrays, results, strict=True):
                array[at] = result
            done += len(at)
            while missing and missing[0].stop <= at[-1] + 1:
                for found in hosts.gather(list(faults.items())):
                    faults.update(found)
                block = missing.pop(0)
                if hosts.is_first() and not faults.keys() & set(rows[block].tolist()):
                    self._write(kinds, arrays, block)
        return tuple(arrays)

    def _read(self, kinds: Mapping[str, int], arrays: list[np.ndarray], blocks: list[slice]) -> list[slice]:
        """Fills `arrays` with the blocks on disk. Returns the blocks that some process did not find or cannot read."""
        if self._folder is None:
            return blocks
        missing = []
        found = hosts.gather([self._read_block(kinds, arrays, block) for block in blocks])
        for block, faults in zip(blocks, zip(*found, strict=True), strict=True):
            if any(fault is not None for fault in faults):
                missing.append(block)
            if hosts.is_first() and (fault := next(filter(None, faults), None)):
                warn(f"{fault}; what it held is encoded again.")
        return missing

    def _read_block(self, kinds: Mapping[str, int], arrays: list[np.ndarray], block: slice) -> str | None:
        """Fills `arrays` with a block. Returns None, or why it cannot be read: "" if it does not exist."""
        for path, array in zip(self._paths(kinds, block), arrays, strict=True):
            try:
                data = path.read_bytes()
                size = len(data) - hashlib.sha256().digest_size
                if size < 0 or data[size:] != self._digest(path, data[:size]):
                    raise ValueError("does not hold what was written to it (its SHA-256 differs)")
                part = np.load(io.BytesIO(data[:size]), allow_pickle=False)
                if part.shape != array[block].shape:
                    raise ValueError(f"found an array {part.shape}, needs {array[block].shape}")
            except FileNotFoundError:
                return ""
            except (OSError, ValueError) as error:
                return f"{path}: {error.strerror if isinstance(error, OSError) else error}"
            array[block] = part
        return None

    def _write(self, kinds: Mapping[str, int], arrays: list[np.ndarray], block: slice) -> None:
        if self._folder is None:
            return
        for path, array in zip(self._paths(kinds, block), arrays, strict=True):
            file = io.BytesIO()
            np.save(file, array[block])
            write_file(path, file.getvalue() + self._digest(path, file.getvalue()))

    def _paths(self, kinds: Mapping[str, int], block: slice) -> list[Path]:
        assert self._folder is not None
        return [self._folder / f"{kind}-{block.start:09d}.npy" for kind in kinds]

    def _digest(self, path: Path, data: bytes) -> bytes:
        """Returns the SHA-256 of a block. It covers the names, so that no block passes for another one."""
        digest = hashlib.sha256(f"{path.parent.name}/{path.name}\n".encode())
        digest.update(data)
        return digest.digest()


class EvaluationPass:
    """Runs functions over the clips and shop images of a split in batches of equal size, with one progress bar.

    num_clips, num_images: the numbers of rows to encode in all; the sizes of batches follow from them alone, so that an
    evaluation that was interrupted goes on with the same sizes. faults: collects the rows that cannot be read, whose
    results are those of black pictures; None: such a row raises ValueError.
    """

    def __init__(
        self,
        model: Model,
        split: Split,
        *,
        num_clips: int,
        num_images: int,
        faults: Faults | None,
        show_progress: bool,
    ) -> None:
        self._model, self._split, self._keep_going = model, split, faults is not None
        self.faults: Faults = {"clip": {}, "image": {}} if faults is None else faults
        devices = model.mesh.size
        self._sizes: dict[Kind, int] = {
            "clip": even_batch(num_clips, limit=model.batch_size, devices=devices),
            "image": even_batch(num_images, limit=model.image_batch_size, devices=devices),
        }
        self._options = frame_options(model.config.data, train=False)
        total = num_clips + num_images
        self._bar = tqdm(total=total, unit=" encoded", disable=not (show_progress and hosts.is_first()))

    def __enter__(self) -> "EvaluationPass":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def clips(self, rows: np.ndarray, encode: Callable[..., list[Array]]) -> Iterator[list[np.ndarray]]:
        """Yields the results of `encode` for the clips at `rows`, in that order, a batch at a time.

        `encode` takes a batch's rows, -1 where it is filled up, and its frames and mask on the devices. Raises
        ValueError for a row outside the split or too few stored frames and, unless faults are collected, for an
        unreadable record or picture.
        """
        make = functools.partial(clip_batches, seed=self._model.config.seed)
        return self._in_batches("clip", make, ("frames", "mask"), rows, encode)

    def images(self, rows: np.ndarray, encode: Callable[..., list[Array]]) -> Iterator[list[np.ndarray]]:
        """Yields encode(rows, images) of the images at `rows`, as `clips` does."""
        return self._in_batches("image", image_batches, ("image",), rows, encode)

    def _in_batches(
        self,
        kind: Kind,
        make: Callable[..., Any],
        names: tuple[str, ...],
        rows: np.ndarray,
        encode: Callable[..., list[Array]],
    ) -> Iterator[list[np.ndarray]]:
        size, mesh, data = self._sizes[kind], self._model.mesh, self._model.config.data
        positions = process_rows(size, mesh)  # of each batch, the ones that this process reads and decodes
        padded = np.concatenate([rows, np.full(-len(rows) % size, -1)]).reshape(-1, size)
        own_rows = padded[:, positions].reshape(-1)
        how = {"threads": data.threads, "workers": data.workers, "keep_going": self._keep_going}
        with make(self._split, own_rows, self._options, len(positions), **how) as batches:
            for batch_rows, batch in zip(padded, batches, strict=True):
                if self._keep_going:
                    for row, fault in zip(batch["row"].tolist(), batch["fault"], strict=True):
                        if text := fault.tobytes().rstrip(b"\0").decode(errors="ignore"):
                            self.faults[kind][row] = text
                results = encode(batch_rows, *to_global([batch[name] for name in names], mesh))
                count = int(np.count_nonzero(batch_rows >= 0))
                self._bar.update(count)
                yield [np.asarray(result)[:count] for result in results]


def even_batch(rows: int, *, limit: int, devices: int) -> int:
    """Returns the size of the fewest batches of at most `limit` that hold all rows, as equal as `devices` allow.

    It is a multiple of `devices`, at least one. `limit` must be one too.
    """
    batches = max(1, -(-rows // limit))
    return max(1, -(-rows // (batches * devices))) * devices


def embed(
    model: Model,
    split: Split,
    clip_rows: np.ndarray,
    image_rows: np.ndarray,
    *,
    store: EmbeddingStore,
    show_progress: bool,
    faults: Faults | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit embeddings of clips [Q, E] and images [I, E], float32, by row.

    Rows that cannot be read are added to `faults`; without it they raise ValueError.
    """
    width, numbers = model.config.model.embedding, {"num_clips": len(clip_rows), "num_images": len(image_rows)}
    with EvaluationPass(model, split, **numbers, faults=faults, show_progress=show_progress) as encode:
        clips_of = lambda rows: encode.clips(rows, lambda _, *x: model.run(inference.encode_clips, *x))
        images_of = lambda rows: encode.images(rows, lambda _, *x: model.run(inference.encode_images, *x))
        (clips,) = store.blocks({"clips": width}, clip_rows, clips_of, encode.faults["clip"])
        (images,) = store.blocks({"images": width}, image_rows, images_of, encode.faults["image"])
    return clips, images
