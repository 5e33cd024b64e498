"""The order of the data: golden batches, epochs that show each example once, and dependence on the seed alone."""

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_pipeline.input import plan as plan_module
from data_pipeline.input.plan import Plan, epoch_permutation, rows_without

# (seed, step) -> rows of 11 examples in batches of 4, written down once from this code and checked against its
# definition below. They must never change: a resumed run would go on with other data.
GOLDEN = {
    (0, 0): [3, 4, 9, 2],
    (0, 1): [1, 5, 10, 0],
    (0, 2): [8, 3, 7, 4],
    (7, 1000): [6, 10, 8, 9],
}


def slow_permutation(seed: int, epoch: int, count: int) -> list[int]:
    """The definition: draw a random word for each example, sort the examples by (word, index)."""
    philox = np.random.Philox(key=seed + (int.from_bytes(b"order") << 64), counter=epoch << 192)
    words = [int(philox.random_raw()) for _ in range(count)]
    return sorted(range(count), key=lambda i: (words[i], i))


def test_golden_batches_never_change():
    for (seed, step), rows in GOLDEN.items():
        assert Plan(11, 4, seed).batch(step).tolist() == rows, (seed, step)


def test_permutation_agrees_with_its_definition():
    for seed, epoch, count in [(0, 0, 50), (2**64 - 1, 3, 7), (5, 10**6, 64)]:
        assert epoch_permutation(seed, epoch, count).tolist() == slow_permutation(seed, epoch, count)


def test_equal_words_are_ordered_by_index(monkeypatch):
    class FewWords:
        def __init__(self, **key: object) -> None:
            pass

        def random_raw(self, count: int) -> np.ndarray:
            return np.arange(count, dtype=np.uint64) % 3

    monkeypatch.setattr(np.random, "Philox", FewWords)
    assert epoch_permutation(99, 99, 3000).tolist() == [*range(0, 3000, 3), *range(1, 3000, 3), *range(2, 3000, 3)]


def test_an_epoch_shows_no_example_twice_and_leaves_out_n_mod_g():
    plan = Plan(103, 10, 3)
    assert plan.batches_per_epoch == 10
    for epoch in range(3):
        steps = range(epoch * 10, epoch * 10 + 10)
        assert {plan.epoch(step) for step in steps} == {epoch}
        seen = np.concatenate([plan.batch(step) for step in steps])
        assert len(set(seen.tolist())) == 100
        assert set(seen.tolist()) | set(plan.left_out(epoch).tolist()) == set(range(103))
        assert len(plan.left_out(epoch)) == 103 % 10


def test_epochs_and_seeds_have_orders_of_their_own():
    # In Grain's shuffle, epoch e + 1 of seed s is epoch e of seed s + 1: not here.
    orders = {tuple(epoch_permutation(seed, epoch, 20).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_every_order_is_equally_likely():
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2400):
        counts[tuple(epoch_permutation(11, epoch, 4).tolist())] += 1
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom: exceeded by chance once in a thousand seeds


def test_batch_is_a_function_of_the_step_alone():
    forward = [Plan(50, 8, 1).batch(step).tolist() for step in range(20)]
    plan = Plan(50, 8, 1)
    assert [plan.batch(step).tolist() for step in reversed(range(20))] == forward[::-1]
    code = "from data_pipeline.input.plan import Plan; print([Plan(50, 8, 1).batch(s).tolist() for s in range(20)])"
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert fresh.stdout.strip() == str(forward)


def test_an_epochs_order_is_computed_once_for_all_threads(monkeypatch):
    calls = []
    argsort = np.argsort
    monkeypatch.setattr(
        plan_module.np, "argsort", lambda *args, **kwargs: (calls.append(1), argsort(*args, **kwargs))[1]
    )
    plan = Plan(100_000, 10, 987)
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(plan.batch, range(32)))
    assert len(calls) == 1
    assert len({int(row) for batch in batches for row in batch}) == 320


def test_four_million_examples_cost_as_much_as_few_sorts_of_as_many():
    """Half a second on an idle core. Both are timed in one process, so that a slow machine is slow at both."""
    keys = np.random.default_rng(0).integers(2**63, size=4_013_617, dtype=np.uint64)
    start = time.process_time()
    np.argsort(keys, kind="stable")
    sort = time.process_time() - start
    Plan(4_013_617, 32_768, 12345).batch(0)
    assert time.process_time() - start - sort < 3 * sort


def test_a_batch_handed_out_may_be_changed_without_changing_the_plan():
    plan = Plan(20, 5, 0)
    first = plan.batch(0)
    expected = first.copy()
    first[:] = -1
    assert plan.batch(0).tolist() == expected.tolist()


def test_fewer_examples_than_one_batch_names_both_and_what_to_set():
    with pytest.raises(ValueError, match=r"found 7 clips.* needs at least one batch of 8; set batch_size to 7"):
        Plan(7, 8, 0)
    with pytest.raises(ValueError, match=r"found 3 clips \(7 of 10 skipped\)"):
        Plan(10, 4, 0, keep=np.array([1, 2, 3]))
    assert Plan(8, 8, 0).batches_per_epoch == 1


@pytest.mark.parametrize("keep", [[2, 1], [1, 1], [-1, 3], [3, 10]])
def test_keep_must_be_sorted_distinct_rows(keep):
    with pytest.raises(ValueError, match="sorted, distinct rows of 0 to 9"):
        Plan(10, 1, 0, keep=np.array(keep))


@pytest.mark.parametrize(("batch_size", "seed"), [(0, 0), (1, -1), (1, 2**64)])
def test_impossible_batch_size_or_seed_is_refused(batch_size, seed):
    with pytest.raises(ValueError, match="needs"):
        Plan(10, batch_size, seed)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="found -1"):
        Plan(10, 2, 0).batch(-1)


def test_skip_clips_leaves_exactly_those_out_and_changes_the_fingerprint():
    ids = [f"clip{i}" for i in range(12)]
    keep = rows_without(ids, ["clip3", "clip7"])
    plan = Plan(12, 5, 0, keep=keep)
    seen = {int(row) for step in range(10) for row in plan.batch(step)}
    assert seen == set(range(12)) - {3, 7}
    assert plan.fingerprint != Plan(12, 5, 0).fingerprint
    assert plan.fingerprint != Plan(12, 5, 0, keep=rows_without(ids, ["clip3", "clip8"])).fingerprint


def test_an_unknown_id_in_skip_clips_is_named():
    with pytest.raises(ValueError, match="found clip99, which"):
        rows_without(["clip1", "clip2"], ["clip1", "clip99"])


def test_a_plan_that_skips_all_clips_does_not_ask_for_batches_of_none():
    with pytest.raises(ValueError, match=r"found 0 clips \(2 of 2 skipped\), .*; convert more clips or skip fewer"):
        Plan(2, 1, 0, keep=np.zeros(0, np.int64))


def test_fingerprint_covers_seed_batch_size_count_and_content():
    plans = [Plan(20, 5, 0), Plan(20, 5, 1), Plan(20, 4, 0), Plan(21, 5, 0), Plan(20, 5, 0, content_hash="ab")]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert Plan(20, 5, 0).fingerprint == Plan(20, 5, 0).fingerprint


# --- spreading products -----------------------------------------------------------------------------------------------


def spread_plan(**changes: object) -> Plan:
    """20 products of 1 to 20 clips, and a batch of twenty."""
    product = np.repeat(np.arange(20, dtype=np.int32), np.arange(1, 21))
    return Plan(**{"num_examples": len(product), "batch_size": 20, "seed": 3, "product": product, **changes})  # type: ignore[arg-type]


def test_spreading_shows_each_clip_once_an_epoch() -> None:
    plan = spread_plan()
    for epoch in range(3):
        first = epoch * plan.batches_per_epoch
        shown = np.concatenate([plan.batch(first + k) for k in range(plan.batches_per_epoch)])
        everything = np.concatenate([shown, plan.left_out(epoch)])
        assert sorted(everything.tolist()) == list(range(plan.num_examples))


def test_spreading_gives_each_batch_its_share_of_every_product() -> None:
    plan = spread_plan()
    for step in range(3 * plan.batches_per_epoch):
        shown = np.bincount(plan.product[plan.batch(step)], minlength=20)
        share = np.arange(1, 21) * plan.batch_size / plan.num_examples
        assert np.abs(shown - share).max() < 2.5, step
    alone = dataclasses.replace(plan, product=None)
    products = lambda p: np.mean([len(set(plan.product[p.batch(step)].tolist())) for step in range(60)])
    assert products(plan) > products(alone) + 1


def test_spreading_is_another_order_with_another_fingerprint() -> None:
    plan, alone = spread_plan(), dataclasses.replace(spread_plan(), product=None)
    assert plan.fingerprint != alone.fingerprint
    assert plan.batch(0).tolist() != alone.batch(0).tolist()
    assert plan.batch(40).tolist() == spread_plan().batch(40).tolist()


def test_spreading_knows_the_clips_left_out() -> None:
    keep = np.arange(0, 210, 3)
    plan = spread_plan(keep=keep)
    assert set(plan.batch(0).tolist()) <= set(keep.tolist())


def test_each_product_of_a_spread_epoch_begins_at_a_place_of_its_own() -> None:
    """Two products of equal size alternate, and which is first stays the same for the whole epoch."""
    plan = Plan(20, batch_size=2, seed=0, product=np.arange(20, dtype=np.int32) % 2)
    firsts = []
    for epoch in range(8):
        order = np.concatenate([plan.batch(10 * epoch + step) for step in range(10)]) % 2
        assert len(set(order[::2].tolist())) == 1 and set(order[:2].tolist()) == {0, 1}
        firsts.append(int(order[0]))
    assert len(set(firsts)) == 2
