"""The three losses of RICE and their sum over the global batch.

First the equations (arrays in, a number out), then what feeds them on each device of a mesh. Scores, softmax and
means are float32. Letters: B rows of this device, G of the global batch (B = G on one device), N frame slots,
T tokens a picture, D width, E embedding, S = N*T, K candidates.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from rice_jax.losses import pairs
from rice_jax.losses.equations import (
    GlobalBatch,
    icl_loss,
    in_chunks,
    pfr_loss,
    pmd_loss,
    positives_and_ignored,
    sigmoid_icl_loss,
)
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


class Encoded(NamedTuple):
    """What the encoder makes of this device's rows."""

    image_tokens: Float[Array, "B T D"]
    clip_tokens: Float[Array, "B S D"]  # frame-major, padding slots included
    images: Float[Array, "B E"]  # unit vectors
    clips: Float[Array, "B E"]
    halves: tuple[Float[Array, "B E"], Float[Array, "B E"]]  # embeddings of a clip's even and of its odd slots
    key_mask: Bool[Array, "B S"]  # clip tokens of real frames


def encode_rows(model: Rice, options: Any, params: Any, key: Array, batch: dict[str, Array], own: Array) -> Encoded:
    """Every picture of the rows through the shared encoder (SPEC 2), `micro_batch` pictures at a time."""
    mask = batch["mask"]
    n, slots = mask.shape
    pictures = jnp.concatenate([batch["image"][:, None], batch["frames"]], axis=1)
    shown = jnp.concatenate([jnp.ones((n, 1), mask.dtype), mask], axis=1)

    kept = kept_patches(key, own, slots + 1, model.encoder.patches, options.patch_drop) if options.patch_drop else None

    def encode(rows: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        pictures, shown, kept = rows
        return apply(model.encoder, params["encoder"], normalise(pictures, shown), kept)

    flat = jax.tree.map(lambda a: a.reshape(n * (slots + 1), *a.shape[2:]), (pictures, shown, kept))
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


def kept_patches(key: Array, own: Int[Array, " B"], pictures: int, patches: int, drop: float) -> Int[Array, "B n k"]:
    """Random patches that each picture keeps, by its place in the global batch: the same on any mesh."""
    key = jax.random.fold_in(key, 2**32 - 1)  # no image has this position, so no pair has this key (pairs.py)

    def one(row: Array, picture: Array) -> Array:
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, row), picture), patches)
        return order[: max(1, round(patches * (1 - drop)))]

    return jax.vmap(lambda row: jax.vmap(lambda picture: one(row, picture))(jnp.arange(pictures)))(own)


def clip_halves(pooled: Float[Array, "B N E"], mask: Int[Array, "B N"]) -> tuple[Array, Array]:
    """Embeddings of a clip's even and of its odd slots; of a clip of one frame, twice that frame's."""
    slot = jnp.arange(mask.shape[1])[None]
    odd = mask * (slot % 2)
    odd = jnp.where(odd.any(axis=1, keepdims=True), odd, mask)
    return clip_embedding(pooled, mask * (slot % 2 == 0)), clip_embedding(pooled, odd)


class Positives(NamedTuple):
    """What decoding the pairs (image i, clip i) leaves for PMD and PFR: done once for both (SPEC 11, row 13)."""

    logit: Float[Array, " B"]
    keys_values: Float[Array, "B S 2*D"]
    class_token: Float[Array, "B D"]  # of the image, after the decoder's self layer
    pfr: Float[Array, " B"]


def decode_positives(
    model: Rice, options: Any, params: Any, key: Array, rows: tuple[Encoded, Int[Array, " B"]]
) -> Positives:
    encoded, position = rows
    decoder = functools.partial(apply, model.decoder, params["decoder"])
    keys_values = decoder(encoded.clip_tokens, method="keys_values")
    x = decoder(encoded.image_tokens, method="image_tokens")
    scores = decoder(x, keys_values, encoded.key_mask, method="scores")
    weights = jax.nn.softmax(scores[:, :, :1], axis=-1)
    if options.cross_dropout:
        keys = pairs.pair_keys(key, position[:, None], position[:, None])
        weights = pairs.attention_dropout(weights, keys, options.cross_dropout)
    logit = decoder(x[:, :1], weights, keys_values, method="logit")[:, 0]
    pfr = jnp.zeros_like(logit)
    if model.reconstruction is not None:
        coefficients = apply(model.reconstruction, params["reconstruction"], scores, encoded.key_mask)
        pfr = jax.vmap(pfr_loss)(coefficients, encoded.image_tokens, encoded.clip_tokens, encoded.key_mask)
    return Positives(logit, keys_values, x[:, 0], pfr)


class HardPairs(NamedTuple):
    """Each anchor of this device with its hard partners, hardest first."""

    partner: Int[Array, "B k"]  # position in the global batch
    found: Bool[Array, "B k"]  # False: there was none, and its logit means nothing
    logit: Float[Array, "B k"]
    units: Int[Array, ""]  # decoded by this device; 0 where the load is always even


def hard_pairs(
    model: Rice,
    options: Any,
    params: Any,
    key: Array,
    encoded: Encoded,
    positives: Positives,
    everyone: GlobalBatch,
    own: Int[Array, " B"],
) -> list[HardPairs]:
    """Mines and decodes the hard pairs of the global batch (SPEC 4-5), once a direction asked for.

    `own`: this device's rows in the global batch. Neither a row's own partner is hard, nor, if so asked, one that
    shows its product.
    """
    rows = encoded.images.shape[0]

    def mined(anchors: Array, partners: Array) -> tuple[Array, Array]:
        def of(part: tuple[Array, Array]) -> tuple[Array, Array]:
            anchors, own = part
            same = "masked" if options.exclude_same_product else "negative"
            itself, also = positives_and_ignored(own, everyone.product, same)
            return pairs.mine_hard(anchors, partners, itself | also)

        return in_chunks(of, (anchors, own), options.icl_chunk)

    class_tokens = gather_rows(positives.class_token)  # [G, D]: all of the decoder that travels
    cross = {name: part for name, part in params["decoder"].items() if name != "self_layer"}
    context = (encoded.key_mask, first_row(rows), jax.random.key_data(key))

    def decode(cross: Any, x: Array, keys_values: Array, context: Any, image: Array, clip: Array) -> Array:
        key_mask, first, key_data = context
        decoder = functools.partial(apply, model.decoder, cross)
        weights = jax.nn.softmax(decoder(x, keys_values, key_mask[clip], method="scores"), axis=-1)
        if options.cross_dropout:
            where = jnp.broadcast_to((first + clip)[:, None], image.shape)
            keys = pairs.pair_keys(jax.random.wrap_key_data(key_data, impl="threefry2x32"), image, where)
            weights = pairs.attention_dropout(weights, keys, options.cross_dropout)
        return decoder(x, weights, keys_values, method="logit")

    inputs = (decode, cross, class_tokens, positives.keys_values, context)
    directions = []
    if options.mining_direction in ("image_to_clip", "both"):
        hard, found = mined(encoded.images, everyone.clips)
        logits, units = pairs.image_to_clip_logits(
            *inputs, hard, found, slots=options.unit_slots, chunk=options.unit_chunk
        )
        directions.append(HardPairs(hard, found, logits, units))
    if options.mining_direction in ("clip_to_image", "both"):
        hard, found = mined(encoded.clips, everyone.images)
        logits = pairs.clip_to_image_logits(*inputs, hard, chunk=options.unit_chunk)
        directions.append(HardPairs(hard, found, logits, varying(jnp.int32(0))))
    return directions


def local_losses(
    model: Rice, options: Any, specs: Any, params: Any, batch: dict[str, Array], key: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The losses of the global batch on one device of the mesh, inside shard_map: (losses, counts), equal on all."""
    params, key = jax.tree.map(all_gather_parameter, params, specs), varying(key)
    rows = batch["mask"].shape[0]
    own = first_row(rows) + jnp.arange(rows)
    encoded = encode_rows(model, options, params, key, batch, own)
    product = gather_rows(batch["product"])

    def icl(clips: Array, images: Array) -> tuple[Array, GlobalBatch]:
        everyone = GlobalBatch(gather_rows(images), gather_rows(clips), product)
        if options.icl_form == "sigmoid":
            form = functools.partial(sigmoid_icl_loss, clips, everyone, own, bias=params["logit_bias"])
        else:
            form = functools.partial(icl_loss, clips, images, everyone, own)
        same, chunk = options.icl_same_product, options.icl_chunk
        return form(scale=params["logit_scale"], same_product_is=same, chunk=chunk), everyone

    value, everyone = icl(encoded.clips, encoded.images)
    losses = {"icl": value}
    if options.frame_icl:
        losses["frame_icl"], _ = icl(*encoded.halves)
    counts = dict.fromkeys(("negatives_missing", "busiest_device_units"), varying(jnp.int32(0)))
    if model.decoder is not None:
        decode = functools.partial(decode_positives, model, options, params, key)
        positives = in_chunks(decode, (encoded, own), options.pair_chunk)
        if options.pmd:
            hard = hard_pairs(model, options, params, key, encoded, positives, everyone, own)
            losses["pmd"] = jnp.mean(jnp.stack([pmd_loss(positives.logit, h.logit, h.found) for h in hard]))
            counts = {
                "negatives_missing": jnp.sum(jnp.stack([jnp.sum(~h.found) for h in hard])),
                "busiest_device_units": jnp.max(jnp.stack([h.units for h in hard])),
            }
        if options.pfr:
            losses["pfr"] = jnp.mean(positives.pfr)
    return mean_over_devices(losses), {
        "negatives_missing": sum_over_devices(counts["negatives_missing"]),
        "busiest_device_units": max_over_devices(counts["busiest_device_units"]),
    }


def make_loss(
    model: Rice, options: Any, mesh: Mesh, specs: Any, *, local: Callable[..., Any] = local_losses
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """loss(params, batch, key) -> (total, parts) over a global batch on `mesh`. Differentiate it from outside.

    Args:
      options: the config's `loss` section.
      specs: PartitionSpecs of the parameters.
      local: what each device computes; benchmarks put the official formulation here.

    `batch` holds frames uint8 [G,N,px,px,3], mask int32 [G,N], image uint8 [G,px,px,3] and product int32 [G];
    `parts` the unweighted losses and the counts of what mining missed.
    """
    batch_spec = P(BATCH)
    losses = jax.shard_map(
        functools.partial(local, model, options, specs),
        mesh=mesh,
        in_specs=(specs, batch_spec, P()),
        out_specs=(P(), P()),
    )

    def loss(params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        parts, counts = losses(params, {name: batch[name] for name in ("frames", "mask", "image", "product")}, key)
        total = sum(options[name] * value for name, value in parts.items())
        return total, {**parts, **counts}

    return loss
