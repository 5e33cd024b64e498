"""Recall@k, what chance reaches, and intervals."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def recall_at(rank_q: Int[np.ndarray, " Q"], ks: Sequence[int], *, denominator: int) -> dict[int, float]:
    """Recall@k in percent: queries ranked k or better, among all entries of the truth list (SPEC 10.2).

    Args:
        rank_q: int [Q], 1-based ranks, NEVER for a miss.
        ks: the k's wanted.
        denominator: entries of the truth list, whether predicted or not; at least Q.

    Returns:
        k -> percent, not rounded.

    Raises:
        ValueError: a denominator below Q or of 0.
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
    """Expected Recall@k in percent of a random order of each gallery, exact.

    With t true among n entries the first k hold none of them with probability C(n - t, k) / C(n, k).

    Args:
        true_entries: int [Q], true entries of each query's gallery, duplicates counted.
        gallery_size: int [Q], entries of each query's gallery.
        ks: the k's wanted.
        denominator: as in `recall_at`; a query that was not predicted hits with probability 0.

    Returns:
        k -> percent, not rounded.

    Raises:
        ValueError: a denominator below Q or of 0.
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
    """Mean over the queries (not the livestreams) of the entries that a query is ranked among; 0 without queries."""
    return float(np.mean(gallery_size)) if len(gallery_size) else 0.0


def wilson_interval(recall_percent: float, denominator: int) -> tuple[float, float]:
    """95 % interval of a Recall figure by Wilson's score, in percent.

    It takes the queries for independent. Queries of few products are not: then the true interval is wider.

    Args:
        recall_percent: the figure, 0 to 100.
        denominator: the entries it was taken over.

    Returns:
        Lower and upper end in percent, within 0 to 100.

    Raises:
        ValueError: a denominator below 1 or a figure outside 0 to 100.
    """
    _check_denominator(denominator, 0)
    if not 0.0 <= recall_percent <= 100.0:
        raise ValueError(f"wilson_interval: found a recall of {recall_percent}, needs 0 to 100 percent.")
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    share = recall_percent / 100.0
    shrink = 1.0 / (1.0 + z * z / denominator)
    centre = shrink * (share + z * z / (2 * denominator))
    half = shrink * z * math.sqrt(share * (1.0 - share) / denominator + (z / (2 * denominator)) ** 2)
    # At 0 and at 100 percent rounding would leave the figure itself a hair outside.
    return 100.0 * max(0.0, min(share, centre - half)), 100.0 * min(1.0, max(share, centre + half))


def _check_denominator(denominator: int, queries: int) -> None:
    if denominator < max(queries, 1):
        raise ValueError(
            f"Recall: found a denominator of {denominator} for {queries} ranked queries, "
            f"needs at least {max(queries, 1)}; give the number of entries of the truth list."
        )
