"""What every part of the model uses: pixel statistics, unit vectors, cosines, a clip's mean."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel statistics, SPEC 9.5


STD = (0.26862954, 0.26130258, 0.27577711)


def repeat_to(x: Array, row: Array) -> Array:
    """`row` repeated to x's shape; said, since tests refuse broadcasts that nobody wrote down."""
    return jnp.broadcast_to(row, x.shape).astype(x.dtype)


def normalise(
    pictures: UInt8[Array, "*n px px 3"] | Float[Array, "*n px px 3"], mask: Int[Array, "*n"] | None = None
) -> Float[Array, "*n px px 3"]:
    """Levels 0..255 to CLIP's normalised floats; pictures whose mask is 0 become zero AFTER that (SPEC 2.1).

    Floating pictures are taken as normalised already.
    """
    x = pictures
    if pictures.dtype == jnp.uint8:
        x = pictures.astype(jnp.float32) / 255
        x = (x - repeat_to(x, jnp.array(MEAN))) / repeat_to(x, jnp.array(STD))
    return x if mask is None else jnp.where(mask[..., None, None, None] > 0, x, 0)


def apply(module: nn.Module | None, params: Any, *inputs: Any, method: str | None = None) -> Any:
    """A module, or one of its methods, on its own part of the parameters."""
    assert module is not None
    return module.apply({"params": params}, *inputs, method=method)


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """x / max(||x||, 1e-12) along the last axis (SPEC 2.5), with gradient zero, not NaN, at x = 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosines(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Products of unit vectors, each with each, float32 at the highest precision whatever the config's.

    bfloat16 products near 1 come in steps of 4e-3: coarse logits, and ties of near-equal negatives (SPEC 11, row 36).
    """
    return jnp.einsum("nd,md->nm", a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def clip_embedding(pooled: Float[Array, "n N E"], mask: Int[Array, "n N"]) -> Float[Array, "n E"]:
    """Unit vector of the mean of the real frames' raw pooled vectors (SPEC 2.5)."""
    weight = mask[..., None].astype(pooled.dtype)
    # max: a clip without a real frame cannot leave the pipeline, but 0/0 would spoil the whole batch.
    return unit((pooled * weight).sum(axis=-2) / jnp.maximum(weight.sum(axis=-2), 1))
