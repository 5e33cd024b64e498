"""Writes imported weights as a run's folder, and a run in the formats of other programs.

A folder appears when all of it is written, was read back and is equal; after an error there is none.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from data_pipeline.system.output_folder import new_folder
from rice_jax.checkpoints.run_folder import is_run, write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import DataConfig, to_json
from rice_jax.models.arrays import MEAN, STD
from rice_jax.retrieval.model import Model
from rice_jax.training.step import State
from rice_jax.weights import exports, naming
from rice_jax.weights.card import differences_from_official, model_card
from rice_jax.weights.inspect import inspect_weights
from rice_jax.weights.naming import DECODER
from rice_jax.weights.readers import UNUSED, Source, load_on_one_device, read_source, read_unused

Tensors = dict[str, np.ndarray]


def import_weights(path: Path, output: Path, *, activation: str | None = None, image_size: int | None = None) -> Source:
    """Writes what read_source returns as a run at step 0 into `output`, a new or empty folder, and returns it.

    Raises FileNotFoundError if there is nothing at `path`, and ValueError if it is a run, its weights are damaged, of
    another kind or faulty, the image size is below the patch size, `activation` differs from the file's or is stated by
    neither, `output` is not empty, or the written files read back differently.
    """
    if is_run(path):
        raise ValueError(f"{path}: is a run already; give it to rice_jax.load or --config.init_from as it is.")
    with new_folder(output) as folder:
        source = read_source(path, activation=activation, image_size=image_size)
        stated = source.config.model.activation
        if activation not in (None, stated):
            raise ValueError(f"--activation {activation}: the file says {stated}; leave the option out.")
        origin = {"name": path.name, "kind": source.kind, "notes": list(source.notes)}
        state = State(jnp.int32(0), jax.tree.map(jnp.asarray, source.params), {}, {})
        write_config(folder, to_json(source.config))
        with Checkpoints(folder, kept=1) as checkpoints:
            checkpoints.save(0, state, {"source": origin, "config": to_json(source.config)})
        save_unused(source.unused, folder)
        check_equal(source.params, jax.device_get(load_on_one_device(folder).params), str(output))
        check_equal(source.unused, read_unused(folder), str(output))
    return source


def check_equal(written: Any, read: Any, what: str) -> None:
    """Raises ValueError unless two trees have equal paths, shapes and values (any dtype): -0 is 0, NaN is unequal."""
    left, right = naming.flattened(written), naming.flattened(read)
    wrong = left.keys() ^ right.keys()
    wrong |= {name for name in left.keys() & right.keys() if not np.array_equal(left[name], right[name])}
    if wrong:
        raise ValueError(
            f"{what} does not read back as it was written ({', '.join(sorted(wrong)[:5])}); the disk may be at fault: "
            "nothing was kept, run the same command again. If that fails alike, report it as a fault of rice_jax."
        )


def write_safetensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Writes tensors by name as float32 to a safetensors file that everybody may read (mode 644), or replaces it."""
    # Contiguous, because safetensors writes an array's memory and ignores its strides.
    arrays = {name: np.ascontiguousarray(x, np.float32).reshape(np.shape(x)) for name, x in tensors.items()}
    save_file(arrays, path, {"format": "pt"})  # transformers needs this entry
    path.chmod(0o644)


def save_unused(unused: Tensors, run: Path) -> None:
    """Writes official tensors that nothing reads (docs/official.md 5.8) to RUN/unused.safetensors; none: no file."""
    if unused:
        write_safetensors(unused, run / UNUSED)


def official_tensors(model: Model, unused: Tensors) -> Tensors:
    """Returns all tensors of the model's official checkpoint, float32, by name (docs/official.md 3.4, 5.8, 15.1).

    Raises ValueError if the model has parameters that the official code does not have.
    """
    flat = naming.flattened(jax.device_get(model.params))
    decoder = {name: x for name, x in unused.items() if name.startswith((f"{DECODER}.transformer.", f"{DECODER}.po"))}
    if model.net.decoder is not None:
        table, kept = naming.OFFICIAL, _embeddings(model, flat, unused)
    elif decoder:  # imported from ICL alone on MovingFashion; its checkpoint has a decoder that was never trained
        table, kept = naming.OFFICIAL_NO_HEAD, _embeddings(model, flat, unused) | decoder
    else:
        scale = "transformer.logit_scale"  # in the checkpoint beside norm_s, and not used
        table, kept = naming.OFFICIAL_CONTRASTIVE, {scale: unused.get(scale, np.asarray(4.0))}
    foreign = sorted(flat.keys() - {rule.path for rule in table})
    if foreign:
        raise ValueError(
            f"{len(foreign)} parameter(s) have no place in the official code: {', '.join(foreign[:5])}; it "
            "knows CLIP's patch embedding and ICL's softmax only (model.stem_channels empty, loss.icl_form softmax); "
            "take --format stablehlo."
        )
    return {name: np.asarray(x, np.float32) for name, x in (naming.invert(flat, table) | kept).items()}


def _embeddings(model: Model, flat: Tensors, unused: Tensors) -> Tensors:
    """Returns the decoder's 4 unread embeddings by official name: imported, else initial (docs/official.md 5.8)."""
    width, prefix, tokens = model.config.model.width, f"{DECODER}.embeddings.", 1 + model.net.encoder.patches
    new = {
        f"{prefix}class_embedding": np.random.default_rng(model.config.seed).normal(size=width),
        f"{prefix}position_embedding.weight": flat["encoder/positional_embedding"],
        f"{prefix}layer_norm.weight": np.ones(width),
        f"{prefix}layer_norm.bias": np.zeros(width),
    }
    fits = lambda name: "position" not in name or len(unused[name]) == tokens
    return new | {name: x for name, x in unused.items() if name.startswith(prefix) and fits(name)}


def write_official(model: Model, unused: Tensors, folder: Path) -> None:
    tensors = official_tensors(model, unused)
    write_safetensors(tensors, folder / "model.safetensors")
    _write_config_and_read_back(model, tensors, folder)


def write_pth(model: Model, unused: Tensors, folder: Path) -> None:
    """Writes rice_final.pth and config.json. Raises ValueError without torch, or if they cannot hold the model."""
    try:
        import torch
    except ImportError as error:
        message = "--format pth needs torch: pip install 'rice_jax[torch]' (or take --format official)."
        raise ValueError(message) from error
    tensors = official_tensors(model, unused)
    # Copies in C order: torch would share the memory of our arrays, some of which are read-only or transposed.
    state = {name: torch.from_numpy(np.array(x, order="C")) for name, x in tensors.items()}
    torch.save(state, folder / "rice_final.pth")
    _write_config_and_read_back(model, tensors, folder)


def _write_config_and_read_back(model: Model, tensors: Tensors, folder: Path) -> None:
    write_config(folder, to_json(model.config))  # for the heads and activation, which no tensor shows
    check_equal(tensors, {name: tensor.read() for name, tensor in inspect_weights(folder).tensors.items()}, str(folder))
    check_equal(jax.device_get(model.params), read_source(folder).params, str(folder))


def write_huggingface(model: Model, unused: Tensors, folder: Path) -> None:
    """Writes a CLIPVisionModelWithProjection. Raises ValueError for a stem, other pooling, or damage when read back."""
    del unused
    c, data = model.config.model, model.config.data
    if c.stem_channels or c.pool != "class_token":
        raise ValueError(
            "--format huggingface: CLIP has no convolutional stem and pools its class token; take --format stablehlo."
        )
    encoder = naming.flattened({"encoder": jax.device_get(model.params["encoder"])})
    write_safetensors(naming.invert(encoder, naming.HUGGING_FACE), folder / "model.safetensors")
    description = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_channels": 3,
        "image_size": data.image_size,
        "patch_size": c.patch_size,
        "projection_dim": c.embedding,
        "hidden_act": c.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation(data), indent=2) + "\n")
    check_equal(naming.nested(encoder), {"encoder": read_source(folder).params["encoder"]}, str(folder))


def preparation(data: DataConfig) -> dict[str, Any]:
    """Returns the dict of Hugging Face's preprocessor_config.json for what evaluation with `data` does to a picture."""
    stretch = data.resize_mode == "stretch"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": data.resize, "width": data.resize} if stretch else {"shortest_edge": data.resize},
        "resample": 2 if stretch else 3,  # Pillow's bilinear, bicubic
        "do_center_crop": True,
        "crop_size": {"height": data.image_size, "width": data.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


FORMATS = {  # each writes a model, with the run's unused official tensors, into an empty folder and reads it back
    "official": write_official,
    "pth": write_pth,
    "huggingface": write_huggingface,
    "stablehlo": lambda model, unused, folder: exports.export_programs(model, folder),
}


def export_run(run: Path, output: Path, format_name: str, *, step: int | None = None) -> tuple[Model, list[str]]:
    """Writes a run's model and a README.md into `output`, a new or empty folder. Returns the model and user warnings.

    `format_name` is a key of FORMATS, and `step` is a checkpoint's number of updates, None for the newest. Raises
    FileNotFoundError if the run has no checkpoint, or none of that step. Raises ValueError if `run` is no run, its
    checkpoint is damaged, `output` is not empty, the format cannot express the model, the written files read back
    differently, or torch is missing for format "pth"; KeyError for another format.
    """
    if not run.exists():
        raise FileNotFoundError(f"{run}: found nothing there; give a training run or an imported folder.")
    if not is_run(run):
        raise ValueError(
            f"{run}: is neither a training run with checkpoints nor an imported folder; weights of other programs are "
            "imported first (rice_jax.weights import)."
        )
    with new_folder(output) as folder:
        model = load_on_one_device(run, step)
        FORMATS[format_name](model, read_unused(run), folder)
        warnings = differences_from_official(model.config) if format_name in ("official", "pth") else []
        (folder / "README.md").write_text(model_card(model, run, format_name, warnings), encoding="utf-8")
    return model, warnings
