"""The tables of tensor names."""

import jax
import numpy as np
import pytest

from configs import default
from rice_jax.models.rice import build_model
from rice_jax.training import step
from rice_jax.weights import naming
from tests.weights.conftest import GOLDEN


def test_every_tensor_of_the_official_model_has_its_place_and_shape() -> None:
    """golden/parameters.csv: names and shapes of the full ViT-B/32 model."""
    config = default.get_config()
    shapes = jax.eval_shape(lambda: step.init_params(build_model(config), config, jax.random.key(0)))
    nothing = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in naming.flattened(shapes).items()}
    ours = {name: array.shape for name, array in naming.invert(nothing).items()}
    lines = (GOLDEN / "parameters.csv").read_text().splitlines()[1:]
    theirs = {
        name: () if shape == "scalar" else tuple(int(side) for side in shape.split("x"))
        for name, shape in (line.split(",")[:2] for line in lines)
        if "embeddings." not in name and "norm_s" not in name
    }
    assert ours == theirs and len(theirs) == 185


def test_a_tensor_that_two_rules_match_is_refused() -> None:
    with pytest.raises(ValueError, match="x: several rules match"):
        naming.find_rule("x", (naming.Rule("x", "a"), naming.Rule("**", None)))
