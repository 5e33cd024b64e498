"""Runs preflight on the official formulation of the losses, for comparison.

python -m benchmarks.official_formulation --config pod --topology v5e:16x16 [other options of preflight]

Every device gathers the tokens of all clips of the global batch. It decodes all tokens of each of its images against
the image's own clip and the hard ones (docs/official.md 5). rice_jax.losses.global_batch computes the same losses, and
moves one vector per image. Encoder, ICL and the parts of the decoder are the same in both.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rice_jax.config import LossConfig
from rice_jax.errors import run
from rice_jax.losses import global_batch, pairs
from rice_jax.losses.equations import GlobalBatch, icl_loss, in_chunks, pfr_loss, pmd_loss, positives_and_ignored
from rice_jax.losses.global_batch import encode_rows, loss_context
from rice_jax.models.arrays import apply
from rice_jax.models.rice import Rice
from rice_jax.parallel.mesh import gather_rows, max_over_devices, mean_over_devices, sum_over_devices, varying
from rice_jax.preflight.__main__ import main, parse

IMAGES_AT_ONCE = 2  # as in the official code


def local_losses(
    net: Rice, options: LossConfig, specs: Any, params: Any, batch: dict[str, Any], key: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns ({"icl", "pmd", "pfr"}, counts), as rice_jax.losses.global_batch.local_losses does inside shard_map."""
    context = loss_context(net, options, specs, params, key, batch["mask"].shape[0])
    params, key, global_rows = context.params, context.key, context.global_rows
    encoded = encode_rows(context, batch)
    gathered = GlobalBatch(*map(gather_rows, (encoded.images, encoded.clips, batch["product"])))
    out = {
        "icl": icl_loss(
            encoded.clips,
            encoded.images,
            gathered,
            global_rows,
            params["logit_scale"],
            same_product_is=options.icl_same_product,
            chunk=options.icl_chunk,
        )
    }
    clip_tokens = gather_rows(encoded.clip_tokens)  # [G, S, D]: all clips, on every device
    key_mask = gather_rows(encoded.key_mask)
    same = "masked" if options.exclude_same_product else "negative"
    partner, same_product = positives_and_ignored(global_rows, gathered.product, same)
    hard, found = pairs.mine_hard(encoded.images, gathered.clips, partner | same_product)
    decoder = functools.partial(apply, net.decoder, params["decoder"])

    def decode(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """Returns the logits of one image against its clips [1 + k], and its PFR loss."""
        image_tokens, position, clips = row
        x = decoder(jnp.broadcast_to(image_tokens, (len(clips), *image_tokens.shape)), method="image_tokens")
        keys_values = decoder(clip_tokens[clips], method="keys_values")
        scores = decoder(x, keys_values, key_mask[clips], method="scores")
        weights = jax.nn.softmax(scores, axis=-1)
        if options.cross_dropout:
            keys = pairs.pair_keys(key, jnp.broadcast_to(position, clips.shape), clips)
            first = pairs.attention_dropout(weights[:, :, :1], keys[:, None], options.cross_dropout)
            weights = jnp.concatenate([first, weights[:, :, 1:]], axis=2)
        logits = decoder(x, weights, keys_values, method="logit")[:, 0]
        coefficients = apply(net.reconstruction, params["reconstruction"], scores[:1], key_mask[clips[:1]])
        pfr = pfr_loss(coefficients[0], image_tokens, clip_tokens[clips[0]], key_mask[clips[0]])
        return logits, pfr

    clips = jnp.concatenate([global_rows[:, None], hard], axis=1)
    logits, pfr = in_chunks(jax.vmap(decode), (encoded.image_tokens, global_rows, clips), IMAGES_AT_ONCE)
    out["pmd"] = pmd_loss(logits[:, 0], logits[:, 1:], found)
    out["pfr"] = jnp.mean(pfr)
    return mean_over_devices(out), {
        "negatives_missing": sum_over_devices(jnp.sum(~found)),
        "busiest_device_units": max_over_devices(varying(jnp.int32(0))),
    }


def make_loss(net: Rice, options: LossConfig, mesh: Mesh, specs: Any) -> Callable[..., Any]:
    """Does what global_batch.make_loss does. Raises ValueError for options that the official code does not have."""
    if not (options.pmd and options.pfr) or options.mining_direction != "image_to_clip" or options.frame_icl:
        raise ValueError("loss: the official formulation needs ICL, PMD and PFR, mined from image to clip; set them.")
    return global_batch.make_loss(net, options, mesh, specs, local=local_losses)


if __name__ == "__main__":
    run(functools.partial(main, make_loss=make_loss), parse())
