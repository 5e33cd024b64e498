"""The plan of examples for each global batch i: a pure function of (seed, i), the same on every machine.

An epoch is a permutation of the examples, cut in order into batches of G. The last n mod G examples are left out, as
the official loader does. Nothing here depends on the numbers of hosts, workers or threads. So a run may resume with
other numbers in mid-epoch, and its position in the data is the step alone.
"""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import counted
from data_pipeline.input.random_words import ORDER_STREAM, SPREAD_STREAM, random_words

SHOWN = 5  # unknown ids in a message


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The order of the examples in a training run.

    Attributes:
      num_examples: number of rows of the split, n.
      batch_size: size of a global batch, over all hosts, G.
      seed: 0 to 2**64 - 1.
      keep: int64, the rows to train on, ascending and distinct (see `rows_without`). None keeps all n rows.
      product: int32 [n], the product of every row. If given, each product's clips are spread evenly over an epoch, so
        that a batch of a small set shows as many products as it can.
      content_hash: of the converted data set. It enters the fingerprint only.

    Raises ValueError if seed, batch_size or keep is out of range, or fewer rows are kept than one batch needs.

    Example:
        from data_pipeline import Plan, open_dataset

        split = open_dataset("records").split("train")
        plan = Plan(split.num_clips, batch_size=2, seed=0)
        clip_ids = [split.clip_ids[row] for row in plan.batch(0).tolist()]
        assert len(set(clip_ids)) == 2
    """

    num_examples: int
    batch_size: int
    seed: int
    _: dataclasses.KW_ONLY
    keep: NDArray[np.int64] | None = None
    product: NDArray[np.int32] | None = None
    content_hash: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: found {self.seed}, needs 0 to 2**64 - 1; choose another seed.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: found {self.batch_size}, needs at least 1; set batch_size.")
        if self.keep is not None:
            keep = np.array(self.keep, np.int64)  # a copy: the caller's array may change, a plan may not
            if keep.ndim != 1 or np.any(np.diff(keep) <= 0) or np.any((keep < 0) | (keep >= self.num_examples)):
                raise ValueError(
                    f"keep: needs sorted, distinct rows of 0 to {self.num_examples - 1}; use rows_without."
                )
            keep.setflags(write=False)
            object.__setattr__(self, "keep", keep)
        if self.num_kept < self.batch_size:
            skipped = self.num_examples - self.num_kept
            left = f" ({skipped} of {self.num_examples} skipped)" if skipped else ""
            smaller = f"set batch_size to {self.num_kept} or less, or " if self.num_kept else ""
            raise ValueError(
                f"training split: found {counted(self.num_kept, 'clip')}{left}, needs at least one batch of "
                f"{self.batch_size}; {smaller}convert more clips{' or skip fewer' if skipped else ''}."
            )

    @property
    def num_kept(self) -> int:
        return self.num_examples if self.keep is None else len(self.keep)

    @property
    def batches_per_epoch(self) -> int:
        return self.num_kept // self.batch_size

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of a digest of everything that decides the order: equal ones mean equal batches."""
        digest = hashlib.sha256()
        digest.update(f"plan 1 {self.seed} {self.batch_size} {self.num_examples} {self.content_hash} ".encode())
        digest.update(b"all" if self.keep is None else self.keep.astype("<i8").tobytes())
        digest.update(b"" if self.product is None else self.product.astype("<i4").tobytes())
        return digest.hexdigest()[:32]

    def epoch(self, step: int) -> int:
        """Returns the epoch, from 0, that global batch `step` belongs to. Does not check `step`."""
        return step // self.batches_per_epoch

    def batch(self, step: int) -> NDArray[np.int64]:
        """Returns the rows of global batch `step`, int64 [G], in its order. Raises ValueError if step is negative."""
        if step < 0:
            raise ValueError(f"step: found {step}, needs 0 or more.")
        epoch, position = divmod(step, self.batches_per_epoch)
        picked = self._order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        return picked.copy() if self.keep is None else self.keep[picked]

    def left_out(self, epoch: int) -> NDArray[np.int64]:
        """Returns the kept rows that `epoch` does not show, int64 [num_kept mod G]: they fill no whole batch."""
        rest = self._order(epoch)[self.batches_per_epoch * self.batch_size :]
        return rest.copy() if self.keep is None else self.keep[rest]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.product is None:
            return epoch_permutation(self.seed, epoch, self.num_kept)
        with _lock:
            return _spread_order(self, epoch)


def rows_without(clip_ids: Sequence[str], skip_clips: Iterable[str]) -> NDArray[np.int64]:
    """Returns the rows of clip_ids that are not in skip_clips, int64, ascending. Raises ValueError for unknown ids."""
    skip = frozenset(skip_clips)
    rows = np.fromiter((i for i, clip_id in enumerate(clip_ids) if clip_id not in skip), np.int64)
    if len(clip_ids) - len(rows) != len(skip):
        unknown = sorted(skip - frozenset(clip_ids))
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ValueError(
            f"skip_clips: found {', '.join(unknown[:SHOWN])}{more}, which the training split does not have; leave out "
            "what is not an id of a training clip."
        )
    return rows


_lock = threading.RLock()  # threads that reach a new epoch together compute its order once


def epoch_permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Returns the order of `count` examples in one epoch, int64 [count], read-only; every order is equally likely.

    Sorts one random word per example, ties by index. 4 M examples take half a second, once per epoch.
    """
    with _lock:
        return _epoch_permutation(seed, epoch, count)


@functools.lru_cache(maxsize=2)  # prefetching reaches into the next epoch
def _epoch_permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    order = np.argsort(random_words(seed, ORDER_STREAM, count, epoch=epoch), kind="stable")
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=2)
def _spread_order(plan: Plan, epoch: int) -> NDArray[np.int64]:
    """Returns the epoch's order, int64 [num_kept], with clip k of a product's c clips at (u + k) / c of the epoch.

    u is uniform in [0, 1), one for each product and epoch. A product's clips stay in the permutation's order.
    """
    assert plan.product is not None
    order = epoch_permutation(plan.seed, epoch, plan.num_kept)
    product = plan.product[order if plan.keep is None else plan.keep[order]]
    _, group, counts = np.unique(product, return_inverse=True, return_counts=True)
    by_group = np.argsort(group, kind="stable")
    rank = np.empty(len(group), np.int64)  # k of every clip
    rank[by_group] = np.arange(len(group)) - (np.cumsum(counts) - counts)[group[by_group]]
    start = (random_words(plan.seed, SPREAD_STREAM, len(counts), epoch=epoch) >> np.uint64(11)) * 2.0**-53  # u
    spread = order[np.argsort((rank + start[group]) / counts[group], kind="stable")]
    spread.setflags(write=False)
    return spread
