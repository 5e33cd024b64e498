"""Golden files of the official code as our model, parameters and batch; nothing here knows their sizes or names.

tests/golden/README.md is the format. A file may hold fewer arrays than it lists.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from rice_jax.losses.equations import GlobalBatch, icl_logits, reconstruct
from rice_jax.losses.global_batch import decode_positives, encode_rows, hard_pairs, loss_context, make_loss
from rice_jax.models.arrays import apply, cosines
from rice_jax.models.decoder import MatchingDecoder
from rice_jax.models.rice import Rice, build_model
from rice_jax.parallel.mesh import BATCH, P, gather_rows, make_mesh, parameter_specs, path_name
from rice_jax.weights import naming

DECODER = "transformer.transformer.transformer.layers"
REC = "transformer.heads.rec.0.weight"


def loss_options(**changes: Any) -> Any:
    """The config's loss section, without dropout, as the golden figures were made."""
    options = default.get_config().loss
    options.unlock()
    options.cross_dropout = 0.0
    options.update(changes)
    return options


def one_device() -> jax.sharding.Mesh:
    return make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])


def mesh_of(data: int, fsdp: int) -> jax.sharding.Mesh:
    return make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])


@dataclasses.dataclass
class Golden:
    name: str
    arrays: dict[str, np.ndarray]
    table: naming.Table
    config: Any  # the defaults, which are the official recipe, with the file's sizes
    net: Rice
    params: Any
    batch: dict[str, jax.Array]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}

    def as_parameters(self, prefix: str) -> Any:
        """A group of arrays in official names as our tree; what the file does not hold is zero."""
        zeros = {name: np.zeros_like(array) for name, array in self.group("param/").items()}
        return naming.convert({**zeros, **self.group(prefix)}, self.table)

    def loss(self, mesh: jax.sharding.Mesh | None = None, **options: Any) -> Any:
        mesh = mesh or one_device()
        return make_loss(self.net, loss_options(**options), mesh, parameter_specs(self.params, mesh))


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@functools.cache
def load(path: Path) -> Golden:
    """A golden file; sizes are read off its arrays, heads of the encoder are D/64, of the decoder rec's inputs.

    Raises:
      ValueError: a decoder of more than one pair of layers, or tensors that are not of the official model.
    """
    arrays = read(path)
    tensors = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
    deeper = sorted(name for name in tensors if name.startswith(f"{DECODER}.") and name.split(".")[4] not in "01")
    if deeper:
        raise ValueError(f"{path.name}: {deeper[0]} belongs to a second pair of decoder layers; ours has one.")
    table = table_of(tensors)
    try:
        params = jax.tree.map(jnp.asarray, naming.convert(tensors, table))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    images = arrays["in/image"].transpose(0, 2, 3, 1)
    batch = {
        "image": images,
        "frames": arrays["in/video"].transpose(0, 1, 3, 4, 2),
        "mask": arrays["in/video_temporal_mask"].astype(np.int32),
        "product": np.arange(len(images), dtype=np.int32),
        "index": np.arange(len(images), dtype=np.int32),
    }
    config = config_of(params, images.shape[1], tensors)
    return Golden(path.name, arrays, table, config, build_model(config), params, jax.tree.map(jnp.asarray, batch))


def table_of(tensors: dict[str, np.ndarray]) -> naming.Table:
    """By the head type that the official model has (docs/official.md 3.4)."""
    if "transformer.contrastive_norm.norm_s" in tensors:
        return naming.OFFICIAL_CONTRASTIVE
    bare = any(name.startswith(f"{DECODER}.") for name in tensors) and "transformer.heads.vim.weight" not in tensors
    return naming.OFFICIAL_NO_HEAD if bare else naming.OFFICIAL


def config_of(params: Any, image_size: int, tensors: dict[str, np.ndarray]) -> Any:
    config = default.get_config()
    config.loss.cross_dropout = 0.0
    config.data.image_size = image_size
    encoder, c = params["encoder"], config.model
    c.patch_size, _, _, c.width = encoder["conv1"]["kernel"].shape
    c.layers, c.hidden = encoder["resblocks"]["mlp"]["c_fc"]["bias"].shape
    c.embedding = encoder["proj"].shape[1]
    c.heads = max(1, c.width // 64)
    c.decoder_heads = tensors[REC].shape[1] if REC in tensors else default.get_config().model.decoder_heads
    config.loss.pmd, config.loss.pfr = float("decoder" in params), float("reconstruction" in params)
    return config


def gaps(ours: Any, theirs: Any) -> dict[str, float]:
    """Per official tensor, layers apart: the largest difference over the largest entry (docs/official.md 13.3)."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    out = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        name = path_name(path)
        layers = [(f"{name}[{k}]", a[k], b[k]) for k in range(len(a))] if "resblocks" in name else [(name, a, b)]
        out.update({name: gap(a, b) for name, a, b in layers})
    return out


def gap(ours: Any, theirs: Any) -> float:
    """The largest difference over the largest entry; one that is not finite is infinite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")


# --- what the model computes on a file --------------------------------------------------------------------------------


@functools.cache
def forward(path: Path) -> dict[str, np.ndarray]:
    """Everything under `out/` that our model has, by the format's names and with all examples."""
    golden = load(path)
    return jax.device_get(_forward(golden)(golden.params, golden.batch))


def mined(golden: Golden, params: Any) -> np.ndarray:
    """The clips that training mines for each image, [B, 3]."""
    return np.asarray(_forward(golden)(params, golden.batch)["pmd_negative_clips"])


_COMPILED: dict[str, Any] = {}


def _forward(golden: Golden) -> Any:
    return _COMPILED.setdefault(golden.name, jax.jit(functools.partial(_outputs, golden)))


def _outputs(golden: Golden, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    out = _encoded(golden, params, batch)
    trained = _trained(golden)(params, batch)
    if golden.net.decoder is not None:
        out |= _decoded(golden, params, batch, out, trained["pmd_negative_clips"])
    return out | trained


def _encoded(golden: Golden, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Tokens and pooled vectors of every picture as the file holds it, padding slots included."""
    encode = functools.partial(apply, golden.net.encoder, params["encoder"])
    image_tokens, image_pooled = encode(batch["image"])
    count, slots = batch["mask"].shape
    tokens, pooled = encode(batch["frames"].reshape(count * slots, *batch["frames"].shape[2:]))
    return {
        "image_tokens": image_tokens,
        "video_tokens": tokens.reshape(count, -1, tokens.shape[-1]),
        "image_pooled": image_pooled,
        "video_pooled": pooled.reshape(count, slots, -1),
    }


def _trained(golden: Golden) -> Any:
    """What training computes on the way to its losses: embeddings, both kinds of logits, mined clips."""
    net, options, mesh = golden.net, golden.config.loss, one_device()
    specs = parameter_specs(golden.params, mesh)

    def local(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        context = loss_context(net, options, specs, params, jax.random.key(0), len(batch["mask"]))
        encoded = encode_rows(context, batch)
        gathered = GlobalBatch(*map(gather_rows, (encoded.images, encoded.clips, batch["product"])))
        out = {
            "image_embedding": encoded.images,
            "video_embedding": encoded.clips,
            "icl_logits_clip_to_image": icl_logits(encoded.clips, gathered.images, params["logit_scale"]),
            "pmd_similarity_image_by_clip": cosines(encoded.images, gathered.clips),
        }
        if net.decoder is None:
            return out
        positives = decode_positives(context, encoded)
        (hard,) = hard_pairs(context, encoded, positives, gathered)
        logits = jnp.concatenate([positives.logit[:, None], hard.logit], axis=1)
        return out | {"pmd_negative_clips": hard.partner, "pmd_logits": logits}

    return jax.shard_map(local, mesh=mesh, in_specs=(specs, P(BATCH)), out_specs=P(BATCH))


def _decoded(
    golden: Golden, params: Any, batch: dict[str, jax.Array], encoded: dict[str, jax.Array], hard: jax.Array
) -> dict[str, jax.Array]:
    """What only the whole decoder shows: all T queries of the image, for the positive clip and for each hard one."""
    decoder = functools.partial(apply, golden.net.decoder, params["decoder"])
    images, clips = encoded["image_tokens"], encoded["video_tokens"]
    key_mask = jnp.repeat(batch["mask"] > 0, images.shape[1], axis=1)
    x = decoder(images, method="image_tokens")

    def pair(clip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores and output for images 0, 1, ... with one clip each."""
        keys_values = decoder(clips[clip], method="keys_values")
        scores = decoder(x, keys_values, key_mask[clip], method="scores")
        return scores, decoder(x, jax.nn.softmax(scores, axis=-1), keys_values, method="cross_tokens")

    def self_attention(module: MatchingDecoder) -> jax.Array:
        attn = module.self_layer.attn
        q, k, _ = jnp.split(attn.project(module.self_layer.ln_1(images), 0, 3), 3, axis=-1)
        return jax.nn.softmax(attn.scores(q, k), axis=-1).mean(axis=1)

    own = jnp.arange(len(images))
    scores, whole = pair(own)
    candidates = [whole, *(pair(hard[:, k])[1] for k in range(hard.shape[1]))]
    out = {
        "pmd_self_attention_out_positive": x,
        "decoder_self_attention_mean_map": golden.net.decoder.apply(
            {"params": params["decoder"]}, method=self_attention
        ),
        "decoder_out_positive": whole,
        "pmd_pooled": jnp.stack([decoder(y[:, :1], method="pooled")[:, 0] for y in candidates], axis=1),
    }
    if golden.net.reconstruction is not None:
        read = functools.partial(apply, golden.net.reconstruction, params["reconstruction"])
        out["pfr_attention_in"] = read(scores, key_mask, method="read")
        out["pfr_conv_out"] = read(out["pfr_attention_in"], method="mix")
        out["pfr_coefficients"] = read(scores, key_mask)
        out["pfr_reconstruction"] = reconstruct(out["pfr_coefficients"], clips, key_mask)
    return out
