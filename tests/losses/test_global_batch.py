"""The losses on meshes of CPU devices against their plain definition: values and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rice_jax.losses.global_batch import kept_patches, make_loss
from rice_jax.models.decoder import MatchingDecoder, PatchReconstruction
from rice_jax.models.rice import Rice
from rice_jax.models.vit import VisionTransformer
from rice_jax.parallel.mesh import parameter_specs, path_name, to_global
from rice_jax.training import step
from tests import official, oracle

pytestmark = pytest.mark.compiles
G, SLOTS, SIDE, WIDTH = 16, 3, 16, 32


def net(form: str = "softmax") -> Rice:
    encoder = VisionTransformer(SIDE, 8, WIDTH, layers=1, heads=2, hidden=48, embedding=16)
    decoder, reconstruction = MatchingDecoder(WIDTH, 4, 48), PatchReconstruction(4, head_width=8)
    return Rice(encoder, decoder, reconstruction, bias_init=-14.0 if form == "sigmoid" else None)


@functools.cache
def params(form: str = "softmax") -> Any:
    picture = jnp.zeros((1, SIDE, SIDE, 3), jnp.uint8)
    start = net(form).init(jax.random.key(3), picture[:, None], jnp.ones((1, 1), jnp.int32), picture)["params"]
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    # So every ReLU has inputs of both signs, no bias is 0, and embeddings differ.
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    out = jax.tree.unflatten(tree, moved)
    # A cosine does not depend on the length, but the gradient is divided by it: if short, rounding would exceed 1e-6.
    out["decoder"]["match"] *= 10
    return out


def pictures(kind: str) -> dict[str, np.ndarray]:
    """Returns a batch of a kind that would reveal a fault in the exchange."""
    random = np.random.default_rng(0)
    batch = {
        "frames": random.integers(0, 256, (G, SLOTS, SIDE, SIDE, 3), np.uint8),
        "mask": (np.arange(SLOTS)[None] < random.integers(1, SLOTS + 1, (G, 1))).astype(np.int32),
        "image": random.integers(0, 256, (G, SIDE, SIDE, 3), np.uint8),
        "product": np.arange(G, dtype=np.int32),
        "index": np.arange(G, dtype=np.int32),
    }
    if kind == "one hard clip":  # every image's hardest clip is clip 5, which shows what all images show
        batch["image"][:] = batch["image"][0]
        batch["frames"][5] = batch["image"][0]
        batch["image"][5] = 255 - batch["image"][5]
    if kind == "all clips identical":
        batch["frames"][:], batch["mask"][:] = batch["frames"][0], batch["mask"][0]
    if kind == "few products":
        batch["product"][:] = np.array(
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]
        )  # two eligible negatives at most
    return batch


@functools.cache
def loss_and_gradient(mesh_shape: tuple[int, int], options: tuple[tuple[str, Any], ...]) -> Any:
    mesh, chosen = official.mesh_of(*mesh_shape), official.loss_options(**dict(options))
    specs = parameter_specs(params(chosen.icl_form), mesh)
    loss = make_loss(net(chosen.icl_form), chosen, mesh, specs)
    return mesh, jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def plain(kind: str, options: tuple[tuple[str, Any], ...]) -> Any:
    chosen, batch = official.loss_options(**dict(options)), pictures(kind)
    start = params(chosen.icl_form)
    mined = oracle.mine(net(), chosen, start, batch)

    @jax.jit
    def total(p: Any) -> Any:
        parts = oracle.losses(net(), chosen, p, batch, key(), mined)
        return sum(chosen[name] * value for name, value in parts.items()), parts

    (_, parts), grads = jax.value_and_grad(total, has_aux=True)(start)
    return jax.device_get((parts, grads))


def key() -> jax.Array:
    return jax.random.fold_in(step.random_key(7), 3)


def check(kind: str, mesh_shape: tuple[int, int], **options: Any) -> dict[str, jax.Array]:
    chosen = tuple(sorted(options.items()))
    mesh, call = loss_and_gradient(mesh_shape, chosen)
    how = ("micro_batch", "pair_chunk", "icl_chunk", "unit_slots", "unit_chunk")  # without effect on results
    expected, expected_grads = plain(kind, tuple(item for item in chosen if item[0] not in how))
    start = params(options.get("icl_form", "softmax"))
    (_, parts), grads = call(start, to_global(pictures(kind), mesh), key())
    for name, value in expected.items():
        assert float(parts[name]) == pytest.approx(float(value), abs=1e-5, rel=1e-6), name
    for path, ours, theirs in zip(
        [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(grads)],
        jax.tree.leaves(jax.device_get(grads)),
        jax.tree.leaves(expected_grads),
        strict=True,
    ):
        # The same tolerance as everywhere for gradients across devices.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=max(1e-4 * np.abs(theirs).max(), 1e-6), err_msg=path)
    return parts


MESHES = [(1, 1), (8, 1), (2, 4)]


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("kind", ["random", "one hard clip", "all clips identical"])
def test_losses_and_gradients_equal_the_plain_definition(kind: str, mesh_shape: tuple[int, int]) -> None:
    parts = check(kind, mesh_shape, unit_slots=2, unit_chunk=2)
    if kind == "one hard clip" and mesh_shape == (8, 1):
        assert (
            parts["busiest_device_units"] >= 8
        )  # fifteen images want one clip: the device of that clip decodes them all


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_dropout_does_not_depend_on_the_mesh(mesh_shape: tuple[int, int]) -> None:
    options = {"cross_dropout": 0.3, "mining_direction": "both"}
    parts = check("random", mesh_shape, **options)
    still, _ = plain("random", (("mining_direction", "both"),))
    assert abs(float(parts["pmd"]) - float(still["pmd"])) > 1e-3  # it drops something
    assert float(parts["pfr"]) == pytest.approx(float(still["pfr"]), abs=1e-5)  # and not before the reconstruction


@pytest.mark.parametrize("mesh_shape", [(1, 1), (4, 2)])
@pytest.mark.parametrize("icl", ["masked", "positive"])
def test_same_product_pairs_are_no_negatives(icl: str, mesh_shape: tuple[int, int]) -> None:
    parts = check("few products", mesh_shape, icl_same_product=icl, exclude_same_product=True)
    # 14 rows of product 0 have two eligible partners, the others 15: one logit is missing in each of the 14.
    assert int(parts["negatives_missing"]) == 14


@pytest.mark.parametrize(("mesh_shape", "chunk"), [((1, 1), 3), ((2, 1), 3), ((8, 1), 1)])  # 3 leaves a rest
def test_micro_batches_and_chunks_change_nothing(mesh_shape: tuple[int, int], chunk: int) -> None:
    chunks = {"pair_chunk": chunk, "icl_chunk": chunk, "unit_chunk": chunk}
    check("random", mesh_shape, micro_batch=5, frame_icl=1.0, mining_direction="both", **chunks)


SIGMOID = {"icl_form": "sigmoid", "pmd": 0.0, "pfr": 0.0, "icl_chunk": 2}


@pytest.mark.parametrize(("same", "mesh_shape"), [("negative", (1, 1)), ("masked", (2, 2)), ("positive", (1, 1))])
def test_the_sigmoid_form_of_icl(same: str, mesh_shape: tuple[int, int]) -> None:
    parts = check("few products", mesh_shape, icl_same_product=same, **SIGMOID)
    other, _ = plain("few products", tuple(sorted({"pmd": 0.0, "pfr": 0.0, "icl_same_product": same}.items())))
    assert abs(float(parts["icl"]) - float(other["icl"])) > 0.1  # another number than the softmax


ALL_MESHES = [(data, fsdp) for n in (1, 2, 4, 8) for data in (1, 2, 4, 8) for fsdp in (1, 2, 4, 8) if data * fsdp == n]
ICL, ICL_PMD = {"pmd": 0.0, "pfr": 0.0}, {"pfr": 0.0}
MASKED = {"icl_same_product": "masked", "exclude_same_product": True}
MICRO = {"micro_batch": 5, "pair_chunk": 1, "icl_chunk": 1}
CASES = {
    "icl": ICL,
    "icl, masked, micro": ICL | MASKED | MICRO,
    "pmd": ICL_PMD,
    "pmd, from clips, dropout, micro": ICL_PMD | MICRO | {"mining_direction": "clip_to_image", "cross_dropout": 0.3},
    "pmd, both, masked": ICL_PMD | MASKED | {"mining_direction": "both"},
    "pfr, dropout": {"cross_dropout": 0.3, "unit_slots": 2, "unit_chunk": 2},
    "pfr, from clips, masked, micro": MASKED | MICRO | {"mining_direction": "clip_to_image"},
    "pfr, both, dropout, masked, micro": MASKED | MICRO | {"mining_direction": "both", "cross_dropout": 0.3},
    "sigmoid, pfr, both, micro": MICRO | {"icl_form": "sigmoid", "mining_direction": "both"},
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", ALL_MESHES)
@pytest.mark.parametrize("case", CASES)
def test_every_mesh_gives_the_losses_and_gradients_of_one_device(case: str, mesh_shape: tuple[int, int]) -> None:
    for kind in ("random", "one hard clip", "few products"):
        check(kind, mesh_shape, **CASES[case])
    loss_and_gradient.cache_clear()
    jax.clear_caches()  # hundreds of live programs use up the memory maps that Linux allows a process


@pytest.mark.parametrize(
    ("case", "mesh_shape"), [("pfr, both, dropout, masked, micro", (2, 2)), ("sigmoid, pfr, both, micro", (1, 8))]
)
def test_some_meshes_give_the_losses_and_gradients_of_one_device(case: str, mesh_shape: tuple[int, int]) -> None:
    check("one hard clip", mesh_shape, **CASES[case])


def test_patches_that_are_left_out_do_not_depend_on_the_mesh() -> None:
    """Half of the four patches: the same ones on one device and on eight, another half in another step."""
    options = (("frame_icl", 1.0), ("patch_drop", 0.5))
    results = []
    for mesh_shape in ((1, 1), (8, 1)):
        mesh, call = loss_and_gradient(mesh_shape, options)
        results.append(jax.device_get(call(params(), to_global(pictures("random"), mesh), key())))
    (one, one_parts), one_grads = results[0]
    (eight, _), eight_grads = results[1]
    assert float(one) == pytest.approx(float(eight), abs=1e-5)
    for ours, theirs in zip(jax.tree.leaves(eight_grads), jax.tree.leaves(one_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=max(1e-4 * np.abs(theirs).max(), 1e-6))
    mesh, call = loss_and_gradient((1, 1), options)
    (_, other), _ = call(params(), pictures("random"), jax.random.fold_in(key(), 1))
    assert abs(float(other["icl"]) - float(one_parts["icl"])) > 1e-4
    kept = kept_patches(key(), jnp.arange(50), 3, 4, 0.5)
    assert kept.shape == (50, 3, 2)
    assert all(len(set(row)) == 2 and set(row) <= {0, 1, 2, 3} for row in kept.reshape(-1, 2).tolist())


def test_a_batch_of_one_product_has_no_matching_loss() -> None:
    batch = pictures("random") | {"product": np.zeros(G, np.int32)}
    _, call = loss_and_gradient((1, 1), (("exclude_same_product", True), ("icl_same_product", "masked")))
    (total, parts), grads = call(params(), batch, key())
    assert float(parts["pmd"]) == 0 and float(parts["icl"]) == pytest.approx(0, abs=1e-6)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)) and bool(jnp.isfinite(total))
