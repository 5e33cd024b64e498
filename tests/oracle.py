"""The losses of RICE by their plain definition: one device, every pair through the whole decoder with all its tokens.

Slow and short on purpose: nothing here is shared with the code under test but the network's own layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rice_jax.models.arrays import normalise
from rice_jax.models.rice import Rice


def norm(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def encode(net: Rice, params: Any, batch: dict[str, Any]) -> tuple[jax.Array, ...]:
    """Image tokens [G,T,D], clip tokens [G,N,T,D], image and clip embeddings [G,E]."""
    encoder = lambda x: net.encoder.apply({"params": params["encoder"]}, x)
    count, slots = batch["mask"].shape
    mask = jnp.asarray(batch["mask"])
    image_tokens, image_pooled = encoder(normalise(jnp.asarray(batch["image"])))
    frames = normalise(jnp.asarray(batch["frames"]), mask)
    tokens, pooled = encoder(frames.reshape(count * slots, *frames.shape[2:]))
    pooled = pooled.reshape(count, slots, -1)
    means = [pooled[i, : batch["mask"][i].sum()].mean(axis=0) for i in range(count)]
    return image_tokens, tokens.reshape(count, slots, *tokens.shape[1:]), norm(image_pooled), norm(jnp.stack(means))


def sigmoid_icl(images: jax.Array, clips: jax.Array, params: Any, product: np.ndarray, same_product_is: str) -> Any:
    """SigLIP's loss, pair by pair."""
    count = len(product)
    right, counted = np.eye(count), np.ones((count, count))
    for i in range(count):
        for j in range(count):
            if i != j and product[i] == product[j]:
                right[i, j] = same_product_is == "positive"
                counted[i, j] = same_product_is != "masked"
    logits = params["logit_scale"] ** 2 * jnp.matmul(clips, images.T, precision="highest") + params["logit_bias"]
    return jnp.sum(counted * jnp.logaddexp(0.0, jnp.where(right, -logits, logits))) / count


def icl(images: jax.Array, clips: jax.Array, params: Any, product: np.ndarray, options: Any) -> jax.Array:
    if options.icl_form == "sigmoid":
        return sigmoid_icl(images, clips, params, product, options.icl_same_product)
    scale, same_product_is = params["logit_scale"], options.icl_same_product
    count = len(product)
    positives = {i: [i] for i in range(count)}
    counted = {i: list(range(count)) for i in range(count)}
    for i in range(count):
        mates = [j for j in range(count) if product[j] == product[i] and j != i]
        if same_product_is == "positive":
            positives[i] += mates
        if same_product_is == "masked":
            counted[i] = [j for j in range(count) if j not in mates]
    share, hidden = np.zeros((count, count), np.float32), np.full((count, count), -np.inf, np.float32)
    for i in range(count):
        share[i, positives[i]] = 1 / len(positives[i])
        hidden[i, counted[i]] = 0
    total = 0.0
    for anchors, partners in ((images, clips), (clips, images)):
        logits = scale * scale * jnp.matmul(anchors, partners.T, precision="highest")
        z = jax.nn.logsumexp(logits + hidden, axis=1)
        total += jnp.sum(share * (z[:, None] - logits))
    return total / (2 * count)


def frame_icl(net: Rice, options: Any, params: Any, batch: dict[str, Any]) -> jax.Array:
    """ICL between the means of each clip's even and of its odd frames; a clip of one frame meets itself."""
    mask = np.asarray(batch["mask"])
    frames = normalise(jnp.asarray(batch["frames"]), jnp.asarray(mask))
    pooled = jax.vmap(lambda x: net.encoder.apply({"params": params["encoder"]}, x)[1])(frames)
    even, odd = [], []
    for i, count in enumerate(mask.sum(axis=1).tolist()):
        even.append(pooled[i, 0:count:2].mean(axis=0))
        odd.append(pooled[i, 1:count:2].mean(axis=0) if count > 1 else pooled[i, 0])
    halves = norm(jnp.stack(even)), norm(jnp.stack(odd))
    return icl(halves[1], halves[0], params, np.asarray(batch["product"]), options)


def hardest(anchors: np.ndarray, partners: np.ndarray, product: np.ndarray, exclude: bool) -> list[list[int]]:
    out = []
    for i, anchor in enumerate(anchors):
        order = np.argsort(-(partners.astype(np.float64) @ anchor.astype(np.float64)), kind="stable").tolist()
        out.append([j for j in order if j != i and not (exclude and product[j] == product[i])][:3])
    return out


def match_logit(
    net: Rice, params: Any, image: jax.Array, clip: jax.Array, key_mask: jax.Array, key: Any, rate: float
) -> Any:
    """Logit and scores of one pair: all T tokens of the image, the whole decoder, dropout drawn from the pair's key."""
    decoder = lambda *a, method: net.decoder.apply({"params": params["decoder"]}, *(v[None] for v in a), method=method)[
        0
    ]
    x, keys_values = decoder(image, method="image_tokens"), decoder(clip, method="keys_values")
    scores = decoder(x, keys_values, key_mask, method="scores")
    weights = jax.nn.softmax(scores, axis=-1)
    if rate:
        keep = jax.random.bernoulli(key, 1 - rate, (weights.shape[0], weights.shape[2]))
        weights = weights.at[:, 0].set(jnp.where(keep, weights[:, 0] / (1 - rate), 0))
    return decoder(x, weights, keys_values, method="logit")[0], scores


def mine(net: Rice, options: Any, params: Any, batch: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The hard partners of every anchor, by direction."""
    images, clips = map(np.asarray, jax.jit(lambda p: encode(net, p, batch)[2:])(params))
    product = np.asarray(batch["product"])
    both = {"image_to_clip": (images, clips), "clip_to_image": (clips, images)}
    wanted = both if options.mining_direction == "both" else [options.mining_direction]
    return {name: hardest(*both[name], product, options.exclude_same_product) for name in wanted}


def losses(
    net: Rice, options: Any, params: Any, batch: dict[str, Any], key: Any, mined: dict[str, list[list[int]]]
) -> dict[str, jax.Array]:
    """ICL, PMD and PFR of the batch for the hard partners that `mine` found; can be jitted."""
    image_tokens, clip_tokens, images, clips = encode(net, params, batch)
    count, slots, tokens, width = clip_tokens.shape
    product = np.asarray(batch["product"])
    out = {"icl": icl(images, clips, params, product, options)}
    if options.frame_icl:
        out["frame_icl"] = frame_icl(net, options, params, batch)
    clip_tokens = clip_tokens.reshape(count, slots * tokens, width)
    key_mask = jnp.repeat(jnp.asarray(batch["mask"]) > 0, tokens, axis=1)
    call = jax.vmap(
        lambda i, j: match_logit(
            net,
            params,
            image_tokens[i],
            clip_tokens[j],
            key_mask[j],
            jax.random.fold_in(jax.random.fold_in(key, i), j),
            options.cross_dropout,
        )
    )
    own = jnp.arange(count)
    positive, scores = call(own, own)
    directions = []
    for direction, hard in mined.items():
        anchor = jnp.array([i for i, row in enumerate(hard) for _ in row], jnp.int32)
        partner = jnp.array([j for row in hard for j in row], jnp.int32)
        logits = call(anchor, partner)[0] if direction == "image_to_clip" else call(partner, anchor)[0]
        rank = np.array([k for row in hard for k in range(len(row))])
        candidates = jnp.full((count, 4), -jnp.inf).at[:, 0].set(positive).at[anchor, 1 + rank].set(logits)
        directions.append(jnp.mean(jax.nn.logsumexp(candidates, axis=1) - positive))
    if options.pmd:
        out["pmd"] = sum(directions) / len(directions)
    if options.pfr:
        out["pfr"] = pfr(net, options, params, scores, image_tokens, clip_tokens, key_mask)
    return out


def shares(x: jax.Array, allowed: jax.Array) -> jax.Array:
    """exp(x) over its sum along the last axis, of those allowed; the largest is taken off first."""
    largest = jax.lax.stop_gradient(jnp.where(allowed, x, -jnp.inf).max(axis=-1, keepdims=True))
    weight = jnp.where(allowed, jnp.exp(jnp.where(allowed, x - largest, 0)), 0)
    return weight / weight.sum(axis=-1, keepdims=True)


def pfr(net: Rice, options: Any, params: Any, scores: Any, image_tokens: Any, clip_tokens: Any, key_mask: Any) -> Any:
    """The PFR loss of docs/official.md 6, with the options of docs/official.md 11, rows 1, 2 and 29."""
    rec, heads = params["reconstruction"], net.decoder.heads
    real = jnp.broadcast_to(key_mask[:, None, None, :], scores.shape)
    attention = jnp.where(real, scores, 0) if options.pfr_attention == "score" else shares(scores, real)
    if options.pfr_attention == "prob_scaled":
        attention = attention * (net.decoder.width / heads) ** 0.5
    hidden = [
        jax.nn.relu(sum(rec["conv1_kernel"][h, k] * attention[:, h] for h in range(heads)) + rec["conv1_bias"][k])
        for k in range(rec["conv1_kernel"].shape[1])
    ]
    mixed = jax.nn.relu(sum(w * x for w, x in zip(rec["conv2_kernel"], hidden, strict=True)) + rec["conv2_bias"][0])
    first = 0 if options.pfr_with_class_token else 1  # of a picture's tokens
    tokens = image_tokens.shape[1]
    allowed = jnp.broadcast_to((jnp.arange(scores.shape[3]) % tokens >= first)[None], key_mask.shape)
    if options.pfr_mask_padding:
        allowed = allowed & key_mask
    weight = shares(mixed, jnp.broadcast_to(allowed[:, None], mixed.shape))
    sources, target = jax.lax.stop_gradient((jnp.where(key_mask[:, :, None], clip_tokens, 0), image_tokens))
    return jnp.mean((jnp.einsum("nts,nsd->ntd", weight, sources) - target)[:, first:] ** 2)
