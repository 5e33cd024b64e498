"""The pairwise matching decoder and patch feature reconstruction."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from rice_jax.models.arrays import unit
from rice_jax.models.vit import Block, LayerNorm


class MatchingDecoder(nn.Module):
    """Pairwise matching decoder with one self and one cross layer (SPEC 5), in parts.

    The logit of (image, clip) needs of the image only its class token after the self layer, and of the clip its
    keys and values, so each is made once and meets many partners (pairs.py). Called whole, it is SPEC 5's plain form.
    """

    width: int
    heads: int
    hidden: int
    activation: str = "quick_gelu"
    self_eps: float = 1e-12  # official; 1e-5 everywhere else (SPEC 11, row 6)
    kv_norm: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        block = functools.partial(Block, self.width, self.heads, self.hidden, self.activation, dtype=self.dtype)
        self.self_layer, self.cross_layer = block(eps=self.self_eps), block()
        self.pooler_norm = LayerNorm()
        self.dense = nn.Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02))
        bound = self.width**-0.5
        self.match = self.param(
            "match", lambda k, s: jax.random.uniform(k, s, minval=-bound, maxval=bound), (self.width,)
        )

    def image_tokens(self, tokens: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        """The self layer: all that happens to an image before it meets a clip (5.3)."""
        return self.self_layer(tokens)

    def keys_values(self, tokens: Float[Array, "n S D"]) -> Float[Array, "n S 2*D"]:
        """A clip's keys and values side by side, of raw tokens unless kv_norm (5.4; SPEC 11, row 4)."""
        tokens = self.cross_layer.ln_1(tokens) if self.kv_norm else tokens
        return self.cross_layer.attn.project(tokens, 1, 3)

    def scores(
        self, x: Float[Array, "n r D"], keys_values: Float[Array, "n S 2*D"], key_mask: Bool[Array, "n S"]
    ) -> Float[Array, "n H r S"]:
        """q k^T / sqrt(D/H), float32, the most negative number at padding: its softmax weight is exactly 0."""
        query = self.cross_layer.attn.project(self.cross_layer.ln_1(x), 0, 1)
        scores = self.cross_layer.attn.scores(query, keys_values[..., : self.width])
        return jnp.where(key_mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)

    def cross_tokens(
        self, x: Float[Array, "n r D"], weights: Float[Array, "n H r S"], keys_values: Float[Array, "n S 2*D"]
    ) -> Float[Array, "n r D"]:
        """The cross layer after its softmax (5.4)."""
        x = x + self.cross_layer.attn.mix(weights, keys_values[..., self.width :])
        return x + self.cross_layer.mlp(self.cross_layer.ln_2(x))

    def pooled(self, x: Float[Array, "n r D"]) -> Float[Array, "n r D"]:
        """h of class tokens after the cross layer, float32 (5.5)."""
        return jax.nn.relu(self.dense(self.pooler_norm(x))).astype(jnp.float32)

    def logit(
        self, x: Float[Array, "n r D"], weights: Float[Array, "n H r S"], keys_values: Float[Array, "n S 2*D"]
    ) -> Float[Array, "n r"]:
        """10 cos(h, w) of image class tokens x against the clip (5.6)."""
        pooled = self.pooled(self.cross_tokens(x, weights, keys_values))
        return 10 * unit(pooled) @ unit(self.match)

    def __call__(
        self, image_tokens: Float[Array, "n T D"], clip_tokens: Float[Array, "n S D"], key_mask: Bool[Array, "n S"]
    ) -> tuple[Float[Array, "n"], Float[Array, "n H T S"]]:
        """Matching logit and masked scores of n (image, clip) pairs, without dropout."""
        x, keys_values = self.image_tokens(image_tokens), self.keys_values(clip_tokens)
        scores = self.scores(x, keys_values, key_mask)
        return self.logit(x[:, :1], jax.nn.softmax(scores[:, :, :1], axis=-1), keys_values)[:, 0], scores


class PatchReconstruction(nn.Module):
    """Attention of all heads to the coefficients that rebuild image tokens from clip tokens (SPEC 6.2-6.4)."""

    heads: int
    head_width: int
    attention: str = "prob_scaled"  # or "prob", "score": what of the cross layer is read (SPEC 11, row 2)
    mask_padding: bool = False  # row 1
    with_class_token: bool = True  # row 29: False leaves patches only, as rows and as sources

    def setup(self) -> None:
        hidden = max(1, self.heads // 2)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        self.conv1_kernel = self.param("conv1_kernel", ones, (self.heads, hidden))
        self.conv1_bias = self.param("conv1_bias", zeros, (hidden,))
        self.conv2_kernel = self.param("conv2_kernel", ones, (hidden,))
        self.conv2_bias = self.param("conv2_bias", zeros, (1,))

    def read(self, scores: Float[Array, "n H T S"], key_mask: Bool[Array, "n S"]) -> Float[Array, "n H T S"]:
        """R: what of the cross layer's masked scores is read, 0 at padding."""
        if self.attention == "score":
            return jnp.where(key_mask[:, None, None, :], scores, 0)
        weights = jax.nn.softmax(scores, axis=-1)
        return weights * self.head_width**0.5 if self.attention == "prob_scaled" else weights

    def mix(self, attention: Float[Array, "n H T S"]) -> Float[Array, "n T S"]:
        """Q >= 0: two 1x1 convolutions over the heads."""
        # jax.nn.relu has derivative 0 at 0, as SPEC 6.3 wants; jnp.maximum has 1/2.
        hidden = jnp.einsum("nhts,hk->nkts", attention, self.conv1_kernel) + self.conv1_bias[None, :, None, None]
        return jax.nn.relu(jnp.einsum("nkts,k->nts", jax.nn.relu(hidden), self.conv2_kernel) + self.conv2_bias[0])

    def __call__(self, scores: Float[Array, "n H T S"], key_mask: Bool[Array, "n S"]) -> Float[Array, "n R S"]:
        """W, from the cross layer's masked scores: rows sum to 1; R = T rows, or T-1 without the class token's."""
        tokens = scores.shape[2]
        mixed = self.mix(self.read(scores, key_mask))
        if self.mask_padding:
            mixed = jnp.where(key_mask[:, None, :], mixed, -jnp.inf)
        if not self.with_class_token:
            patch = jnp.arange(scores.shape[3]) % tokens != 0  # sources are frame-major, class token first
            mixed = jnp.where(patch[None, None, :], mixed, -jnp.inf)[:, 1:]
        return jax.nn.softmax(mixed, axis=-1)
