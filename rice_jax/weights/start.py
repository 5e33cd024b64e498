"""Starts a new run from pretrained weights."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rice_jax.config import Config
from rice_jax.parallel import hosts
from rice_jax.training.step import State
from rice_jax.weights import naming
from rice_jax.weights.inspect import Kind
from rice_jax.weights.readers import Source, read_source
from rice_jax.weights.writers import save_unused

ENCODER_FIELDS = (  # of config.model, which must be the same in the source and in the new run
    "patch_size", "stem_channels", "stem_blocks", "pool", "width", "layers", "heads", "hidden", "embedding",
    "activation",
)  # fmt: skip


def initialise(state: State, config: Config, workdir: Path) -> tuple[State, list[str]]:
    """Returns a new run's state with the weights of config.init_from in place of random ones, and notes for the user.

    The encoder always comes from there, and the decoder and its heads come from there if it has them (PFR's only with
    the same decoder_heads). If not, the decoder's two layers start as the encoder's last two blocks, as in the official
    code (docs/official.md 5.8). CLIP's logit scale is not taken. The average, if the state has one, starts as a copy of
    the parameters. The official model's unused tensors are written to the workdir. Raises FileNotFoundError if there is
    nothing at init_from, or a run without checkpoint, and ValueError if its weights are damaged or of another kind,
    the model there differs from the config's (all fields named) or the processes of the run read different weights.
    """
    source = read_source(Path(config.init_from), activation=config.model.activation, image_size=config.data.image_size)
    if jax.process_count() > 1:
        sha = hashlib.sha256()
        for path, array in sorted(naming.flattened(source.params).items()):
            sha.update(f"{path} {array.shape} ".encode() + np.ascontiguousarray(array, np.float32).tobytes())
        hosts.agree({"weights of init_from": sha.hexdigest()[:16]})
    started = _with_weights(state, source, config)
    if hosts.is_first():
        save_unused(source.unused, workdir)
    return started


def _with_weights(state: State, source: Source, config: Config) -> tuple[State, list[str]]:
    old, new = naming.flattened(state.params), naming.flattened(source.params)
    has_decoder = any(path.startswith("decoder/") for path in old)
    copies_blocks = has_decoder and "decoder" not in source.params
    _check_fields(source, config, copies_blocks)
    theirs, ours = source.config.model.decoder_heads, config.model.decoder_heads
    notes = [f"starts from {config.init_from} ({source.kind}): {'; '.join(source.notes)}"]
    if source.kind not in (Kind.OFFICIAL, Kind.RUN):
        del new["logit_scale"]
    if copies_blocks:
        prefix = "encoder/resblocks/"
        stacks = {path.removeprefix(prefix): stack for path, stack in new.items() if path.startswith(prefix)}
        for name, layer in (("self_layer", -2), ("cross_layer", -1)):
            new |= {f"decoder/{name}/{path}": stack[layer] for path, stack in stacks.items()}
        notes.append("the decoder's layers start as the encoder's last two blocks, its pooler and heads anew")
    elif has_decoder and theirs != ours:
        new = {path: array for path, array in new.items() if not path.startswith("reconstruction/")}
        notes.append(f"the rec head of PFR starts anew: model.decoder_heads is {theirs} there, {ours} here")
    elif "reconstruction/conv1_kernel" in old.keys() - new.keys():
        notes.append("the rec head of PFR starts anew: there is none there")

    def put(like: Any, array: np.ndarray) -> Any:
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.asarray(array[index]))

    params = naming.nested({path: put(x, new[path]) if path in new else x for path, x in old.items()})
    average = jax.tree.map(jnp.copy, params) if state.average else {}
    return state._replace(params=params, average=average), notes


def _check_fields(source: Source, config: Config, copies_blocks: bool) -> None:
    theirs, ours = source.config.model, config.model
    names = [name for name in ENCODER_FIELDS if theirs[name] != ours[name]]
    differ = [f"model.{name}: {theirs[name]!r} there, {ours[name]!r} here" for name in names]
    if copies_blocks and ours.layers < 2:
        differ.append("model.layers: 1 here, needs at least 2, because the decoder starts as the last two blocks")
    if differ:
        raise ValueError(
            f"init_from={config.init_from} is not the config's model; set these fields as they are there, or give "
            "other weights:\n  " + "\n  ".join(differ)
        )
