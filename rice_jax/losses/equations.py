"""The equations of the losses: arrays in, numbers out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rice_jax.models.arrays import cosines


def icl_logits(
    anchors: Float[Array, "B E"], partners: Float[Array, "G E"], scale: Float[Array, ""]
) -> Float[Array, "B G"]:
    """scale^2 cos (SPEC 3.1): the scale stands on both sides, plain, neither a logarithm nor squared."""
    return jnp.square(scale) * cosines(anchors, partners)


class GlobalBatch(NamedTuple):
    """What a device's rows are compared with: the embeddings of the global batch, and its products."""

    images: Float[Array, "G E"]
    clips: Float[Array, "G E"]
    product: Int[Array, " G"]


def icl_loss(
    clips: Float[Array, "B E"],
    images: Float[Array, "B E"],
    everyone: GlobalBatch,
    own: Int[Array, " B"],
    scale: Float[Array, ""],
    *,
    same_product_is: str = "negative",
    chunk: int = 0,
) -> Float[Array, ""]:
    """Instance-level contrastive loss of unit embeddings (SPEC 3): mean of both directions and of this device's rows.

    Args:
      own: position of each row in the global batch; its partner there is the positive.
      scale: of icl_logits.
      same_product_is: what other pairs of the row's product are: "negative" as in the official code, "masked" (left
        out), or "positive" (the mean of -log p over all of them, SupCon's outer form).
      chunk: rows whose logits exist at once, the others' being made again in the backward pass; 0: all.
    """

    def cross_entropy(anchors: Array, partners: Array) -> Array:
        def rows(part: tuple[Array, Array]) -> Array:
            anchors, own = part
            positive, left_out = positives_and_ignored(own, everyone.product, same_product_is)
            log_p = jax.nn.log_softmax(jnp.where(left_out, -jnp.inf, icl_logits(anchors, partners, scale)), axis=-1)
            return -jnp.sum(jnp.where(positive, log_p, 0), axis=-1) / jnp.sum(positive, axis=-1)

        return jnp.mean(in_chunks(rows, (anchors, own), chunk))

    return (cross_entropy(clips, everyone.images) + cross_entropy(images, everyone.clips)) / 2


def sigmoid_icl_loss(
    clips: Float[Array, "B E"],
    everyone: GlobalBatch,
    own: Int[Array, " B"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    same_product_is: str = "negative",
    chunk: int = 0,
) -> Float[Array, ""]:
    """ICL as SigLIP has it: each pair of the global batch is right or wrong by itself, -log sigmoid(+-(s^2 cos + b)).

    The sum over a clip's pairs, the mean over this device's clips (Zhai et al. 2023, algorithm 1). Every pair is met
    once, where its clip lives, hence one direction. Other arguments as in icl_loss.
    """

    def rows(part: tuple[Array, Array]) -> Array:
        clips, own = part
        positive, left_out = positives_and_ignored(own, everyone.product, same_product_is)
        logits = icl_logits(clips, everyone.images, scale) + bias
        return -jnp.sum(jnp.where(left_out, 0, jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))), axis=-1)

    return jnp.mean(in_chunks(rows, (clips, own), chunk))


def positives_and_ignored(
    own: Int[Array, " b"], product: Int[Array, " G"], same_product_is: str
) -> tuple[Bool[Array, "b G"], Bool[Array, "b G"]]:
    """Which partners are a row's positives, and which are neither positive nor negative."""
    itself = own[:, None] == jnp.arange(product.shape[0])[None]
    also = (product[own][:, None] == product[None]) & ~itself
    nobody = jnp.zeros_like(itself)
    return {
        "negative": (itself, nobody),
        "masked": (itself, also),
        "positive": (itself | also, nobody),
    }[same_product_is]


def pmd_loss(
    positive: Float[Array, " B"], negatives: Float[Array, "B k"], found: Bool[Array, "B k"]
) -> Float[Array, ""]:
    """Pairwise matching loss: mean over rows of -log softmax of the positive among its candidates (SPEC 5.7).

    A hard partner that was not found takes no part; with none the row's loss is 0.
    """
    logits = jnp.concatenate([positive[:, None], jnp.where(found, negatives, -jnp.inf)], axis=1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)


def reconstruct(
    coefficients: Float[Array, "*B R S"], clip_tokens: Float[Array, "*B S D"], key_mask: Bool[Array, "*B S"]
) -> Float[Array, "*B R D"]:
    """Image tokens as sums of clip tokens, which carry no gradient; padding is a source of zeros (SPEC 6.5)."""
    sources = jnp.where(key_mask[..., None], jax.lax.stop_gradient(clip_tokens), 0)
    return coefficients @ sources.astype(coefficients.dtype)


def pfr_loss(
    coefficients: Float[Array, "*B R S"],
    image_tokens: Float[Array, "*B T D"],
    clip_tokens: Float[Array, "*B S D"],
    key_mask: Bool[Array, "*B S"],
) -> Float[Array, ""]:
    """Patch feature reconstruction: mean squared error of the rebuilt image tokens (SPEC 6.6).

    Tokens carry no gradient: the loss teaches where to look, not what to see. R rows are those of the last R tokens:
    all T, or the patches (SPEC 11, row 29).
    """
    target = jax.lax.stop_gradient(image_tokens)[..., -coefficients.shape[-2] :, :]
    found = reconstruct(coefficients, clip_tokens, key_mask)
    return jnp.mean(jnp.square(found - target.astype(found.dtype)))


def in_chunks(f: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """f over chunks of the leading axis, each recomputed in the backward pass; 0: all at once, nothing recomputed.

    As few chunks as `chunk` rows at most allow, all of one size: copies of the last row fill up the last chunk, and
    what f makes of them is dropped.

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
