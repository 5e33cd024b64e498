"""What a file or folder of weights is, before any number is read: whose model, which tensors, by which table.

Models of other kinds are told apart by their tensors' names, and named.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rice_jax.weights import archives, naming

OFFICIAL, OPENAI, OPEN_CLIP, HUGGING_FACE = "official RICE", "OpenAI CLIP", "open_clip", "Hugging Face CLIP"

CLIP = "give a CLIP model with a vision transformer (ViT-B/32, ViT-L/14, ...)"
OTHERS = (  # looked up before ours: what a name gives away, and what to do
    (r"visual\.(layer\d|attnpool)\..*", "a ResNet CLIP", CLIP),
    (r"visual\.trunk\..*", "an open_clip model with a timm tower (SigLIP, EVA, ConvNeXt)", CLIP),
    (r"visual\.attn_pool\..*", "CoCa or another model with attention pooling", CLIP),
    (r"vision_model\.head\..*", "SigLIP", CLIP),
    (r"vision_model\..*\.self_attn\.qkv\..*", "BLIP", CLIP),
    (r".*\.ls_[12]\.gamma|.*\.layer_scale1.*", "a ViT with layer scale", CLIP),
    (r"(.*\.)?(cls_token|mask_token)|(.*\.)?blocks\.\d+\..*", "a ViT by timm's or DINO's names", CLIP),
    (r"layer[1-4]\.\d+\.conv1\.weight", "a ResNet", CLIP),
    (
        r"transformer\.transformer\.transformer\.layers\.([2-9]|\d\d+)\..*",
        "an official model with more than one pair of decoder layers",
        "give one with layers.0 and layers.1 only, as the published ones",
    ),
)
TEXT = (
    r"text_model\..*|transformer\.resblocks\..*|token_embedding\.weight|(.*\.)?(word_embeddings|wte|embed_tokens)\..*"
)
FOLDERS = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


class Contents(NamedTuple):
    """A file of weights (or what Hugging Face split into several), none of its numbers read."""

    file: Path
    container: str  # archives.Archive's
    kind: str  # one of the four above
    tensors: Mapping[str, archives.StoredTensor]
    table: naming.Table
    description: Mapping[str, Any]  # the JSON beside the file; empty when there is none


def inspect_weights(path: Path) -> Contents:
    """What is in a file or folder.

    Raises:
      FileNotFoundError: nothing there. ValueError: a damaged file, or no model of a known kind, which is named.
    """
    tensors: dict[str, archives.StoredTensor] = {}
    files = _files(path)
    for file in files:
        archive = archives.read(file)
        twice = sorted(tensors.keys() & archive.tensors.keys())
        if twice:
            raise ValueError(f"{file}: holds {', '.join(twice)}, which another part holds too; fetch all parts again.")
        tensors |= archive.tensors
    if tensors and all(name.startswith("module.") for name in tensors):  # several GPUs' wrapper (SPEC 15.1)
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    kind = _kind(files[0], tensors, archive.container)
    return Contents(files[0], archive.container, kind, tensors, _table(kind, tensors), _description(files[0], kind))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        parts = read_json(index).get("weight_map")
        names = set(parts.values()) if isinstance(parts, dict) else set()
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError(f"{index}: names no parts in its own folder (weight_map); fetch it again.")
        return [path / name for name in sorted(names)]
    for name in FOLDERS:
        if (path / name).exists():
            return [path / name]
    others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(others) != 1:
        held = ", ".join(file.name for file in others) or "none"
        raise ValueError(f"{path}: found neither a run nor one file of weights ({held}); give the file itself.")
    return others


def _kind(file: Path, tensors: Mapping[str, Any], container: str) -> str:
    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in tensors)

    needs = "needs a vision transformer of CLIP or of RICE"
    for pattern, what, do in OTHERS:
        if has(pattern):
            raise ValueError(f"{file}: found {what}, {needs}; {do}.")
    if has(r"image_encoder\.model\..*"):
        return OFFICIAL
    if has(r"vision_model\..*|visual_projection\.weight"):
        stated = str(read_json(file.parent / "config.json").get("model_type", "clip"))
        if not stated.startswith("clip"):
            raise ValueError(f"{file}: found {stated} (says config.json), {needs}; {CLIP}.")
        return HUGGING_FACE
    if has(r"visual\..*"):
        return OPENAI if container == "TorchScript" else OPEN_CLIP
    if has(TEXT):
        raise ValueError(f"{file}: found a text model without a vision model, {needs}; {CLIP}.")
    names = ", ".join(list(tensors)[:3]) or "no tensor"
    raise ValueError(f"{file}: found no model that is known here ({names}, ...), {needs}; {CLIP}.")


def _table(kind: str, tensors: Mapping[str, Any]) -> naming.Table:
    if kind != OFFICIAL:
        return {OPENAI: naming.OPENAI, OPEN_CLIP: naming.OPEN_CLIP, HUGGING_FACE: naming.HUGGING_FACE}[kind]
    if "transformer.contrastive_norm.norm_s" in tensors:
        return naming.OFFICIAL_CONTRASTIVE
    heads = any(name.startswith("transformer.heads.") for name in tensors)
    return naming.OFFICIAL if heads else naming.OFFICIAL_NO_HEAD


def _description(file: Path, kind: str) -> Mapping[str, Any]:
    """The JSON beside the file, if it speaks of this kind."""
    if kind == OPEN_CLIP:
        return read_json(file.parent / "open_clip_config.json")
    if kind == OPENAI:
        return {}
    stated = read_json(file.parent / "config.json")
    ours = "loss" in stated and "data" in stated  # as our exports in the official names have it
    return stated if ours == (kind == OFFICIAL) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file. ValueError: something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is no JSON ({error}); fetch it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; fetch it again.")
    return found
