"""FLOP by formula, compared with the table of docs/official.md 14 and with the compiler's count."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs import pod, smoke
from rice_jax.models.arrays import apply
from rice_jax.models.rice import build_model
from rice_jax.preflight import costs
from rice_jax.preflight.advice import with_changes
from rice_jax.training import step


@pytest.mark.parametrize(
    ("size", "picture", "decoder", "needed", "again"),
    [("b32", 4.41, 1.04, 0.297, 0.394), ("b16", 17.56, 4.5, 1.19, 1.57), ("l14", 81.0, 10.4, 5.41, 7.19)],
)
def test_clips_sizes_cost_what_the_table_says(
    size: str, picture: float, decoder: float, needed: float, again: float
) -> None:
    """GMAC of a picture and of the decoder for an example; TFLOP of an example without and with a repeated encoder."""
    changes = {"loss.mining_direction": "image_to_clip", "loss.pair_chunk": 0, "loss.icl_chunk": 0, "batch_size": 128}
    config = with_changes(pod.get_config(size), changes | {"model.remat": "none"})
    assert costs.encoder_macs(config) / 1e9 == pytest.approx(picture, rel=2e-3)
    assert (costs.positive_macs(config) + costs.hard_macs(config)) / 1e9 == pytest.approx(decoder, rel=1e-2)
    cost = costs.example_cost(config, devices=1)
    assert cost.needed / 1e12 == pytest.approx(needed, rel=4e-3)
    assert cost.total / 1e12 == pytest.approx(again, rel=4e-3)


@pytest.mark.parametrize("stem", [False, True])
def test_the_compiler_counts_about_as_many_in_one_layer(stem: bool) -> None:
    config = with_changes(smoke.get_config(), {"model.layers": 1, "model.width": 128, "model.hidden": 512})
    if stem:
        config = with_changes(config, {"model.stem_channels": (16, 16, 32, 64), "model.stem_blocks": (1, 0, 1, 0)})
    net = build_model(config)
    params = jax.eval_shape(lambda: step.init_params(net, config, jax.random.key(0)))
    pictures = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    encode = jax.jit(lambda p, x: apply(net.encoder, p["encoder"], x))
    analysis: Any = encode.lower(params, pictures).compile().cost_analysis()
    # It also counts additions, norms and activations, a few percent, and leaves out products with a picture's padding.
    assert analysis["flops"] == pytest.approx(2 * 8 * costs.encoder_macs(config), rel=0.15)


def test_saving_memory_costs_forward_passes() -> None:
    config = with_changes(smoke.get_config(), {"batch_size": 64})
    whole = costs.example_cost(config, devices=8)
    pictures = config.data.num_frames + 1  # of an example
    encoder = 2 * pictures * costs.encoder_macs(config)
    micro = costs.example_cost(with_changes(config, {"loss.micro_batch": 8}), devices=8)
    assert micro.needed == whole.needed and micro.repeated - whole.repeated == encoder
    all_at_once = with_changes(config, {"loss.micro_batch": 8 * pictures})
    assert costs.example_cost(all_at_once, devices=8) == whole
    full = costs.example_cost(with_changes(config, {"model.remat": "full"}), devices=8)
    dots = costs.example_cost(with_changes(config, {"model.remat": "dots"}), devices=8)
    assert 0 < dots.repeated - whole.repeated < full.repeated - whole.repeated < encoder
    alone = with_changes(config, {"loss.pmd": 0.0, "loss.pfr": 0.0})
    assert costs.example_cost(alone, devices=8).repeated == 0
