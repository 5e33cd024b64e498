"""The convolutional stem, an option of the encoder that CLIP does not have, against its plain definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rice_jax.models.stem import ConvStem, convolve

CHANNELS, BLOCKS, WIDTH = (8, 16), (1, 0), 12


def plain_convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Standardised nowhere: every output pixel a sum over its 3 x 3 window, the windows `stride` pixels apart."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=layout)


def standardised(kernel: np.ndarray) -> np.ndarray:
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    return kernel * np.sqrt(2 / np.square(kernel).sum(axis=(0, 1, 2)))


@pytest.fixture(scope="module")
def stem() -> ConvStem:
    return ConvStem(CHANNELS, BLOCKS, WIDTH, jnp.float32)


@pytest.fixture(scope="module")
def pictures() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (3, 12, 12, 3))


@pytest.fixture(scope="module")
def params(stem: ConvStem, pictures: jax.Array) -> Any:
    """No scale at 1, no bias at 0, no kernel standardised already."""
    drawn = stem.init(jax.random.key(1), pictures)["params"]
    keys = iter(jax.random.split(jax.random.key(2), 99))
    return jax.tree.map(lambda x: 1.5 * x + 0.1 * jax.random.normal(next(keys), x.shape), drawn)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [7, 8])
def test_a_convolution_and_its_gradients_are_the_usual_ones(side: int, stride: int) -> None:
    x = jax.random.normal(jax.random.key(3), (2, side, side, 3))
    kernel = jax.random.normal(jax.random.key(4), (3, 3, 3, 5))
    expected, pull_plain = jax.vjp(lambda *a: plain_convolution(*a, stride), x, kernel)
    found, pull = jax.vjp(lambda *a: convolve(*a, stride), x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(pull(jnp.cos(found)), pull_plain(jnp.cos(found)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_stem_is_what_its_text_says(stem: ConvStem, pictures: jax.Array, params: Any) -> None:
    p = jax.device_get(params)

    def convolution(x: Any, name: str, stride: int) -> Any:
        part = p[f"conv_{name}"]
        return np.asarray(plain_convolution(x, standardised(part["kernel"]) * part["scale"], stride)) + part["bias"]

    x = np.maximum(0, convolution(pictures, "0", 2))
    x = x + p["block_0_0_scale"] * convolution(np.maximum(0, convolution(x, "0_0_a", 1)), "0_0_b", 1)
    x = np.maximum(0, convolution(x, "1", 2))
    expected = x @ p["to_width"]["kernel"]
    found = stem.apply({"params": params}, pictures)
    assert found.shape == (3, 3, 3, WIDTH)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch_and_keeps_its_contrast_and_colour(
    stem: ConvStem, pictures: jax.Array, params: Any
) -> None:
    alone = stem.apply({"params": params}, pictures[:1])
    np.testing.assert_allclose(stem.apply({"params": params}, pictures)[:1], alone, atol=1e-5)
    for changed in (pictures[:1] * 1.5, pictures[:1] + jnp.array([0.5, 0, 0]).reshape(1, 1, 1, 3)):
        other = stem.apply({"params": params}, changed)
        assert float(jnp.abs(other - alone)[:, 1:-1, 1:-1].max()) > 0.1  # a norm over the picture takes both away


def test_the_size_of_a_kernel_does_not_matter(stem: ConvStem, pictures: jax.Array, params: Any) -> None:
    def grown(path: Any, x: jax.Array) -> jax.Array:
        return 7 * x + 3 if "conv_" in jax.tree_util.keystr(path) and x.ndim == 4 else x

    other = jax.tree_util.tree_map_with_path(grown, params)
    expected = stem.apply({"params": params}, pictures)
    np.testing.assert_allclose(stem.apply({"params": other}, pictures), expected, atol=2e-3)
