"""Hard pairs: mining them, and decoding each pair on the device that holds its clip.

Everything here runs inside shard_map over the whole batch. A matching logit depends on the image's class token after
the decoder's self layer, [D], and on the clip's keys and values, [S, 2D]. So the class tokens of all G images are
gathered on every device and the keys and values stay where they are: the same loss as gathering every clip's tokens,
for a five-hundredth of the bytes.

Letters of shapes are those of models/rice.py; besides, U is the number of blocks, and r that of pairs in a block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rice_jax.models.arrays import cosines
from rice_jax.parallel.mesh import first_row, gather_rows, scatter_sum_rows, varying

NUM_HARD = 3  # hard partners of a row (docs/official.md 4.3)


def mine_hard(
    anchors: Float[Array, "B E"], partners: Float[Array, "G E"], excluded: Bool[Array, "B G"]
) -> tuple[Int[Array, "B k"], Bool[Array, "B k"]]:
    """Finds the k = min(NUM_HARD, G) most similar partners of each anchor, without gradient (docs/official.md 4.1-4.3).

    Returns their positions in the global batch, int32, the most similar first; and whether each was found. That is
    false, and the position means nothing, where an anchor has fewer than k partners that are not excluded.
    """
    similarity = cosines(jax.lax.stop_gradient(anchors), jax.lax.stop_gradient(partners))
    value, position = jax.lax.top_k(jnp.where(excluded, -jnp.inf, similarity), min(NUM_HARD, partners.shape[0]))
    return position, value > -jnp.inf


def pair_keys(key: Array, image: Int[Array, "*n"], clip: Int[Array, "*n"]) -> Array:
    """Returns a random key for each pair, [*n], from positions in the global batch: the same on every mesh."""
    fold = lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j)
    for _ in range(image.ndim):
        fold = jax.vmap(fold)
    return fold(image, clip)


def attention_dropout(weights: Float[Array, "n H r S"], keys: Array, rate: float) -> Float[Array, "n H r S"]:
    """Returns the weights, each 0 with probability `rate`, else divided by 1 - rate; keys [n, r]: one for each pair."""
    shape = (weights.shape[1], weights.shape[3])
    keep = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, shape)))(keys)  # [n, r, H, S]
    return jnp.where(keep.swapaxes(1, 2), weights / (1 - rate), 0)


class PairBlocks(NamedTuple):
    """Pairs grouped by clip into blocks of r pairs, so that a clip's keys and values are read once a block."""

    pair: Int[Array, "U r"]  # number of the pair among all pairs of the global batch; their count marks an empty place
    clip: Int[Array, " U"]  # row of this device
    used: Int[Array, ""]  # number of blocks that contain a pair; they come first


def group_pairs_by_clip(clip_of_pair: Int[Array, " pairs"], *, rows: int, block_size: int, multiple: int) -> PairBlocks:
    """Returns pairs in blocks of `block_size` by the row of their clip; the row `rows` marks another device's pair.

    U is rows + pairs // block_size, which always suffices, rounded up to a multiple of `multiple`. With clips (2, 0, 3,
    0, 0), 3 rows and block_size 2 the used blocks are the pairs (1, 3), (4, -), (0, -) of the clips 0, 0, 2.
    """
    count = clip_of_pair.shape[0]
    most = -(-(rows + count // block_size) // multiple) * multiple
    order = jnp.argsort(clip_of_pair)  # stable; pairs of other devices come last
    clip = clip_of_pair[order]
    rank = jnp.arange(count) - jnp.searchsorted(clip, clip)  # among the pairs of the same clip
    block = jnp.where(clip < rows, jnp.cumsum(rank % block_size == 0) - 1, most)
    return PairBlocks(
        pair=jnp.full((most, block_size), count).at[block, rank % block_size].set(order, mode="drop"),
        clip=jnp.zeros(most, jnp.int32).at[block].set(clip, mode="drop"),
        used=jnp.max(block, where=clip < rows, initial=-1) + 1,
    )


class DecoderInputs(NamedTuple):
    """All that the decoding of pairs reads on one device."""

    params: Any  # of the decoder, without the self layer
    class_tokens: Float[Array, "G D"]  # of all images, after the self layer
    keys_values: Float[Array, "B S 2*D"]  # of this device's clips
    constants: Any  # arrays that have no gradient


# decode(params, class_tokens [c, r, D], keys_values [c, S, 2D], constants, image [c, r], clip [c]) -> logits [c, r]
Decode = Callable[[Any, Array, Array, Any, Array, Array], Array]


def decode_blocks(
    decode: Decode,
    inputs: DecoderInputs,
    image: Int[Array, "U r"],
    clip: Int[Array, " U"],
    *,
    count: Int[Array, ""],
    chunk: int,
) -> Float[Array, "U r"]:
    """Returns the logits of the first `count` blocks, float32, `chunk` blocks at a time; the others' mean nothing.

    `image` contains positions in the global batch, `clip` rows of this device; `chunk` divides U. The gradient goes to
    `inputs` except their constants. The loop runs as often as this device has work, because no fixed capacity would do:
    with an untrained encoder one clip is among the hardest of nearly every image. It contains no collective, so devices
    may differ. JAX has no gradient for a loop of unknown length, so it is written here: the same loop again.
    """

    def cut(at: Array, *arrays: Array) -> list[Array]:
        return [jax.lax.dynamic_slice_in_dim(a, at * chunk, chunk) for a in arrays]

    def zeros_like(tree: Any) -> Any:  # float32, because thousands of small contributions are added up
        return jax.tree.map(lambda a: varying(jnp.zeros(a.shape, jnp.float32)), tree)

    @jax.custom_vjp
    def run(inputs: DecoderInputs, image: Array, clip: Array, n: Array) -> Array:
        def body(at: Array, logits: Array) -> Array:
            i, j = cut(at, image, clip)
            tokens, keys_values = inputs.class_tokens[i], inputs.keys_values[j]
            out = decode(inputs.params, tokens, keys_values, inputs.constants, i, j)
            return jax.lax.dynamic_update_slice_in_dim(logits, out, at * chunk, 0)

        return jax.lax.fori_loop(0, n, body, varying(jnp.zeros(image.shape, jnp.float32)))

    def backward(saved: tuple[Any, ...], d_logits: Array) -> tuple[Any, ...]:
        inputs, image, clip, n = saved
        *differentiated, constants = inputs
        params, class_tokens, keys_values = differentiated

        def body(at: Array, total: list[Any]) -> list[Any]:
            i, j, d_out = cut(at, image, clip, d_logits)
            pull = jax.vjp(lambda p, x, y: decode(p, x, y, constants, i, j), params, class_tokens[i], keys_values[j])[1]
            d_params, d_tokens, d_keys_values = pull(d_out)
            return [
                jax.tree.map(jnp.add, total[0], d_params),
                total[1].at[i].add(d_tokens.astype(jnp.float32)),
                total[2].at[j].add(d_keys_values.astype(jnp.float32)),
            ]

        total = jax.lax.fori_loop(0, n, body, zeros_like(differentiated))
        cotangents = jax.tree.map(lambda t, a: t.astype(a.dtype), total, differentiated)
        return DecoderInputs(*cotangents, constants=None), None, None, None

    run.defvjp(lambda *arguments: (run(*arguments), arguments), backward)
    return run(inputs, image, clip, -(-count // chunk))


def image_to_clip_logits(
    decode: Decode,
    inputs: DecoderInputs,
    hard_clips: Int[Array, "B k"],
    found: Bool[Array, "B k"],
    *,
    block_size: int,
    chunk: int,
) -> tuple[Float[Array, "B k"], Int[Array, ""]]:
    """Decodes every image with its hard clips, each pair on the device of its clip (docs/official.md 4.3-4.5).

    Returns the logits of this device's images, float32, 0 where `found` is false; and the number, int32, of blocks of
    `block_size` pairs that this device decoded, `chunk` blocks at a time.
    """
    rows, k = hard_clips.shape
    total = inputs.class_tokens.shape[0]
    wanted = gather_rows(jnp.where(found, hard_clips, total)).reshape(-1)  # [G k]; position G belongs to no device
    first = first_row(rows)
    is_here = (wanted >= first) & (wanted < first + rows)
    clip_of_pair = jnp.where(is_here, wanted - first, rows)
    blocks = group_pairs_by_clip(clip_of_pair, rows=rows, block_size=block_size, multiple=chunk)
    image = jnp.minimum(blocks.pair, k * total - 1) // k
    logits = decode_blocks(decode, inputs, image, blocks.clip, count=blocks.used, chunk=chunk)
    of_pair = varying(jnp.zeros(k * total, jnp.float32)).at[blocks.pair].set(logits, mode="drop")
    return scatter_sum_rows(of_pair).reshape(rows, k), blocks.used


def clip_to_image_logits(
    decode: Decode, inputs: DecoderInputs, hard_images: Int[Array, "B k"], *, chunk: int
) -> Float[Array, "B k"]:
    """Decodes every clip of this device with its hard images, at most `chunk` clips at a time.

    Returns the logits, float32; where mining found no partner they mean nothing. No device waits for another's logits.
    """
    rows = hard_images.shape[0]
    chunk = -(-rows // -(-rows // chunk))  # as few chunks as possible, equal in size
    spare = -rows % chunk  # copies of the last clip fill the last chunk; their logits are dropped
    image = jnp.pad(hard_images, ((0, spare), (0, 0)), mode="edge")
    clip = varying(jnp.minimum(jnp.arange(rows + spare), rows - 1))
    return decode_blocks(decode, inputs, image, clip, count=varying(jnp.int32(rows)), chunk=chunk)[:rows]
