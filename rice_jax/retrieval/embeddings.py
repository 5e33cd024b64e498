"""Embeddings of the clips and shop images of a split, in blocks on disk so that an evaluation can be resumed."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from data_pipeline.format.reader import Split
from data_pipeline.format.tfrecord import write_file
from data_pipeline.input.batches import clip_batches, image_batches
from rice_jax.parallel import hosts
from rice_jax.parallel.mesh import process_rows, to_global
from rice_jax.retrieval import inference
from rice_jax.retrieval.model import Model, frame_options


class EmbeddingStore:
    """Blocks of embeddings in a folder. Process 0 writes them and decides which ones exist; all processes read."""

    BLOCK = 4096  # rows

    def __init__(self, folder: Path | None) -> None:
        """Makes `folder`, which must be named after all that decides the embeddings; None: nothing is kept."""
        self._folder = folder
        if folder is not None and hosts.is_first():
            folder.mkdir(parents=True, exist_ok=True)

    def blocks(
        self, kinds: Mapping[str, int], rows: np.ndarray, encode: Callable[[np.ndarray], Sequence[np.ndarray]]
    ) -> tuple[np.ndarray, ...]:
        """Returns encode(rows), float32 [n, width] for each kind. Blocks on disk are read; process 0 writes the others.

        `kinds` are widths by name, in the order of encode's arrays. Raises OSError or ValueError for a bad block.
        """
        out = [[np.zeros((0, width), np.float32) for width in kinds.values()]]
        for start in range(0, len(rows), self.BLOCK):
            paths = [self._folder / f"{kind}-{start:09d}.npy" for kind in kinds] if self._folder is not None else []
            if paths and hosts.ask_first(functools.partial(all, map(Path.exists, paths))):
                out.append([np.load(path, allow_pickle=False) for path in paths])
                continue
            out.append(list(encode(rows[start : start + self.BLOCK])))
            if hosts.is_first():
                for path, array in zip(paths, out[-1], strict=False):
                    data = io.BytesIO()
                    np.save(data, array)
                    write_file(path, data.getvalue())
        return tuple(np.concatenate(parts) for parts in zip(*out, strict=True))


class EvaluationPass:
    """Runs a function over clips and shop images of a split in batches, with one progress bar that counts `total`."""

    def __init__(self, model: Model, split: Split, *, total: int, show_progress: bool) -> None:
        self._model, self._split = model, split
        self._options = frame_options(model.config.data, train=False)
        self._bar = tqdm(total=total, unit=" encoded", disable=not (show_progress and hosts.is_first()))

    def __enter__(self) -> "EvaluationPass":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def clips(self, rows: np.ndarray, encode: Callable[..., list[Array]]) -> tuple[np.ndarray, ...]:
        """Returns the results of `encode` for the clips at `rows`, in that order, joined; () for no rows.

        `encode` takes a batch's rows, -1 where it is filled up, and its frames and mask on the devices. Raises
        ValueError for a row outside the split, too few stored frames, or an unreadable record or picture.
        """
        make = functools.partial(clip_batches, seed=self._model.config.seed)
        return self._in_batches(make, ("frames", "mask"), rows, encode)

    def images(self, rows: np.ndarray, encode: Callable[..., list[Array]]) -> tuple[np.ndarray, ...]:
        """Returns encode(rows, images) of the images at `rows`, joined in order. Raises ValueError if unreadable."""
        return self._in_batches(image_batches, ("image",), rows, encode)

    def _in_batches(
        self, make: Callable[..., Any], names: tuple[str, ...], rows: np.ndarray, encode: Callable[..., list[Array]]
    ) -> tuple[np.ndarray, ...]:
        size, mesh, data = self._model.batch_size, self._model.mesh, self._model.config.data
        positions = process_rows(size, mesh)  # of each batch, the ones that this process reads and decodes
        padded = np.concatenate([rows, np.full(-len(rows) % size, -1)]).reshape(-1, size)
        own_rows, workers = padded[:, positions].reshape(-1), {"threads": data.threads, "workers": data.workers}
        out = []
        with make(self._split, own_rows, self._options, len(positions), **workers) as batches:
            for batch_rows, batch in zip(padded, batches, strict=True):
                results = encode(batch_rows, *to_global([batch[name] for name in names], mesh))
                out.append([np.asarray(result) for result in results])
                self._bar.update(int(np.count_nonzero(batch_rows >= 0)))
        return tuple(np.concatenate(parts)[: len(rows)] for parts in zip(*out, strict=True))


def embed(
    model: Model,
    split: Split,
    clip_rows: np.ndarray,
    image_rows: np.ndarray,
    *,
    store: EmbeddingStore,
    show_progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit embeddings of clips [Q, E] and images [I, E], float32, by row. Raises ValueError if unreadable."""
    width, total = model.config.model.embedding, len(clip_rows) + len(image_rows)
    with EvaluationPass(model, split, total=total, show_progress=show_progress) as encode:
        clips_of = lambda rows: encode.clips(rows, lambda _, *x: model.run(inference.encode_clips, *x))
        images_of = lambda rows: encode.images(rows, lambda _, *x: model.run(inference.encode_images, *x))
        (clips,) = store.blocks({"clips": width}, clip_rows, clips_of)
        (images,) = store.blocks({"images": width}, image_rows, images_of)
    return clips, images
