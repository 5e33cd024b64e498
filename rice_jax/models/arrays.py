"""Functions on arrays that several parts of the model share: pixels, unit vectors, cosines, the mean of a clip."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

# CLIP's mean and standard deviation of red, green and blue, on a scale of 0 to 1 (docs/official.md 9.5).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def expand_to(vector: Float[Array, "*_"], x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns `vector` broadcast to x's shape and then cast to x's dtype, as NumPy would, but in this order.

    So the gradient of a float32 parameter is summed in float32; cast first, it would be summed in x's bfloat16. Also
    where no cast is needed, XLA rounds otherwise when the broadcast is left to NumPy's rules, so figures would change.
    """
    return jnp.broadcast_to(vector, x.shape).astype(x.dtype)


def normalise(
    pictures: UInt8[Array, "*n px px 3"] | Float[Array, "*n px px 3"], mask: Int[Array, "*n"] | None = None
) -> Float[Array, "*n px px 3"]:
    """Returns (pixel / 255 - MEAN) / STD in float32 for uint8 pictures; those of floats keep their values and dtype.

    Pictures with mask 0 become zero after that (docs/official.md 2.1). Without a mask no picture does.
    """
    x = pictures
    if pictures.dtype == jnp.uint8:
        x = pictures.astype(jnp.float32) / 255
        x = (x - expand_to(jnp.array(MEAN), x)) / expand_to(jnp.array(STD), x)
    return x if mask is None else jnp.where(mask[..., None, None, None] > 0, x, 0)


def apply(module: nn.Module | None, params: Any, *inputs: Any, method: str | None = None) -> Any:
    """Returns what a module, or its method of that name, returns for `inputs` with `params` as its own parameters."""
    assert module is not None
    return module.apply({"params": params}, *inputs, method=method)


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Returns x / max(||x||, 1e-12) along the last axis (docs/official.md 2.5). At x = 0 the gradient is 0, not NaN."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosines(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Returns the dot product of each row of `a` with each row of `b`, float32; rows are unit vectors.

    Computed in float32 at the highest matmul precision for any model.dtype: near 1 bfloat16 has steps of 4e-3, which
    makes logits coarse and near-equal negatives equal (docs/official.md 11, row 36).
    """
    return jnp.einsum("nd,md->nm", a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def clip_embedding(pooled: Float[Array, "n N E"], mask: Int[Array, "n N"]) -> Float[Array, "n E"]:
    """Returns the unit vector of the mean of each clip's pooled vectors, over slots with mask 1 (docs/official.md 2.5).

    The pooled vectors are not unit vectors. A clip without a real frame gets the zero vector.
    """
    weight = mask[..., None].astype(pooled.dtype)
    # max: the input pipeline refuses a clip without a frame, but one 0/0 would spoil the whole batch.
    return unit((pooled * weight).sum(axis=-2) / jnp.maximum(weight.sum(axis=-2), 1))
