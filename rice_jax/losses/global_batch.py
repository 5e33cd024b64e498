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
from rice_jax.models.vit import Rice, call, clip_embedding, cosines, normalise, unit
from rice_jax.parallel import mesh as sharding

# --- the equations ----------------------------------------------------------------------------------------------------


def icl_logits(
    anchors: Float[Array, "B E"], partners: Float[Array, "G E"], scale: Float[Array, ""]
) -> Float[Array, "B G"]:
    """scale^2 cos (SPEC 3.1): the scale stands on both sides, plain, neither a logarithm nor squared."""
    return jnp.square(scale) * cosines(anchors, partners)


class Everyone(NamedTuple):
    """What a device's rows are compared with: the embeddings of the global batch, and its products."""

    images: Float[Array, "G E"]
    clips: Float[Array, "G E"]
    product: Int[Array, " G"]


def icl_loss(
    clips: Float[Array, "B E"],
    images: Float[Array, "B E"],
    everyone: Everyone,
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
            positive, left_out = relations(own, everyone.product, same_product_is)
            log_p = jax.nn.log_softmax(jnp.where(left_out, -jnp.inf, icl_logits(anchors, partners, scale)), axis=-1)
            return -jnp.sum(jnp.where(positive, log_p, 0), axis=-1) / jnp.sum(positive, axis=-1)

        return jnp.mean(in_chunks(rows, (anchors, own), chunk))

    return (cross_entropy(clips, everyone.images) + cross_entropy(images, everyone.clips)) / 2


def sigmoid_icl_loss(
    clips: Float[Array, "B E"],
    everyone: Everyone,
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
        positive, left_out = relations(own, everyone.product, same_product_is)
        logits = icl_logits(clips, everyone.images, scale) + bias
        return -jnp.sum(jnp.where(left_out, 0, jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))), axis=-1)

    return jnp.mean(in_chunks(rows, (clips, own), chunk))


def relations(
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


def rebuilt(
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
    found = rebuilt(coefficients, clip_tokens, key_mask)
    return jnp.mean(jnp.square(found - target.astype(found.dtype)))


# --- what feeds them --------------------------------------------------------------------------------------------------


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
        return call(model.encoder, params["encoder"], normalise(pictures, shown), kept)

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
    decoder = functools.partial(call, model.decoder, params["decoder"])
    keys_values = decoder(encoded.clip_tokens, method="keys_values")
    x = decoder(encoded.image_tokens, method="image_tokens")
    scores = decoder(x, keys_values, encoded.key_mask, method="scores")
    weights = jax.nn.softmax(scores[:, :, :1], axis=-1)
    if options.cross_dropout:
        keys = pairs.pair_keys(key, position[:, None], position[:, None])
        weights = pairs.dropped(weights, keys, options.cross_dropout)
    logit = decoder(x[:, :1], weights, keys_values, method="logit")[:, 0]
    pfr = jnp.zeros_like(logit)
    if model.reconstruction is not None:
        coefficients = call(model.reconstruction, params["reconstruction"], scores, encoded.key_mask)
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
    everyone: Everyone,
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
            itself, also = relations(own, everyone.product, same)
            return pairs.hardest(anchors, partners, itself | also)

        return in_chunks(of, (anchors, own), options.icl_chunk)

    class_tokens = sharding.gather_rows(positives.class_token)  # [G, D]: all of the decoder that travels
    cross = {name: part for name, part in params["decoder"].items() if name != "self_layer"}
    context = (encoded.key_mask, sharding.first_row(rows), jax.random.key_data(key))

    def decode(cross: Any, x: Array, keys_values: Array, context: Any, image: Array, clip: Array) -> Array:
        key_mask, first, key_data = context
        decoder = functools.partial(call, model.decoder, cross)
        weights = jax.nn.softmax(decoder(x, keys_values, key_mask[clip], method="scores"), axis=-1)
        if options.cross_dropout:
            where = jnp.broadcast_to((first + clip)[:, None], image.shape)
            keys = pairs.pair_keys(jax.random.wrap_key_data(key_data, impl="threefry2x32"), image, where)
            weights = pairs.dropped(weights, keys, options.cross_dropout)
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
        directions.append(HardPairs(hard, found, logits, sharding.varying(jnp.int32(0))))
    return directions


def local_losses(
    model: Rice, options: Any, specs: Any, params: Any, batch: dict[str, Array], key: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The losses of the global batch on one device of the mesh, inside shard_map: (losses, counts), equal on all."""
    params, key = jax.tree.map(sharding.whole, params, specs), sharding.varying(key)
    rows = batch["mask"].shape[0]
    own = sharding.first_row(rows) + jnp.arange(rows)
    encoded = encode_rows(model, options, params, key, batch, own)
    product = sharding.gather_rows(batch["product"])

    def icl(clips: Array, images: Array) -> tuple[Array, Everyone]:
        everyone = Everyone(sharding.gather_rows(images), sharding.gather_rows(clips), product)
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
    counts = dict.fromkeys(("negatives_missing", "busiest_device_units"), sharding.varying(jnp.int32(0)))
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
    return sharding.mean_over_devices(losses), {
        "negatives_missing": sharding.sum_over_devices(counts["negatives_missing"]),
        "busiest_device_units": sharding.max_over_devices(counts["busiest_device_units"]),
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
    batch_spec = sharding.P(sharding.BATCH)
    losses = jax.shard_map(
        functools.partial(local, model, options, specs),
        mesh=mesh,
        in_specs=(specs, batch_spec, sharding.P()),
        out_specs=(sharding.P(), sharding.P()),
    )

    def loss(params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        parts, counts = losses(params, {name: batch[name] for name in ("frames", "mask", "image", "product")}, key)
        total = sum(options[name] * value for name, value in parts.items())
        return total, {**parts, **counts}

    return loss
