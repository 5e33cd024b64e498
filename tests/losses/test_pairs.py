"""Grouping and mining of hard pairs by themselves, with every broadcast between different ranks an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rice_jax.losses import pairs

pytestmark = pytest.mark.usefixtures("no_silent_broadcast")


def test_the_example_of_the_docstring() -> None:
    blocks = pairs.group_pairs_by_clip(jnp.array([2, 0, 3, 0, 0]), rows=3, block_size=2, multiple=1)
    count = int(blocks.used)
    assert count == 3
    assert blocks.pair[:count].tolist() == [[1, 3], [4, 5], [0, 5]]  # 5 = none
    assert blocks.clip[:count].tolist() == [0, 0, 2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_pair_of_this_device_gets_one_place_in_a_block_of_its_clip(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    size = data.draw(st.integers(1, 4))
    clips = data.draw(st.lists(st.integers(0, rows), min_size=12, max_size=12))  # `rows`: on another device
    blocks = pairs.group_pairs_by_clip(jnp.array(clips), rows=rows, block_size=size, multiple=3)
    assert blocks.pair.shape[0] % 3 == 0
    seen = []
    for block, (members, clip) in enumerate(zip(blocks.pair.tolist(), blocks.clip.tolist(), strict=True)):
        real = [pair for pair in members if pair < len(clips)]
        assert (block < int(blocks.used)) == bool(real)
        assert all(clips[pair] == clip for pair in real)
        seen += real
    assert sorted(seen) == [pair for pair, clip in enumerate(clips) if clip < rows]
    wanted = [clips.count(clip) for clip in range(rows)]
    assert int(blocks.used) == sum(-(-n // size) for n in wanted)  # no block more than needed


def test_the_most_similar_partners_come_first_without_those_excluded() -> None:
    anchors, partners = jnp.eye(3)[:1], jnp.array([[0.9, 0, 0], [0.1, 0, 0], [0.5, 0, 0], [0.7, 0, 0], [0.5, 0, 0]])
    excluded = jnp.array([[True, False, False, False, False]])
    position, found = pairs.mine_hard(anchors, partners, excluded)
    assert position.tolist() == [[3, 2, 4]] and found.all()


def test_missing_partners_are_marked_as_not_found() -> None:
    anchors, partners = jnp.eye(2)[:1], jnp.ones((4, 2))
    _, found = pairs.mine_hard(anchors, partners, jnp.array([[True, True, False, True]]))
    assert found.tolist() == [[True, False, False]]
    _, found = pairs.mine_hard(anchors, partners[:2], jnp.array([[True, False]]))
    assert found.tolist() == [[True, False]]


def test_dropout_keeps_the_mean_and_differs_between_pairs() -> None:
    keys = pairs.pair_keys(jax.random.key(0), jnp.array([[0, 1]]), jnp.array([[5, 5]]))
    weights = pairs.attention_dropout(jnp.ones((1, 8, 2, 4000)), keys, 0.25)
    np.testing.assert_allclose(np.unique(weights), [0, 4 / 3], rtol=1e-6)
    assert float(weights.mean()) == pytest.approx(1, abs=0.02)
    assert not bool((weights[:, :, 0] == weights[:, :, 1]).all())
