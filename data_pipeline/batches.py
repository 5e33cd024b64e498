"""Batches as NumPy arrays: this process's rows of each global batch in training, every row once in evaluation.

Grain carries it: threads, worker processes, prefetching. Its elements are parts of a batch, joined in order, and each
is a pure function of its index, so no number of threads or workers can change a batch, and nothing is saved but the
step. `import grain` imports jax; no jax backend is ever initialised here, in the parent or in a worker.
"""

import dataclasses
import functools
import gc
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import grain.python as grain
import numpy as np
from absl import flags
from numpy.typing import NDArray

from data_pipeline import frames
from data_pipeline.frames import FrameOptions, Pixels
from data_pipeline.plan import Plan

if TYPE_CHECKING:
    from data_pipeline.records import Split

Batch = dict[str, NDArray[Any]]
Rows = Sequence[int] | NDArray[np.integer]

ELEMENT_EXAMPLES = 32  # at most: a host's 1,024 clips are 1.7 GB, and one element is decoded by one thread
ENDLESS = 2**48  # elements: training stops asking before that
PADDING = -1  # the row of an example that only fills a batch


# --- the pictures of a split ------------------------------------------------------------------------------------------


class _Cache:
    """Pictures by key, first come, up to `limit` bytes; none is ever thrown out, none is stored above the limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.pictures: dict[tuple[str, int, int], Pixels] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type["_Cache"], tuple[int]]:
        return _Cache, (self.limit,)  # each worker fills its own

    def add(self, key: tuple[str, int, int], pixels: Pixels) -> None:
        with self.lock:
            if key not in self.pictures and self.used + pixels.nbytes <= self.limit:
                self.pictures[key] = pixels
                self.used += pixels.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pictures:
    """The pictures of a split as the network sees them."""

    split: "Split"
    options: FrameOptions
    seed: int
    train: bool
    cache: _Cache

    def clips(self, rows: NDArray[np.integer], epoch: int) -> Batch:
        """frames uint8 [b, N, px, px, 3] and mask int32 [b, N] of b clips; a PADDING row is one black frame."""
        slots, side = self.options.num_frames, self.options.image_size
        clips, mask = np.zeros((len(rows), slots, side, side, 3), np.uint8), np.zeros((len(rows), slots), np.int32)
        for place, row in enumerate(rows.tolist()):
            mask[place, : 1 if row == PADDING else self._fill(clips[place], row, epoch)] = 1
        return {"frames": clips, "mask": mask}

    def shop_images(self, rows: NDArray[np.integer], examples: NDArray[np.integer], epoch: int) -> Batch:
        """image uint8 [b, px, px, 3]: shop images by row, with the random words of the examples that show them."""
        images = np.zeros((len(rows), self.options.image_size, self.options.image_size, 3), np.uint8)
        for place, (row, example) in enumerate(zip(rows.tolist(), examples.tolist(), strict=True)):
            if row != PADDING:
                images[place] = self._finished(self._loaded("image", row, [0])[0], example, epoch, frames.SHOP_IMAGE)
        return {"image": images}

    def _fill(self, slots: Pixels, row: int, epoch: int) -> int:
        """Puts a clip's frames into `slots`, [N, px, px, 3], from the front; returns how many."""
        clip_words = frames.words(self.seed, epoch, row, frames.WHOLE_CLIP, 2 + self.options.num_frames)
        count = int(self.split.columns["frames"][row])
        chosen = frames.choose_frames(count, self.options, clip_words, train=self.train).tolist()
        for slot, pixels in enumerate(self._loaded("clip", row, chosen)):
            picture = frames.FIRST_FRAME + (0 if self.options.consistent_augment else slot)
            slots[slot] = self._finished(pixels, row, epoch, picture)
        return len(chosen)

    def _finished(self, pixels: Pixels, example: int, epoch: int, picture: int) -> Pixels:
        if not self.train:
            return frames.centre_crop(pixels, self.options)
        return frames.augment(pixels, self.options, frames.words(self.seed, epoch, example, picture))

    def _loaded(self, kind: Literal["clip", "image"], row: int, positions: Sequence[int]) -> list[Pixels]:
        """Pictures of one record, decoded and resized; the record is read only for what the cache does not hold."""
        encoded: Sequence[bytes] = ()
        loaded = []
        for position in positions:
            pixels = self.cache.pictures.get((kind, row, position))
            if pixels is None:
                encoded = encoded or (
                    self.split.clip(row).frames if kind == "clip" else [self.split.image(row).encoded]
                )
                try:
                    pixels = frames.load(encoded[position], self.options, train=self.train)
                except ValueError as err:
                    raise ValueError(self._complaint(kind, row, position, len(encoded), err)) from err
                self.cache.add((kind, row, position), pixels)
            loaded.append(pixels)
        return loaded

    def _complaint(self, kind: str, row: int, position: int, count: int, err: ValueError) -> str:
        """FILE record N (clip ID): found X, needs Y; do Z."""
        name = (self.split.clip_ids if kind == "clip" else self.split.image_ids)[row]
        what = f"frame {position + 1} of {count}" if kind == "clip" else "the picture"
        return (
            f"split {self.split.name} {kind} {row} ({kind} {name}): {what} {err}; convert again, or list in skip_clips."
        )


# --- parts of a batch, by index ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Elements:
    """A source for Grain: element i is the i-th part, of at most ELEMENT_EXAMPLES examples, of all batches in order."""

    batch_size: int  # examples of this process in a batch
    num_batches: int
    make: Callable[[int, slice], Batch]  # (number of the batch, which of its examples) -> those examples

    @property
    def per_batch(self) -> int:
        return -(-self.batch_size // ELEMENT_EXAMPLES)

    def part(self, index: int) -> tuple[int, slice]:
        batch, part = divmod(index, self.per_batch)
        return batch, slice(part * ELEMENT_EXAMPLES, min(self.batch_size, (part + 1) * ELEMENT_EXAMPLES))

    def __len__(self) -> int:
        return self.num_batches * self.per_batch

    def __getitem__(self, index: int) -> Batch:
        return self.make(*self.part(index))


def _train_part(
    pictures: _Pictures, plan: Plan, rows: NDArray[np.int64], start_step: int, batch: int, within: slice
) -> Batch:
    step = start_step + batch
    epoch, examples = plan.epoch(step), plan.batch(step)[rows[within]]
    columns = pictures.split.columns
    return {
        **pictures.clips(examples, epoch),
        **pictures.shop_images(columns["image"][examples], examples, epoch),
        "product": columns["product"][examples].astype(np.int32),
        "index": examples.astype(np.int32),
    }


def _clip_part(pictures: _Pictures, padded: NDArray[np.int32], batch: int, within: slice) -> Batch:
    rows = padded[batch, within]
    return {**pictures.clips(rows, epoch=0), "row": rows, "valid": rows != PADDING}


def _image_part(pictures: _Pictures, padded: NDArray[np.int32], batch: int, within: slice) -> Batch:
    rows = padded[batch, within]
    return {**pictures.shop_images(rows, rows, epoch=0), "row": rows, "valid": rows != PADDING}


# --- threads and workers ----------------------------------------------------------------------------------------------


class Batches(Iterator[Batch]):
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
        self._finalizer = weakref.finalize(self, _close, self._open)  # also at exit, while the interpreter is whole

    def __next__(self) -> Batch:
        if self._served == self.num_batches:
            self.close()
            raise StopIteration
        if not self._open:
            raise ValueError(
                "these batches were closed, by close() or by an error; make new ones from the step to go on at."
            )
        try:
            batch = self._joined(self._open[0])
        except BaseException:
            self.close()
            raise
        self._served += 1
        return batch

    def _joined(self, elements: Iterator[Batch]) -> Batch:
        """The next batch, copied together part by part, so that no more than one part is held twice."""
        batch: Batch = {}
        for index in range(self._elements.per_batch):
            within = self._elements.part(index)[1]
            for name, part in next(elements).items():
                if name not in batch:
                    batch[name] = np.empty((self._elements.batch_size, *part.shape[1:]), part.dtype)
                batch[name][within] = part
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends threads and workers; safe to call twice."""
        self._finalizer()


def _close(iterators: list[Iterator[Batch]]) -> None:
    while iterators:
        iterators.pop().close()  # type: ignore[attr-defined]
    # Grain's iterators sit in reference cycles and close themselves again when these are collected: now, and not in
    # the middle of the interpreter's end, where every one of them would print a traceback.
    pass


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker: it never touches an accelerator, and ends when its parent does, however that ends."""
    import jax  # here, not above: only a worker sets jax's options

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(1.0)
    os._exit(1)  # kill -9 of the parent closes nothing: without this, workers and shared memory stay for ever


# --- what training and evaluation call --------------------------------------------------------------------------------


def train_batches(
    split: "Split",
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
    cache = _Cache(cache_bytes // max(1, workers))
    pictures = _Pictures(split=split, options=options, seed=plan.seed, train=True, cache=cache)
    elements = _Elements(
        len(batch_rows), ENDLESS, functools.partial(_train_part, pictures, plan, batch_rows, start_step)
    )
    return Batches(elements, threads=threads, workers=workers, prefetch_batches=prefetch_batches)


def clip_batches(
    split: "Split",
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
    last is filled up with examples that are not valid: row -1, black, one frame (so that no mean is 0 / 0).
    seed: of the random tail cut, if options.test_tail_cut asks for it.
    """
    padded = _padded(rows, split.num_clips, split.name, batch_size)
    _check_stored_frames(split, padded[padded != PADDING], options)
    return _evaluation(
        _clip_part,
        _Pictures(split=split, options=options, seed=seed, train=False, cache=_Cache(0)),
        padded,
        threads,
        workers,
    )


def image_batches(
    split: "Split",
    rows: Rows,
    options: FrameOptions,
    batch_size: int,
    *,
    threads: int = 2,
    workers: int = 0,
) -> Batches:
    """The shop images `rows` of the split as clip_batches gives clips: image uint8 [b, px, px, 3], row, valid."""
    padded = _padded(rows, split.num_images, split.name, batch_size)
    return _evaluation(
        _image_part,
        _Pictures(split=split, options=options, seed=0, train=False, cache=_Cache(0)),
        padded,
        threads,
        workers,
    )


def _padded(rows: Rows, num_rows: int, split_name: str, batch_size: int) -> NDArray[np.int32]:
    """The rows as [batches, batch_size], filled up with PADDING."""
    wanted = np.asarray(rows, np.int64)
    if wanted.ndim != 1 or np.any((wanted < 0) | (wanted >= num_rows)):
        raise ValueError(f"rows: found some outside split {split_name}, needs 0 to {num_rows - 1}.")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, needs at least 1.")
    padded = np.concatenate([wanted, np.full(-len(wanted) % batch_size, PADDING)])
    return padded.astype(np.int32).reshape(-1, batch_size)


def _evaluation(
    make: Callable[[_Pictures, NDArray[np.int32], int, slice], Batch],
    pictures: _Pictures,
    padded: NDArray[np.int32],
    threads: int,
    workers: int,
) -> Batches:
    num_batches, batch_size = padded.shape
    elements = _Elements(batch_size, num_batches, functools.partial(make, pictures, padded))
    return Batches(elements, threads=threads, workers=workers, prefetch_batches=2)


def _check_stored_frames(split: "Split", rows: NDArray[np.int64], options: FrameOptions) -> None:
    stored, original = (np.asarray(split.columns[name])[rows] for name in ("frames", "original_frames"))
    short = np.flatnonzero((stored < original) & (stored < options.num_frames))
    if len(short):
        first = short[0]
        raise ValueError(
            f"split {split.name} clip {split.clip_ids[int(rows[first])]}: found {stored[first]} stored frames of "
            f"{original[first]}, needs num_frames = {options.num_frames}; convert again with --frames all."
        )
