"""Each option of the table of oddities (docs/official.md 11), at both values, against a plain definition.

Rows tested where their code is: 9 and 34 test_losses.py too, 15 test_sampling.py, 17 test_decode.py,
16 test_batches.py; the options of pixels are repeated here no more than to see that the config reaches them.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default, lpr750k, rice, smoke
from data_pipeline.input.options import FrameOptions
from rice_jax.config import differences, override, validate
from rice_jax.losses import pairs
from rice_jax.losses.equations import icl_logits, pfr_loss
from rice_jax.losses.global_batch import make_loss
from rice_jax.models.arrays import apply, clip_embedding, cosines
from rice_jax.models.decoder import PatchReconstruction
from rice_jax.models.rice import Rice, build_model
from rice_jax.parallel.mesh import path_name
from rice_jax.retrieval.model import frame_options
from rice_jax.training import optimizer, step
from tests import official, oracle

BETTER = {
    "model.decoder_heads": 2,  # [3]; 16 channels a head, as in the smoke config's encoder
    "model.cross_kv_norm": True,  # [4]
    "model.decoder_self_eps": 1e-5,  # [6]
    "model.logit_scale_init": 10.0,  # [10]
    "loss.pfr_mask_padding": True,  # [1]
    "loss.pfr_attention": "score",  # [2]
    "loss.pfr_with_class_token": False,  # [29]
    "loss.exclude_same_product": True,  # [7]
    "loss.mining_direction": "both",  # [8]
    "loss.icl_same_product": "positive",  # [9]
    "loss.cross_dropout": 0.0,  # [34]
}
PRODUCTS = (0, 0, 1, 2, 0, 3, 1)  # seven pairs: the official code needs an even number (row 23)


def config_of(changes: dict[str, Any]) -> Any:
    config = smoke.get_config()
    for name, value in changes.items():
        override(config, name, str(value))
    config.data.path = "unused"
    validate(config)
    return config


def moved(net: Rice, config: Any) -> Any:
    """Parameters for the model, none at a value that hides it: biases in use, every ReLU two-sided."""
    random = np.random.default_rng(1)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name, x = path_name(path), random.normal(size=shape.shape)
        if name == "logit_scale":
            return jnp.float32(config.model.logit_scale_init)
        if name.endswith("scale") or "reconstruction" in name:
            return jnp.asarray(("bias" not in name) + 0.1 * x, jnp.float32)
        return jnp.asarray(x * (shape.shape[-2] ** -0.5 if name.endswith(("kernel", "proj")) else 0.3), jnp.float32)

    shapes = jax.eval_shape(lambda: step.init_params(net, config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def pictures(count: int = len(PRODUCTS), products: tuple[int, ...] = PRODUCTS) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "frames": random.integers(0, 256, (count, 3, 32, 32, 3), np.uint8),
        "mask": (np.arange(3)[None] < random.integers(1, 4, (count, 1))).astype(np.int32),
        "image": random.integers(0, 256, (count, 32, 32, 3), np.uint8),
        "product": np.array(products, np.int32),
    }


def check_losses(changes: dict[str, Any], batch: dict[str, np.ndarray], key: jax.Array) -> dict[str, jax.Array]:
    """The training path's losses for a config's options equal the plain ones."""
    config = config_of(changes)
    net = build_model(config)
    params = moved(net, config)
    mesh = official.one_device()
    loss = make_loss(net, config.loss, mesh, jax.tree.map(lambda _: jax.sharding.PartitionSpec(), params))
    _, parts = jax.jit(loss)(params, jax.tree.map(jnp.asarray, batch), key)
    mined = oracle.mine(net, config.loss, params, batch)
    expected = jax.jit(lambda p: oracle.losses(net, config.loss, p, batch, key, mined))(params)
    assert {name: float(parts[name]) for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-5
    )
    return parts


@pytest.mark.parametrize(
    "changes",
    [BETTER, {"loss.mining_direction": "clip_to_image", "loss.pfr_attention": "prob"}],
    ids=["better", "official but for two third values"],
)
def test_training_does_what_each_option_says(changes: dict[str, Any]) -> None:
    """Every option of model and loss, all the way from the config (rows 1-4, 6-10, 29, 34); products repeat.

    The official values of mining_direction and pfr_attention are test_losses.py's.
    """
    parts = check_losses(changes, pictures(), step.random_key(5))
    # Product 0 has four clips of others, so three negatives; nobody lacks one, with either value of row 7.
    assert int(parts["negatives_missing"]) == 0


def test_a_batch_of_three_has_two_negatives() -> None:
    """Row 23: the official code fails below four pairs, and for odd numbers."""
    parts = check_losses({}, pictures(3, (0, 1, 2)), step.random_key(5))
    assert float(parts["pmd"]) > 0 and int(parts["negatives_missing"]) == 3


def test_a_clip_without_frames_spoils_nothing() -> None:
    """Row 30: the official code gives NaN."""
    config = config_of({})
    net = build_model(config)
    params = moved(net, config)["decoder"]
    tokens = jnp.ones((1, 5, 32))

    @jax.jit
    @jax.value_and_grad
    def whole(x: jax.Array) -> jax.Array:
        logit, scores = apply(net.decoder, params, x, x, jnp.zeros((1, 5), bool))
        embedding = clip_embedding(x[:, :3], jnp.zeros((1, 3), jnp.int32))
        return jnp.sum(logit) + jnp.sum(embedding) + jnp.sum(jax.nn.softmax(scores))

    value, gradient = whole(tokens)
    assert np.isfinite(value) and bool(jnp.isfinite(gradient).all())


# --- patch feature reconstruction: rows 1, 2, 29 ----------------------------------------------------------------------


@pytest.mark.parametrize("with_class_token", [True, False])
@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("attention", ["prob_scaled", "prob", "score"])
def test_reconstruction_and_its_gradient(attention: str, mask_padding: bool, with_class_token: bool) -> None:
    config = config_of(
        {
            "loss.pfr_attention": attention,
            "loss.pfr_mask_padding": mask_padding,
            "loss.pfr_with_class_token": with_class_token,
        }
    )
    net = build_model(config)
    params = moved(net, config)
    random = np.random.default_rng(0)
    heads, tokens, slots, width = net.decoder.heads, 5, 3, net.decoder.width
    key_mask = jnp.repeat(jnp.array([[True, True, True], [True, False, False]]), tokens, axis=1)
    scores = 3 * random.normal(size=(2, heads, tokens, slots * tokens)).astype(np.float32)
    # A patch of the short clip that sees nothing but its frame's class token: without it the others share the weight.
    scores[1, :, 2, 0] = 40
    scores = jnp.where(key_mask[:, None, None, :], jnp.asarray(scores), jnp.finfo(jnp.float32).min)
    image_tokens, clip_tokens = (jnp.asarray(random.normal(size=(2, n, width)), jnp.float32) for n in (5, 15))

    def ours(rec: Any, scores: jax.Array) -> jax.Array:
        coefficients = apply(net.reconstruction, rec, scores, key_mask)
        return pfr_loss(coefficients, image_tokens, clip_tokens, key_mask)

    def plain(rec: Any, scores: jax.Array) -> jax.Array:
        params_now = {**params, "reconstruction": rec}
        return oracle.pfr(net, config.loss, params_now, scores, image_tokens, clip_tokens, key_mask)

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params["reconstruction"], scores) for f in (ours, plain)
    )
    assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-4 * np.abs(b).max(), 1e-6))


def test_a_class_token_that_takes_all_the_weight_leaves_a_finite_share_to_the_patches() -> None:
    """Row 29: patches are the softmax's own candidates, not what the class token left over."""
    rec = PatchReconstruction(1, head_width=1600, with_class_token=False)
    scores = jnp.full((1, 1, 3, 3), -60.0).at[..., 0].set(60.0)  # R is 40 at the class token, 0 at both patches
    params = rec.init(jax.random.key(0), scores, jnp.ones((1, 3), bool))
    np.testing.assert_allclose(rec.apply(params, scores, jnp.ones((1, 3), bool)), [[[0, 0.5, 0.5]] * 2], atol=1e-6)


# --- the decoder: rows 3, 4, 6, 34 ------------------------------------------------------------------------------------


def decoder_of(changes: dict[str, Any]) -> tuple[Any, Any, np.ndarray]:
    """A decoder's methods, its parameters and tokens [2, 5, 32] as small as makes an epsilon show."""
    config = config_of(changes)
    net = build_model(config)
    params = moved(net, config)
    tokens = 2e-3 * np.random.default_rng(3).normal(size=(2, 5, net.decoder.width))
    return functools.partial(apply, net.decoder, params["decoder"]), params, tokens


def layer_norm(x: np.ndarray, eps: float, p: Any) -> np.ndarray:
    y = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return y * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


@pytest.mark.parametrize(("heads", "hidden"), [(8, 4), (2, 1), (1, 1)])
def test_decoder_heads_are_blocks_of_channels(heads: int, hidden: int) -> None:
    """Row 3: official 8, or as many as the encoder has; the reconstruction's inputs follow."""
    decoder, params, tokens = decoder_of({"model.decoder_heads": heads})
    assert params["reconstruction"]["conv1_kernel"].shape == (heads, hidden)
    tokens = 1000 * tokens
    cross, x = params["decoder"]["cross_layer"], jnp.asarray(tokens, jnp.float32)
    kernel, bias = (np.asarray(cross["attn"][f"in_proj_{name}"], np.float64) for name in ("kernel", "bias"))
    q = layer_norm(tokens, 1e-5, cross["ln_1"]) @ kernel[:, :32] + bias[:32]
    k = tokens @ kernel[:, 32:64] + bias[32:64]
    side = 32 // heads
    expected = np.stack([q[..., c : c + side] @ k[..., c : c + side].swapaxes(1, 2) for c in range(0, 32, side)], 1)
    found = decoder(x, decoder(x, method="keys_values"), jnp.ones((2, 5), bool), method="scores")
    np.testing.assert_allclose(found, expected / side**0.5, atol=1e-5)


@pytest.mark.parametrize("kv_norm", [False, True])
def test_keys_and_values_are_of_raw_tokens_or_of_normalised_ones(kv_norm: bool) -> None:
    """Row 4: the LayerNorm is the one that CLIP's block has before its queries, keys and values."""
    decoder, params, tokens = decoder_of({"model.cross_kv_norm": kv_norm})
    cross = params["decoder"]["cross_layer"]
    x = layer_norm(tokens, 1e-5, cross["ln_1"]) if kv_norm else tokens
    kernel, bias = (np.asarray(cross["attn"][f"in_proj_{name}"], np.float64)[..., 32:] for name in ("kernel", "bias"))
    found = decoder(jnp.asarray(tokens, jnp.float32), method="keys_values")
    np.testing.assert_allclose(found, x @ kernel + bias, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_epsilon_of_the_self_layer_is_its_own(eps: float) -> None:
    """Row 6: 1e-12 in both LayerNorms of the self layer, 1e-5 in the cross layer and the pooler; or one for all."""
    config = config_of({"model.decoder_self_eps": eps})
    net = build_model(config)
    params = moved(net, config)["decoder"]
    x = 2e-3 * np.random.default_rng(3).normal(size=(4, 32))
    norms = {
        "self_layer ln_1": (lambda d: d.self_layer.ln_1, eps),
        "self_layer ln_2": (lambda d: d.self_layer.ln_2, eps),
        "cross_layer ln_1": (lambda d: d.cross_layer.ln_1, 1e-5),
        "cross_layer ln_2": (lambda d: d.cross_layer.ln_2, 1e-5),
        "pooler_norm": (lambda d: d.pooler_norm, 1e-5),
    }
    for name, (norm, expected) in norms.items():
        found = net.decoder.apply({"params": params}, method=lambda d, norm=norm: norm(d)(jnp.asarray(x, jnp.float32)))
        place = functools.reduce(lambda tree, part: tree[part], name.split(), params)
        np.testing.assert_allclose(found, layer_norm(x, expected, place), atol=1e-5, err_msg=name)


# --- mining and the temperature: rows 7, 10 ---------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [False, True])
def test_a_clip_of_the_same_product_is_mined_unless_excluded(exclude: bool) -> None:
    """Row 7, by hand: pair 1 shows the product of pair 0 and looks just like it."""
    e = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    same = np.eye(5, dtype=bool)
    if exclude:
        same[0, 1] = same[1, 0] = True
    partner, found = pairs.mine_hard(e, e, jnp.asarray(same))
    assert partner[0].tolist() == ([2, 3, 4] if exclude else [1, 2, 3]) and bool(found.all())


@pytest.mark.parametrize(("scale", "multiplier"), [(4.0, 1.0), (10.0, 100.0)])
def test_the_temperature_starts_and_moves_as_the_config_says(scale: float, multiplier: float) -> None:
    """Row 10: official 4 (logits 16 cos) at the encoder's rate; CLIP's 100 cos is 10."""
    config = config_of({"model.logit_scale_init": scale, "optimizer.logit_scale_lr_multiplier": multiplier})
    net = build_model(config)
    params = jax.jit(lambda: step.init_params(net, config, jax.random.key(0)))()
    assert float(params["logit_scale"]) == scale
    e = jnp.eye(2)
    np.testing.assert_allclose(icl_logits(e, e, params["logit_scale"]), scale**2 * np.eye(2), rtol=1e-6)
    config.optimizer.weight_decay = 0.0
    small = {"logit_scale": params["logit_scale"], "encoder": {"ln_pre": {"scale": jnp.ones(1)}}}
    after = run_optimizer(config, small, [jax.tree.map(jnp.ones_like, small)] * 3)
    ratio = (scale - after["logit_scale"]) / (1 - after["encoder"]["ln_pre"]["scale"][0])
    assert float(ratio) == pytest.approx(multiplier, rel=1e-2)  # float32: a step of 1e-3 on 10


def test_similarities_are_float32_whatever_computes_the_embeddings() -> None:
    """Row 36: two clips 3e-4 apart in cosine are one and the same in bfloat16."""
    a = jnp.array([[1.0, 0.0]], jnp.bfloat16)
    b = jnp.array([[0.9997, 0.0], [1.0, 0.0]], jnp.float32)
    found = cosines(a, b)
    assert found.dtype == jnp.float32 and found[0].tolist() == pytest.approx([0.9997, 1.0], abs=1e-7)
    config = config_of({"model.dtype": "bfloat16"})
    net = build_model(config)
    pooled = jax.eval_shape(lambda x: net.encoder.init_with_output(jax.random.key(0), x), jnp.zeros((1, 32, 32, 3)))
    assert pooled[0][1].dtype == jnp.float32  # hence unit vectors, logits and mining


# --- the optimiser: rows 11, 12 ---------------------------------------------------------------------------------------


def run_optimizer(config: Any, params: Any, grads: list[Any]) -> Any:
    tx = optimizer.make_optimizer(config)

    @jax.jit
    def update(params: Any, state: Any, g: Any) -> Any:
        changes, state = tx.update(g, state, params)
        return optax.apply_updates(params, changes), state

    state = tx.init(params)
    for g in grads:
        params, state = update(params, state, g)
    return jax.device_get(params)


@pytest.mark.parametrize("eps_placing", ["uncorrected", "corrected"])
@pytest.mark.parametrize("decay_rule", ["official", "no_1d"])
def test_adam_against_its_definition_in_float64(eps_placing: str, decay_rule: str) -> None:
    """docs/official.md 7.1-7.4 for five updates; eps and decay are so large that their place and order show."""
    config = config_of({"optimizer.eps_placing": eps_placing, "optimizer.decay_rule": decay_rule})
    o = config.optimizer
    o.learning_rate, o.decoder_lr_multiplier, o.logit_scale_lr_multiplier = 1e-2, 5.0, 3.0
    o.warmup_updates, config.num_updates, o.eps, o.weight_decay, o.b1, o.b2 = 2, 7, 1e-2, 0.5, 0.8, 0.95
    # name: rate's multiplier, decays by the official rule, by no_1d
    table = {
        "encoder/resblocks/ln_1/scale": (1, True, False),
        "encoder/resblocks/ln_1/bias": (1, False, False),
        "encoder/resblocks/attn/in_proj_bias": (1, False, False),
        "encoder/resblocks/attn/in_proj_kernel": (1, True, True),
        "encoder/class_embedding": (1, True, False),
        "encoder/positional_embedding": (1, True, True),
        "decoder/cross_layer/mlp/c_fc/kernel": (5, True, True),
        "decoder/pooler_norm/scale": (5, True, False),
        "reconstruction/conv1_bias": (5, False, False),
        "logit_scale": (3, True, False),
    }
    random = np.random.default_rng(0)

    def shape(name: str) -> tuple[int, ...]:
        matrix = name.endswith(("kernel", "positional_embedding"))
        return () if name == "logit_scale" else (2,) * (1 + matrix + ("resblocks" in name))

    theta = {name: random.normal(size=shape(name)) for name in table}
    grads = [{name: 1e-2 * random.normal(size=shape(name)) for name in table} for _ in range(5)]
    theta = {name: np.float64(np.float32(x)) for name, x in theta.items()}

    def tree(flat: dict[str, np.ndarray]) -> Any:
        out: dict[str, Any] = {}
        for name, value in flat.items():
            *parents, leaf = name.split("/")
            functools.reduce(lambda d, part: d.setdefault(part, {}), parents, out)[leaf] = jnp.asarray(value, float)
        return out

    found = run_optimizer(config, tree(theta), [tree(g) for g in grads])
    for name, (multiplier, official_decay, no_1d_decay) in table.items():
        m, v, x = 0.0, 0.0, theta[name]
        for t, g in enumerate((grad[name] for grad in grads), start=1):
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            u = t - 1
            lr = 1e-2 * multiplier * (u / 2 if u < 2 else 0.5 * (1 + np.cos(np.pi * (u - 2) / 5)))
            if eps_placing == "uncorrected":
                x = x - lr * np.sqrt(1 - 0.95**t) / (1 - 0.8**t) * m / (np.sqrt(v) + 1e-2)
            else:
                x = x - lr * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-2)
            if official_decay if decay_rule == "official" else no_1d_decay:
                x = x - lr * 0.5 * x
        place = functools.reduce(lambda tree, part: tree[part], name.split("/"), found)
        np.testing.assert_allclose(place, x, atol=1e-6, rtol=0, err_msg=name)


def test_a_beta_of_zero_is_no_average() -> None:
    config = config_of({"optimizer.b1": 0.0, "optimizer.b2": 0.0, "optimizer.weight_decay": 0.0})
    config.optimizer.eps = 0.0
    params = {"encoder": {"proj": jnp.ones((1, 1))}}
    after = run_optimizer(config, params, [{"encoder": {"proj": jnp.full((1, 1), g)}} for g in (1.0, 7.0, -3.0)])
    # Steps of the rate itself, by the gradient's sign: 0, half of the peak up, then the peak down.
    assert float(after["encoder"]["proj"][0, 0]) == pytest.approx(1 - 0.5e-3 + 1e-3, abs=1e-7)


# --- pixels: rows 15, 16, 17 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("test_tail_cut", ("True", "False")),
        ("consistent_augment", ("False", "True")),
        ("resize_mode", ("stretch", "keep_ratio")),
    ],
)
def test_the_config_reaches_the_options_of_pixels(field: str, values: tuple[str, str]) -> None:
    reached = []
    for value in values:
        config = config_of({f"data.{field}": value})
        options = frame_options(config.data, train=field != "test_tail_cut")
        assert isinstance(options, FrameOptions)
        reached.append(str(getattr(options, field)))
    assert reached == list(values)


# --- our recipe -------------------------------------------------------------------------------------------------------


def test_each_departure_of_our_recipe_is_one_and_has_its_reason() -> None:
    lines = [line for line in Path(rice.__file__).read_text().splitlines() if line.strip().startswith("c.")]
    assert all("  # " in line for line in lines if "c.unlock()" not in line)
    set_there = {line.split(" = ")[0].strip().removeprefix("c.") for line in lines if " = " in line}
    differing = differences(lpr750k.get_config(), rice.get_config())
    assert {text.split(":")[0] for text in differing} == set_there
    for stage in default.STAGES:
        config = rice.get_config(stage)
        config.data.path = "unused"
        validate(config)
