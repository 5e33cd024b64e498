"""Matrix products of float32 models are float32 on accelerators, as the programs say that jax makes for them."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from configs import smoke
from rice_jax.config import from_json, to_json
from rice_jax.models.rice import build_model
from rice_jax.preflight.advice import with_changes
from rice_jax.preflight.assessment import abstract_batch
from rice_jax.retrieval import inference
from rice_jax.retrieval.model import Model
from rice_jax.training.step import abstract_state, init_params, make_train_step, random_key
from rice_jax.weights import exports
from tests import official

STEM = {"model.stem_channels": (8, 8, 8, 8), "model.stem_blocks": (1, 0, 0, 0)}


def products(text: str) -> Counter[tuple[str, str]]:
    """Returns how often each (type of the left operand, precision) occurs among a program's matrix products."""
    found: Counter[tuple[str, str]] = Counter()
    for line in text.splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            operand = re.search(r": \(tensor<(?:[\dx?]*x)?(\w+)>", line)
            precision = set(re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line)) or {"DEFAULT"}
            assert operand is not None and len(precision) == 1, line
            found[operand[1], precision.pop()] += 1
    return found


def config_of(**changes: Any) -> Any:
    return with_changes(smoke.get_config(), {"data.path": "none", "data.image_size": 32, **changes})


def step_text(config: Any, platform: str) -> str:
    mesh, net = official.mesh_of(2, 1), build_model(config)
    state = abstract_state(net, config, mesh)
    step = make_train_step(net, config, mesh, state)
    with jax.default_matmul_precision(None):  # as in a command; the tests ask for the highest
        return export.export(step, platforms=(platform,))(state, abstract_batch(config, mesh)).mlir_module()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("changes", [{}, STEM | {"loss.micro_batch": 3, "loss.pair_chunk": 2}], ids=["patches", "stem"])
def test_every_product_of_a_float32_step_is_float32(platform: str, changes: dict[str, Any]) -> None:
    found = products(step_text(config_of(**changes), platform))
    assert set(found) == {("f32", "HIGHEST")} and found.total() > 30


def test_with_default_precision_only_similarities_and_logits_are_exact() -> None:
    found = products(step_text(config_of(**{"model.matmul_precision": "default"}), "cuda"))
    assert found["f32", "DEFAULT"] > 30 > found["f32", "HIGHEST"] > 5


def test_products_of_bfloat16_are_left_to_the_device() -> None:
    found = products(step_text(config_of(**{"model.dtype": "bfloat16"}), "tpu"))
    assert found["bf16", "DEFAULT"] > 30 and found["bf16", "HIGHEST"] == 0
    assert 30 > found["f32", "HIGHEST"] > 5  # similarities and logits


def random_model(**changes: Any) -> Model:
    config = config_of(**changes)
    net = build_model(config)
    params = init_params(net, config, random_key(0))
    return Model(config, net, params, official.mesh_of(1, 1), batch_size=2)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, {("f32", "HIGHEST")}),
        ({"model.matmul_precision": "default"}, {("f32", "DEFAULT"), ("f32", "HIGHEST")}),
        ({"model.dtype": "bfloat16"}, {("bf16", "DEFAULT"), ("f32", "HIGHEST")}),
    ],
    ids=["float32", "default", "bfloat16"],
)
def test_exported_programs_have_the_models_precision(changes: dict[str, Any], kinds: set[tuple[str, str]]) -> None:
    model = random_model(**changes)
    flat = exports.flat_parameters(model)
    with jax.default_matmul_precision(None):
        programs = {
            name: products(exported.mlir_module()) for name, exported in exports._exported_programs(model, flat)
        }
    assert set(programs) == {"encode_images", "encode_clips", "match"}
    assert set(programs["match"]) == kinds


@pytest.mark.parametrize(("precision", "exact"), [("highest", True), ("default", False)])
def test_an_evaluation_has_the_models_precision(precision: str, exact: bool) -> None:
    from rice_jax.retrieval.model import _on_mesh

    model = random_model(**{"model.matmul_precision": precision})
    images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    with jax.default_matmul_precision(None):
        traced = _on_mesh.trace(inference.encode_images, model.mesh, model.net, (False,), model.params, images)
        found = products(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert (set(found) == {("f32", "HIGHEST")}) is exact


def test_a_config_from_before_the_field_opens_with_the_highest_precision() -> None:
    text = to_json(smoke.get_config())
    older = re.sub(r'    "matmul_precision": "highest",\n', "", text)
    assert older != text and from_json(older) == smoke.get_config()
    assert build_model(from_json(older)).precision == "highest"


def test_on_a_cpu_the_field_changes_no_bit() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    highest, default = (random_model(**{"model.matmul_precision": name}) for name in ("highest", "default"))
    np.testing.assert_array_equal(highest.encode_images(images), default.encode_images(images))
