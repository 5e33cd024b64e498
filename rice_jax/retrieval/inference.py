"""Embeddings (docs/official.md 2.5) and matching scores (docs/official.md 10.4) as pure functions for jit and export.

For a score the decoder needs the shop image's class token after its self layer, and the clip's keys and values. Both
are computed once, for however many pairs.

Letters: n clips or pictures, m shop images, r shop images scored with one clip, N frame slots, T tokens, D width,
E embedding, S = N*T decoder keys, L size of a padded gallery.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rice_jax.models.arrays import apply, clip_embedding, normalise, unit
from rice_jax.models.rice import Rice


def encode_images(net: Rice, flip: bool, params: Any, images: Array) -> Float[Array, "n E"]:
    """Returns unit embeddings, float32, of shop images, uint8 [n, px, px, 3].

    flip: add the pooled vectors of each image and its mirror image before they are scaled to unit length.
    """
    return unit(_encode(net, flip, params, normalise(images))[1])


def encode_clips(net: Rice, flip: bool, params: Any, frames: Array, mask: Array) -> Float[Array, "n E"]:
    """Returns float32 unit embeddings of frames uint8 [n, N, px, px, 3], mask int32 [n, N]; flip as encode_images."""
    return clip_embedding(_encode_frames(net, flip, params, frames, mask)[1], mask)


def encode_images_to_match(
    net: Rice, flip: bool, params: Any, images: Array
) -> tuple[Float[Array, "n E"], Float[Array, "n D"]]:
    """Returns unit embeddings, and class tokens after the decoder's self layer (never mirrored), both float32."""
    tokens, pooled = _encode(net, flip, params, normalise(images))
    class_tokens = apply(net.decoder, params["decoder"], tokens, method="image_tokens")[:, 0]
    return unit(pooled), class_tokens.astype(jnp.float32)


def encode_clips_to_match(
    net: Rice, flip: bool, params: Any, frames: Array, mask: Array
) -> tuple[Float[Array, "n E"], Float[Array, "n S DD"], Bool[Array, "n S"]]:
    """Returns unit embeddings, the decoder's keys and values (DD = 2*D, never mirrored), and the mask of real keys."""
    tokens, pooled = _encode_frames(net, flip, params, frames, mask)
    n, slots, per_frame, width = tokens.shape
    tokens = tokens.reshape(n, slots * per_frame, width)
    keys_values = apply(net.decoder, params["decoder"], tokens, method="keys_values")
    return clip_embedding(pooled, mask), keys_values, jnp.repeat(mask > 0, per_frame, axis=1)


def pair_scores(
    net: Rice,
    raw: bool,
    params: Any,
    class_tokens: Float[Array, "n r D"],
    keys_values: Float[Array, "n S 2*D"],
    key_mask: Bool[Array, "n S"],
) -> Float[Array, "n r"]:
    """Returns each clip's scores with its r shop images, float32: cos(h, w), or h . w if `raw`."""
    # docs/official.md 5.5, 5.6 and 10.4
    assert net.decoder is not None
    decoder = functools.partial(apply, net.decoder, params["decoder"])
    x = class_tokens.astype(net.decoder.dtype)
    weights = jax.nn.softmax(decoder(x, keys_values, key_mask, method="scores"), axis=-1)
    pooled = decoder(decoder(x, weights, keys_values, method="cross_tokens"), method="pooled")
    match = params["decoder"]["match"]
    if not raw:
        pooled, match = unit(pooled), unit(match)
    return jnp.einsum("nrd,d->nr", pooled, match, precision="highest")


def gallery_scores(
    net: Rice,
    raw: bool,
    at_once: int,
    params: Any,
    class_tokens: Float[Array, "m D"],
    gallery: Int[Array, "n L"],
    steps: Int[Array, ""],
    keys_values: Float[Array, "n S 2*D"],
    key_mask: Bool[Array, "n S"],
) -> Float[Array, "n L"]:
    """Returns each clip's scores with its own gallery, float32, -inf where `gallery` is padded.

    `class_tokens` are those of all shop images, each once, and a last row for padding. `gallery` has rows of them, and
    is padded with the last one. `at_once` images, which divide L, are scored at a time, `steps` times: as often as the
    longest of these galleries needs.
    """
    start = jnp.full(gallery.shape, -jnp.inf, jnp.float32)

    def step(number: Array, scores: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(gallery, number * at_once, at_once, axis=1)
        part = pair_scores(net, raw, params, class_tokens[rows], keys_values, key_mask)
        return jax.lax.dynamic_update_slice_in_dim(scores, part, number * at_once, axis=1)

    scores = jax.lax.fori_loop(0, steps, step, start)
    return jnp.where(gallery < class_tokens.shape[0] - 1, scores, -jnp.inf)


def score_all_pairs(
    net: Rice, raw: bool, params: Any, frames: Array, mask: Array, images: Array
) -> Float[Array, "n m"]:
    """Returns float32 scores, cos(h, w), or h . w if `raw`, of all pairs at once: it needs memory for [n, H, m, S]."""
    _, class_tokens = encode_images_to_match(net, False, params, images)
    _, keys_values, key_mask = encode_clips_to_match(net, False, params, frames, mask)
    repeated = jnp.broadcast_to(class_tokens[None], (mask.shape[0], *class_tokens.shape))
    return pair_scores(net, raw, params, repeated, keys_values, key_mask)


def encode_and_score_clips(
    net: Rice, flip: bool, raw: bool, at_once: int, params: Any, frames: Array, mask: Array, *galleries: Array
) -> tuple[Float[Array, "n E"], Float[Array, "n L"]]:
    """Returns unit embeddings and gallery_scores, float32; `galleries` are its class_tokens, gallery and steps."""
    embedding, keys_values, key_mask = encode_clips_to_match(net, flip, params, frames, mask)
    class_tokens, gallery, steps = galleries
    scores = gallery_scores(net, raw, at_once, params, class_tokens, gallery, steps, keys_values, key_mask)
    return embedding, scores


def _encode(net: Rice, flip: bool, params: Any, pictures: Array) -> tuple[Array, Array]:
    """Returns tokens [n, T, D], pooled vectors [n, E], not unit; `flip` adds the mirror images' to the pooled alone."""
    tokens, pooled = apply(net.encoder, params["encoder"], pictures)
    if flip:
        pooled = pooled + apply(net.encoder, params["encoder"], pictures[:, :, ::-1])[1]
    return tokens, pooled


def _encode_frames(net: Rice, flip: bool, params: Any, frames: Array, mask: Array) -> tuple[Array, Array]:
    n, slots = mask.shape
    pictures = normalise(frames, mask).reshape(n * slots, *frames.shape[2:])
    tokens, pooled = _encode(net, flip, params, pictures)
    return tokens.reshape(n, slots, *tokens.shape[1:]), pooled.reshape(n, slots, *pooled.shape[1:])
