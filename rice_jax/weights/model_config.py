"""Infers the config of the model in a file of weights, and lists the file's faults.

Sizes follow from the tensors' shapes. The number of heads and the activation, which no tensor shows, come from the JSON
beside the file (docs/official.md 15). The tensors' values are not read.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import default
from rice_jax.config import Config, from_json
from rice_jax.models.arrays import MEAN, STD
from rice_jax.models.rice import build_model
from rice_jax.models.vit import ACTIVATIONS
from rice_jax.training.step import init_params
from rice_jax.weights import archives, naming
from rice_jax.weights.files import read_json
from rice_jax.weights.inspect import Kind, WeightsFile

JSON = "the JSON beside the file"


class StatedModel(NamedTuple):
    """The facts that the JSON beside a file states."""

    sizes: Mapping[str, Any]  # of fields of config.model, and image_size
    activation: str | None  # None: not stated
    settings: tuple[tuple[str, Any, Any], ...] = ()  # name, value, and the only value that our model can have
    pixel_statistics: tuple[Any, Any] = (None, None)  # mean and standard deviation; None: not stated


def infer_config(weights: WeightsFile, activation: str | None = None) -> tuple[Config, list[str]]:
    """Returns the config of the model in a file and a text for each fault of the file.

    Sizes, activation, resizing and the weights of PMD and PFR (0 or 1) follow from the file, other fields are defaults;
    in an export of ours they are its config.json's. `activation` counts only if the file states none; without either it
    is quick_gelu, and a fault. Other faults: tensors that are missing, unexpected, or of another shape or dtype than
    the model's; JSON that contradicts the tensors or describes a model that ours cannot be. Raises ValueError if the
    JSON beside the file describes no model that is known here.
    """
    try:
        config, faults = _config_and_faults(weights, activation)
    except (ValueError, AttributeError, TypeError, KeyError, ZeroDivisionError) as error:
        if not weights.description:
            raise
        if weights.kind == Kind.OFFICIAL and isinstance(error, ValueError):  # our own config, of another version
            raise ValueError(f"{weights.path.parent / 'config.json'}: {error}") from error
        raise ValueError(
            f"{weights.path.parent}: the JSON beside {weights.path.name} describes no model that is known here "
            f"({type(error).__name__}: {error}); fetch it again."
        ) from error
    return config, faults + _tensor_faults(weights, config)


def _config_and_faults(weights: WeightsFile, activation: str | None) -> tuple[Config, list[str]]:
    is_export = weights.kind == Kind.OFFICIAL and weights.description
    exported = from_json(json.dumps(weights.description)) if is_export else None
    stated = _stated_model(weights, exported)
    sizes, faults = _sizes_of_tensors(weights), _faults_of_json(stated)
    for name, value in stated.sizes.items():
        if not _is_count(value):
            continue
        if name == "image_size" and value // sizes["patch_size"] == sizes[name] // sizes["patch_size"]:
            sizes[name] = value  # with pixels at the border that fill no patch
        elif sizes.setdefault(name, value) != value:
            faults.append(f"{name}: {JSON} says {value}, the tensors {sizes[name]}")
    sizes.setdefault("heads", max(1, sizes["width"] // 64))
    sizes.setdefault("decoder_heads", 8 if sizes["width"] % 8 == 0 else sizes["heads"])
    for heads in ("heads", "decoder_heads"):
        if sizes["width"] % sizes[heads]:
            faults.append(f"{heads}: {sizes[heads]} do not divide the width {sizes['width']}")
            sizes[heads] = 1
    if stated.activation is not None:
        activation = stated.activation if stated.activation in ACTIVATIONS else "quick_gelu"
    elif activation is None:
        faults.append(
            "activation: the file does not say; import it with --activation quick_gelu (OpenAI's weights, and models "
            "named -quickgelu) or --activation gelu (most others of open_clip)"
        )

    config = _default_config(weights) if exported is None else exported
    config.init_from = ""
    image_size = sizes.pop("image_size")
    config.data.resize = round(config.data.resize * image_size / config.data.image_size)
    config.data.image_size = image_size
    config.model.update(sizes | {"activation": activation or "quick_gelu"})
    return config, faults


def _default_config(weights: WeightsFile) -> Config:
    """Returns defaults but for loss.pmd and loss.pfr (0 or 1), CLIP's resizing and ICL's logit_scale_lr_multiplier."""
    config = default.get_config()
    if weights.kind != Kind.OFFICIAL:  # CLIP was trained on pictures of this shorter side, resized by a bicubic filter
        config.data.resize, config.data.resize_mode = config.data.image_size, "keep_ratio"
    pfr = any(name.startswith("transformer.heads.rec.") for name in weights.tensors)
    config.loss.pfr = float(pfr)
    config.loss.pmd = float(pfr or "transformer.heads.vim.weight" in weights.tensors)
    if weights.table is naming.OFFICIAL_CONTRASTIVE:
        config.optimizer.logit_scale_lr_multiplier = 100.0  # docs/official.md 3.4
    return config


# --- Tensors ---


def _sizes_of_tensors(weights: WeightsFile) -> dict[str, int]:
    """Returns sizes by field, as tensors show them, else defaults (width 64); decoder_heads with a rec head only."""
    shapes, layers = dict[str, tuple[int, ...]](), set[str]()
    for name, tensor in weights.tensors.items():
        try:
            rule, match = naming.find_rule(name, weights.table)
        except ValueError:
            continue
        if rule.path is not None:
            shapes.setdefault(rule.path, tensor.shape)
            if match.groups():
                layers.add(match[1])

    def length(path: str, axis: int = 0) -> int:
        shape = shapes.get(path, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    vectors = (length(f"encoder/{name}") for name in ("class_embedding", "ln_pre/scale", "ln_post/scale"))
    width = next((size for size in vectors if size), 64)
    # The side of proj that is not the width: so a transposed proj has a wrong shape rather than another size.
    sides = [side for side in shapes.get("encoder/proj", ()) if side != width]
    patch = length("encoder/conv1/kernel", -1) or 1
    heads = length("reconstruction/conv1_kernel", 1)
    return {
        "width": width,
        "patch_size": patch,
        "image_size": max(1, math.isqrt(max(0, length("encoder/positional_embedding") - 1))) * patch,
        "layers": max(1, len(layers)),
        "hidden": length("encoder/resblocks/mlp/c_fc/bias") or 4 * width,
        "embedding": sides[0] if sides else width,
    } | ({"decoder_heads": heads} if heads else {})


def _tensor_faults(weights: WeightsFile, config: Config) -> list[str]:
    shapes = jax.eval_shape(lambda: init_params(build_model(config), config, jax.random.key(0)))
    zeros = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in naming.flattened(shapes).items()}
    needed = {name: array.shape for name, array in naming.invert(zeros, weights.table).items()}
    faults = []
    for name, tensor in weights.tensors.items():
        try:
            rule, _ = naming.find_rule(name, weights.table)
        except ValueError as error:
            faults.append(f"{error}: unexpected (shape {tensor.shape})")
            continue
        if rule.path is None:
            continue
        if name not in needed:
            faults.append(f"{name}: unexpected in a model of {config.model.layers} layers")
        elif tensor.shape != needed[name]:
            faults.append(f"{name}: shape {tensor.shape}, needs {needed[name]}")
        elif tensor.dtype not in archives.FLOATS:
            faults.append(f"{name}: {tensor.dtype}, needs one of {', '.join(archives.FLOATS)}")
    missing = [f"{name}: missing (shape {shape})" for name, shape in needed.items() if name not in weights.tensors]
    return faults + missing


# --- The JSON beside the file ---


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _faults_of_json(stated: StatedModel) -> list[str]:
    faults = []
    if stated.activation not in (None, *ACTIVATIONS):
        faults.append(f"activation: {JSON} says {stated.activation}, needs one of {', '.join(ACTIVATIONS)}")
    faults += [
        f"{name}: {JSON} says {value}, needs {needed}" for name, value, needed in stated.settings if value != needed
    ]
    faults += [
        f"{name} of pixels: {JSON} says {value}, needs CLIP's {list(needed)}"
        for name, value, needed in zip(("mean", "std"), stated.pixel_statistics, (MEAN, STD), strict=True)
        if value is not None and (np.shape(value) != (3,) or not np.allclose(value, needed, atol=1e-4))
    ]
    return faults + [
        f"{name}: {JSON} says {value!r}, needs a whole number"
        for name, value in stated.sizes.items()
        if not _is_count(value)
    ]


def _stated_model(weights: WeightsFile, exported: Config | None) -> StatedModel:
    if exported is not None:
        names = ("width", "layers", "heads", "hidden", "embedding", "patch_size", "decoder_heads")
        sizes = {name: exported.model[name] for name in names}
        return StatedModel(sizes | {"image_size": exported.data.image_size}, exported.model.activation)
    if weights.kind in (Kind.OPENAI, Kind.OFFICIAL):
        return StatedModel({}, "quick_gelu")  # docs/official.md 2.3
    if not weights.description:
        return StatedModel({}, None)
    if weights.kind == Kind.HUGGING_FACE:
        return hugging_face_model(weights.description, read_json(weights.path.parent / "preprocessor_config.json"))
    return _open_clip_model(weights.description)


def hugging_face_model(description: Mapping[str, Any], prepared: Mapping[str, Any]) -> StatedModel:
    """Returns the facts in config.json and preprocessor_config.json of a CLIPModel or CLIPVisionModelWithProjection.

    Fields that are absent have ViT-B/32's values (docs/official.md 15.4), pixel statistics None. Values are unchecked;
    raises AttributeError if vision_config is no object.
    """
    vision = description.get("vision_config") or description
    sizes = {
        "width": vision.get("hidden_size", 768),
        "hidden": vision.get("intermediate_size", 3072),
        "layers": vision.get("num_hidden_layers", 12),
        "heads": vision.get("num_attention_heads", 12),
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 32),
        "embedding": description.get("projection_dim", 512),
    }
    settings = (
        ("layer_norm_eps", vision.get("layer_norm_eps", 1e-5), 1e-5),
        ("num_channels", vision.get("num_channels", 3), 3),
    )
    activation = str(vision.get("hidden_act", "quick_gelu"))
    return StatedModel(sizes, activation, settings, (prepared.get("image_mean"), prepared.get("image_std")))


def _open_clip_model(description: Mapping[str, Any]) -> StatedModel:
    # docs/official.md 15.5
    model, prepared = description.get("model_cfg", description), description.get("preprocess_cfg", {})
    vision = model.get("vision_cfg", {})
    sizes = {name: vision[name] for name in ("width", "layers", "patch_size", "image_size") if name in vision}
    if isinstance(sizes.get("width"), int):
        sizes["heads"] = sizes["width"] // vision.get("head_width", 64)
        sizes["hidden"] = int(sizes["width"] * vision.get("mlp_ratio", 4.0))
    if "embed_dim" in model:
        sizes["embedding"] = model["embed_dim"]
    settings = (
        ("pool_type", vision.get("pool_type", "tok"), "tok"),
        ("global_average_pool", vision.get("global_average_pool", False), False),
        ("final_ln_after_pool", vision.get("final_ln_after_pool", False), False),
        ("eps", (vision.get("norm_kwargs") or {}).get("eps", 1e-5), 1e-5),
    )
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return StatedModel(sizes, activation, settings, (prepared.get("mean"), prepared.get("std")))
