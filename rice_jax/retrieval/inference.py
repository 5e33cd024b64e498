"""What a model makes of pictures when it is used: pure functions of parameters and pictures, for jit and jax.export.

Embeddings (SPEC 2.5) and matching scores (SPEC 10.4). A score needs of a shop image its class token after the decoder's
self layer, and of a clip its keys and values: each is made once, whatever it meets.

Letters: n clips or pictures, m shop images, r images that one clip meets, N frame slots, T tokens, D width,
E embedding, S = N*T decoder keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rice_jax.models.arrays import apply, clip_embedding, normalise, unit
from rice_jax.models.rice import Rice


def encode_images(net: Rice, flip: bool, params: Any, images: Array) -> Float[Array, "n E"]:
    """Unit embeddings of shop images, uint8 [n, px, px, 3]; `flip`: of the sum of theirs and their mirror images'."""
    return unit(_encode(net, flip, params, normalise(images))[1])


def encode_clips(net: Rice, flip: bool, params: Any, frames: Array, mask: Array) -> Float[Array, "n E"]:
    """Unit embeddings of clips: frames uint8 [n, N, px, px, 3], mask int32 [n, N] with 1 for a frame."""
    return clip_embedding(_encode_frames(net, flip, params, frames, mask)[1], mask)


def image_queries(net: Rice, flip: bool, params: Any, images: Array) -> tuple[Float[Array, "n E"], Float[Array, "n D"]]:
    """Embeddings of shop images, and their class tokens after the decoder's self layer (never of mirror images)."""
    tokens, pooled = _encode(net, flip, params, normalise(images))
    class_tokens = apply(net.decoder, params["decoder"], tokens, method="image_tokens")[:, 0]
    return unit(pooled), class_tokens.astype(jnp.float32)


def clip_keys(
    net: Rice, flip: bool, params: Any, frames: Array, mask: Array
) -> tuple[Float[Array, "n E"], Float[Array, "n S DD"], Bool[Array, "n S"]]:
    """Embeddings of clips, the decoder's keys and values of their frames (DD = 2*D), and which are no padding."""
    tokens, pooled = _encode_frames(net, flip, params, frames, mask)
    n, slots, per_frame, width = tokens.shape
    keys_values = apply(
        net.decoder, params["decoder"], tokens.reshape(n, slots * per_frame, width), method="keys_values"
    )
    return clip_embedding(pooled, mask), keys_values, jnp.repeat(mask > 0, per_frame, axis=1)


def pair_scores(
    net: Rice,
    raw: bool,
    params: Any,
    class_tokens: Float[Array, "n r D"],
    keys_values: Float[Array, "n S 2*D"],
    key_mask: Bool[Array, "n S"],
) -> Float[Array, "n r"]:
    """How well each clip matches its r images: cos(h, w), or with `raw` h . w (SPEC 5.5, 5.6, 10.4). Float32."""
    assert net.decoder is not None
    decoder = functools.partial(apply, net.decoder, params["decoder"])
    x = class_tokens.astype(net.decoder.dtype)
    weights = jax.nn.softmax(decoder(x, keys_values, key_mask, method="scores"), axis=-1)
    pooled = decoder(decoder(x, weights, keys_values, method="cross_tokens"), method="pooled")
    match = params["decoder"]["match"]
    if not raw:
        pooled, match = unit(pooled), unit(match)
    return jnp.einsum("nrd,d->nr", pooled, match, precision="highest")


def shelf_scores(
    net: Rice,
    raw: bool,
    at_once: int,
    params: Any,
    class_tokens: Float[Array, "m D"],
    shelf: Int[Array, "n L"],
    count: Int[Array, ""],
    keys_values: Float[Array, "n S 2*D"],
    key_mask: Bool[Array, "n S"],
) -> Float[Array, "n L"]:
    """Scores of each clip against the images of its own shelf, `at_once` of them at a time.

    Args:
      class_tokens: of all images, each once; shelves point at them.
      shelf: rows of `class_tokens`, filled up with the last one, which is nobody's; L a multiple of at_once.
      count: steps of at_once that the longest of these shelves needs; the rest is not computed.

    Returns:
      float32, -inf where `shelf` is filled up.
    """
    start = jnp.full(shelf.shape, -jnp.inf, jnp.float32)

    def step(at: Array, scores: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(shelf, at * at_once, at_once, axis=1)
        part = pair_scores(net, raw, params, class_tokens[rows], keys_values, key_mask)
        return jax.lax.dynamic_update_slice_in_dim(scores, part, at * at_once, axis=1)

    scores = jax.lax.fori_loop(0, count, step, start)
    return jnp.where(shelf < class_tokens.shape[0] - 1, scores, -jnp.inf)


def match(net: Rice, raw: bool, params: Any, frames: Array, mask: Array, images: Array) -> Float[Array, "n m"]:
    """Scores of every clip against every image at once, with [n, H, m, S] numbers in between."""
    _, class_tokens = image_queries(net, False, params, images)
    _, keys_values, key_mask = clip_keys(net, False, params, frames, mask)
    everyone = jnp.broadcast_to(class_tokens[None], (mask.shape[0], *class_tokens.shape))
    return pair_scores(net, raw, params, everyone, keys_values, key_mask)


def match_clips(
    net: Rice,
    flip: bool,
    raw: bool,
    at_once: int,
    params: Any,
    frames: Array,
    mask: Array,
    shelf: Array,
    class_tokens: Array,
    count: Array,
) -> tuple[Float[Array, "n E"], Float[Array, "n L"]]:
    """Embeddings of clips and their scores on their shelves; arguments as in clip_keys and shelf_scores."""
    embedding, keys_values, key_mask = clip_keys(net, flip, params, frames, mask)
    return embedding, shelf_scores(net, raw, at_once, params, class_tokens, shelf, count, keys_values, key_mask)


def _encode(net: Rice, flip: bool, params: Any, pictures: Array) -> tuple[Array, Array]:
    """Tokens [n, T, D] and pooled vectors [n, E] of normalised pictures; `flip` adds their mirror images' vectors."""
    tokens, pooled = apply(net.encoder, params["encoder"], pictures)
    if flip:
        pooled = pooled + apply(net.encoder, params["encoder"], pictures[:, :, ::-1])[1]
    return tokens, pooled


def _encode_frames(net: Rice, flip: bool, params: Any, frames: Array, mask: Array) -> tuple[Array, Array]:
    """Tokens [n, N, T, D] and pooled vectors [n, N, E] of every slot."""
    n, slots = mask.shape
    pictures = normalise(frames, mask).reshape(n * slots, *frames.shape[2:])
    tokens, pooled = _encode(net, flip, params, pictures)
    return tokens.reshape(n, slots, *tokens.shape[1:]), pooled.reshape(n, slots, *pooled.shape[1:])
