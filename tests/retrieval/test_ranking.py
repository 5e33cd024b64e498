"""Ranks and Recall@k against the official figures, a plain NumPy definition and enumeration (docs/official.md 10)."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rice_jax.retrieval import ranking as module
from rice_jax.retrieval.ranking import NEVER, rank_matrix, rank_queries
from rice_jax.retrieval.recall import chance_recall, mean_gallery_size, recall_at, wilson_interval

pytestmark = pytest.mark.usefixtures("no_silent_broadcast")

KS = (1, 3, 5, 10)
GOLDEN = Path(__file__).parents[1] / "golden" / "fixture_rank.json"


def plain_ranks(score_i, ids, truth):
    """Returns the official and the strict rank of one query, by a stable NumPy sort of its gallery."""
    order = np.argsort(-np.where(np.isnan(score_i), -np.inf, score_i), kind="stable")
    is_true_i = np.array([image_id in truth for image_id in ids], bool)
    if not is_true_i.any():
        return NEVER, NEVER
    rank = 1 + int(np.flatnonzero(is_true_i[order])[0])
    if np.isnan(score_i[is_true_i]).any():
        return rank, NEVER
    return rank, 1 + int(np.sum(~is_true_i & ~(score_i < score_i[is_true_i].max())))


def assert_equals_the_plain_definition(query_qe, image_ie, galleries, gallery_of, image_ids, truth, *, lost=0):
    ranking = rank_queries(
        query_qe, image_ie, galleries=galleries, gallery_of=gallery_of, image_ids=image_ids, truth=truth, top_k=10
    )
    expected = []
    matrix = np.full((len(gallery_of), max(map(len, galleries))), np.nan, np.float32)
    for query, gallery in enumerate(gallery_of):
        rows = galleries[gallery]
        score_i = image_ie[rows] @ query_qe[query]
        matrix[query, : len(rows)] = score_i
        expected.append(plain_ranks(score_i, [image_ids[row] for row in rows], truth[query]))
        best = rows[np.argsort(-score_i, kind="stable")][:10]
        np.testing.assert_array_equal(ranking.top_images[query], [*best, *[-1] * (10 - len(best))])
        assert ranking.true_entries[query] == sum(image_ids[row] in truth[query] for row in rows)
        assert ranking.gallery_size[query] == len(rows)
    np.testing.assert_array_equal(np.stack([ranking.rank, ranking.strict_rank], axis=1), expected)
    of_matrix = rank_matrix(
        matrix, galleries=galleries, gallery_of=gallery_of, image_ids=image_ids, truth=truth, top_k=10
    )
    for field in dataclasses.fields(ranking):
        np.testing.assert_array_equal(getattr(of_matrix, field.name), getattr(ranking, field.name), err_msg=field.name)
    plain_recall = {k: 100 * sum(rank <= k for rank, _ in expected) / (len(expected) + lost) for k in KS}
    assert recall_at(ranking.rank, KS, denominator=len(expected) + lost) == plain_recall


def ranking_of_scores(scores, truth, **kwargs):
    """Returns `rank_queries` of one gallery whose images are the unit vectors, so dot products are exactly `scores`."""
    scores = np.asarray(scores, np.float32)
    size = scores.shape[1]
    return rank_queries(
        scores,
        np.eye(size, dtype=np.float32),
        galleries=[np.arange(size)],
        gallery_of=np.zeros(len(scores), np.int32),
        image_ids=range(size),
        truth=truth,
        **kwargs,
    )


def test_official_rankings_and_recalls_of_livestream_galleries_are_reproduced():
    golden = json.loads(GOLDEN.read_text())
    names = list(golden["galleries"])
    ids = [image_id for name in names for image_id in golden["galleries"][name]]
    sizes = [len(golden["galleries"][name]) for name in names]
    galleries = np.split(np.arange(len(ids)), np.cumsum(sizes)[:-1])
    gallery_of = np.array([names.index(query["live"]) for query in golden["queries"]])
    query_qe = np.zeros((len(golden["queries"]), len(ids)), np.float32)
    for query, gallery, row_e in zip(golden["queries"], gallery_of, query_qe, strict=True):
        row_e[galleries[gallery]] = query["similarity"]

    ranking = rank_queries(
        query_qe,
        np.eye(len(ids), dtype=np.float32),
        galleries=galleries,
        gallery_of=gallery_of,
        image_ids=ids,
        truth=[query["true"] for query in golden["queries"]],
        top_k=12,
    )
    assert ranking.rank.tolist() == [query["first_true_rank"] or NEVER for query in golden["queries"]]
    for query, top_k in zip(golden["queries"], ranking.top_images, strict=True):
        assert [ids[row] for row in top_k if row >= 0] == query["ranking"]
    # Two clips of the truth list were not predicted; the official script counts them, the pairwise one does not.
    for name, denominator in (
        ("lpr_embedding_evaluation", len(golden["ground_truth"])),
        ("lpr_pairwise_evaluation_truth_cut_to_predicted", len(golden["queries"])),
    ):
        recall = recall_at(ranking.rank, KS, denominator=denominator)
        assert {f"R@{k}": round(percent, 2) for k, percent in recall.items()} == golden[name]


def test_official_ranking_and_recall_of_movingfashion_are_reproduced():
    golden = json.loads(GOLDEN.read_text())["movingfashion"]
    ids, queries = golden["gallery"], golden["queries"]
    ranking = ranking_of_scores(
        [query["similarity"] for query in queries], [[ids.index(query["true"])] for query in queries], top_k=8
    )
    assert ranking.rank.tolist() == [query["first_true_rank"] for query in queries]
    assert [[ids[row] for row in top] for top in ranking.top_images] == [query["ranking"] for query in queries]
    recall = recall_at(ranking.rank, KS, denominator=len(queries))
    assert {f"R@{k}": round(percent, 2) for k, percent in recall.items()} == golden["official"]


@st.composite
def retrievals(draw):
    """Draws few shapes, so that few are compiled, and scores on a coarse grid, with many ties and exact arithmetic."""
    queries, images, width = 9, 16, 3
    grid = st.integers(-2, 2)
    query_qe = np.array(draw(st.lists(grid, min_size=queries * width, max_size=queries * width)), np.float32)
    image_ie = np.array(draw(st.lists(grid, min_size=images * width, max_size=images * width)), np.float32)
    rows = st.lists(st.integers(0, images - 1), min_size=1, max_size=images)
    galleries = [np.array(draw(rows), np.int32) for _ in range(2)]
    gallery_of = draw(st.lists(st.integers(0, 1), min_size=queries, max_size=queries))
    image_ids = [str(code) for code in draw(st.lists(st.integers(0, 11), min_size=images, max_size=images))]
    ids = st.sets(st.integers(0, 13).map(str), max_size=3)
    truth = [draw(ids) for _ in range(queries)]
    nan_images = draw(st.sets(st.integers(0, images - 1), max_size=1))
    image_ie = image_ie.reshape(images, width) / 2
    image_ie[list(nan_images)] = np.nan
    return query_qe.reshape(queries, width), image_ie, galleries, np.array(gallery_of), image_ids, truth


@settings(deadline=None, max_examples=100)  # the first example of a shape compiles
@given(retrievals(), st.integers(0, 5))
def test_jitted_ranks_and_recall_equal_the_plain_definition(retrieval, lost):
    assert_equals_the_plain_definition(*retrieval, lost=lost)


def test_ranks_equal_the_plain_definition_over_several_size_classes_and_blocks():
    rng = np.random.default_rng(0)
    sizes = [300, 1, 64, 0, 65, 130, 7, 290, 12, 200]
    images, queries, width = 400, 700, 4
    galleries = [rng.integers(0, images, size).astype(np.int32) for size in sizes]
    gallery_of = rng.integers(0, len(sizes) - 1, queries)  # the last one has no query
    gallery_of[:200] = 4
    image_ids = [f"image-{code}" for code in rng.integers(0, 250, images)]
    truth = [{f"image-{code}" for code in rng.integers(0, 260, rng.integers(0, 5))} for _ in range(queries)]
    query_qe = rng.integers(-3, 4, (queries, width)).astype(np.float32)
    image_ie = rng.integers(-3, 4, (images, width)).astype(np.float32)
    assert_equals_the_plain_definition(query_qe, image_ie, galleries, gallery_of, image_ids, truth)


def test_ties_keep_file_order_in_the_official_rank_and_count_against_the_strict_one():
    ranking = ranking_of_scores([[0.7, 0.9, 0.7, 0.1]] * 3, [[0], [2], [0, 2]])
    assert ranking.rank.tolist() == [2, 3, 2]
    assert ranking.strict_rank.tolist() == [3, 3, 2]


def test_negative_zero_ties_with_zero():
    ranking = ranking_of_scores([[-0.0, 0.0, -0.0]], [[2]], top_k=3)
    assert ranking.rank.tolist() == [3]
    assert ranking.top_images.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("value", [0.3, np.nan])
def test_a_constant_or_nan_model_does_not_rank_first(value):
    sizes = (2, 3, 40, 100)
    galleries = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    ranking = rank_queries(
        np.full((4, 7), value, np.float32),
        np.full((sum(sizes), 7), value, np.float32),
        galleries=galleries,
        gallery_of=np.arange(4),
        image_ids=range(sum(sizes)),
        truth=[[int(rows[0])] for rows in galleries],  # the position that a tie in file order favours
    )
    assert ranking.strict_rank.tolist() == ([NEVER] * 4 if np.isnan(value) else list(sizes))


def test_nan_entries_are_ranked_last_in_the_official_rank_and_keep_file_order():
    query_qe = np.ones((3, 1), np.float32)
    image_ie = np.array([[np.nan], [-5.0], [np.nan], [-7.0]], np.float32)
    ranking = rank_queries(
        query_qe,
        image_ie,
        galleries=[np.arange(4)],
        gallery_of=np.zeros(3, int),
        image_ids=("broken", "good", "broken too", "worse"),
        truth=[["broken too"], ["good"], ["good", "worse"]],
        top_k=5,
    )
    assert ranking.rank.tolist() == [4, 1, 1]
    assert ranking.strict_rank.tolist() == [NEVER, 3, 3]
    assert ranking.top_images.tolist() == [[1, 3, 0, 2, -1]] * 3
    assert ranking.top_scores.tolist() == [[-5.0, -7.0, *[-math.inf] * 3]] * 3


def test_a_true_image_that_is_listed_twice_counts_once():
    ranking = ranking_of_scores([[0.1, 0.9, 0.2]], [[2, 2]])
    assert ranking.true_entries.tolist() == [1]
    assert ranking.strict_rank.tolist() == [2]


def test_padding_never_wins():
    # Padding repeats image 0, which has the best score for every query and is only in the largest gallery.
    image_ie = np.array([[9.0], [-1.0], [-2.0], *([-3.0],) * 97], np.float32)
    ranking = rank_queries(
        np.ones((3, 1), np.float32),
        image_ie,
        galleries=[np.array([2]), np.array([2, 1]), np.arange(100)],
        gallery_of=np.array([0, 1, 2]),
        image_ids=range(100),
        truth=[[2], [2], [2]],
        top_k=3,
    )
    assert ranking.rank.tolist() == [1, 2, 3]
    assert ranking.strict_rank.tolist() == [1, 2, 3]
    assert ranking.top_images.tolist() == [[2, -1, -1], [1, 2, -1], [0, 1, 2]]


def test_a_query_without_a_true_image_in_its_gallery_misses_at_every_k():
    ranking = ranking_of_scores([[0.1, 0.2]] * 2, [[], [7]])
    assert ranking.rank.tolist() == ranking.strict_rank.tolist() == [NEVER, NEVER]
    assert recall_at(ranking.rank, KS, denominator=2) == dict.fromkeys(KS, 0.0)


def test_evaluation_compiles_once(monkeypatch):
    traces = []
    rank_scores = module.rank_scores
    monkeypatch.setattr(module, "rank_scores", lambda *a, **k: traces.append(a[0].shape) or rank_scores(*a, **k))
    rng = np.random.default_rng(0)
    sizes = [5, 30, 64, 90, 100, 250]
    galleries = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])

    def evaluate():
        rank_queries(
            rng.standard_normal((331, 11)).astype(np.float32),
            rng.standard_normal((sum(sizes), 11)).astype(np.float32),
            galleries=galleries,
            gallery_of=np.arange(331) % len(sizes),
            image_ids=range(sum(sizes)),
            truth=[[int(rng.choice(galleries[query % len(sizes)]))] for query in range(331)],
        )

    evaluate()
    assert sorted(size for _, size in traces) == [64, 104, 256]  # once a size class
    first = len(traces)
    evaluate()
    assert len(traces) == first


@pytest.mark.parametrize("largest", [1, 64, 5_000, 1_000_000])
def test_size_classes_are_few_and_waste_at_most_a_third(largest):
    sizes = np.unique(np.geomspace(1, largest, 500).astype(np.int32))
    classes = module._size_classes(sizes, np.ones_like(sizes), at_least=10)
    assert sorted(np.concatenate([members for members, _ in classes])) == list(range(len(sizes)))
    assert len(classes) <= 2 + max(0, math.log(largest / 64, 4 / 3))
    for members, padded in classes:
        assert padded >= max(sizes[members].max(), 10)
        assert padded % 8 == 0
        assert padded <= 64 or padded <= sizes[members].min() * 4 / 3 + 8


@pytest.mark.parametrize(("size", "true"), [(1, 0), (1, 1), (2, 1), (3, 2), (6, 1), (6, 4), (6, 6), (7, 3), (0, 0)])
def test_chance_equals_the_share_of_all_orders(size, true):
    for k in (1, 2, 3, 6, 9):
        draws = list(itertools.combinations(range(size), min(k, size)))
        expected = 100 * sum(min(draw, default=size) < true for draw in draws) / len(draws)
        chance = chance_recall(np.array([true]), np.array([size]), [k], denominator=1)
        assert chance[k] == pytest.approx(expected, abs=1e-9)


def test_chance_averages_over_the_truth_list_and_counts_unpredicted_queries_as_misses():
    chance = chance_recall(np.array([1, 2, 0]), np.array([4, 10, 5]), [1], denominator=5)
    assert chance == {1: pytest.approx(100 * (1 / 4 + 2 / 10) / 5)}


def test_mean_gallery_size_is_over_queries():
    assert mean_gallery_size(np.array([30, 30, 30, 10])) == 25.0
    assert mean_gallery_size(np.array([], np.int32)) == 0.0


@pytest.mark.parametrize("hits", [0, 1, 44, 95])
def test_wilson_interval_ends_where_the_score_test_rejects(hits):
    total = 95
    low, high = wilson_interval(100 * hits / total, total)
    assert 0.0 <= low <= 100 * hits / total <= high <= 100.0
    for end in (low / 100, high / 100):
        if 0.0 < end < 1.0:
            z = abs(hits / total - end) / math.sqrt(end * (1 - end) / total)
            assert z == pytest.approx(1.96, abs=1e-3)


def test_no_queries_and_no_images_give_empty_answers():
    image_ie = np.ones((3, 2), np.float32)
    arguments = {"galleries": [np.arange(3)], "image_ids": range(3)}
    none = rank_queries(np.ones((0, 2), np.float32), image_ie, gallery_of=np.zeros(0, int), truth=[], **arguments)
    assert none.rank.shape == (0,)
    assert none.top_images.shape == (0, 10)
    none = rank_matrix(np.ones((0, 2), np.float32), gallery_of=np.zeros(0, int), truth=[], **arguments)
    assert none.rank.shape == (0,)
    assert none.top_images.shape == none.top_scores.shape == (0, 10)
    empty = {"galleries": [np.zeros(0, int)], "image_ids": []}
    lonely = rank_queries(image_ie[:1], image_ie[:0], gallery_of=np.zeros(1, int), truth=[["a"]], **empty)
    assert lonely.rank.tolist() == [NEVER]
    assert lonely.gallery_size.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery_of": np.array([0, 1])}, "query 1 has gallery 1, needs 0 to 0"),
        ({"galleries": [np.array([0, 3])]}, "gallery 0 has image rows 0 to 3, needs rows from 0 to 2"),
        ({"galleries": [np.array([-1])]}, "gallery 0 has image rows -1 to -1"),
        ({"truth": [[0]]}, "truth has 1 entries, needs 2"),
        ({"image_ids": range(4)}, "image_ids has 4 entries, needs 3"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(change, message):
    arguments = {
        "galleries": [np.arange(3)],
        "gallery_of": np.zeros(2, int),
        "image_ids": range(3),
        "truth": [[0], [1]],
    }
    with pytest.raises(ValueError, match=message):
        rank_queries(np.ones((2, 4), np.float32), np.ones((3, 4), np.float32), **(arguments | change))


def test_embeddings_of_other_shapes_or_types_are_refused_without_the_type_checker():
    # In a test jaxtyping would refuse them first; users run without it.
    rest = ([np.arange(3)], np.zeros(2, int), range(3), [[0], [1]], 10)
    query_qe, image_ie = np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)
    for query, image, message in (
        (query_qe[:, :3], image_ie, r"found query embeddings \(2, 3\) and image embeddings \(3, 4\)"),
        (query_qe[0], image_ie, r"found query embeddings \(4,\)"),
        (query_qe.astype(np.float16), image_ie, "found embeddings of float16 and float32, needs float32"),
        (query_qe[:1], image_ie, "gallery_of has 2 entries, needs 1"),
    ):
        with pytest.raises(ValueError, match=message):
            module._check_arguments(query, image, *rest)


def test_a_denominator_below_the_queries_is_refused():
    with pytest.raises(ValueError, match="denominator of 1 for 2 ranked queries"):
        recall_at(np.array([1, 2]), KS, denominator=1)
    with pytest.raises(ValueError, match="denominator of 0"):
        chance_recall(np.array([], int), np.array([], int), KS, denominator=0)
    with pytest.raises(ValueError, match=r"found a recall of 101\.0"):
        wilson_interval(101.0, 5)
