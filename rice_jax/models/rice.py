"""RICE as a whole: the shared encoder, the matching decoder and the reconstruction head, built from a config.

Letters of array shapes, here and in rice_jax/losses (docs/official.md 1):
    B, G, n   rows of a device and of the global batch, a row being a (clip, shop image) pair; n of anything
    N, px, g  frame slots of a clip; side of a picture in pixels and in patches
    P, T, S   patches of a picture = g g; tokens of a picture = P + 1, class token first; keys of a clip = N T
    D, E, H   width, width of the embeddings, heads of the decoder
    k, r, R   hard partners of a row; image tokens that query one clip; image tokens that are rebuilt
"""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int, UInt8

from rice_jax.config import Config
from rice_jax.models.arrays import clip_embedding, normalise, unit
from rice_jax.models.decoder import MatchingDecoder, PatchReconstruction
from rice_jax.models.vit import VisionTransformer


class Rice(nn.Module):
    """Encoder, matching decoder and patch reconstruction; ICL alone needs neither of the last two."""

    encoder: VisionTransformer
    decoder: MatchingDecoder | None
    reconstruction: PatchReconstruction | None
    scale_init: float = 4.0
    bias_init: float | None = None  # of ICL's sigmoid form; the softmax has no bias
    precision: str = "highest"  # of matrix products that name none, see matmul_precision

    def setup(self) -> None:
        # A plain factor of both embeddings, so logits are scale^2 cos; CLIP's is a logarithm (docs/official.md 3.1).
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.scale_init), ())
        if self.bias_init is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.bias_init), ())

    def __call__(
        self,
        frames: UInt8[Array, "n N px px 3"],
        mask: Int[Array, "n N"],
        image: UInt8[Array, "n px px 3"],
    ) -> dict[str, Array]:
        """Returns all outputs for n (clip, image) pairs, without dropout, by name.

        All are float32: image_embedding and clip_embedding [n, E] are unit vectors and logit_scale is a scalar. A
        decoder adds match_logit [n], a reconstruction head beside it coefficients [n, R, S].
        """
        n, slots = mask.shape
        image_tokens, image_pooled = self.encoder(normalise(image))
        frame_tokens, frame_pooled = self.encoder(normalise(frames, mask).reshape(n * slots, *frames.shape[2:]))
        out = {
            "image_embedding": unit(image_pooled),
            "clip_embedding": clip_embedding(frame_pooled.reshape(n, slots, -1), mask),
            "logit_scale": self.logit_scale,
        }
        if self.decoder is not None:
            tokens, width = frame_tokens.shape[1:]
            key_mask = jnp.repeat(mask > 0, tokens, axis=1)
            clip_tokens = frame_tokens.reshape(n, slots * tokens, width)
            out["match_logit"], scores = self.decoder(image_tokens, clip_tokens, key_mask)
            if self.reconstruction is not None:
                out["coefficients"] = self.reconstruction(scores, key_mask)
        return out


def matmul_precision(model: Rice) -> AbstractContextManager[None]:
    """Returns the context in which programs of the model are traced: their matrix products have model.precision."""
    return jax.default_matmul_precision(model.precision)


def build_model(config: Config) -> Rice:
    """Returns the config's model, without parameters: a decoder only for loss.pmd or pfr, the head for loss.pfr."""
    c, dtype = config.model, jnp.dtype(config.model.dtype)
    encoder = VisionTransformer(
        image_size=config.data.image_size,
        patch_size=c.patch_size,
        width=c.width,
        layers=c.layers,
        heads=c.heads,
        hidden=c.hidden,
        embedding=c.embedding,
        activation=c.activation,
        remat=c.remat,
        stem_channels=c.stem_channels,
        stem_blocks=c.stem_blocks,
        pool=c.pool,
        dtype=dtype,
    )
    decoder = reconstruction = None
    if config.loss.pmd or config.loss.pfr:
        decoder = MatchingDecoder(
            width=c.width,
            heads=c.decoder_heads,
            hidden=c.hidden,
            activation=c.activation,
            self_eps=c.decoder_self_eps,
            kv_norm=c.cross_kv_norm,
            dtype=dtype,
        )
    if config.loss.pfr:
        reconstruction = PatchReconstruction(
            heads=c.decoder_heads,
            head_width=c.width // c.decoder_heads,
            attention=config.loss.pfr_attention,
            mask_padding=config.loss.pfr_mask_padding,
            with_class_token=config.loss.pfr_with_class_token,
        )
    return Rice(
        encoder=encoder,
        decoder=decoder,
        reconstruction=reconstruction,
        scale_init=c.logit_scale_init,
        bias_init=c.logit_bias_init if config.loss.icl_form == "sigmoid" else None,
        precision=c.matmul_precision if c.dtype == "float32" else "default",
    )
