"""The pairwise matching decoder and the head for patch feature reconstruction. Letters of shapes: rice.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from rice_jax.models.arrays import unit
from rice_jax.models.vit import Block, LayerNorm


class MatchingDecoder(nn.Module):
    """Pairwise matching decoder with one self layer and one cross layer (docs/official.md 5), callable in parts.

    The logit of (image, clip) depends on the image's class token after the self layer and on the clip's keys and
    values. losses/pairs.py computes each of these once and uses it for many pairs.
    """

    width: int
    heads: int
    hidden: int
    activation: str = "quick_gelu"
    self_eps: float = 1e-12  # official; 1e-5 everywhere else (docs/official.md 11, row 6)
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
        """Returns the image tokens after the self layer (docs/official.md 5.3); no clip is involved yet."""
        return self.self_layer(tokens)

    def keys_values(self, tokens: Float[Array, "n S D"]) -> Float[Array, "n S 2*D"]:
        """Returns a clip's keys, then its values, in `dtype`, of raw tokens; kv_norm: after ln_1 (11, row 4)."""
        tokens = self.cross_layer.ln_1(tokens) if self.kv_norm else tokens
        return self.cross_layer.attn.project(tokens, 1, 3)

    def scores(
        self, x: Float[Array, "n r D"], keys_values: Float[Array, "n S 2*D"], key_mask: Bool[Array, "n S"]
    ) -> Float[Array, "n H r S"]:
        """Returns q k^T / sqrt(D/H) in float32. Padding keys get the lowest float32, hence a softmax weight of 0."""
        query = self.cross_layer.attn.project(self.cross_layer.ln_1(x), 0, 1)
        scores = self.cross_layer.attn.scores(query, keys_values[..., : self.width])
        return jnp.where(key_mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)

    def cross_tokens(
        self, x: Float[Array, "n r D"], weights: Float[Array, "n H r S"], keys_values: Float[Array, "n S 2*D"]
    ) -> Float[Array, "n r D"]:
        """Returns image tokens after the cross layer, given its softmax weights (docs/official.md 5.4)."""
        x = x + self.cross_layer.attn.mix(weights, keys_values[..., self.width :])
        return x + self.cross_layer.mlp(self.cross_layer.ln_2(x))

    def pooled(self, x: Float[Array, "n r D"]) -> Float[Array, "n r D"]:
        """Returns h of docs/official.md 5.5 for each token after the cross layer, in float32."""
        return jax.nn.relu(self.dense(self.pooler_norm(x))).astype(jnp.float32)

    def logit(
        self, x: Float[Array, "n r D"], weights: Float[Array, "n H r S"], keys_values: Float[Array, "n S 2*D"]
    ) -> Float[Array, "n r"]:
        """Returns 10 cos(h, w), float32, for image class tokens x against the clip (docs/official.md 5.6)."""
        pooled = self.pooled(self.cross_tokens(x, weights, keys_values))
        return jnp.matmul(10 * unit(pooled), unit(self.match), precision="highest")

    def __call__(
        self, image_tokens: Float[Array, "n T D"], clip_tokens: Float[Array, "n S D"], key_mask: Bool[Array, "n S"]
    ) -> tuple[Float[Array, "n"], Float[Array, "n H T S"]]:
        """Returns float32 matching logits and scores, padding at the lowest float32, of n pairs, without dropout."""
        x, keys_values = self.image_tokens(image_tokens), self.keys_values(clip_tokens)
        scores = self.scores(x, keys_values, key_mask)
        return self.logit(x[:, :1], jax.nn.softmax(scores[:, :, :1], axis=-1), keys_values)[:, 0], scores


class PatchReconstruction(nn.Module):
    """Computes from the cross layer's scores the weights that rebuild an image's tokens (docs/official.md 6.2-6.4)."""

    heads: int
    head_width: int
    attention: str = "prob_scaled"  # or "prob", "score", see `read` (docs/official.md 11, row 2)
    mask_padding: bool = False  # row 1
    with_class_token: bool = True  # row 29: False excludes class tokens, both as rows and as sources

    def setup(self) -> None:
        hidden = max(1, self.heads // 2)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        self.conv1_kernel = self.param("conv1_kernel", ones, (self.heads, hidden))
        self.conv1_bias = self.param("conv1_bias", zeros, (hidden,))
        self.conv2_kernel = self.param("conv2_kernel", ones, (hidden,))
        self.conv2_bias = self.param("conv2_bias", zeros, (1,))

    def read(self, scores: Float[Array, "n H T S"], key_mask: Bool[Array, "n S"]) -> Float[Array, "n H T S"]:
        """Returns R: "score": scores, 0 at padding; "prob": softmax; "prob_scaled": that times sqrt(head_width)."""
        if self.attention == "score":
            return jnp.where(key_mask[:, None, None, :], scores, 0)
        weights = jax.nn.softmax(scores, axis=-1)
        return weights * self.head_width**0.5 if self.attention == "prob_scaled" else weights

    def mix(self, attention: Float[Array, "n H T S"]) -> Float[Array, "n T S"]:
        """Returns Q >= 0 of docs/official.md 6.3: two 1x1 convolutions over the heads, each followed by a ReLU."""
        # jax.nn.relu has derivative 0 at 0, as in docs/official.md 6.3; jnp.maximum has 1/2.
        hidden = jnp.einsum("nhts,hk->nkts", attention, self.conv1_kernel) + self.conv1_bias[:, None, None]
        return jax.nn.relu(jnp.einsum("nkts,k->nts", jax.nn.relu(hidden), self.conv2_kernel) + self.conv2_bias[0])

    def __call__(self, scores: Float[Array, "n H T S"], key_mask: Bool[Array, "n S"]) -> Float[Array, "n R S"]:
        """Returns the weights, float32, of the S clip tokens for each of R = T image tokens; each row sums to 1.

        Without class tokens R = T - 1, and the frames' class tokens have weight 0. With mask_padding padding has 0.
        """
        tokens = scores.shape[2]
        mixed = self.mix(self.read(scores, key_mask))
        if self.mask_padding:
            mixed = jnp.where(key_mask[:, None, :], mixed, -jnp.inf)
        if not self.with_class_token:
            patch = jnp.arange(scores.shape[3]) % tokens != 0  # sources are frame-major, class token first
            mixed = jnp.where(patch, mixed, -jnp.inf)[:, 1:]
        return jax.nn.softmax(mixed, axis=-1)
