"""Our arithmetic against figures that the official code gave (tests/golden/README.md), one test a file and topic.

`pytest tests/test_golden.py --golden DIR` runs them on other files of the same format.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default, lpr750k
from rice_jax.models.rice import build_model
from rice_jax.models.vit import LayerNorm
from rice_jax.parallel.mesh import path_name, state_shardings, to_global
from rice_jax.training import optimizer, step
from rice_jax.weights import naming
from tests import official

LOSS = 1e-5  # docs/official.md 13.2, absolute
ARRAY = 1e-4  # docs/official.md 13.2, of an array's largest entry
GRADIENT = 1e-4  # docs/official.md 13.3, of a tensor's largest entry
HERE = Path(__file__).parent / "golden"

PARTS = ("icl", "pmd", "pfr")
READ = (
    *("param/", "in/", "loss/", "contrastive_head/", "probe/", "grad_total/"),
    *(f"grad_{part}/" for part in PARTS),
)  # and under out/ what official.forward gives


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_every_array_of_the_file_is_read_by_some_test(golden_file: Path) -> None:
    known = {f"out/{name}" for name in official.forward(golden_file)}
    assert [name for name in official.read(golden_file) if not name.startswith(READ) and name not in known] == []


def check_outputs(path: Path, *names: str) -> None:
    golden, ours = official.load(path).group("out/"), official.forward(path)
    for name in set(names) & golden.keys():
        # Some arrays hold the first examples only.
        assert official.gap(ours[name][: len(golden[name])], golden[name]) <= ARRAY, name


ENCODER = ("image_tokens", "video_tokens", "image_pooled", "video_pooled")
EMBEDDINGS = ("image_embedding", "video_embedding")
LOGITS = ("icl_logits_clip_to_image", "pmd_similarity_image_by_clip")
DECODER = ("pmd_self_attention_out_positive", "decoder_self_attention_mean_map", "decoder_out_positive")
PFR = ("pfr_attention_in", "pfr_conv_out", "pfr_coefficients", "pfr_reconstruction")


@pytest.mark.holds(*(f"out/{name}" for name in ENCODER))
def test_encoder(golden_file: Path) -> None:
    check_outputs(golden_file, *ENCODER)


@pytest.mark.holds(*(f"out/{name}" for name in EMBEDDINGS))
def test_embeddings(golden_file: Path) -> None:
    check_outputs(golden_file, *EMBEDDINGS)


@pytest.mark.holds(*(f"out/{name}" for name in LOGITS))
def test_similarities(golden_file: Path) -> None:
    check_outputs(golden_file, *LOGITS)


@pytest.mark.holds("out/pmd_negative_clips")
def test_mined_clips(golden_file: Path) -> None:
    """The same set an image (docs/official.md 13.2)."""
    theirs = official.load(golden_file).arrays["out/pmd_negative_clips"]
    ours = official.forward(golden_file)["pmd_negative_clips"]
    assert np.sort(ours[: len(theirs)]).tolist() == np.sort(theirs).tolist()


@pytest.mark.holds("out/pmd_logits", "out/pmd_pooled")
def test_matching(golden_file: Path) -> None:
    golden, ours = official.load(golden_file).group("out/"), official.forward(golden_file)
    hard = ours["pmd_negative_clips"]
    theirs = golden.get("pmd_negative_clips", hard)
    # Near-equal negatives may stand in another order: the positive, then theirs by our positions of the same clips.
    place = [[0, *(1 + row.tolist().index(clip) for clip in clips)] for row, clips in zip(hard, theirs, strict=False)]
    for name in {"pmd_logits", "pmd_pooled"} & golden.keys():
        found = np.stack([array[order] for array, order in zip(ours[name], place, strict=False)])
        assert official.gap(found[: len(golden[name])], golden[name]) <= ARRAY, name


@pytest.mark.holds(*(f"out/{name}" for name in DECODER))
def test_decoder(golden_file: Path) -> None:
    check_outputs(golden_file, *DECODER)


@pytest.mark.holds(*(f"out/{name}" for name in PFR))
def test_reconstruction(golden_file: Path) -> None:
    check_outputs(golden_file, *PFR)


@pytest.mark.holds("probe/")
def test_layer_norm_probes(golden_file: Path) -> None:
    """Inputs of size 2e-3, where an epsilon of 1e-5 shows; encoder: block 0."""
    golden = official.load(golden_file)
    x, net, params = jnp.asarray(golden.arrays["probe/layernorm_in"]), golden.net, golden.params
    block = jax.tree.map(lambda leaf: leaf[0], params["encoder"]["resblocks"])
    ours = {"encoder_ln_1": LayerNorm(net.encoder.eps).apply({"params": block["ln_1"]}, x)}
    if net.decoder is not None:
        of_decoder = {
            "decoder_self_ln_1": lambda decoder: decoder.self_layer.ln_1(x),
            "decoder_cross_ln_1": lambda decoder: decoder.cross_layer.ln_1(x),
            "pooler": lambda decoder: decoder.pooler_norm(x),
        }
        for name, method in of_decoder.items():
            ours[name] = net.decoder.apply({"params": params["decoder"]}, method=method)
    theirs = golden.group("probe/layernorm_")
    assert {name: official.gap(ours[name], array) <= ARRAY for name, array in theirs.items() if name != "in"} == (
        dict.fromkeys(theirs.keys() - {"in"}, True)
    )


# --- losses and gradients, on the path that training takes ------------------------------------------------------------


@functools.cache
def loss_and_gradients(path: Path) -> Any:
    """f(weights of total, icl, pmd, pfr) -> (losses by name, gradient of the weighted sum); compiled once a file."""
    golden = official.load(path)
    loss = golden.loss()

    def weighted(params: Any, parts_weight: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, parts = loss(params, golden.batch, jax.random.key(0))
        found = {"total": total} | {part: parts.get(part, jnp.zeros(())) for part in PARTS}
        return jnp.dot(parts_weight, jnp.stack(list(found.values()))), found

    compiled = jax.jit(jax.value_and_grad(weighted, has_aux=True))

    def run(*parts_weight: float) -> tuple[dict[str, float], Any]:
        (_, found), grads = compiled(golden.params, jnp.array(parts_weight))
        return {name: float(value) for name, value in found.items()}, jax.device_get(grads)

    return run


@pytest.mark.holds("loss/")
def test_losses(golden_file: Path) -> None:
    found, _ = loss_and_gradients(golden_file)(1.0, 0.0, 0.0, 0.0)
    theirs = {name: float(value) for name, value in official.load(golden_file).group("loss/").items()}
    assert {name: found[name] for name in theirs} == pytest.approx(theirs, abs=LOSS)


def check_gradients(path: Path, part: str) -> None:
    """A parameter without a stored gradient must get exactly none (docs/official.md 13.3)."""
    names = ("total", *PARTS)
    _, grads = loss_and_gradients(path)(*(float(name == part) for name in names))
    found = official.gaps(grads, official.load(path).as_parameters(f"grad_{part}/"))
    assert {name: gap for name, gap in found.items() if not gap <= GRADIENT} == {}


@pytest.mark.holds("grad_icl/")
def test_gradients_of_icl(golden_file: Path) -> None:
    check_gradients(golden_file, "icl")


@pytest.mark.holds("grad_pmd/")
def test_gradients_of_pmd(golden_file: Path) -> None:
    check_gradients(golden_file, "pmd")


@pytest.mark.holds("grad_pfr/")
def test_gradients_of_pfr(golden_file: Path) -> None:
    check_gradients(golden_file, "pfr")


@pytest.mark.holds("grad_total/")
def test_gradients_of_the_total(golden_file: Path) -> None:
    check_gradients(golden_file, "total")


@pytest.mark.holds("contrastive_head/")
def test_model_of_icl_alone(golden_file: Path) -> None:
    """Head type `contrastive`, our model without a decoder: the same function of s (docs/official.md 3.4-3.5)."""
    golden = official.load(golden_file)
    config = golden.config.copy_and_resolve_references()
    config.loss.pmd = config.loss.pfr = 0.0
    params = {name: golden.params[name] for name in ("encoder", "logit_scale")}
    alone = dataclasses.replace(golden, config=config, net=build_model(config), params=params)
    loss = alone.loss(pmd=0.0, pfr=0.0)

    @jax.jit
    @jax.value_and_grad
    def of_scale(scale: jax.Array) -> jax.Array:
        return loss({**params, "logit_scale": scale}, golden.batch, jax.random.key(0))[0]

    value, gradient = of_scale(params["logit_scale"])
    theirs = golden.group("contrastive_head/")
    if "loss" in theirs:
        assert float(value) == pytest.approx(float(theirs["loss"]), abs=LOSS)
    if "grad_norm_s" in theirs:
        assert float(gradient) == pytest.approx(theirs["grad_norm_s"].item(), rel=GRADIENT)


def test_a_second_pair_of_decoder_layers_is_refused_by_name(tmp_path: Path) -> None:
    arrays = official.read(next(iter(sorted(HERE.glob("*[0-9].npz")))))
    deeper = {
        name.replace("layers.0", f"layers.{layer}"): array
        for name, array in arrays.items()
        for layer in (2, 3)
        if "layers.0" in name
    }
    np.savez(tmp_path / "deep.npz", **arrays, **deeper)
    with pytest.raises(ValueError, match=r"deep\.npz: transformer.*layers\.2\.attn.* second pair of decoder layers"):
        official.load(tmp_path / "deep.npz")


# --- optimisation -----------------------------------------------------------------------------------------------------


@functools.cache
def updates(path: Path) -> tuple[official.Golden, dict[str, np.ndarray], Any]:
    """An updates file: the file it starts from, its arrays, and its settings as a config."""
    start = path.with_name(path.name.removesuffix("_six_updates.npz") + ".npz")
    assert start.exists(), f"{path.name} starts from {start.name}, which is not in the folder"
    golden, arrays = official.load(start), official.read(path)
    config = golden.config.copy_and_resolve_references()
    names = ("learning_rate", "decoder_lr_multiplier", "warmup_updates", "num_updates", "b1", "b2", "eps")
    settings = dict(zip((*names, "weight_decay"), map(float, arrays["settings"]), strict=True))
    config.num_updates = int(settings.pop("num_updates"))
    config.optimizer.update(settings | {"warmup_updates": int(settings["warmup_updates"])})
    return golden, arrays, config


@functools.cache
def run_updates(path: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Metrics before each update and after the last, and the parameters at these points, by training's own step."""
    golden, arrays, config = updates(path)
    mesh = official.one_device()
    start = jax.device_get(golden.params)
    state = step.State(jnp.int32(0), start, optimizer.make_optimizer(config).init(start), {})
    shardings = state_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    train_step = step.make_train_step(golden.net, config, mesh, abstract)
    metrics, params = [], []
    for _ in range(len(arrays["losses"] if "losses" in arrays else range(7))):
        params.append(jax.device_get(state.params))  # the step donates its state
        state, found = train_step(state, to_global(golden.batch, mesh))
        metrics.append(jax.device_get(found))
    return metrics, params


@pytest.mark.holds("losses")
def test_losses_of_the_updates(updates_file: Path) -> None:
    _, arrays, _ = updates(updates_file)
    metrics, _ = run_updates(updates_file)
    for update, theirs in enumerate(arrays["losses"]):
        ours = [float(metrics[update].get(name, 0)) for name in (*PARTS, "loss")]
        assert ours == pytest.approx(theirs.tolist(), abs=LOSS), f"before update {update}"


@pytest.mark.holds("final/", "logit_scale")
def test_weights_after_the_updates(updates_file: Path) -> None:
    """Largest difference of a weight (docs/official.md 13.4); the decoder embeddings that we drop never move."""
    golden, arrays, _ = updates(updates_file)
    _, params = run_updates(updates_file)
    scales = [float(p["logit_scale"]) for p in params[1:]]
    if "logit_scale" in arrays:
        assert scales == pytest.approx(arrays["logit_scale"].tolist(), abs=2e-5)
    final = {name.removeprefix("final/"): array for name, array in arrays.items() if name.startswith("final/")}
    theirs = naming.convert({**golden.group("param/"), **final}, golden.table)
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(params[-1]), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0, err_msg=path_name(path))
    for name, array in final.items():
        if ".embeddings." in name:
            np.testing.assert_array_equal(array, golden.arrays[f"param/{name}"], err_msg=name)


@pytest.mark.holds("negative_clips")
def test_clips_mined_at_each_update(updates_file: Path) -> None:
    golden, arrays, _ = updates(updates_file)
    _, params = run_updates(updates_file)
    for update, theirs in enumerate(arrays["negative_clips"]):
        assert np.sort(official.mined(golden, params[update])).tolist() == np.sort(theirs).tolist(), update


@pytest.mark.holds("learning_rates")
def test_learning_rates_of_the_updates(updates_file: Path) -> None:
    """Lowest and highest of all groups: 1e-12 by the formula in float64, to its rounding as the step has it."""
    golden, arrays, config = updates(updates_file)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(golden.params)]
    multipliers = [optimizer.lr_multiplier(name, config) for name in names]
    factors = np.array([min(multipliers), max(multipliers)])
    theirs = arrays["learning_rates"]
    for update, rates in enumerate(theirs):
        with jax.enable_x64(True):
            exact = float(optimizer.schedule(config)(update))
        assert (exact * factors).tolist() == pytest.approx(rates.tolist(), rel=1e-12)
    metrics, _ = run_updates(updates_file)
    used = [float(m["learning_rate"]) for m in metrics[: len(theirs)]]
    assert used == pytest.approx(theirs[:, 0].tolist(), rel=3e-7)


def test_schedule_is_the_official_one() -> None:
    """docs/official.md 7.4 at chosen updates: 1e-12 of the peak in float64, 3e-7 of each rate in float32."""
    config = default.get_config()
    config.optimizer.learning_rate = 1.0
    for update, factor in np.loadtxt(HERE / "schedule.csv", delimiter=",", skiprows=1):
        with jax.enable_x64(True):
            assert float(optimizer.schedule(config)(int(update))) == pytest.approx(factor, abs=1e-12)
        assert float(jax.jit(optimizer.schedule(config))(jnp.int32(update))) == pytest.approx(factor, rel=3e-7)


def test_parameter_groups_are_the_official_ones() -> None:
    """Every trained tensor of the ViT-B/32 models: its rate's multiplier and its decay (golden/parameters.csv)."""
    full, alone = lpr750k.get_config("icl_pmd_pfr"), lpr750k.get_config("icl")
    seen = 0
    for line in (HERE / "parameters.csv").read_text().splitlines()[1:]:
        name, shape, _, multiplier, decay = line.split(",")[:5]
        of_icl_alone = name.endswith("norm_s")  # one number that they hold as a vector
        config, table = (alone, naming.OFFICIAL_CONTRASTIVE) if of_icl_alone else (full, naming.OFFICIAL)
        path = naming.find_rule(name, table)[0].path
        if path is None:
            continue  # the bypassed decoder embeddings, which no gradient reaches
        dims = 0 if shape == "scalar" or of_icl_alone else len(shape.split("x")) + ("resblocks" in path)
        assert optimizer.lr_multiplier(path, config) == float(multiplier), name
        assert optimizer.decays(path, dims, config) * config.optimizer.weight_decay == float(decay), name
        seen += 1
    assert seen == 186
