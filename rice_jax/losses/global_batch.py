"""The losses of the global batch: the equations are in equations.py, this file feeds them on each device of a mesh.

Scores, softmax and means are float32. Letters of shapes: models/rice.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from rice_jax.config import LossConfig
from rice_jax.losses import equations, pairs
from rice_jax.losses.equations import GlobalBatch, in_chunks
from rice_jax.models.arrays import apply, clip_embedding, normalise, unit
from rice_jax.models.rice import Rice
from rice_jax.parallel.mesh import (
    BATCH,
    P,
    all_gather_parameter,
    first_row,
    gather_rows,
    max_over_devices,
    mean_over_devices,
    sum_over_devices,
    varying,
)


@dataclasses.dataclass(frozen=True)
class LossContext:
    """All that the losses read on one device of the mesh, except its rows of the batch."""

    model: Rice
    options: LossConfig  # the config's `loss` section
    params: Any  # whole tensors
    key: Array  # random key of the update, the same on all devices
    global_rows: Int[Array, " B"]  # positions of this device's rows in the global batch


def loss_context(model: Rice, options: LossConfig, specs: Any, params: Any, key: Array, rows: int) -> LossContext:
    """Returns the context of a device with `rows` rows, from its shards of the parameters; call it inside shard_map."""
    params = jax.tree.map(all_gather_parameter, params, specs)
    return LossContext(model, options, params, varying(key), first_row(rows) + jnp.arange(rows))


class Encoded(NamedTuple):
    """The encoder's results for this device's rows."""

    image_tokens: Float[Array, "B T D"]
    clip_tokens: Float[Array, "B S D"]  # frame after frame, padding slots included
    images: Float[Array, "B E"]  # unit vectors
    clips: Float[Array, "B E"]
    halves: tuple[Float[Array, "B E"], Float[Array, "B E"]]  # as from clip_halves
    key_mask: Bool[Array, "B S"]  # true at tokens of real frames


def encode_rows(context: LossContext, batch: dict[str, Array]) -> Encoded:
    """Returns the results for this device's rows, micro_batch pictures at a time (0: all); patch_drop lessens T."""
    model, options, mask = context.model, context.options, batch["mask"]
    n, slots = mask.shape
    pictures = jnp.concatenate([batch["image"][:, None], batch["frames"]], axis=1)
    is_real = jnp.concatenate([jnp.ones((n, 1), mask.dtype), mask], axis=1)
    kept = None
    if options.patch_drop:
        kept = kept_patches(context.key, context.global_rows, slots + 1, model.encoder.patches, options.patch_drop)

    def encode(rows: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        pictures, is_real, kept = rows
        return apply(model.encoder, context.params["encoder"], normalise(pictures, is_real), kept)

    flat = jax.tree.map(lambda a: a.reshape(n * (slots + 1), *a.shape[2:]), (pictures, is_real, kept))
    tokens, pooled = in_chunks(encode, flat, options.micro_batch)
    tokens, pooled = jax.tree.map(lambda a: a.reshape(n, slots + 1, *a.shape[1:]), (tokens, pooled))
    return Encoded(
        image_tokens=tokens[:, 0],
        clip_tokens=tokens[:, 1:].reshape(n, -1, tokens.shape[-1]),
        images=unit(pooled[:, 0]),
        clips=clip_embedding(pooled[:, 1:], mask),
        halves=clip_halves(pooled[:, 1:], mask),
        key_mask=jnp.repeat(mask > 0, tokens.shape[2], axis=1),
    )


def kept_patches(
    key: Array, global_rows: Int[Array, " B"], pictures: int, patches: int, drop: float
) -> Int[Array, "B pictures kept"]:
    """Returns max(1, round(patches (1 - drop))) random patches of each picture, int32, the same on every mesh."""
    key = jax.random.fold_in(key, 2**32 - 1)  # no image has this position, so no pair has this key (pairs.py)

    def one(row: Array, picture: Array) -> Array:
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, row), picture), patches)
        return order[: max(1, round(patches * (1 - drop)))]

    return jax.vmap(lambda row: jax.vmap(lambda picture: one(row, picture))(jnp.arange(pictures)))(global_rows)


def clip_halves(pooled: Float[Array, "B N E"], mask: Int[Array, "B N"]) -> tuple[Array, Array]:
    """Returns unit embeddings [B, E] of each clip's even slots and of its odd ones; of one frame, both are of it."""
    slot = jnp.arange(mask.shape[1])[None]
    odd = mask * (slot % 2)
    odd = jnp.where(odd.any(axis=1, keepdims=True), odd, mask)
    return clip_embedding(pooled, mask * (slot % 2 == 0)), clip_embedding(pooled, odd)


class Positives(NamedTuple):
    """The decoder's results for the pairs (image i, clip i): PMD and PFR share them (docs/official.md 11, row 13)."""

    logit: Float[Array, " B"]
    keys_values: Float[Array, "B S 2*D"]
    class_token: Float[Array, "B D"]  # of the image, after the decoder's self layer
    pfr: Float[Array, " B"]  # the loss of each row, 0 without a reconstruction head


def decode_positives(context: LossContext, encoded: Encoded) -> Positives:
    """Returns each own image's decoder results and PFR loss with its own clip, pair_chunk pairs at a time (0: all)."""
    model, options, params = context.model, context.options, context.params
    decoder = functools.partial(apply, model.decoder, params["decoder"])

    def of_rows(rows: tuple[Encoded, Array]) -> Positives:
        encoded, global_rows = rows
        keys_values = decoder(encoded.clip_tokens, method="keys_values")
        x = decoder(encoded.image_tokens, method="image_tokens")
        scores = decoder(x, keys_values, encoded.key_mask, method="scores")
        weights = jax.nn.softmax(scores[:, :, :1], axis=-1)
        if options.cross_dropout:
            keys = pairs.pair_keys(context.key, global_rows[:, None], global_rows[:, None])
            weights = pairs.attention_dropout(weights, keys, options.cross_dropout)
        logit = decoder(x[:, :1], weights, keys_values, method="logit")[:, 0]
        pfr = jnp.zeros_like(logit)
        if model.reconstruction is not None:
            coefficients = apply(model.reconstruction, params["reconstruction"], scores, encoded.key_mask)
            pfr = jax.vmap(equations.pfr_loss)(
                coefficients, encoded.image_tokens, encoded.clip_tokens, encoded.key_mask
            )
        return Positives(logit, keys_values, x[:, 0], pfr)

    return in_chunks(of_rows, (encoded, context.global_rows), options.pair_chunk)


class HardPairs(NamedTuple):
    """This device's rows with their hard partners, the most similar first."""

    partner: Int[Array, "B k"]  # position in the global batch
    found: Bool[Array, "B k"]  # false: there was no such partner, and the logit means nothing
    logit: Float[Array, "B k"]
    blocks: Int[Array, ""]  # pair blocks that this device decoded; 0 for clip_to_image, where the load is always even


def hard_pairs(context: LossContext, encoded: Encoded, positives: Positives, gathered: GlobalBatch) -> list[HardPairs]:
    """Mines and decodes hard pairs (docs/official.md 4-5); returns one result for each direction, image_to_clip first.

    options.mining_direction names one direction or "both". A row's own partner is never hard; with
    options.exclude_same_product no partner of the row's product is.
    """
    model, options = context.model, context.options

    def mine(anchors: Array, partners: Array) -> tuple[Array, Array]:
        def of_rows(rows: tuple[Array, Array]) -> tuple[Array, Array]:
            anchors, global_rows = rows
            same_product_is = "masked" if options.exclude_same_product else "negative"
            own, same_product = equations.positives_and_ignored(global_rows, gathered.product, same_product_is)
            return pairs.mine_hard(anchors, partners, own | same_product)

        return in_chunks(of_rows, (anchors, context.global_rows), options.icl_chunk)

    def decode(params: Any, x: Array, keys_values: Array, constants: Any, image: Array, clip: Array) -> Array:
        key_mask, global_rows, key_data = constants
        decoder = functools.partial(apply, model.decoder, params)
        weights = jax.nn.softmax(decoder(x, keys_values, key_mask[clip], method="scores"), axis=-1)
        if options.cross_dropout:
            clip_position = jnp.broadcast_to(global_rows[clip][:, None], image.shape)
            keys = pairs.pair_keys(jax.random.wrap_key_data(key_data, impl="threefry2x32"), image, clip_position)
            weights = pairs.attention_dropout(weights, keys, options.cross_dropout)
        return decoder(x, weights, keys_values, method="logit")

    inputs = pairs.DecoderInputs(
        params={name: part for name, part in context.params["decoder"].items() if name != "self_layer"},
        class_tokens=gather_rows(positives.class_token),  # [G, D]: nothing else of the decoder crosses devices
        keys_values=positives.keys_values,
        constants=(encoded.key_mask, context.global_rows, jax.random.key_data(context.key)),
    )
    directions = []
    if options.mining_direction in ("image_to_clip", "both"):
        partner, found = mine(encoded.images, gathered.clips)
        logit, blocks = pairs.image_to_clip_logits(
            decode, inputs, partner, found, block_size=options.unit_slots, chunk=options.unit_chunk
        )
        directions.append(HardPairs(partner, found, logit, blocks))
    if options.mining_direction in ("clip_to_image", "both"):
        partner, found = mine(encoded.clips, gathered.images)
        logit = pairs.clip_to_image_logits(decode, inputs, partner, chunk=options.unit_chunk)
        directions.append(HardPairs(partner, found, logit, varying(jnp.int32(0))))
    return directions


def local_losses(
    model: Rice, options: LossConfig, specs: Any, params: Any, batch: dict[str, Array], key: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Computes the losses of the global batch on one device of the mesh, inside shard_map.

    Returns the unweighted losses by name (icl and, as configured, frame_icl, pmd, pfr) and two counts:
    negatives_missing, hard partners that mining did not find, and busiest_device_units, pair blocks of the device that
    decoded most, both 0 without pmd. All are scalars, losses float32 and counts int32, equal on all devices.
    """
    context = loss_context(model, options, specs, params, key, batch["mask"].shape[0])
    encoded = encode_rows(context, batch)
    product = gather_rows(batch["product"])

    def icl(clips: Array, images: Array) -> tuple[Array, GlobalBatch]:
        gathered = GlobalBatch(gather_rows(images), gather_rows(clips), product)
        if options.icl_form == "sigmoid":
            form = functools.partial(equations.sigmoid_icl_loss, clips, bias=context.params["logit_bias"])
        else:
            form = functools.partial(equations.icl_loss, clips, images)
        scale, same, chunk = context.params["logit_scale"], options.icl_same_product, options.icl_chunk
        return form(gathered, context.global_rows, scale, same_product_is=same, chunk=chunk), gathered

    value, gathered = icl(encoded.clips, encoded.images)
    losses = {"icl": value}
    if options.frame_icl:
        losses["frame_icl"], _ = icl(*encoded.halves)
    missing = blocks = varying(jnp.int32(0))
    if model.decoder is not None:
        positives = decode_positives(context, encoded)
        if options.pmd:
            hard = hard_pairs(context, encoded, positives, gathered)
            pmd = [equations.pmd_loss(positives.logit, h.logit, h.found) for h in hard]
            losses["pmd"] = jnp.mean(jnp.stack(pmd))
            missing = jnp.sum(jnp.stack([jnp.sum(~h.found) for h in hard]))
            blocks = jnp.max(jnp.stack([h.blocks for h in hard]))
        if options.pfr:
            losses["pfr"] = jnp.mean(positives.pfr)
    return mean_over_devices(losses), {
        "negatives_missing": sum_over_devices(missing),
        "busiest_device_units": max_over_devices(blocks),
    }


def make_loss(
    model: Rice, options: LossConfig, mesh: Mesh, specs: Any, *, local: Callable[..., Any] = local_losses
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Returns a function loss(params, batch, key) -> (total, parts) over a global batch on `mesh`, to differentiate.

    `batch` contains frames uint8 [G, N, px, px, 3], mask int32 [G, N], image uint8 [G, px, px, 3] and product int32
    [G]. `total` is the sum of the losses with the weights in `options`; `parts` contains the unweighted losses and the
    counts of local_losses, which `local` replaces in benchmarks. `specs` are the parameters' PartitionSpecs.
    """
    on_device = functools.partial(local, model, options, specs)
    losses = jax.shard_map(on_device, mesh=mesh, in_specs=(specs, P(BATCH), P()), out_specs=(P(), P()))

    def loss(params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        parts, counts = losses(params, {name: batch[name] for name in ("frames", "mask", "image", "product")}, key)
        total = sum(options[name] * value for name, value in parts.items())
        return total, {**parts, **counts}

    return loss
