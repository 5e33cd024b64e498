"""Weights in the layouts of other programs."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rice_jax.checkpoints.run_folder import write_config
from rice_jax.config import to_json
from rice_jax.models.arrays import MEAN, STD
from rice_jax.retrieval.model import Model
from rice_jax.weights import exports, naming
from rice_jax.weights.inspect import inspect_weights
from rice_jax.weights.readers import read_source, write_safetensors

Tensors = dict[str, np.ndarray]


DECODER = "transformer.transformer"  # as the official code calls it


def check_equal(ours: Any, again: Any, what: str) -> None:
    """ValueError unless two trees of parameters are the same, bit for bit."""
    left, right = naming.flattened(ours), naming.flattened(again)
    wrong = [name for name in left.keys() | right.keys() if not _same(left.get(name), right.get(name))]
    if wrong:
        raise ValueError(
            f"{what} does not read back as it was written ({', '.join(sorted(wrong)[:5])}); the disk may be at fault: "
            "nothing was kept, run the same command again."
        )


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


def sizes(config: Any) -> str:
    c = config.model
    parts = ["encoder", *(["decoder"] if config.loss.pmd or config.loss.pfr else [])]
    heads = f", {c.decoder_heads} decoder heads" if len(parts) > 1 else ""
    return (
        f"{' and '.join(parts)}: patch {c.patch_size}, {config.data.image_size} px, width {c.width}, "
        f"{c.layers} layers, {c.heads} heads, MLP {c.hidden}, embedding {c.embedding}, {c.activation}{heads}"
    )


def official_tensors(m: Model, unused: Tensors) -> Tensors:
    """All tensors of the official checkpoint of this model, by their names (SPEC 3.4, 5.8, 15.1).

    Raises:
      ValueError: parameters that the official code does not have.
    """
    flat = naming.flattened(jax.device_get(m.params))
    untrained = {name: x for name, x in unused.items() if name.startswith((f"{DECODER}.transformer.", f"{DECODER}.po"))}
    embeddings = {name: x for name, x in unused.items() if name.startswith(f"{DECODER}.embeddings.")}
    if m.net.decoder is not None:
        table, kept = naming.OFFICIAL, _embeddings(m, flat) | _of_this_size(m, embeddings)
    elif untrained:  # imported from MovingFashion's ICL alone, whose checkpoint has a decoder that saw no training
        table, kept = naming.OFFICIAL_NO_HEAD, _embeddings(m, flat) | _of_this_size(m, embeddings) | untrained
    else:
        scale = "transformer.logit_scale"  # not used beside norm_s, and there
        table, kept = naming.OFFICIAL_CONTRASTIVE, {scale: unused.get(scale, np.asarray(4.0))}
    foreign = sorted(flat.keys() - {rule.path for rule in table})
    if foreign:
        raise ValueError(
            f"{len(foreign)} parameter(s) have no place in the official code: {', '.join(foreign[:5])}; it "
            "knows CLIP's patch embedding and ICL's softmax only (model.stem_channels empty, loss.icl_form softmax)."
        )
    return {name: np.asarray(x, np.float32) for name, x in (naming.invert(flat, table) | kept).items()}


def _embeddings(m: Model, flat: Tensors) -> Tensors:
    """The decoder's embeddings, which nothing reads, as the official code starts them (SPEC 5.8)."""
    width = m.config.model.width
    return {
        f"{DECODER}.embeddings.class_embedding": np.random.default_rng(m.config.seed).normal(size=width),
        f"{DECODER}.embeddings.position_embedding.weight": flat["encoder/positional_embedding"],
        f"{DECODER}.embeddings.layer_norm.weight": np.ones(width),
        f"{DECODER}.embeddings.layer_norm.bias": np.zeros(width),
    }


def _of_this_size(m: Model, embeddings: Tensors) -> Tensors:
    """Imported ones, but for positions of another image size."""
    tokens = 1 + m.net.encoder.patches
    return {name: x for name, x in embeddings.items() if "position" not in name or len(x) == tokens}


def write_official(m: Model, unused: Tensors, folder: Path) -> None:
    tensors = official_tensors(m, unused)
    write_safetensors(tensors, folder / "model.safetensors")
    _describe_and_read_back(m, tensors, folder)


def write_pth(m: Model, unused: Tensors, folder: Path) -> None:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "--format pth needs torch: pip install 'rice_jax[torch]' (or take --format official)."
        ) from error
    tensors = official_tensors(m, unused)
    # np.array, C: torch shares the memory of what it is given, and ours is read-only and transposed here and there.
    state = {name: torch.from_numpy(np.array(x, order="C")) for name, x in tensors.items()}
    torch.save(state, folder / "rice_final.pth")
    _describe_and_read_back(m, tensors, folder)


def _describe_and_read_back(m: Model, tensors: Tensors, folder: Path) -> None:
    """Our config beside the official names, so that a reader of ours need not guess what no tensor shows."""
    write_config(folder, to_json(m.config))
    check_equal(tensors, {name: tensor.read() for name, tensor in inspect_weights(folder).tensors.items()}, str(folder))
    check_equal(jax.device_get(m.params), read_source(folder).params, str(folder))


def write_huggingface(m: Model, unused: Tensors, folder: Path) -> None:
    """The encoder as CLIPVisionModelWithProjection, with what prepares its pictures."""
    del unused
    c, data = m.config.model, m.config.data
    if c.stem_channels or c.pool != "class_token":
        raise ValueError(
            "--format huggingface: CLIP has no convolutional stem and pools its class token; take --format stablehlo."
        )
    encoder = naming.flattened({"encoder": jax.device_get(m.params["encoder"])})
    write_safetensors(naming.invert(encoder, naming.HUGGING_FACE), folder / "model.safetensors")
    stated = {
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
    (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation(data), indent=2) + "\n")
    again = read_source(folder)
    check_equal(naming.nested(encoder), {"encoder": again.params["encoder"]}, str(folder))


def write_stablehlo(m: Model, unused: Tensors, folder: Path) -> None:
    del unused
    exports.export_programs(m, folder)  # reads back and compares by itself


def preparation(data: Any) -> dict[str, Any]:
    """The config's `data` section as preprocessor_config.json of Hugging Face: what evaluation does to a picture."""
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
