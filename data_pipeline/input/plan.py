"""Which examples make global batch i: a pure function of (seed, i), the same on every machine.

An epoch is a permutation of the examples, cut in order into batches of G; the last n mod G of it are left out, as
the official loader does. Nothing here knows about hosts, workers or threads, so a run may go on with other numbers
of them in mid-epoch, and its position in the data is the step itself.
"""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# Second halves of the Philox key: no other use of the seed gets these words.
ORDER_STREAM, SPREAD_STREAM = int.from_bytes(b"order"), int.from_bytes(b"spread")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The order of a training run.

    num_examples: rows of the split, n. batch_size: G, over all hosts. seed: 0 to 2**64 - 1.
    keep: the rows to train on, sorted and distinct (from `rows_without`); None means all n.
    product: int [n], the product of every row. Given, each product's clips are spread evenly over an epoch, so that a
    batch of a small set shows as many products as it can; None: they fall where chance has them.
    content_hash: of the converted data set, so that a fingerprint is never that of other clips.
    Raises ValueError when fewer examples are left than one batch needs.
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
            raise ValueError(
                f"training split: found {self.num_kept} clips ({self.num_examples - self.num_kept} of "
                f"{self.num_examples} skipped), needs at least one batch of {self.batch_size}; "
                f"set batch_size to {self.num_kept} or less, or convert more clips."
            )

    @property
    def num_kept(self) -> int:
        return self.num_examples if self.keep is None else len(self.keep)

    @property
    def batches_per_epoch(self) -> int:
        return self.num_kept // self.batch_size

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides the order: two runs with the same one see the same batches."""
        digest = hashlib.sha256()
        digest.update(f"plan 1 {self.seed} {self.batch_size} {self.num_examples} {self.content_hash} ".encode())
        digest.update(b"all" if self.keep is None else self.keep.astype("<i8").tobytes())
        digest.update(b"" if self.product is None else self.product.astype("<i4").tobytes())
        return digest.hexdigest()[:32]

    def epoch(self, step: int) -> int:
        return step // self.batches_per_epoch

    def batch(self, step: int) -> NDArray[np.int64]:
        """Rows of the split that make global batch `step`, [G], in the batch's order."""
        if step < 0:
            raise ValueError(f"step: found {step}, needs 0 or more.")
        epoch, position = divmod(step, self.batches_per_epoch)
        picked = self._order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        return picked.copy() if self.keep is None else self.keep[picked]

    def left_out(self, epoch: int) -> NDArray[np.int64]:
        """Rows that `epoch` does not show, because they fill no whole batch: exactly n mod G of them."""
        rest = self._order(epoch)[self.batches_per_epoch * self.batch_size :]
        return rest.copy() if self.keep is None else self.keep[rest]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.product is None:
            return epoch_permutation(self.seed, epoch, self.num_kept)
        with _spread_lock:
            return _spread_order(self, epoch)


def rows_without(clip_ids: Sequence[str], skip_clips: Iterable[str]) -> NDArray[np.int64]:
    """Rows of the clips that are left when `skip_clips` are not to be trained on, sorted.

    Raises ValueError for an id that the split does not have: a mistyped one would leave the bad clip in.
    """
    skip = frozenset(skip_clips)
    rows = np.fromiter((i for i, clip_id in enumerate(clip_ids) if clip_id not in skip), np.int64)
    if len(clip_ids) - len(rows) != len(skip):
        unknown = sorted(skip - frozenset(clip_ids))
        raise ValueError(f"skip_clips: found {', '.join(unknown)}, which the training split does not have; correct it.")
    return rows


_permutation_lock = threading.Lock()  # threads that reach a new epoch together compute its order once


def epoch_permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of `count` examples in one epoch, read-only: every order is equally likely.

    Sorts one random 64-bit word an example, ties by index. `Generator.permutation` is not used: NumPy may change its
    stream between versions, and `Philox.random_raw` it may not. 4 M examples take half a second, once an epoch.
    """
    with _permutation_lock:
        return _epoch_permutation(seed, epoch, count)


@functools.lru_cache(maxsize=2)  # prefetching straddles two epochs
def _epoch_permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    order = np.argsort(_words(seed, ORDER_STREAM, epoch, count), kind="stable")
    order.setflags(write=False)
    return order


def _words(seed: int, stream: int, epoch: int, count: int) -> NDArray[np.uint64]:
    key, counter = np.array([seed, stream], np.uint64), np.array([0, 0, 0, epoch], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


_spread_lock = threading.Lock()


@functools.lru_cache(maxsize=2)
def _spread_order(plan: Plan, epoch: int) -> NDArray[np.int64]:
    """The epoch's permutation, each product's c clips moved, in their order, to (u + 0), (u + 1), ... c-ths of it."""
    assert plan.product is not None
    order = epoch_permutation(plan.seed, epoch, plan.num_kept)
    product = plan.product[order if plan.keep is None else plan.keep[order]]
    _, group, counts = np.unique(product, return_inverse=True, return_counts=True)
    by_group = np.argsort(group, kind="stable")
    rank = np.empty(len(group), np.int64)  # of a clip among those of its product
    rank[by_group] = np.arange(len(group)) - (np.cumsum(counts) - counts)[group[by_group]]
    start = (_words(plan.seed, SPREAD_STREAM, epoch, len(counts)) >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
    spread = order[np.argsort((rank + start[group]) / counts[group], kind="stable")]
    spread.setflags(write=False)
    return spread
