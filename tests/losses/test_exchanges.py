"""Exchanges between devices in the compiled training step: one vector for each image, and the embeddings."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import official_formulation
from configs import smoke
from rice_jax.losses import global_batch
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import parameter_specs
from rice_jax.preflight import costs, hlo
from rice_jax.preflight.assessment import abstract_batch
from rice_jax.training import step
from tests import official

pytestmark = pytest.mark.compiles
# Sizes that can be told apart in a shape: 9 patches, T = 10 tokens, S = 30, D = 40, E = 28, and G is none of them.
TOKENS, KEYS, WIDTH, EMBEDDING = 10, 30, 40, 28
MESHES = [(8, 1), pytest.param((4, 2), marks=pytest.mark.slow), (2, 4)]


def config_of(rows: int, **options: Any) -> Any:
    """Returns a config of `rows` rows on each of 8 devices, with loops over pictures, pairs, rows of ICL and blocks."""
    config = smoke.get_config()
    config.batch_size = 8 * rows
    config.data.image_size, config.data.resize, config.data.num_frames = 24, 28, 3
    config.model.update(
        {"patch_size": 8, "width": WIDTH, "layers": 2, "heads": 4, "hidden": 88, "embedding": EMBEDDING}
    )
    config.loss.update({"micro_batch": 8, "pair_chunk": 3, "icl_chunk": 3} | options)
    assert costs.tokens(config) == TOKENS
    return config


Found = tuple[list[hlo.Collective], set[tuple[int, ...]]]


def exchanges(config: Any, mesh: jax.sharding.Mesh, make_loss: Callable[..., Any] = global_batch.make_loss) -> Found:
    """Returns the collectives of the compiled step, and the shapes of parameters and of their shards."""
    net = build_model(config)
    state = step.abstract_state(net, config, mesh)
    train_step: Any = step.make_train_step(net, config, mesh, state, make_loss=make_loss)
    leaves = jax.tree.leaves(state.params)
    shapes = {x.shape for x in leaves} | {x.sharding.shard_shape(x.shape) for x in leaves}
    text = train_step.lower(state, abstract_batch(config, mesh)).compile().as_text()
    return hlo.collectives(text), shapes


@functools.cache
def ours(sizes: tuple[int, int]) -> Found:
    return exchanges(config_of(6), official.mesh_of(*sizes))


def of_the_batch(found: list[hlo.Collective], parameters: set[tuple[int, ...]]) -> list[hlo.Collective]:
    """Returns the collectives without scalars and without arrays of a parameter's shape (gradients and parameters)."""
    parts = [
        one._replace(results=tuple(p for p in one.results if p.shape and p.shape not in parameters)) for one in found
    ]
    return [one for one in parts if one.results]


def faults(found: list[hlo.Collective], parameters: set[tuple[int, ...]], total: int) -> list[str]:
    out = []
    for one in of_the_batch(found, parameters):
        for piece in one.results:
            if {TOKENS, TOKENS - 1, KEYS} & set(piece.shape) or math.prod(piece.shape) > total * WIDTH:
                out.append(f"{one.name} carries tokens: {piece}")
    for one in found:
        if any(count != 1 for count in one.trip_counts):
            out.append(f"{one.name} is in a loop: {one.trip_counts}, {one.results}")
    return out


def batch_bytes(found: list[hlo.Collective], parameters: set[tuple[int, ...]]) -> int:
    return sum(one.bytes * one.runs for one in of_the_batch(found, parameters))


@pytest.mark.parametrize("sizes", MESHES)
def test_no_tokens_cross_devices_and_nothing_does_inside_a_loop(sizes: tuple[int, int]) -> None:
    found, parameters = ours(sizes)
    assert {one.kind for one in found} >= {"all-gather", "reduce-scatter", "all-reduce"}
    assert faults(found, parameters, 48) == []


def test_exchanges_grow_with_the_batch_by_one_vector_an_image_and_the_embeddings_there_and_back() -> None:
    """Besides, by three logits an image there and back, its three hard clips and its product."""
    small = batch_bytes(*ours((8, 1)))
    large = batch_bytes(*exchanges(config_of(12), official.mesh_of(8, 1)))
    an_example = 4 * (2 * (WIDTH + 2 * EMBEDDING) + 3 + 3 + 3 + 1)
    assert 0 < large - small <= 48 * an_example
    assert small <= 48 * an_example  # so nothing is constant or grows with the square


def test_the_official_formulation_is_detected() -> None:
    found, parameters = exchanges(config_of(6), official.mesh_of(8, 1), official_formulation.make_loss)
    assert any(f"shape=(48, {KEYS}, {WIDTH})" in fault for fault in faults(found, parameters, 48))
    assert batch_bytes(found, parameters) > 48 * 4 * KEYS * WIDTH


def test_gradients_reduced_in_every_micro_batch_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_batch, "all_gather_parameter", lambda shard, spec: shard)
    config = config_of(6, pmd=0.0)  # the hard pairs' own gradient would refuse such parameters
    found, parameters = exchanges(config, official.mesh_of(8, 1))
    inside = [fault for fault in faults(found, parameters, 48) if "is in a loop" in fault]
    assert any(f"shape=(2, {WIDTH}, 88)" in fault or f"shape=({WIDTH}, 88)" in fault for fault in inside)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"icl_same_product": "masked", "exclude_same_product": True}, {"cross_dropout": 0.0}]
)
def test_the_official_formulation_gives_our_losses_and_gradients(options: dict[str, Any]) -> None:
    config, mesh = config_of(2, **options), official.mesh_of(4, 2)
    net = build_model(config)
    params = step.init_params(net, config, jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "frames": rng.integers(0, 256, (16, 3, 24, 24, 3), np.uint8),
        "image": rng.integers(0, 256, (16, 24, 24, 3), np.uint8),
        "mask": (np.arange(3) < rng.integers(1, 4, (16, 1))).astype(np.int32),
        "product": rng.integers(0, 10, 16).astype(np.int32),
    }
    results = []
    for make_loss in (global_batch.make_loss, official_formulation.make_loss):
        loss = make_loss(net, config.loss, mesh, parameter_specs(params, mesh))
        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, step.random_key(1)))
    ((_, mine), our_gradient), ((_, theirs), their_gradient) = results
    for name in ("icl", "pmd", "pfr", "negatives_missing"):
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(their_gradient), strict=True):
        assert jnp.abs(a - b).max() <= max(1e-4 * jnp.abs(b).max(), 1e-6)
