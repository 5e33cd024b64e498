"""Ranks of query clips within their livestreams' galleries (docs/official.md 10).

Axes: `Q` query clips, `I` shop images, `E` embedding, `L` positions in a gallery padded to a common size, `M` true
entries of a query (padded with -1), `K` best entries returned, `S` galleries of one size class.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32

# The rank of a query without a true image in its gallery. I + 1 would count as a hit at 10 in a gallery of three.
NEVER = int(np.iinfo(np.int32).max)

# Queries scored together. A gallery's last block is filled up with queries of other galleries, and their results are
# dropped: a larger block wastes more of them, a smaller one makes narrower matrix products.
_BLOCK = 64
# Galleries of at least this share of the largest one's size are padded to that size, so padding costs at most a third.
_SIZE_RATIO = 0.75
_SIZE_MULTIPLE = 8
# Galleries up to this size form one class: they cost next to nothing, and each class is a loop to compile.
_SMALLEST_SIZE = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """The rankings of query clips, as NumPy arrays with one row a query.

    Attributes:
        rank: int32 [Q], 1-based official rank of the best true entry (docs/official.md 10.1); NEVER without one.
        strict_rank: int32 [Q], the same with ties and NaN counted against the true entry; at least `rank`.
        top_images: int32 [Q, K], rows of the shop images ranked first, best first; -1 past the end of the gallery.
        top_scores: float32 [Q, K], their scores; -inf for NaN and past the end.
        true_entries: int32 [Q], number of true entries in the query's gallery, with duplicates.
        gallery_size: int32 [Q], number of entries in the query's gallery.
    """

    rank: Int32[np.ndarray, " Q"]
    strict_rank: Int32[np.ndarray, " Q"]
    top_images: Int32[np.ndarray, "Q K"]
    top_scores: Float32[np.ndarray, "Q K"]
    true_entries: Int32[np.ndarray, " Q"]
    gallery_size: Int32[np.ndarray, " Q"]


def rank_queries(
    query_qe: Float32[np.ndarray | Array, "Q E"],
    image_ie: Float32[np.ndarray | Array, "I E"],
    *,
    galleries: Sequence[Int[np.ndarray, " _"]],
    gallery_of: Int[np.ndarray, " Q"],
    image_ids: Sequence[Hashable],
    truth: Sequence[Collection[Hashable]],
    top_k: int = 10,
) -> Ranking:
    """Returns the ranking of each query clip in its own gallery (docs/official.md 10.1, 10.2 and 10.5).

    It is one compiled call for all galleries; equal shapes are compiled once.

    Args:
        query_qe: float32 [Q, E], embeddings of the query clips. The score is the dot product, so the cosine for unit
            vectors.
        image_ie: float32 [I, E], embeddings of the shop images.
        galleries: for each livestream, rows of `image_ie` in file order, with duplicates; equal scores rank in this
            order.
        gallery_of: int [Q], the index in `galleries` for each query.
        image_ids: I ids; an entry is true if its id is in the query's `truth`.
        truth: for each query its true image ids. Ids that are not in its gallery are ignored.
        top_k: the number of best entries to return for each query.

    Raises:
        ValueError: the sizes of the arguments do not fit, a row or gallery does not exist, `top_k` is negative, or
            embeddings are not float32.
    """
    _check_arguments(query_qe, image_ie, galleries, gallery_of, image_ids, truth, top_k)
    num_queries, num_images = query_qe.shape[0], image_ie.shape[0]
    true_qm, true_entries = _true_positions(galleries, gallery_of, image_ids, truth)
    size_s = np.array([len(rows) for rows in galleries], np.int32)
    gallery_size = size_s[gallery_of] if num_queries else np.zeros(0, np.int32)
    if num_queries == 0 or num_images == 0:
        never, top = np.full(num_queries, NEVER, np.int32), np.full((num_queries, top_k), -1, np.int32)
        return Ranking(never, never, top, np.full(top.shape, -np.inf, np.float32), true_entries, gallery_size)

    # Sort the queries by gallery, and galleries in the order of the compiled loop.
    count_s = np.bincount(gallery_of, minlength=len(galleries)).astype(np.int32)
    classes = _size_classes(size_s, count_s, at_least=max(top_k, 1))
    loop_order_s = np.full(len(galleries), -1)
    used = np.concatenate([members for members, _ in classes])
    loop_order_s[used] = np.arange(len(used))
    order_q = np.argsort(loop_order_s[gallery_of], kind="stable")
    first_s = np.zeros(len(galleries), np.int32)
    first_s[used] = np.cumsum(count_s[used]) - count_s[used]
    padded_classes = []
    for members, padded_size in classes:
        row_sl = np.zeros((len(members), padded_size), np.int32)
        for row_l, gallery in zip(row_sl, members, strict=True):
            row_l[: size_s[gallery]] = galleries[gallery]
        padded_classes.append(_SizeClass(row_sl, size_s[members], first_s[members], count_s[members]))

    results = _rank_galleries(query_qe[order_q], true_qm[order_q], image_ie, tuple(padded_classes), top_k=top_k)
    back_q = np.argsort(order_q)
    rank, strict_rank, top_images, top_scores = (array[back_q] for array in jax.device_get(results))
    return Ranking(rank, strict_rank, top_images, top_scores, true_entries, gallery_size)


def rank_matrix(
    score_ql: Float32[np.ndarray, "Q L"],
    *,
    galleries: Sequence[Int[np.ndarray, " _"]],
    gallery_of: Int[np.ndarray, " Q"],
    image_ids: Sequence[Hashable],
    truth: Sequence[Collection[Hashable]],
    top_k: int = 10,
) -> Ranking:
    """Returns the ranking by given scores. The arguments are not checked.

    Args:
        score_ql: float32 [Q, L], each query's scores of its gallery's entries, in file order. L is at least the size of
            the largest gallery; scores beyond a gallery's end are ignored.
        galleries, gallery_of, image_ids, truth, top_k: as in `rank_queries`.
    """
    true_qm, true_entries = _true_positions(galleries, gallery_of, image_ids, truth)
    gallery_size = np.array([len(galleries[gallery]) for gallery in gallery_of], np.int32)
    score_ql = np.pad(score_ql, ((0, 0), (0, max(0, top_k - score_ql.shape[1]))))
    rank, strict_rank, positions, top_scores = jax.device_get(_rank_rows(score_ql, gallery_size, true_qm, top_k=top_k))
    top_images = np.full_like(positions, -1)
    for gallery, position_k, image_k in zip(gallery_of, positions, top_images, strict=True):
        image_k[position_k >= 0] = galleries[gallery][position_k[position_k >= 0]]
    return Ranking(rank, strict_rank, top_images, top_scores, true_entries, gallery_size)


@functools.partial(jax.jit, static_argnames=("top_k",))
def _rank_rows(
    score_ql: Float32[Array, "Q L"], size_q: Int32[Array, " Q"], true_qm: Int32[Array, "Q M"], *, top_k: int
) -> "_Results":

    def one(row: tuple[Array, Array, Array]) -> Any:
        score_l, size, true_m = row
        is_real_l = jnp.arange(score_l.shape[0], dtype=jnp.int32) < size
        return jax.tree.map(lambda x: x[0], rank_scores(score_l[None], is_real_l, true_m[None], top_k=top_k))

    return lax.map(one, (score_ql, size_q, true_qm), batch_size=_BLOCK)


def rank_scores(
    score_ql: Float32[Array, "Q L"], is_real_l: Bool[Array, " L"], true_qm: Int32[Array, "Q M"], *, top_k: int
) -> tuple[Int32[Array, " Q"], Int32[Array, " Q"], Int32[Array, "Q K"], Float32[Array, "Q K"]]:
    """Returns the ranks of each row's best true entry, and the best entries (docs/official.md 10.1); for jit.

    Scores 0.90 0.70 0.70 0.10 with the second 0.70 true: official rank 3, because the first 0.70 comes before it in the
    file, and strict rank 3. With the first 0.70 true: official rank 2, strict rank 3.

    Args:
        score_ql: float32 [Q, L], higher is better. NaN ranks as -inf, last.
        is_real_l: bool [L], False for padding, which must be at the end.
        true_qm: int32 [Q, M], positions of the true entries, -1 for none.
        top_k: the number of best entries to return, at most L.

    Returns:
        Official rank int32 [Q]. Strict rank int32 [Q]: other entries that are not lower count as higher, and a row with
        NaN among its true entries has NEVER. Both are NEVER for a row without a true entry. Positions int32 [Q, K] of
        the best entries, -1 for padding, and their scores float32 [Q, K], -inf for NaN and padding.
    """
    position_l = jnp.arange(score_ql.shape[1], dtype=jnp.int32)
    is_true_qm = true_qm >= 0
    has_true_q = is_true_qm.any(axis=1)

    # top_k orders -0.0 below 0.0; for a sort of floats, such as the official one, they are equal.
    sortable_ql = jnp.where(score_ql == 0, 0.0, jnp.where(jnp.isnan(score_ql), -jnp.inf, score_ql))
    true_score_qm = jnp.where(is_true_qm, jnp.take_along_axis(sortable_ql, jnp.maximum(true_qm, 0), axis=1), -jnp.inf)
    best_q1 = true_score_qm.max(axis=1, keepdims=True, initial=-jnp.inf)
    is_best_qm = is_true_qm & (true_score_qm == best_q1)
    first_q1 = jnp.where(is_best_qm, true_qm, NEVER).min(axis=1, keepdims=True, initial=NEVER)
    is_before_ql = (sortable_ql > best_q1) | ((sortable_ql == best_q1) & (position_l[None, :] < first_q1))
    rank_q = 1 + jnp.sum(is_before_ql & is_real_l[None, :], axis=1, dtype=jnp.int32)

    # Entries are counted unless they are lower: so ties and NaN count against the model, and a constant or diverged one
    # does not seem perfect. The true entries themselves are subtracted again.
    raw_true_qm = jnp.take_along_axis(score_ql, jnp.maximum(true_qm, 0), axis=1)
    has_nan_q = (is_true_qm & jnp.isnan(raw_true_qm)).any(axis=1)
    not_lower_q = jnp.sum(~(score_ql < best_q1) & is_real_l[None, :], axis=1, dtype=jnp.int32)
    true_not_lower_q = jnp.sum(~(raw_true_qm < best_q1) & is_true_qm, axis=1, dtype=jnp.int32)
    strict_q = 1 + not_lower_q - true_not_lower_q

    # Of equal scores top_k takes the first, as in file order; padding comes after every real -inf.
    top_score_qk, top_position_qk = lax.top_k(jnp.where(is_real_l[None, :], sortable_ql, -jnp.inf), top_k)
    top_position_qk = jnp.where(is_real_l[top_position_qk], top_position_qk, -1)
    return (
        jnp.where(has_true_q, rank_q, NEVER),
        jnp.where(has_true_q & ~has_nan_q, strict_q, NEVER),
        top_position_qk,
        top_score_qk,
    )


# Official rank, strict rank, rows of the best images, their scores.
_Results = tuple[Int32[Array, " Q"], Int32[Array, " Q"], Int32[Array, "Q K"], Float32[Array, "Q K"]]


class _SizeClass(NamedTuple):
    """Galleries of one size class. Each has `count` of the sorted queries, from `first` on."""

    row_sl: Int32[np.ndarray | Array, "S L"]
    size_s: Int32[np.ndarray | Array, " S"]
    first_s: Int32[np.ndarray | Array, " S"]
    count_s: Int32[np.ndarray | Array, " S"]


@functools.partial(jax.jit, static_argnames=("top_k",))
def _rank_galleries(
    query_qe: Float32[Array, "Q E"],
    true_qm: Int32[Array, "Q M"],
    image_ie: Float32[Array, "I E"],
    classes: tuple[_SizeClass, ...],
    *,
    top_k: int,
) -> _Results:
    num_queries = query_qe.shape[0]
    # The last block of a gallery reads and writes past its queries, and the last block of all past all queries.
    query_qe = jnp.pad(query_qe, ((0, _BLOCK), (0, 0)))
    true_qm = jnp.pad(true_qm, ((0, _BLOCK), (0, 0)), constant_values=-1)
    rows = num_queries + _BLOCK
    results = (
        jnp.full((rows,), NEVER, jnp.int32),
        jnp.full((rows,), NEVER, jnp.int32),
        jnp.full((rows, top_k), -1, jnp.int32),
        jnp.full((rows, top_k), -jnp.inf, jnp.float32),
    )

    def rank_gallery(results: _Results, gallery: _SizeClass) -> tuple[_Results, None]:
        row_l, size, first, count = gallery
        image_le = image_ie[row_l]
        is_real_l = jnp.arange(row_l.shape[0], dtype=jnp.int32) < size

        def rank_block(block: Array, results: _Results) -> _Results:
            start = first + block * _BLOCK
            block_qe = lax.dynamic_slice_in_dim(query_qe, start, _BLOCK)
            score_ql = jnp.einsum("qe,le->ql", block_qe, image_le, precision=lax.Precision.HIGHEST)
            block_true_qm = lax.dynamic_slice_in_dim(true_qm, start, _BLOCK)
            rank_q, strict_q, position_qk, top_score_qk = rank_scores(score_ql, is_real_l, block_true_qm, top_k=top_k)
            top_image_qk = jnp.where(position_qk >= 0, row_l[position_qk], -1)
            # Results past this gallery's own queries are overwritten by later galleries: the queries are sorted so.
            return jax.tree.map(
                lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, axis=0),
                results,
                (rank_q, strict_q, top_image_qk, top_score_qk),
            )

        return lax.fori_loop(0, (count + _BLOCK - 1) // _BLOCK, rank_block, results), None

    for size_class in classes:
        results, _ = lax.scan(rank_gallery, results, size_class)
    return jax.tree.map(lambda whole: whole[:num_queries], results)


def _size_classes(
    size_s: Int32[np.ndarray, " S"], count_s: Int32[np.ndarray, " S"], *, at_least: int
) -> list[tuple[Int[np.ndarray, " _"], int]]:
    """Returns (galleries, padded size) of each class of galleries with queries, largest first; a size >= `at_least`."""
    members_s = np.flatnonzero(count_s)
    members_s = members_s[np.argsort(-size_s[members_s], kind="stable")]

    classes, start = [], 0
    while start < len(members_s):
        largest = max(int(size_s[members_s[start]]), at_least)
        smallest = 0 if largest <= _SMALLEST_SIZE else math.ceil(largest * _SIZE_RATIO)
        stop = start + int(np.count_nonzero(size_s[members_s[start:]] >= smallest))
        classes.append((members_s[start:stop], math.ceil(largest / _SIZE_MULTIPLE) * _SIZE_MULTIPLE))
        start = stop
    return classes


def _true_positions(
    galleries: Sequence[Int[np.ndarray, " _"]],
    gallery_of: Int[np.ndarray, " Q"],
    image_ids: Sequence[Hashable],
    truth: Sequence[Collection[Hashable]],
) -> tuple[Int32[np.ndarray, "Q M"], Int32[np.ndarray, " Q"]]:
    """Returns the positions of each query's true entries in its gallery, in any order, then -1, and their number."""
    # A join of entries and truth on the pair (gallery, id).
    code_of_id: dict[Hashable, int] = {}
    code_i = np.array([code_of_id.setdefault(image_id, len(code_of_id)) for image_id in image_ids], np.int64)
    codes = max(len(code_of_id), 1)

    size_s = np.array([len(rows) for rows in galleries], np.int64)
    entry_row = np.concatenate([np.zeros(0, np.int64), *galleries]).astype(np.int64)
    entry_position = np.concatenate([np.zeros(0, np.int64), *(np.arange(size) for size in size_s)])
    entry_key = np.repeat(np.arange(len(galleries)), size_s) * codes + code_i[entry_row]
    order = np.argsort(entry_key, kind="stable")
    entry_key, entry_position = entry_key[order], entry_position[order]

    known = [[code_of_id[image_id] for image_id in set(ids) if image_id in code_of_id] for ids in truth]
    known_q = np.array([len(codes_of_query) for codes_of_query in known], np.int64)
    truth_query = np.repeat(np.arange(len(truth)), known_q)
    truth_code = np.fromiter(itertools.chain.from_iterable(known), np.int64, int(known_q.sum()))
    truth_key = np.asarray(gallery_of, np.int64)[truth_query] * codes + truth_code
    begin = np.searchsorted(entry_key, truth_key, side="left")
    found = np.searchsorted(entry_key, truth_key, side="right") - begin

    pair_query = np.repeat(truth_query, found)
    pair_position = entry_position[np.repeat(begin, found) + _count_within_groups(found)]
    entries_q = np.bincount(pair_query, minlength=len(truth))
    true_qm = np.full((len(truth), max(int(np.max(entries_q, initial=0)), 1)), -1, np.int32)
    true_qm[pair_query, _count_within_groups(entries_q)] = pair_position
    return true_qm, entries_q.astype(np.int32)


def _count_within_groups(sizes: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """Returns 0, 1, ... for each group in turn, one array: sizes 2 and 3 give 0 1 0 1 2."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _check_arguments(
    query_qe: np.ndarray | Array,
    image_ie: np.ndarray | Array,
    galleries: Sequence[Int[np.ndarray, " _"]],
    gallery_of: Int[np.ndarray, " _"],
    image_ids: Sequence[Hashable],
    truth: Sequence[Collection[Hashable]],
    top_k: int,
) -> None:
    if query_qe.ndim != 2 or image_ie.ndim != 2 or query_qe.shape[1] != image_ie.shape[1]:
        raise ValueError(
            f"rank_queries: found query embeddings {query_qe.shape} and image embeddings {image_ie.shape}, "
            "needs [Q, E] and [I, E]; encode both with the same model."
        )
    num_queries, num_images = query_qe.shape[0], image_ie.shape[0]
    if query_qe.dtype != np.float32 or image_ie.dtype != np.float32:
        raise ValueError(
            f"rank_queries: found embeddings of {query_qe.dtype} and {image_ie.dtype}, needs float32: "
            "narrower types make ties; encode in float32."
        )
    for name, found, needed in (
        ("gallery_of", len(gallery_of), num_queries),
        ("truth", len(truth), num_queries),
        ("image_ids", len(image_ids), num_images),
    ):
        if found != needed:
            raise ValueError(f"rank_queries: {name} has {found} entries, needs {needed}, one for each embedding.")
    if num_queries and not (np.min(gallery_of) >= 0 and np.max(gallery_of) < len(galleries)):
        query = int(np.flatnonzero((gallery_of < 0) | (gallery_of >= len(galleries)))[0])
        raise ValueError(
            f"rank_queries: query {query} has gallery {gallery_of[query]}, needs 0 to {len(galleries) - 1}; "
            "every query is ranked in the gallery of its livestream."
        )
    for gallery, rows in enumerate(galleries):
        if len(rows) and not (np.min(rows) >= 0 and np.max(rows) < num_images):
            raise ValueError(
                f"rank_queries: gallery {gallery} has image rows {np.min(rows)} to {np.max(rows)}, "
                f"needs rows from 0 to {num_images - 1}."
            )
    if top_k < 0:
        raise ValueError(f"rank_queries: top_k is {top_k}, needs 0 or more.")
