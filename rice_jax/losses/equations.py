"""The equations of the losses, arrays in and numbers out. Letters of shapes: models/rice.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rice_jax.models.arrays import cosines


def icl_logits(
    anchors: Float[Array, "B E"], partners: Float[Array, "G E"], scale: Float[Array, ""]
) -> Float[Array, "B G"]:
    """Returns scale^2 cos of unit vectors, float32: the scale is a factor of both sides (docs/official.md 3.1)."""
    return jnp.square(scale) * cosines(anchors, partners)


class GlobalBatch(NamedTuple):
    """The rows of all devices, gathered on each: what a device compares its own rows with."""

    images: Float[Array, "G E"]  # unit vectors
    clips: Float[Array, "G E"]
    product: Int[Array, " G"]


def icl_loss(
    clips: Float[Array, "B E"],
    images: Float[Array, "B E"],
    gathered: GlobalBatch,
    global_rows: Int[Array, " B"],
    scale: Float[Array, ""],
    *,
    same_product_is: str = "negative",
    chunk: int = 0,
) -> Float[Array, ""]:
    """Returns the instance-level contrastive loss (docs/official.md 3), float32: mean of both directions and B rows.

    Args:
      clips, images: unit vectors of this device's rows.
      global_rows: position of each of these rows in the global batch; the row's partner there is its positive.
      scale: as in icl_logits.
      same_product_is: how to count other rows with the same product: "negative" as the official code does, "masked"
        (neither positive nor negative), or "positive" (the mean of -log p over all positives, SupCon's outer form);
        KeyError for another word.
      chunk: rows of logits in memory at once, see in_chunks; 0: all.
    """

    def cross_entropy(anchors: Array, partners: Array) -> Array:
        def of_rows(rows: tuple[Array, Array]) -> Array:
            anchors, global_rows = rows
            positive, ignored = positives_and_ignored(global_rows, gathered.product, same_product_is)
            log_p = jax.nn.log_softmax(jnp.where(ignored, -jnp.inf, icl_logits(anchors, partners, scale)), axis=-1)
            return -jnp.sum(jnp.where(positive, log_p, 0), axis=-1) / jnp.sum(positive, axis=-1)

        return jnp.mean(in_chunks(of_rows, (anchors, global_rows), chunk))

    return (cross_entropy(clips, gathered.images) + cross_entropy(images, gathered.clips)) / 2


def sigmoid_icl_loss(
    clips: Float[Array, "B E"],
    gathered: GlobalBatch,
    global_rows: Int[Array, " B"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    same_product_is: str = "negative",
    chunk: int = 0,
) -> Float[Array, ""]:
    """Returns ICL in SigLIP's form (Zhai et al. 2023, algorithm 1): each pair is classified by itself.

    A pair costs -log sigmoid(l) if positive, else -log sigmoid(-l), with l = scale^2 cos + bias, and 0 if "masked". The
    loss, float32, is the sum over the pairs of a clip, then the mean over the B clips. There is one direction, because
    each pair of the global batch occurs once, on its clip's device. Other arguments, and KeyError, are as in icl_loss.
    """

    def of_rows(rows: tuple[Array, Array]) -> Array:
        clips, global_rows = rows
        positive, ignored = positives_and_ignored(global_rows, gathered.product, same_product_is)
        logits = icl_logits(clips, gathered.images, scale) + bias
        return -jnp.sum(jnp.where(ignored, 0, jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))), axis=-1)

    return jnp.mean(in_chunks(of_rows, (clips, global_rows), chunk))


def positives_and_ignored(
    global_rows: Int[Array, " b"], product: Int[Array, " G"], same_product_is: str
) -> tuple[Bool[Array, "b G"], Bool[Array, "b G"]]:
    """Returns two masks [b, G]: the positives of each row, and the partners that are neither positive nor negative.

    `product` is that of all rows of the global batch; the other arguments are those of icl_loss. Raises KeyError unless
    same_product_is is "negative", "masked" or "positive".
    """
    partner = global_rows[:, None] == jnp.arange(product.shape[0])[None]
    same_product = (product[global_rows][:, None] == product[None]) & ~partner
    none = jnp.zeros_like(partner)
    return {
        "negative": (partner, none),
        "masked": (partner, same_product),
        "positive": (partner | same_product, none),
    }[same_product_is]


def pmd_loss(
    positive: Float[Array, " B"], negatives: Float[Array, "B k"], found: Bool[Array, "B k"]
) -> Float[Array, ""]:
    """Returns the matching loss: mean over rows of -log softmax of the positive logit (docs/official.md 5.7).

    Negatives where `found` is false do not count; a row without any negative has loss 0.
    """
    logits = jnp.concatenate([positive[:, None], jnp.where(found, negatives, -jnp.inf)], axis=1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)


def reconstruct(
    coefficients: Float[Array, "*B R S"], clip_tokens: Float[Array, "*B S D"], key_mask: Bool[Array, "*B S"]
) -> Float[Array, "*B R D"]:
    """Returns coefficients @ clip_tokens in coefficients' dtype; padding tokens count as 0, none gets a gradient."""
    sources = jnp.where(key_mask[..., None], jax.lax.stop_gradient(clip_tokens), 0)
    return coefficients @ sources.astype(coefficients.dtype)


def pfr_loss(
    coefficients: Float[Array, "*B R S"],
    image_tokens: Float[Array, "*B T D"],
    clip_tokens: Float[Array, "*B S D"],
    key_mask: Bool[Array, "*B S"],
) -> Float[Array, ""]:
    """Returns the patch reconstruction loss, a scalar: the mean squared error over all of the last R image tokens.

    docs/official.md 6.6. Only the coefficients get a gradient; the tokens get none. R is T, or T - 1 to leave out the
    class token (docs/official.md 11, row 29).
    """
    target = jax.lax.stop_gradient(image_tokens)[..., -coefficients.shape[-2] :, :]
    found = reconstruct(coefficients, clip_tokens, key_mask)
    return jnp.mean(jnp.square(found - target.astype(found.dtype)))


def in_chunks(f: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """Returns f(rows), computed for at most `chunk` rows at a time and again in the backward pass, to save memory.

    f maps arrays with n rows to arrays with n rows, each row by itself; chunk 0 is a plain call. Chunks are as few as
    possible and equal in size: copies of the last row fill the last one, and f's results for them are dropped.
    With pictures as rows and the encoder as f this is GradCache, without a second pass written by hand.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    if not chunk or n <= chunk:
        return f(rows)
    count = -(-n // chunk)
    size = -(-n // count)

    def split(a: Array) -> Array:
        if spare := count * size - n:
            a = jnp.concatenate([a, jnp.broadcast_to(a[-1:], (spare, *a.shape[1:]))])
        return a.reshape(count, size, *a.shape[1:])

    out = jax.lax.map(jax.checkpoint(f), jax.tree.map(split, rows))
    return jax.tree.map(lambda a: a.reshape(count * size, *a.shape[2:])[:n], out)
