"""Batches of NumPy arrays: this process's part of each global batch in training, every row once in evaluation.

Grain runs the threads, the worker processes and the prefetching. It is given the parts of batches by number. Each part
is a pure function of its number, so threads and workers cannot change a batch, and a run resumes from its step alone.
Importing grain imports jax; neither this process nor a worker initialises a jax backend here.
"""

import contextlib
import dataclasses
import functools
import gc
import os
import re
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence

import grain.python as grain
import numpy as np
from absl import flags
from numpy.typing import NDArray

from data_pipeline.format.manifest import CONVERT_AGAIN
from data_pipeline.format.reader import Split
from data_pipeline.input.clips import FAULT_BYTES, PADDING, Arrays, ClipLoader, Kind, PictureCache
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.plan import Plan
from data_pipeline.input.stored_frames import missing_frames
from data_pipeline.system.processes import WorkerDiedError, death_of_worker, end_with_parent

Rows = Sequence[int] | NDArray[np.integer]

PART_EXAMPLES = 32  # at most: one thread decodes a part, and a host's batch of 1,024 clips has 1.7 GB
ENDLESS = 2**48  # batches: more than any training takes
PARTS_A_WORKER = 3  # in shared memory: one that is made, one that waits, one that is read


# --- parts of batches, by number --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _BatchParts:
    """A data source for Grain: the parts, of at most PART_EXAMPLES examples, of all batches in order."""

    batch_size: int  # examples of this process in a batch
    num_batches: int
    zeros: Callable[[int], Arrays]  # makes the arrays of so many examples
    fill: Callable[[Arrays, int, slice], None]  # fills them with examples of a batch: (arrays, batch, which examples)
    # Batches that threads are filling, each thread its own part: to copy 1,024 clips in the caller's thread takes
    # longer than the step on a TPU. None with workers, which can only send their parts.
    shared: dict[int, Arrays] | None

    @property
    def per_batch(self) -> int:
        return -(-self.batch_size // PART_EXAMPLES)

    def part(self, number: int) -> tuple[int, slice]:
        """Returns the batch, from 0, that a part belongs to, and the slice of the part's examples within it."""
        batch, part = divmod(number, self.per_batch)
        return batch, slice(part * PART_EXAMPLES, min(self.batch_size, (part + 1) * PART_EXAMPLES))

    def __len__(self) -> int:
        return self.num_batches * self.per_batch

    def __getitem__(self, number: int) -> Arrays:
        batch, within = self.part(number)
        if self.shared is None:
            part = self.zeros(within.stop - within.start)
        else:
            whole = self.shared.get(batch) or self.shared.setdefault(batch, self.zeros(self.batch_size))
            part = {name: array[within] for name, array in whole.items()}
        self.fill(part, batch, within)
        return part


def _fill_training(
    loader: ClipLoader, plan: Plan, positions: Rows, start_step: int, part: Arrays, batch: int, within: slice
) -> None:
    step = start_step + batch
    epoch, rows = plan.epoch(step), plan.batch(step)[positions[within]]
    columns = loader.split.columns
    loader.fill_clips(part, rows, epoch)
    loader.fill_images(part, columns["image"][rows], rows, epoch)
    part["product"][:] = columns["product"][rows]
    part["index"][:] = rows


def _fill_evaluation(
    loader: ClipLoader,
    kind: Kind,
    padded: NDArray[np.int32],
    keep_going: bool,
    part: Arrays,
    batch: int,
    within: slice,
) -> None:
    part["row"][:] = rows = padded[batch, within]
    part["valid"][:] = rows != PADDING
    for position in range(len(rows)):
        one = {name: array[position : position + 1] for name, array in part.items()}
        row = rows[position : position + 1]
        try:
            _fill_pictures(loader, kind, one, row)
        except ValueError as error:
            if not keep_going:
                raise
            for name in {"frames", "mask", "image", "valid"} & one.keys():
                one[name][:] = 0
            _fill_pictures(loader, kind, one, np.full_like(row, PADDING))
            text = np.frombuffer(str(error).encode(), np.uint8)[:FAULT_BYTES]
            one["fault"][0, : len(text)] = text


def _fill_pictures(loader: ClipLoader, kind: Kind, arrays: Arrays, rows: NDArray[np.int32]) -> None:
    if kind == "clip":
        loader.fill_clips(arrays, rows, epoch=0)
    else:
        loader.fill_images(arrays, rows, rows, epoch=0)


# --- threads and workers ----------------------------------------------------------------------------------------------


class Batches(Iterator[Arrays], contextlib.AbstractContextManager["Batches"]):
    """An iterator of batches (dicts of arrays by name) that owns threads and processes; num_batches is their number.

    Use it in a `with` statement, or call close(). It closes itself at its end and after an error. Raises ValueError for
    threads or workers below 0 or prefetch_batches below 1. next() raises ValueError for a bad record or picture and
    once closed before the end, and WorkerDiedError, a RuntimeError, if a worker died.
    """

    def __init__(self, parts: _BatchParts, *, threads: int, workers: int, prefetch_batches: int) -> None:
        if threads < 0 or workers < 0 or prefetch_batches < 1:
            raise ValueError(
                f"threads, workers, prefetch_batches: found {threads}, {workers}, {prefetch_batches}; "
                "needs 0 or more threads and workers, and at least one batch."
            )
        self.num_batches = parts.num_batches
        self._served = 0
        self._parts, self._workers = parts, workers
        ahead = max(threads, -(-prefetch_batches * parts.per_batch // max(1, workers)))  # Grain's default is 500
        dataset = grain.MapDataset.source(parts).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its debug flags, also where no absl.app.run parsed them
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(workers, per_worker_buffer_size=1), _start_worker
            )
        self._open = [iter(dataset)]  # empty once closed
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
        except BaseException as error:
            self.close()  # so that no later call returns what comes after a bad record
            if died := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error)):  # Grain says so
                part = self._parts.zeros(min(PART_EXAMPLES, self._parts.batch_size))
                shared = PARTS_A_WORKER * self._workers * sum(array.nbytes for array in part.values())
                raise WorkerDiedError(death_of_worker(int(died[1]), shared)) from error
            raise
        self._served += 1
        return batch

    def _next(self) -> Arrays:
        numbers = range(self._served * self._parts.per_batch, (self._served + 1) * self._parts.per_batch)
        if self._parts.shared is not None:
            for _ in numbers:
                next(self._open[0])  # a part of the shared batch has been filled
            return self._parts.shared.pop(self._served)
        batch = self._parts.zeros(self._parts.batch_size)
        for number in numbers:
            within = self._parts.part(number)[1]
            for name, part in next(self._open[0]).items():
                batch[name][within] = part
        return batch

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends threads and workers; next() then raises ValueError, or StopIteration at the end. May be repeated."""
        self._finalizer()


def _close(iterators: list[grain.DatasetIterator[Arrays]], workers: int) -> None:
    while iterators:
        iterators.pop().close()
    if workers:
        gc.collect()  # Grain's iterators are cycles that hold shared memory, which the interpreter's end would leave


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker: keeps it off accelerators, and makes it end with its parent, even a killed one."""
    import jax  # here, not above: only a worker sets jax's options

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes its workers
    end_with_parent()


# --- what training and evaluation call --------------------------------------------------------------------------------


def train_batches(
    split: Split,
    plan: Plan,
    positions: Rows,
    options: FrameOptions,
    *,
    start_step: int = 0,
    threads: int = 2,
    workers: int = 0,
    prefetch_batches: int = 2,
    cache_bytes: int = 0,
    check_frames: bool = True,
) -> Batches:
    """Returns an endless iterator of training batches, from global batch `start_step` on.

    Args:
      split: a split of a converted data set.
      plan: the order of its examples. Global batch i has the G = plan.batch_size rows `plan.batch(i)`.
      positions: the b positions, 0 to G - 1 in any order, of the global batch that this process loads.
      options: how pictures become arrays; N = options.num_frames, px = options.image_size.
      start_step: number of the first global batch, 0 or more.
      threads: decoding threads of this process, or of each worker. 0 decodes in the calling thread.
      workers: worker processes, of 200 MB each. 0 starts none.
      prefetch_batches: batches prepared ahead, at least 1.
      cache_bytes: memory, shared evenly by the workers, for decoded and resized pictures, so that later epochs do not
        decode them again; the pixels are the same. Useful only for a set that fits.
      check_frames: False takes the stored frames, also where the clips themselves would give others.

    Returns:
      Batches, which yield dicts of arrays:
        frames: uint8 [b, N, px, px, 3], RGB, 0 in empty slots, which come last.
        mask: int32 [b, N], 1 for a frame, 0 for an empty slot.
        image: uint8 [b, px, px, 3], RGB, the clip's shop image.
        product: int32 [b], the clip's product: its index in `dataset.tables["product"]`.
        index: int32 [b], the clip's row in the split.

    Raises:
      ValueError: no position, or one outside 0 to G - 1; a clip of the plan without shop image, or, with check_frames,
        whose stored frames are not all of the source's and lack what num_frames and frame_sampling ask for; threads,
        workers or prefetch_batches out of range. From next(): a record or picture that cannot be read (the message
        names it), a negative start_step, or closed batches.
      RuntimeError: from next(), a worker process died.

    Example:
        from data_pipeline import FrameOptions, Plan, open_dataset, train_batches

        split = open_dataset("records").split("train")
        plan = Plan(split.num_clips, batch_size=2, seed=0)
        with train_batches(split, plan, range(2), FrameOptions()) as batches:
            batch = next(batches)
        assert batch["frames"].shape == (2, 10, 224, 224, 3)
    """
    batch_positions = np.asarray(positions, np.int64)
    outside = np.any((batch_positions < 0) | (batch_positions >= plan.batch_size))
    if batch_positions.ndim != 1 or not len(batch_positions) or outside:
        raise ValueError(f"positions: found {batch_positions.tolist()}, needs positions of 0 to {plan.batch_size - 1}.")
    used = np.arange(split.num_clips) if plan.keep is None else np.asarray(plan.keep)
    if check_frames and (missing := missing_frames(split, used, options, train=True)):
        raise ValueError("; ".join(missing) + ".")
    without_image = np.flatnonzero(np.asarray(split.columns["image"])[used] < 0)
    if len(without_image):
        row = int(used[without_image[0]])
        raise ValueError(
            f"split {split.name} clip {split.clip_ids[row]}: found no shop image ({len(without_image)} such clips), "
            f"needs one to train on; {CONVERT_AGAIN}, or list them in skip_clips (the data doctor names them)."
        )
    cache = PictureCache(cache_bytes // max(1, workers))
    loader = ClipLoader(split=split, options=options, seed=plan.seed, train=True, cache=cache)
    zeros = functools.partial(loader.zeros, names=("frames", "mask", "image", "product", "index"))
    fill = functools.partial(_fill_training, loader, plan, batch_positions, start_step)
    parts = _BatchParts(len(batch_positions), ENDLESS, zeros, fill, shared=None if workers else {})
    return Batches(parts, threads=threads, workers=workers, prefetch_batches=prefetch_batches)


def clip_batches(
    split: Split,
    rows: Rows,
    options: FrameOptions,
    batch_size: int,
    *,
    seed: int = 0,
    threads: int = 2,
    workers: int = 0,
    keep_going: bool = False,
) -> Batches:
    """Returns an iterator of evaluation batches: the clips `rows`, in this order, each exactly once.

    Args:
      split: a split of a converted data set.
      rows: rows of its clips. -1 means no clip: a host with too few clips for its part of a batch fills it up with -1.
      options: how pictures become arrays; N = options.num_frames, px = options.image_size.
      threads, workers: decoding threads of this process, or of each of so many worker processes.
      batch_size: examples of a batch, b.
      seed: of the random tail cut, used only with options.test_tail_cut.
      keep_going: mark a clip that cannot be read, and yield it as one black frame, instead of raising ValueError.

    Returns:
      Batches, ceil(len(rows) / b) of them, which yield dicts of arrays:
        frames: uint8 [b, N, px, px, 3], RGB, 0 in empty slots, which come last.
        mask: int32 [b, N], 1 for a frame, 0 for an empty slot.
        row: int32 [b], the clip's row in the split.
        valid: bool [b], False for examples that fill up a batch, with row -1 and one black frame (no mean is 0 / 0),
          and for clips that cannot be read.
        fault: uint8 [b, FAULT_BYTES], with keep_going only: why a clip cannot be read, in UTF-8, then zeros.

    Raises:
      ValueError: a row outside -1 to num_clips - 1; rows not of one axis; batch_size below 1; a clip whose stored
        frames are not all of the source's and lack some of the N evenly spaced ones; threads or workers below 0. From
        next(): a record or picture that cannot be read (the message names it), or batches closed before their end.
      RuntimeError: from next(), a worker process died.

    Example:
        from data_pipeline import FrameOptions, clip_batches, open_dataset

        split = open_dataset("records").split("train")
        with clip_batches(split, range(split.num_clips), FrameOptions(), batch_size=4) as batches:
            shown = sum(int(batch["valid"].sum()) for batch in batches)
        assert shown == split.num_clips
    """
    padded = _padded(rows, split.num_clips, split.name, batch_size)
    if missing := missing_frames(split, padded[padded != PADDING], options, train=False):
        raise ValueError("; ".join(missing) + ".")
    return _evaluation_batches("clip", split, padded, options, seed, threads, workers, keep_going)


def image_batches(
    split: Split,
    rows: Rows,
    options: FrameOptions,
    batch_size: int,
    *,
    threads: int = 2,
    workers: int = 0,
    keep_going: bool = False,
) -> Batches:
    """Returns an iterator of evaluation batches: the shop images `rows`, in this order, each exactly once.

    -1 in rows means no image. threads: decoding threads of this process, or of each of so many `workers` processes.
    keep_going: mark an image that cannot be read, and yield it black, instead of raising ValueError.

    Returns:
      Batches, ceil(len(rows) / b) of them, which yield dicts of arrays:
        image: uint8 [b, px, px, 3], RGB, the centre crop; px = options.image_size, b = batch_size.
        row: int32 [b], the image's row in the split.
        valid: bool [b], False for black images that fill up a batch, whose row is -1, and for unreadable ones.
        fault: as in clip_batches.

    Raises:
      ValueError: a row outside -1 to num_images - 1; rows not of one axis; batch_size below 1; threads or workers below
        0. From next(): a record or picture that cannot be read, or batches that were closed before their end.
      RuntimeError: from next(), a worker process died.

    Example:
        from data_pipeline import FrameOptions, image_batches, open_dataset

        split = open_dataset("records").split("train")
        with image_batches(split, range(split.num_images), FrameOptions(), batch_size=4) as batches:
            first = next(batches)
        assert first["image"].shape == (4, 224, 224, 3)
    """
    padded = _padded(rows, split.num_images, split.name, batch_size)
    return _evaluation_batches("image", split, padded, options, 0, threads, workers, keep_going)


def _evaluation_batches(
    kind: Kind,
    split: Split,
    padded: NDArray[np.int32],
    options: FrameOptions,
    seed: int,
    threads: int,
    workers: int,
    keep_going: bool,
) -> Batches:
    cache = PictureCache(0)
    loader = ClipLoader(split=split, options=options, seed=seed, train=False, cache=cache, keep_going=keep_going)
    pictures = ("frames", "mask") if kind == "clip" else ("image",)
    zeros = functools.partial(loader.zeros, names=(*pictures, "row", "valid", *(["fault"] if keep_going else [])))
    fill = functools.partial(_fill_evaluation, loader, kind, padded, keep_going)
    parts = _BatchParts(padded.shape[1], len(padded), zeros, fill, shared=None if workers else {})
    return Batches(parts, threads=threads, workers=workers, prefetch_batches=2)


def _padded(rows: Rows, num_rows: int, split_name: str, batch_size: int) -> NDArray[np.int32]:
    wanted = np.asarray(rows, np.int64)
    if wanted.ndim != 1 or np.any((wanted < PADDING) | (wanted >= num_rows)):
        raise ValueError(f"rows: found some outside split {split_name}, needs 0 to {num_rows - 1}.")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, needs at least 1.")
    padded = np.concatenate([wanted, np.full(-len(wanted) % batch_size, PADDING)])
    return padded.astype(np.int32).reshape(-1, batch_size)
