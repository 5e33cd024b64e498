"""Recall@k, its expectation for random rankings, and its confidence interval."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def recall_at(rank_q: Int[np.ndarray, " Q"], ks: Sequence[int], *, denominator: int) -> dict[int, float]:
    """Returns {k: Recall@k in percent, not rounded}: the share of the truth list of rank k or better.

    docs/official.md 10.2.

    Args:
        rank_q: int [Q], 1-based ranks, NEVER for a miss.
        ks: the values of k.
        denominator: the number of entries of the truth list, with or without a prediction; at least Q.

    Raises:
        ValueError: the denominator is 0 or less than Q.
    """
    _check_denominator(denominator, len(rank_q))
    return {k: 100.0 * int(np.count_nonzero(rank_q <= k)) / denominator for k in ks}


def chance_recall(
    true_entries: Int[np.ndarray, " Q"],
    gallery_size: Int[np.ndarray, " Q"],
    ks: Sequence[int],
    *,
    denominator: int,
) -> dict[int, float]:
    """Returns {k: Recall@k in percent, not rounded} to be expected of random rankings, exactly.

    With t true among n entries, the first k contain none of them with probability C(n - t, k) / C(n, k).

    Args:
        true_entries: int [Q], number of true entries in each query's gallery, with duplicates.
        gallery_size: int [Q], number of entries in each query's gallery.
        ks: the values of k.
        denominator: as in `recall_at`; entries without a prediction are misses.

    Raises:
        ValueError: the denominator is 0 or less than Q.
    """
    _check_denominator(denominator, len(true_entries))
    chance = {}
    for k in ks:
        drawn_1k = np.arange(k)[None, :]
        false_left_qk = np.maximum((gallery_size - true_entries)[:, None] - drawn_1k, 0)
        left_qk = np.maximum(gallery_size[:, None] - drawn_1k, 1)
        hit_q = np.where(true_entries > 0, 1.0 - np.prod(false_left_qk / left_qk, axis=1), 0.0)
        chance[k] = 100.0 * float(hit_q.sum()) / denominator
    return chance


def mean_gallery_size(gallery_size: Int[np.ndarray, " Q"]) -> float:
    """Returns the mean gallery size over the queries, not over the livestreams; 0 without queries."""
    return float(np.mean(gallery_size)) if len(gallery_size) else 0.0


def wilson_interval(recall_percent: float, denominator: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a Recall figure: lower and upper end in percent, within 0 to 100.

    It assumes independent queries. Queries of few products are not, and then the true interval is wider.

    Args:
        recall_percent: the figure, 0 to 100.
        denominator: the number of queries that it is a share of.

    Raises:
        ValueError: the denominator is less than 1, or the figure is outside 0 to 100.
    """
    _check_denominator(denominator, 0)
    if not 0.0 <= recall_percent <= 100.0:
        raise ValueError(f"wilson_interval: found a recall of {recall_percent}, needs 0 to 100 percent.")
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    share = recall_percent / 100.0
    shrink = 1.0 / (1.0 + z * z / denominator)
    centre = shrink * (share + z * z / (2 * denominator))
    half = shrink * z * math.sqrt(share * (1.0 - share) / denominator + (z / (2 * denominator)) ** 2)
    # Rounding would exclude the figure itself at 0 and at 100 percent.
    return 100.0 * max(0.0, min(share, centre - half)), 100.0 * min(1.0, max(share, centre + half))


def _check_denominator(denominator: int, queries: int) -> None:
    if denominator < max(queries, 1):
        raise ValueError(
            f"Recall: found a denominator of {denominator} for {queries} ranked queries, "
            f"needs at least {max(queries, 1)}; give the number of entries of the truth list."
        )
