"""The equations of the losses by hand, with every broadcast between different ranks an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rice_jax.losses.equations import GlobalBatch, icl_loss, in_chunks, pfr_loss, pmd_loss, sigmoid_icl_loss

pytestmark = pytest.mark.usefixtures("no_silent_broadcast")


@pytest.mark.parametrize("chunk", [0, 1])
def test_two_pairs_of_one_product(chunk: int) -> None:
    """As negatives the loss is log 2 for equal embeddings; with the other pair masked nothing is left."""
    e = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    gathered = GlobalBatch(images=e, clips=e, product=jnp.zeros(2, jnp.int32))
    icl = functools.partial(icl_loss, e, e, gathered, jnp.arange(2), jnp.float32(4.0), chunk=chunk)
    assert float(icl()) == pytest.approx(np.log(2), abs=1e-6)
    assert float(icl(same_product_is="masked")) == pytest.approx(0, abs=1e-6)
    assert float(icl(same_product_is="positive")) == pytest.approx(np.log(2), abs=1e-6)


def test_the_sigmoid_form_of_two_pairs() -> None:
    """Unit vectors at right angles, s^2 = 16, b = -8: each row has a positive, logit 8, and a negative, logit -8."""
    gathered = GlobalBatch(images=jnp.eye(2), clips=jnp.eye(2), product=jnp.arange(2))
    loss = sigmoid_icl_loss(jnp.eye(2), gathered, jnp.arange(2), jnp.float32(4.0), jnp.float32(-8.0))
    assert float(loss) == pytest.approx(2 * np.log1p(np.exp(-8.0)), rel=1e-5)


def test_pmd_loss_of_equal_logits_is_the_log_of_the_candidates() -> None:
    found = jnp.array([[True] * 3, [True, False, False], [False] * 3])
    loss = jax.vmap(lambda f: pmd_loss(jnp.zeros(1), jnp.zeros((1, 3)), f[None]))(found)
    np.testing.assert_allclose(loss, np.log([4, 2, 1]), atol=1e-6)


def test_pfr_loss_of_one_token_that_copies_and_one_that_reads_padding() -> None:
    """Two image tokens (3, 0) and (0, 4): the first is found again, the second gets zeros: 16 / 4 numbers."""
    clip_tokens, key_mask = jnp.array([[[3.0, 0.0], [7.0, 7.0]]]), jnp.array([[True, False]])
    image_tokens = jnp.array([[[3.0, 0.0], [0.0, 4.0]]])
    loss = functools.partial(pfr_loss, image_tokens=image_tokens, clip_tokens=clip_tokens, key_mask=key_mask)
    assert float(loss(jnp.eye(2)[None])) == 4
    assert float(loss(jnp.array([[[0.0, 1.0]]]))) == 8  # one row: the last token alone


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 5, 9])
def test_chunks_of_any_size_give_all_rows_in_order(chunk: int) -> None:
    rows = {"x": jnp.arange(10.0).reshape(5, 2), "y": jnp.arange(5)}
    sizes = []

    def f(part: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sizes.append(len(part["y"]))
        return jnp.square(part["x"]), part["y"] + 1

    squares, numbers = in_chunks(f, rows, chunk)
    np.testing.assert_array_equal(squares, np.square(np.arange(10.0).reshape(5, 2)))
    np.testing.assert_array_equal(numbers, [1, 2, 3, 4, 5])
    assert set(sizes) == {chunk if 0 < chunk < 5 else 5}
