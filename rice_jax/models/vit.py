"""CLIP's vision transformer, which encodes shop images and frames: read bottom-up, from LayerNorm to VisionTransformer.

Parts have CLIP's names. The parameters of the encoder's blocks are stacked on a leading axis. Letters of shapes are
those of rice.py; in this file t is any number of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rice_jax.models.arrays import expand_to
from rice_jax.models.stem import ConvStem

# Which results of a block are kept for the backward pass; the others are computed again. "none" keeps all.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda z: z * jax.nn.sigmoid(1.702 * z),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class LayerNorm(nn.Module):
    """Layer norm of the last axis: biased variance, statistics in float32, output in x's dtype (docs/official.md 2.3).

    flax's nn.LayerNorm, also with use_fast_variance=False, multiplies in another order: once scale is not 1, results
    and gradients differ in the last bit, so the same run would give other figures than the releases before.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)  # not E[x^2] - E[x]^2, in which an epsilon of 1e-12 is lost
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * expand_to(scale, y) + expand_to(bias, y)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention, callable in parts: the decoder projects a clip's keys and values once for many queries.

    The columns of in_proj are q, k, v; a head is a contiguous block of channels (docs/official.md 2.3).
    """

    width: int
    heads: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(self.width**-0.5)
        self.in_proj_kernel = self.param("in_proj_kernel", init, (self.width, 3 * self.width))
        self.in_proj_bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * self.width,))
        self.out_proj = nn.Dense(self.width, dtype=self.dtype, kernel_init=init)

    def project(self, x: Float[Array, "*n D"], start: int, stop: int) -> Float[Array, "*n c"]:
        """Returns numbers start to stop - 1 of (q, k, v), in one array, side by side: c = (stop - start) D."""
        columns = slice(start * self.width, stop * self.width)
        out = x @ self.in_proj_kernel[:, columns].astype(self.dtype)
        return out + expand_to(self.in_proj_bias[columns], out)

    def split_heads(self, x: Float[Array, "n t D"]) -> Float[Array, "n t heads d"]:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)

    def scores(self, q_btd: Float[Array, "n t D"], k_bsd: Float[Array, "n S D"]) -> Float[Array, "n heads t S"]:
        """Returns q k^T / sqrt(head width) in float32, before any mask and softmax."""
        q_bthd, k_bshd = self.split_heads(q_btd), self.split_heads(k_bsd)
        scale = (self.width // self.heads) ** -0.5
        return jnp.einsum("bthd,bshd->bhts", q_bthd * scale, k_bshd, preferred_element_type=jnp.float32)

    def mix(self, weights: Float[Array, "n heads t S"], v_bsd: Float[Array, "n S D"]) -> Float[Array, "n t D"]:
        """Returns the weighted sums of the values, heads concatenated, after out_proj, in `dtype`."""
        x_bthd = jnp.einsum("bhts,bshd->bthd", weights.astype(self.dtype), self.split_heads(v_bsd))
        return self.out_proj(x_bthd.reshape(*x_bthd.shape[:2], self.width))

    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        q, k, v = jnp.split(self.project(x, 0, 3), 3, axis=-1)
        return self.mix(jax.nn.softmax(self.scores(q, k), axis=-1), v)


class Mlp(nn.Module):
    """c_proj(activation(c_fc(x))) with a hidden layer of width `hidden`; CLIP's is four times the width."""

    hidden: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        width = x.shape[-1]
        normal = nn.initializers.normal
        c_fc = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=normal((2 * width) ** -0.5), name="c_fc")
        c_proj = nn.Dense(width, dtype=self.dtype, kernel_init=normal(width**-0.5 / 2), name="c_proj")
        return c_proj(ACTIVATIONS[self.activation](c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block, of the encoder (docs/official.md 2.3) and the decoder (docs/official.md 5.3).

    The decoder's cross layer calls the parts ln_1, attn, ln_2 and mlp one by one.
    """

    width: int
    heads: int
    hidden: int
    activation: str
    eps: float = 1e-5
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.ln_1, self.ln_2 = LayerNorm(self.eps), LayerNorm(self.eps)
        self.attn = Attention(self.width, self.heads, self.dtype)
        self.mlp = Mlp(self.hidden, self.activation, self.dtype)

    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PatchEmbedding(nn.Module):
    """CLIP's `conv1`, a convolution with stride equal to its size, as one matmul over patches (docs/official.md 2.2).

    As in a convolution, pixels at the right and at the bottom that fill no patch are ignored.
    """

    patch_size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n px px 3"]) -> Float[Array, "n g g D"]:
        p, side = self.patch_size, x.shape[1] // self.patch_size
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1, 2))
        kernel = self.param("kernel", init, (p, p, 3, self.width))
        patches = x[:, : side * p, : side * p].reshape(-1, side, p, side, p, 3)
        return jnp.einsum("ngphqc,pqcd->nghd", patches, kernel.astype(self.dtype))


class VisionTransformer(nn.Module):
    """CLIP's ViT, one set of weights for shop images and frames (docs/official.md 2.2-2.4)."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    embedding: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    remat: str = "none"
    stem_channels: tuple[int, ...] = ()  # of ConvStem; empty: PatchEmbedding
    stem_blocks: tuple[int, ...] = ()
    pool: str = "class_token"  # the embedding comes from the class token, or from the "mean" of all tokens
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "n px px 3"], kept: Int[Array, "n kept"] | None = None
    ) -> tuple[Float[Array, "n T D"], Float[Array, "n E"]]:
        """Encodes normalised pictures: all patches (T = 1 + P), or those with the numbers `kept` (T = 1 + kept).

        Returns the tokens of the last block, class token first, before ln_post and in `dtype`; and the pooled vectors,
        after ln_post and proj, in float32 and not of unit length.
        """
        n, width = pictures.shape[0], self.width
        small = nn.initializers.normal(width**-0.5)
        x = pictures.astype(self.dtype)
        if self.stem_channels:
            x = ConvStem(self.stem_channels, self.stem_blocks, width, self.dtype, name="stem")(x)
        else:
            x = PatchEmbedding(self.patch_size, width, self.dtype, name="conv1")(x)
        x = x.reshape(n, -1, width)
        position = self.param("positional_embedding", small, (x.shape[1] + 1, width)).astype(self.dtype)
        x = x + position[1:]
        if kept is not None:
            x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
        class_token = self.param("class_embedding", small, (width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token + position[0], (n, 1, width)), x], axis=1)
        tokens = self.resblocks(LayerNorm(self.eps, name="ln_pre")(x))
        summary = tokens[:, 0] if self.pool == "class_token" else tokens.mean(axis=1)
        pooled = LayerNorm(self.eps, name="ln_post")(summary)
        proj = self.param("proj", small, (width, self.embedding))
        return tokens, (pooled @ proj.astype(self.dtype)).astype(jnp.float32)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def resblocks(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        """Returns x after all blocks; one scan compiles a block once and stacks the parameters on a leading axis."""

        def layer(block: Block, x: Array, _: None) -> tuple[Array, None]:
            return block(x), None

        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT[self.remat], prevent_cse=False)
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        block = Block(self.width, self.heads, self.hidden, self.activation, self.eps, self.dtype, name="resblocks")
        return stack(block, x, None)[0]
