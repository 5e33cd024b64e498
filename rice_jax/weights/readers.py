"""Reads pretrained weights as parameters: from files of CLIP and of the official RICE, and from this project's runs."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rice_jax.checkpoints.run_folder import is_run
from rice_jax.config import Config
from rice_jax.parallel.devices import find_devices
from rice_jax.parallel.mesh import make_mesh
from rice_jax.retrieval.model import Model, load
from rice_jax.weights import archives, naming
from rice_jax.weights.inspect import Kind, WeightsFile, inspect_weights
from rice_jax.weights.model_config import infer_config

MAX_LISTED_FAULTS = 100
UNUSED = "unused.safetensors"  # in a run's folder


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were read, checked and renamed."""

    kind: Kind
    config: Config  # of their model, locked; fields that the source does not decide have their defaults
    params: dict[str, Any]  # nested dicts of float32 NumPy arrays; only the encoder and the logit scale for CLIP
    unused: dict[str, np.ndarray]  # tensors of the official model that it never reads, by their official names
    notes: tuple[str, ...]  # for the user: what was converted and what was left out


def load_on_one_device(run: Path, step: int | None = None) -> Model:
    """Returns the run's model with its parameters on this host's first device. step: None for the newest undamaged.

    Raises FileNotFoundError if there is no run, checkpoint or such step, ValueError if checkpoint or config is damaged.
    """
    return load(run, step=step, mesh=make_mesh(data=1, fsdp=1, devices=find_devices(local=True)[:1]))


def read_source(path: Path, *, activation: str | None = None, image_size: int | None = None) -> Source:
    """Returns the weights of a file, a folder or a run, with position embeddings resized to `image_size` px if given.

    `activation` is "quick_gelu" or "gelu", ignored for a file that states its own. Raises FileNotFoundError if there is
    no such file or folder, or the run has no checkpoint. Raises ValueError for a damaged file, another kind of model, a
    folder without one clear file, an image size below the patch size, an activation that nothing states, JSON that
    contradicts the tensors, and tensors that are missing, unexpected, of another shape or dtype, or not finite; one
    message lists up to 100 faults.
    """
    if is_run(path):
        run = load_on_one_device(path)
        params, notes = resize_positions(jax.device_get(run.params), run.config, image_size)
        notes = (f"after {run.step} updates of its own", *notes)
        return Source(Kind.RUN, run.config, params, read_unused(path), notes)
    weights = inspect_weights(path)
    config, faults = infer_config(weights, activation)
    tensors = _read_tensors(weights, faults)
    if faults:
        more = [f"and {len(faults) - MAX_LISTED_FAULTS} more"] if len(faults) > MAX_LISTED_FAULTS else []
        listed = "\n  ".join(faults[:MAX_LISTED_FAULTS] + more)
        number = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        raise ValueError(
            f"{weights.path} ({weights.kind}): found {number}, and nothing was converted; correct the file, or what "
            f"lies beside it, or give another:\n  {listed}"
        )
    unused = {name: x for name, x in tensors.items() if naming.find_rule(name, weights.table)[0].path is None}
    tensors = {name: x for name, x in tensors.items() if name not in unused}
    dtypes = ", ".join(sorted({weights.tensors[name].dtype for name in tensors}))
    notes = (*weights.notes, f"{len(tensors)} tensors ({dtypes}) converted to float32")
    if len(tensors) < len(weights.tensors):
        notes += (f"{len(weights.tensors) - len(tensors)} tensors are known and not used",)
    params = naming.convert(tensors, weights.table)
    if weights.kind != Kind.OFFICIAL:  # CLIP's own scale is not used (docs/official.md 2.6)
        params["logit_scale"] = np.asarray(config.model.logit_scale_init, np.float32)
    params, resized = resize_positions(params, config, image_size)
    return Source(weights.kind, config, params, unused, (*notes, *resized))


def _read_tensors(weights: WeightsFile, faults: list[str]) -> dict[str, np.ndarray]:
    """Returns tensors of floating dtypes as float32, unused ones only of the official model, for its exports.

    Tensors without a rule are left out. A text for each that is damaged (left out) or not finite is added to `faults`.
    """
    tensors = {}
    for name, tensor in weights.tensors.items():
        try:
            rule, _ = naming.find_rule(name, weights.table)
        except ValueError:
            continue  # one of the faults already
        if tensor.dtype not in archives.FLOATS or (rule.path is None and weights.kind != Kind.OFFICIAL):
            continue
        try:
            tensors[name] = tensor.read()
        except ValueError as error:
            faults.append(f"{name}: {error}")
            continue
        if not np.isfinite(tensors[name]).all():
            faults.append(f"{name}: contains NaN or infinite numbers")
    return tensors


def read_unused(run: Path) -> dict[str, np.ndarray]:
    """Returns official tensors, float32 by name, kept for exports; {} without a file. Raises ValueError if damaged."""
    try:
        return load_file(run / UNUSED) if (run / UNUSED).exists() else {}
    except SafetensorError as error:
        raise ValueError(
            f"{run / UNUSED}: is damaged ({error}); restore it from a copy, or remove it: it has only tensors that no "
            "model reads, and exports then have new ones in their place."
        ) from error


def resize_positions(
    params: dict[str, Any], config: Config, image_size: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns parameters with position embeddings for an image size in px (None: no change), and () or one note of it.

    The filter is bicubic with anti-aliasing, as in open_clip. A change sets data.image_size and data.resize of `config`
    and leaves `params` as they are.
    Raises ValueError for an image size below the patch size.
    """
    old, patch = config.data.image_size, config.model.patch_size
    if image_size is None or image_size == old:
        return params, ()
    if image_size < patch:
        raise ValueError(f"image size {image_size}: needs at least the patch size, {patch}; give a larger one.")
    positions = jnp.asarray(params["encoder"]["positional_embedding"])
    side, new_side = math.isqrt(len(positions) - 1), image_size // patch
    grid = positions[1:].reshape(side, side, -1)  # without the class token's, which does not change
    grid = jax.image.resize(grid, (new_side, new_side, grid.shape[-1]), "cubic", antialias=True)
    resized = np.concatenate([positions[:1], grid.reshape(new_side**2, -1)], axis=0)
    config.data.resize = round(config.data.resize * image_size / old)
    config.data.image_size = image_size
    patches = f"{side}x{side} patches to {new_side}x{new_side}"
    note = f"position embeddings resized (bicubic) from {patches}: {old} px to {image_size}"
    return params | {"encoder": params["encoder"] | {"positional_embedding": resized}}, (note,)
