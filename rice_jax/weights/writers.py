"""Writes a model in the formats of other programs, and reads each file back to compare it.

A function of FORMATS takes a model, the run's unused official tensors and an empty folder. It raises ValueError for a
model that the format cannot express, and if the files do not read back as they were written.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rice_jax.checkpoints.run_folder import write_config
from rice_jax.config import DataConfig, to_json
from rice_jax.models.arrays import MEAN, STD
from rice_jax.retrieval.model import Model
from rice_jax.weights import exports, naming
from rice_jax.weights.inspect import inspect_weights
from rice_jax.weights.naming import DECODER
from rice_jax.weights.readers import read_source
from rice_jax.weights.tensor_files import write_safetensors

Tensors = dict[str, np.ndarray]


def check_equal(written: Any, read: Any, what: str) -> None:
    """Raises ValueError unless two trees of parameters have the same paths and the same values, bit for bit."""
    left, right = naming.flattened(written), naming.flattened(read)
    wrong = left.keys() ^ right.keys()
    wrong |= {name for name in left.keys() & right.keys() if not np.array_equal(left[name], right[name])}
    if wrong:
        raise ValueError(
            f"{what} does not read back as it was written ({', '.join(sorted(wrong)[:5])}); the disk may be at fault: "
            "nothing was kept, run the same command again."
        )


def official_tensors(model: Model, unused: Tensors) -> Tensors:
    """Returns all tensors of the model's official checkpoint, float32, by name (docs/official.md 3.4, 5.8, 15.1).

    Args:
      unused: the official tensors that the run keeps for its exports.

    Raises:
      ValueError: the model has parameters that the official code does not have.
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
            "knows CLIP's patch embedding and ICL's softmax only (model.stem_channels empty, loss.icl_form softmax)."
        )
    return {name: np.asarray(x, np.float32) for name, x in (naming.invert(flat, table) | kept).items()}


def _embeddings(model: Model, flat: Tensors, unused: Tensors) -> Tensors:
    """Returns the decoder's embeddings, which nothing reads (docs/official.md 5.8).

    They are the imported ones, if the run has them for this image size, and else start as in the official code.
    """
    width, prefix, tokens = model.config.model.width, f"{DECODER}.embeddings.", 1 + model.net.encoder.patches
    new = {
        f"{prefix}class_embedding": np.random.default_rng(model.config.seed).normal(size=width),
        f"{prefix}position_embedding.weight": flat["encoder/positional_embedding"],
        f"{prefix}layer_norm.weight": np.ones(width),
        f"{prefix}layer_norm.bias": np.zeros(width),
    }
    imported = {name: x for name, x in unused.items() if name.startswith(prefix)}
    return new | {name: x for name, x in imported.items() if "position" not in name or len(x) == tokens}


def write_official(model: Model, unused: Tensors, folder: Path) -> None:
    tensors = official_tensors(model, unused)
    write_safetensors(tensors, folder / "model.safetensors")
    _write_config_and_read_back(model, tensors, folder)


def write_pth(model: Model, unused: Tensors, folder: Path) -> None:
    """Writes as torch.save of a state dict. Raises ValueError also if torch is not installed."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "--format pth needs torch: pip install 'rice_jax[torch]' (or take --format official)."
        ) from error
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
    """Writes the encoder as a CLIPVisionModelWithProjection, and the preparation of its pictures."""
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


def write_stablehlo(model: Model, unused: Tensors, folder: Path) -> None:
    del unused
    exports.export_programs(model, folder)


def preparation(data: DataConfig) -> dict[str, Any]:
    """Returns preprocessor_config.json of Hugging Face for what evaluation does to a picture, as `data` states it."""
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


FORMATS = {
    "official": write_official,
    "pth": write_pth,
    "huggingface": write_huggingface,
    "stablehlo": write_stablehlo,
}
