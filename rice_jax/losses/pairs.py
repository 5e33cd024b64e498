"""Hard pairs: who is compared with whom, and the decoding of a pair on the device where its clip lives.

Everything here runs inside shard_map over the whole batch. A matching logit needs of the image only its class token
after the decoder's self layer, [D], and of the clip its keys and values, [S, 2D]. So the class tokens of all G images
travel, the keys and values never do: the same loss as gathering every clip's tokens, for a five-hundredth of the bytes.

Letters: B rows of this device, G of the global batch, K-1 = 3 hard partners a row, r image slots of a unit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rice_jax.models.arrays import cosines
from rice_jax.parallel.mesh import first_row, gather_rows, scatter_sum_rows, varying

NUM_HARD = 3  # hard partners of an anchor (SPEC 4.3)


def mine_hard(
    anchors: Float[Array, "B E"], partners: Float[Array, "G E"], excluded: Bool[Array, "B G"]
) -> tuple[Int[Array, "B k"], Bool[Array, "B k"]]:
    """The most similar partners that are not excluded, hardest first (SPEC 4.1-4.3); no gradient.

    Returns their positions in the global batch, and whether there was one (a small set may have fewer than three
    products that are not the anchor's own).
    """
    similarity = cosines(jax.lax.stop_gradient(anchors), jax.lax.stop_gradient(partners))
    value, position = jax.lax.top_k(jnp.where(excluded, -jnp.inf, similarity), min(NUM_HARD, partners.shape[0]))
    return position, value > -jnp.inf


def pair_keys(key: Array, image: Int[Array, "*n"], clip: Int[Array, "*n"]) -> Array:
    """One random key a pair, from global positions: the same on any mesh, whoever decodes the pair."""
    fold = lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j)
    for _ in range(image.ndim):
        fold = jax.vmap(fold)
    return fold(image, clip)


def attention_dropout(weights: Float[Array, "n H r S"], keys: Array, rate: float) -> Float[Array, "n H r S"]:
    """Dropout on attention weights, one key a pair [n, r] (SPEC 5.4)."""
    shape = (weights.shape[1], weights.shape[3])
    keep = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, shape)))(keys)  # [n, r, H, S]
    return jnp.where(keep.swapaxes(1, 2), weights / (1 - rate), 0)


class PairBlocks(NamedTuple):
    """Pairs grouped by clip into units of r slots, so that a clip's keys and values are read once a unit."""

    pair: Int[Array, "U r"]  # which of the global 3G pairs; 3G marks an empty slot
    clip: Int[Array, " U"]  # row of this device
    used: Int[Array, ""]  # units in use; the rest are empty


def group_pairs_by_clip(clip_of_pair: Int[Array, " pairs"], *, rows: int, slots: int, multiple: int) -> PairBlocks:
    """Groups the pairs whose clip is one of this device's `rows`; a clip position of `rows` marks a foreign pair.

    However many pairs want one clip, they fit: U is the most units that any assignment can need, a multiple of
    `multiple`. With clips (2, 0, foreign, 0, 0), rows 3 and slots 2: pairs (1, 3), (4, -), (0, -) for clips 0, 0, 2.
    """
    pairs = clip_of_pair.shape[0]
    most = -(-(rows + pairs // slots) // multiple) * multiple
    order = jnp.argsort(clip_of_pair)  # stable; foreign pairs come last
    clip = clip_of_pair[order]
    rank = jnp.arange(pairs) - jnp.searchsorted(clip, clip)  # place among the pairs of the same clip
    unit = jnp.where(clip < rows, jnp.cumsum(rank % slots == 0) - 1, most)
    return PairBlocks(
        pair=jnp.full((most, slots), pairs).at[unit, rank % slots].set(order, mode="drop"),
        clip=jnp.zeros(most, jnp.int32).at[unit].set(clip, mode="drop"),
        used=jnp.max(unit, where=clip < rows, initial=-1) + 1,
    )


# decode(params, class_tokens [c, r, D], keys_values [c, S, 2D], context, image [c, r], clip [c]) -> logits [c, r]
Decode = Callable[[Any, Array, Array, Any, Array, Array], Array]


def decode_blocks(
    decode: Decode,
    params: Any,
    class_tokens: Float[Array, "G D"],
    keys_values: Float[Array, "B S 2*D"],
    context: Any,
    image: Int[Array, "U r"],
    clip: Int[Array, " U"],
    *,
    count: Int[Array, ""],
    chunk: int,
) -> Float[Array, "U r"]:
    """Logits of the first `count` units, `chunk` at a time; 0 beyond.

    The loop runs as often as this device has work, which no fixed capacity allows: with an untrained encoder one clip
    is among the hardest of nearly every image. No collective stands in it, so devices need not agree. A loop of
    unknown length has no automatic gradient; ours is the same loop, recomputing each chunk.
    """

    def cut(at: Array, *arrays: Array) -> list[Array]:
        return [jax.lax.dynamic_slice_in_dim(a, at * chunk, chunk) for a in arrays]

    def zeros_like(tree: Any) -> Any:  # float32: thousands of small contributions are added up
        return jax.tree.map(lambda a: varying(jnp.zeros(a.shape, jnp.float32)), tree)

    @jax.custom_vjp
    def run(
        params: Any, class_tokens: Array, keys_values: Array, context: Any, image: Array, clip: Array, n: Array
    ) -> Array:
        def body(at: Array, logits: Array) -> Array:
            i, j = cut(at, image, clip)
            out = decode(params, class_tokens[i], keys_values[j], context, i, j)
            return jax.lax.dynamic_update_slice_in_dim(logits, out, at * chunk, 0)

        return jax.lax.fori_loop(0, n, body, varying(jnp.zeros(image.shape, jnp.float32)))

    def backward(saved: tuple[Any, ...], d_logits: Array) -> tuple[Any, ...]:
        params, class_tokens, keys_values, context, image, clip, n = saved

        def body(at: Array, total: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
            i, j, d_out = cut(at, image, clip, d_logits)
            pull = jax.vjp(lambda p, x, y: decode(p, x, y, context, i, j), params, class_tokens[i], keys_values[j])[1]
            d_params, d_tokens, d_keys_values = pull(d_out)
            return (
                jax.tree.map(jnp.add, total[0], d_params),
                total[1].at[i].add(d_tokens.astype(jnp.float32)),
                total[2].at[j].add(d_keys_values.astype(jnp.float32)),
            )

        inputs = (params, class_tokens, keys_values)
        total = jax.lax.fori_loop(0, n, body, zeros_like(inputs))
        return (*jax.tree.map(lambda t, a: t.astype(a.dtype), total, inputs), None, None, None, None)

    run.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
    return run(params, class_tokens, keys_values, context, image, clip, -(-count // chunk))


def image_to_clip_logits(
    decode: Decode,
    params: Any,
    class_tokens: Float[Array, "G D"],
    keys_values: Float[Array, "B S 2*D"],
    context: Any,
    hard_clips: Int[Array, "B k"],
    found: Bool[Array, "B k"],
    *,
    slots: int,
    chunk: int,
) -> tuple[Float[Array, "B k"], Int[Array, ""]]:
    """Logits of every image against its hard clips, each decoded where the clip lives (SPEC 4.3-4.5).

    Also the units that this device decoded. Where `found` is false the logit is 0: mask it.
    """
    rows, k = hard_clips.shape
    total = class_tokens.shape[0]
    wanted = gather_rows(jnp.where(found, hard_clips, total)).reshape(-1)  # [kG]; clip G belongs to nobody
    first = first_row(rows)
    mine = (wanted >= first) & (wanted < first + rows)
    units = group_pairs_by_clip(jnp.where(mine, wanted - first, rows), rows=rows, slots=slots, multiple=chunk)
    image = jnp.minimum(units.pair, k * total - 1) // k
    logits = decode_blocks(
        decode, params, class_tokens, keys_values, context, image, units.clip, count=units.used, chunk=chunk
    )
    of_pair = varying(jnp.zeros(k * total, jnp.float32)).at[units.pair].set(logits, mode="drop")
    return scatter_sum_rows(of_pair).reshape(rows, k), units.used


def clip_to_image_logits(
    decode: Decode,
    params: Any,
    class_tokens: Float[Array, "G D"],
    keys_values: Float[Array, "B S 2*D"],
    context: Any,
    hard_images: Int[Array, "B k"],
    *,
    chunk: int,
) -> Float[Array, "B k"]:
    """Logits of every clip against its hard images; the anchors are the clips at home, so the load is always even."""
    rows = hard_images.shape[0]
    chunk = -(-rows // -(-rows // chunk))  # as few chunks as it allows, all of one size
    spare = -rows % chunk  # copies of the last clip fill up the last chunk; their logits are dropped
    logits = decode_blocks(
        decode,
        params,
        class_tokens,
        keys_values,
        context,
        jnp.pad(hard_images, ((0, spare), (0, 0)), mode="edge"),
        varying(jnp.minimum(jnp.arange(rows + spare), rows - 1)),
        count=varying(jnp.int32(rows)),
        chunk=chunk,
    )
    return logits[:rows]
