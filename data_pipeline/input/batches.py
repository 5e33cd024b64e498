"""Batches as NumPy arrays: this process's rows of each global batch in training, every row once in evaluation.

Grain carries it: threads, worker processes, prefetching. Its elements are parts of a batch, joined in order, and each
is a pure function of its index, so no number of threads or workers can change a batch, and nothing is saved but the
step. `import grain` imports jax; no jax backend is ever initialised here, in the parent or in a worker.
"""

import dataclasses
import functools
import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import grain.python as grain
import numpy as np
from absl import flags
from numpy.typing import NDArray

from data_pipeline.format.reader import Split
from data_pipeline.input.clips import PADDING, Arrays, Examples, PictureCache
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.plan import Plan
from data_pipeline.system.processes import end_with_parent

Rows = Sequence[int] | NDArray[np.integer]

ELEMENT_EXAMPLES = 32  # at most: a host's 1,024 clips are 1.7 GB, and one element is decoded by one thread
ENDLESS = 2**48  # elements: training stops asking before that


# --- parts of a batch, by index ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Elements:
    """A source for Grain: element i is the i-th part, of at most ELEMENT_EXAMPLES examples, of all batches in order."""

    batch_size: int  # examples of this process in a batch
    num_batches: int
    blank: Callable[[int], Arrays]  # arrays of so many examples, to be filled
    fill: Callable[[Arrays, int, slice], None]  # (arrays, number of the batch, which of its examples)
    # Batches that threads are filling, each its own part: a copy of 1,024 clips in the caller's thread takes longer
    # than the step on a TPU. None in workers, which can only send.
    shared: dict[int, Arrays] | None

    @property
    def per_batch(self) -> int:
        return -(-self.batch_size // ELEMENT_EXAMPLES)

    def part(self, index: int) -> tuple[int, slice]:
        batch, part = divmod(index, self.per_batch)
        return batch, slice(part * ELEMENT_EXAMPLES, min(self.batch_size, (part + 1) * ELEMENT_EXAMPLES))

    def __len__(self) -> int:
        return self.num_batches * self.per_batch

    def __getitem__(self, index: int) -> Arrays:
        batch, within = self.part(index)
        if self.shared is None:
            part = self.blank(within.stop - within.start)
        else:
            whole = self.shared.get(batch) or self.shared.setdefault(batch, self.blank(self.batch_size))
            part = {name: array[within] for name, array in whole.items()}
        self.fill(part, batch, within)
        return part


def _fill_training(
    source: Examples, plan: Plan, rows: NDArray[np.int64], start_step: int, part: Arrays, batch: int, within: slice
) -> None:
    step = start_step + batch
    epoch, examples = plan.epoch(step), plan.batch(step)[rows[within]]
    columns = source.split.columns
    source.fill_clips(part, examples, epoch)
    source.fill_images(part, columns["image"][examples], examples, epoch)
    part["product"][:] = columns["product"][examples]
    part["index"][:] = examples


def _fill_clips(source: Examples, padded: NDArray[np.int32], part: Arrays, batch: int, within: slice) -> None:
    part["row"][:] = rows = padded[batch, within]
    part["valid"][:] = rows != PADDING
    source.fill_clips(part, rows, epoch=0)


def _fill_images(source: Examples, padded: NDArray[np.int32], part: Arrays, batch: int, within: slice) -> None:
    part["row"][:] = rows = padded[batch, within]
    part["valid"][:] = rows != PADDING
    source.fill_images(part, rows, rows, epoch=0)


# --- threads and workers ----------------------------------------------------------------------------------------------


class Batches(Iterator[Arrays]):
    """An iterator of batches that owns threads and processes; close it, or use it in a `with`.

    It closes itself at its end and after an error: no later call can return what comes after a bad record.
    num_batches: how many there are from the start.
    """

    def __init__(self, elements: _Elements, *, threads: int, workers: int, prefetch_batches: int) -> None:
        if threads < 0 or workers < 0 or prefetch_batches < 1:
            raise ValueError(
                f"threads, workers, prefetch_batches: found {threads}, {workers}, {prefetch_batches}; "
                "needs 0 or more threads and workers, and at least one batch."
            )
        self.num_batches = elements.num_batches
        self._served = 0
        self._elements = elements
        ahead = max(threads, -(-prefetch_batches * elements.per_batch // max(1, workers)))  # Grain's default is 500
        dataset = grain.MapDataset.source(elements).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its debug flags, also where no absl.app.run parsed them
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(workers, per_worker_buffer_size=1), _start_worker
            )
        self._open = [iter(dataset)]  # emptied when closed
        self._finalizer = weakref.finalize(self, _close, self._open, workers)  # runs at exit too, if nobody closes

    def __next__(self) -> Arrays:
        if self._served == self.num_batches:
            self.close()
            raise StopIteration
        if not self._open:
            raise ValueError(
                "these batches were closed, by close() or by an error; make new ones from the step to go on at."
            )
        try:
            batch = self._next()
        except BaseException:
            self.close()
            raise
        self._served += 1
        return batch

    def _next(self) -> Arrays:
        indices = range(self._served * self._elements.per_batch, (self._served + 1) * self._elements.per_batch)
        if self._elements.shared is not None:
            for _ in indices:
                next(self._open[0])
            return self._elements.shared.pop(self._served)
        batch = self._elements.blank(self._elements.batch_size)
        for index in indices:
            within = self._elements.part(index)[1]
            for name, part in next(self._open[0]).items():
                batch[name][within] = part
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends threads and workers; safe to call twice."""
        self._finalizer()


def _close(iterators: list[grain.DatasetIterator[Arrays]], workers: int) -> None:
    while iterators:
        iterators.pop().close()
    if workers:
        gc.collect()  # Grain's iterators are cycles that hold shared memory, which the interpreter's end would leave


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker: it never touches an accelerator, and ends when its parent does, however that ends."""
    import jax  # here, not above: only a worker sets jax's options

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes its workers
    end_with_parent()


# --- what training and evaluation call --------------------------------------------------------------------------------


def train_batches(
    split: Split,
    plan: Plan,
    rows: Rows,
    options: FrameOptions,
    *,
    start_step: int = 0,
    threads: int = 2,
    workers: int = 0,
    prefetch_batches: int = 2,
    cache_bytes: int = 0,
) -> Batches:
    """Global batches start_step, start_step + 1, ... without end, reduced to the `rows` of this process.

    rows: positions in the global batch, 0 to G - 1, in any order and not necessarily contiguous; b = len(rows).
    threads: of this process, or of each worker; 0 decodes in the caller's thread. workers: processes; 200 MB each.
    cache_bytes: keep pictures, decoded and resized, up to so many bytes of memory (all workers together); the same
    pixels, faster from the second epoch on. Only for a set that fits.

    Each batch: frames uint8 [b, N, px, px, 3] (empty slots 0), mask int32 [b, N] (1 = a frame), image uint8
    [b, px, px, 3], product int32 [b], index int32 [b] (row of the split).
    Raises ValueError for rows outside the batch, clips without shop image, or too few stored frames; and, from the
    iterator, for a record or picture that cannot be read, naming it.
    """
    batch_rows = np.asarray(rows, np.int64)
    if batch_rows.ndim != 1 or not len(batch_rows) or np.any((batch_rows < 0) | (batch_rows >= plan.batch_size)):
        raise ValueError(f"rows: found {batch_rows.tolist()}, needs positions of 0 to {plan.batch_size - 1}.")
    used = slice(None) if plan.keep is None else plan.keep
    _check_stored_frames(split, np.arange(split.num_clips)[used], options)
    lonely = np.flatnonzero(np.asarray(split.columns["image"])[used] < 0)
    if len(lonely):
        row = int(np.arange(split.num_clips)[used][lonely[0]])
        raise ValueError(
            f"split {split.name} clip {split.clip_ids[row]}: found no shop image ({len(lonely)} such clips), "
            "needs one to train on; list them in skip_clips."
        )
    cache = PictureCache(cache_bytes // max(1, workers))
    source = Examples(split=split, options=options, seed=plan.seed, train=True, cache=cache)
    blank = functools.partial(source.blank, names=("frames", "mask", "image", "product", "index"))
    fill = functools.partial(_fill_training, source, plan, batch_rows, start_step)
    elements = _Elements(len(batch_rows), ENDLESS, blank, fill, shared=None if workers else {})
    return Batches(elements, threads=threads, workers=workers, prefetch_batches=prefetch_batches)


def clip_batches(
    split: Split,
    rows: Rows,
    options: FrameOptions,
    batch_size: int,
    *,
    seed: int = 0,
    threads: int = 2,
    workers: int = 0,
) -> Batches:
    """The clips `rows` of the split in this order, each exactly once, in ceil(len(rows) / batch_size) batches.

    Each batch: frames uint8 [b, N, px, px, 3], mask int32 [b, N], row int32 [b], valid bool [b], b = batch_size. The
    last is filled up with examples that are not valid: row -1, black, one frame (so that no mean is 0 / 0). A host that
    has its own part of each batch may put -1 among its rows where the batch has no more.
    seed: of the random tail cut, if options.test_tail_cut asks for it.
    """
    padded = _padded(rows, split.num_clips, split.name, batch_size)
    _check_stored_frames(split, padded[padded != PADDING], options)
    source = Examples(split=split, options=options, seed=seed, train=False, cache=PictureCache(0))
    blank = functools.partial(source.blank, names=("frames", "mask", "row", "valid"))
    fill = functools.partial(_fill_clips, source, padded)
    elements = _Elements(batch_size, len(padded), blank, fill, shared=None if workers else {})
    return Batches(elements, threads=threads, workers=workers, prefetch_batches=2)


def image_batches(
    split: Split,
    rows: Rows,
    options: FrameOptions,
    batch_size: int,
    *,
    threads: int = 2,
    workers: int = 0,
) -> Batches:
    """The shop images `rows` of the split as clip_batches gives clips: image uint8 [b, px, px, 3], row, valid."""
    padded = _padded(rows, split.num_images, split.name, batch_size)
    source = Examples(split=split, options=options, seed=0, train=False, cache=PictureCache(0))
    blank = functools.partial(source.blank, names=("image", "row", "valid"))
    fill = functools.partial(_fill_images, source, padded)
    elements = _Elements(batch_size, len(padded), blank, fill, shared=None if workers else {})
    return Batches(elements, threads=threads, workers=workers, prefetch_batches=2)


def _padded(rows: Rows, num_rows: int, split_name: str, batch_size: int) -> NDArray[np.int32]:
    """The rows as [batches, batch_size], filled up with PADDING."""
    wanted = np.asarray(rows, np.int64)
    if wanted.ndim != 1 or np.any((wanted < PADDING) | (wanted >= num_rows)):
        raise ValueError(f"rows: found some outside split {split_name}, needs 0 to {num_rows - 1}.")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, needs at least 1.")
    padded = np.concatenate([wanted, np.full(-len(wanted) % batch_size, PADDING)])
    return padded.astype(np.int32).reshape(-1, batch_size)


def _check_stored_frames(split: Split, rows: NDArray[np.int64], options: FrameOptions) -> None:
    stored, original = (np.asarray(split.columns[name])[rows] for name in ("frames", "original_frames"))
    short = np.flatnonzero((stored < original) & (stored < options.num_frames))
    if len(short):
        first = short[0]
        raise ValueError(
            f"split {split.name} clip {split.clip_ids[int(rows[first])]}: found {stored[first]} stored frames of "
            f"{original[first]}, needs num_frames = {options.num_frames}; convert again with --frames all."
        )
