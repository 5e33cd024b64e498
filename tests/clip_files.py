"""Small random CLIP models as files of each kind, and their embeddings by the definition (docs/official.md 2)."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests import torch_files

Tensors = dict[str, np.ndarray]


def vision_tower(*, width: int = 128, layers: int = 3, px: int = 24, patch: int = 8, embedding: int = 48) -> Tensors:
    """Returns float32 tensors of half-precision values, by OpenAI's names without `visual.`."""
    rng = np.random.default_rng(0)
    grid = px // patch
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (grid * grid + 1, width),
        "proj": (width, embedding),
        "conv1.weight": (width, 3, patch, patch),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * width, width), f"{block}.mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
    tensors = {}
    for name, shape in shapes.items():
        mean = 1.0 if ".ln" in f".{name}" and name.endswith("weight") else 0.0
        scale = (2 / width) ** 0.5 if len(shape) == 2 else 0.2
        tensors[name] = rng.normal(mean, scale, shape).astype(np.float16).astype(np.float32)
    return tensors


def text_tower(prefix: str = "") -> Tensors:
    names = ("positional_embedding", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight")
    return {f"{prefix}{name}": np.ones((2, 2), np.float32) for name in (*names, "ln_final.weight", "text_projection")}


def quick_gelu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-1.702 * z))


def embed(
    tensors: Tensors, pictures: np.ndarray, *, heads: int, activation: Callable[[np.ndarray], np.ndarray] = quick_gelu
) -> np.ndarray:
    """Returns unit embeddings [n, E] of normalised pictures [n, px, px, 3], one picture and head at a time."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * t[f"{name}.weight"][None] + t[f"{name}.bias"][None]

    def linear(x: np.ndarray, weight: str, bias: str) -> np.ndarray:
        return x @ t[weight].T + t[bias][None]

    out = []
    patch = t["conv1.weight"].shape[-1]
    for picture in pictures:
        side = picture.shape[0] // patch
        patches = [
            np.einsum(
                "hwc,dchw->d", picture[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch], t["conv1.weight"]
            )
            for i in range(side)
            for j in range(side)
        ]
        x = norm(np.stack([t["class_embedding"], *patches]) + t["positional_embedding"], "ln_pre")
        for layer in range(len([name for name in t if name.endswith("ln_1.weight")])):
            block = f"transformer.resblocks.{layer}"
            qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias")
            q, k, v = np.split(qkv, 3, axis=1)
            mixed = []
            for columns in np.split(np.arange(x.shape[1]), heads):
                scores = q[:, columns] @ k[:, columns].T / np.sqrt(len(columns))
                weights = np.exp(scores - scores.max(1, keepdims=True))
                mixed.append(weights / weights.sum(1, keepdims=True) @ v[:, columns])
            x = x + linear(np.concatenate(mixed, 1), f"{block}.attn.out_proj.weight", f"{block}.attn.out_proj.bias")
            hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc.weight", f"{block}.mlp.c_fc.bias")
            x = x + linear(activation(hidden), f"{block}.mlp.c_proj.weight", f"{block}.mlp.c_proj.bias")
        pooled = norm(x[:1], "ln_post")[0] @ t["proj"]
        out.append(pooled / np.linalg.norm(pooled))
    return np.stack(out)


def visual(tensors: Tensors) -> Tensors:
    return {f"visual.{name}": array for name, array in tensors.items()}


def write_openai(path: Path, tensors: Tensors, **more: np.ndarray) -> Path:
    """Writes OpenAI's .pt: TorchScript, float16 except norms and embeddings (docs/official.md 15.2)."""
    halves = {
        name: array if "ln_" in name or "embedding" in name else array.astype(np.float16)
        for name, array in visual(tensors).items()
    }
    numbers = {name: np.array(77) for name in ("input_resolution", "context_length", "vocab_size")}
    scale = {"logit_scale": np.array(4.6, np.float32)}
    torch_files.write_torchscript(path, halves | text_tower() | scale | numbers | more)
    return path


def hugging_face_names(tensors: Tensors) -> Tensors:
    """Returns the tensors by Hugging Face's names, with q, k and v apart."""
    out = {}
    for name, array in tensors.items():
        name = name.replace("transformer.resblocks", "encoder.layers").replace("mlp.c_fc", "mlp.fc1")
        name = name.replace("mlp.c_proj", "mlp.fc2").replace("ln_1", "layer_norm1").replace("ln_2", "layer_norm2")
        name = name.replace("ln_pre", "pre_layrnorm").replace("ln_post", "post_layernorm")
        name = name.replace("attn.out_proj", "self_attn.out_proj")
        if name == "proj":
            out["visual_projection.weight"] = array.T
        elif "in_proj" in name:
            for letter, part in zip("qkv", np.split(array, 3), strict=True):
                renamed = name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")
                out[f"vision_model.{renamed}"] = part
        elif name in ("class_embedding", "positional_embedding", "conv1.weight"):
            place = {"positional_embedding": "position_embedding.weight", "conv1.weight": "patch_embedding.weight"}
            out[f"vision_model.embeddings.{place.get(name, name)}"] = array
        else:
            out[f"vision_model.{name}"] = array
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def hugging_face_config(tensors: Tensors, *, heads: int, activation: str = "quick_gelu") -> dict[str, object]:
    patch = tensors["conv1.weight"].shape[-1]
    return {
        "model_type": "clip_vision_model",
        "hidden_size": len(tensors["class_embedding"]),
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": len([name for name in tensors if name.endswith("ln_1.weight")]),
        "num_attention_heads": heads,
        "image_size": round((len(tensors["positional_embedding"]) - 1) ** 0.5) * patch,
        "patch_size": patch,
        "projection_dim": tensors["proj"].shape[1],
        "hidden_act": activation,
    }


def write_hugging_face(folder: Path, tensors: Tensors, *, whole: bool = False, **stated: object) -> Path:
    """Writes a CLIPVisionModelWithProjection, or with `whole` a CLIPModel, which has its sizes in vision_config."""
    folder.mkdir()
    renamed = hugging_face_names(tensors)
    config = hugging_face_config(tensors, heads=2) | stated
    if whole:
        renamed |= {f"text_model.{name}": array for name, array in text_tower().items()}
        renamed |= {"text_projection.weight": np.ones((2, 2), np.float32), "logit_scale": np.array(4.6, np.float32)}
        renamed |= {"vision_model.embeddings.position_ids": np.arange(10)[None]}  # older files have it
        config = {"model_type": "clip", "projection_dim": config.pop("projection_dim"), "vision_config": config}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_open_clip(folder: Path, tensors: Tensors, *, quick_gelu: bool, **vision: object) -> Path:
    folder.mkdir()
    save_file(visual(tensors) | text_tower() | text_tower("text."), folder / "open_clip_model.safetensors")
    config = hugging_face_config(tensors, heads=2)
    cfg = {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "patch_size": config["patch_size"],
        "image_size": config["image_size"],
    }
    described = {"embed_dim": config["projection_dim"], "vision_cfg": cfg | vision, "text_cfg": {}}
    if quick_gelu:
        described["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    return folder
