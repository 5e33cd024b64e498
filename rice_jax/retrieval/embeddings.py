"""Embeddings of a whole split, kept on disk so that an interrupted evaluation goes on."""

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
    """Embeddings of rows in blocks on disk, so that an interrupted evaluation goes on where it stopped.

    Of several processes the first writes, and says which blocks are there; all read.
    """

    BLOCK = 4096  # rows

    def __init__(self, folder: Path | None) -> None:
        """`folder` must be named after all that decides the embeddings; None keeps nothing."""
        self._folder = folder
        if folder is not None and hosts.is_first():
            folder.mkdir(parents=True, exist_ok=True)

    def blocks(
        self, kinds: Mapping[str, int], rows: np.ndarray, encode: Callable[[np.ndarray], Sequence[np.ndarray]]
    ) -> tuple[np.ndarray, ...]:
        """encode(rows), an array [n, width] for each of `kinds` (name: width); blocks that are all there are read."""
        out = [[np.zeros((0, width), np.float32) for width in kinds.values()]]
        for start in range(0, len(rows), self.BLOCK):
            paths = [self._folder / f"{kind}-{start:09d}.npy" for kind in kinds] if self._folder is not None else []
            if paths and hosts.ask_first(functools.partial(_all_exist, paths)):
                out.append([np.load(path, allow_pickle=False) for path in paths])
                continue
            out.append(list(encode(rows[start : start + self.BLOCK])))
            if hosts.is_first():
                for path, array in zip(paths, out[-1], strict=False):
                    _write_array(path, array)
        return tuple(np.concatenate(parts) for parts in zip(*out, strict=True))


def _all_exist(paths: Sequence[Path]) -> bool:
    return all(path.exists() for path in paths)


def _write_array(path: Path, array: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, array)
    write_file(path, data.getvalue())


class EvaluationPass:
    """Every picture of a split through the model once, with one progress bar."""

    def __init__(self, m: Model, split: Split, *, total: int, show_progress: bool) -> None:
        self._m, self._split = m, split
        self._options = frame_options(m.config.data, train=False)
        self._bar = tqdm(total=total, unit=" encoded", disable=not (show_progress and hosts.is_first()))

    def __enter__(self) -> "EvaluationPass":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def clips(self, rows: np.ndarray, call: Callable[..., list[Array]]) -> tuple[np.ndarray, ...]:
        """call(rows of the batch with -1 where it is filled up, frames, mask) for all of `rows`."""
        make = functools.partial(clip_batches, seed=self._m.config.seed)
        return self._over(make, ("frames", "mask"), rows, call)

    def images(self, rows: np.ndarray, call: Callable[..., list[Array]]) -> tuple[np.ndarray, ...]:
        """call(rows of the batch, images) for all of `rows`."""
        return self._over(image_batches, ("image",), rows, call)

    def _over(
        self,
        make: Callable[..., Any],
        names: tuple[str, ...],
        rows: np.ndarray,
        call: Callable[..., list[Array]],
    ) -> tuple[np.ndarray, ...]:
        m = self._m
        own = process_rows(m.batch_size, m.mesh)  # of each batch, what this process reads and decodes
        padded = np.concatenate([rows, np.full(-len(rows) % m.batch_size, -1)]).reshape(-1, m.batch_size)
        data = m.config.data
        out = []
        with make(
            self._split, padded[:, own].reshape(-1), self._options, len(own), threads=data.threads, workers=data.workers
        ) as batches:
            for batch_rows, batch in zip(padded, batches, strict=True):
                results = call(batch_rows, *to_global([batch[name] for name in names], m.mesh))
                out.append([np.asarray(result) for result in results])
                self._bar.update(int(np.count_nonzero(batch_rows >= 0)))
        return tuple(np.concatenate(parts)[: len(rows)] for parts in zip(*out, strict=True))


def embed(
    m: Model, split: Split, clip_rows: np.ndarray, image_rows: np.ndarray, *, store: EmbeddingStore, show_progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of clips and of shop images of a split, each once, in the order of the rows: [Q,E], [I,E]."""
    width = m.config.model.embedding
    with EvaluationPass(m, split, total=len(clip_rows) + len(image_rows), show_progress=show_progress) as over:
        (clips,) = store.blocks(
            {"clips": width}, clip_rows, lambda rows: over.clips(rows, lambda _, *x: m.run(inference.encode_clips, *x))
        )
        (images,) = store.blocks(
            {"images": width},
            image_rows,
            lambda rows: over.images(rows, lambda _, *x: m.run(inference.encode_images, *x)),
        )
    return clips, images
