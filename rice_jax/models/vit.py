"""The network of RICE, read bottom-up: Block, VisionTransformer, MatchingDecoder, PatchReconstruction, Rice.

Letters of the shapes are SPEC 1's: n pictures or pairs, N frame slots, T tokens a picture (class token first),
D width, E embedding width, H decoder heads, S = N*T decoder keys, r image rows that query one clip.
Names of the parts are CLIP's. Parameters are plain dicts; the blocks of the encoder are stacked on a leading axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rice_jax.models.arrays import repeat_to
from rice_jax.models.stem import ConvStem

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps matmuls, recomputes the rest
    "full": jax.checkpoint_policies.nothing_saveable,
}


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda z: z * jax.nn.sigmoid(1.702 * z),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class LayerNorm(nn.Module):
    """Statistics in float32 with biased variance, output in x's dtype (SPEC 2.3).

    Two passes, unlike flax's default: E[x^2] - E[x]^2 loses what an epsilon of 1e-12 is there for.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * repeat_to(y, scale) + repeat_to(y, bias)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention in parts, so that keys and values are projected once and used by many queries.

    in_proj's columns are q, k, v; heads are contiguous blocks of channels (SPEC 2.3). Softmax in float32.
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
        """Parts start..stop of (q, k, v), side by side."""
        columns = slice(start * self.width, stop * self.width)
        out = x @ self.in_proj_kernel[:, columns].astype(self.dtype)
        return out + repeat_to(out, self.in_proj_bias[columns])

    def split_heads(self, x: Float[Array, "n t D"]) -> Float[Array, "n t heads d"]:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)

    def scores(self, q_btd: Float[Array, "n t D"], k_bsd: Float[Array, "n S D"]) -> Float[Array, "n heads t S"]:
        """q k^T / sqrt(head width), float32."""
        q_bthd, k_bshd = self.split_heads(q_btd), self.split_heads(k_bsd)
        scale = (self.width // self.heads) ** -0.5
        return jnp.einsum("bthd,bshd->bhts", q_bthd * scale, k_bshd, preferred_element_type=jnp.float32)

    def mix(self, weights: Float[Array, "n heads t S"], v_bsd: Float[Array, "n S D"]) -> Float[Array, "n t D"]:
        """Weighted values of all heads, through out_proj."""
        x_bthd = jnp.einsum("bhts,bshd->bthd", weights.astype(self.dtype), self.split_heads(v_bsd))
        return self.out_proj(x_bthd.reshape(*x_bthd.shape[:2], self.width))

    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        q, k, v = jnp.split(self.project(x, 0, 3), 3, axis=-1)
        return self.mix(jax.nn.softmax(self.scores(q, k), axis=-1), v)


class Mlp(nn.Module):
    """c_proj(activation(c_fc(x))), hidden width as given (CLIP: four times the width)."""

    hidden: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        width = x.shape[-1]
        hidden = nn.Dense(
            self.hidden, dtype=self.dtype, kernel_init=nn.initializers.normal((2 * width) ** -0.5), name="c_fc"
        )(x)
        out = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.normal(width**-0.5 / 2), name="c_proj")
        return out(ACTIVATIONS[self.activation](hidden))


class Block(nn.Module):
    """Pre-norm transformer block (SPEC 2.3; 5.3 with eps 1e-12 and other heads).

    `ln_1`, `attn`, `ln_2`, `mlp` are attributes, so that the decoder's cross layer can call them one by one.
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
    """CLIP's `conv1`: a convolution whose stride is its size, hence one matmul over patches (SPEC 2.2).

    Pixels at the right and the bottom that fill no patch are left out, as a convolution does.
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
    """CLIP's ViT, shared by shop images and frames (SPEC 2.2-2.4)."""

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
    stem_channels: tuple[int, ...] = ()  # empty: CLIP's patch embedding
    stem_blocks: tuple[int, ...] = ()
    pool: str = "class_token"  # or "mean" of all tokens: what the embedding is made of
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "n px px 3"], kept: Int[Array, "n k"] | None = None
    ) -> tuple[Float[Array, "n T D"], Float[Array, "n E"]]:
        """Normalised pictures to tokens (before ln_post, class token first) and pooled vectors (float32, not unit).

        `kept`: the patches of each picture that are encoded, T = 1 + k; all of them unless given.
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
        x = x + repeat_to(x, position[1:])
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
        """All blocks as one scan: compiled once, parameters stacked on a leading axis."""

        def layer(block: Block, x: Array, _: None) -> tuple[Array, None]:
            return block(x), None

        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT[self.remat], prevent_cse=False)
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        block = Block(self.width, self.heads, self.hidden, self.activation, self.eps, self.dtype, name="resblocks")
        return stack(block, x, None)[0]
