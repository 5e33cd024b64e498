"""Finds out which kind of model a file or folder of weights has, without reading the tensors' values.

The tensors' names decide. Models that this project cannot use are recognised by name, and the error says what they are.
"""

import enum
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rice_jax.weights import archives, naming


class Kind(enum.StrEnum):
    """The origin of weights, which decides the names of their tensors."""

    OFFICIAL = "official RICE"
    OPENAI = "OpenAI CLIP"
    OPEN_CLIP = "open_clip"
    HUGGING_FACE = "Hugging Face CLIP"
    RUN = "rice_jax run"


GIVE_CLIP = "give a CLIP model with a vision transformer (ViT-B/32, ViT-L/14, ...)"
OTHER_MODELS = (  # checked first: pattern of a tensor's name, the model that has it, what to do
    (r"visual\.(layer\d|attnpool)\..*", "a ResNet CLIP", GIVE_CLIP),
    (r"visual\.trunk\..*", "an open_clip model with a timm tower (SigLIP, EVA, ConvNeXt)", GIVE_CLIP),
    (r"visual\.attn_pool\..*", "CoCa or another model with attention pooling", GIVE_CLIP),
    (r"vision_model\.head\..*", "SigLIP", GIVE_CLIP),
    (r"vision_model\..*\.self_attn\.qkv\..*", "BLIP", GIVE_CLIP),
    (r".*\.ls_[12]\.gamma|.*\.layer_scale1.*", "a ViT with layer scale", GIVE_CLIP),
    (r"(.*\.)?(cls_token|mask_token)|(.*\.)?blocks\.\d+\..*", "a ViT by timm's or DINO's names", GIVE_CLIP),
    (r"layer[1-4]\.\d+\.conv1\.weight", "a ResNet", GIVE_CLIP),
    (
        r"transformer\.transformer\.transformer\.layers\.([2-9]|\d\d+)\..*",
        "an official model with more than one pair of decoder layers",
        "give one with layers.0 and layers.1 only, as the published ones",
    ),
)
TEXT_MODEL = (
    r"text_model\..*|transformer\.resblocks\..*|token_embedding\.weight|(.*\.)?(word_embeddings|wte|embed_tokens)\..*"
)
FILE_NAMES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


class WeightsFile(NamedTuple):
    """A file of weights, or the several that Hugging Face splits a model into. Its tensors are not yet read."""

    path: Path  # the first file's
    kind: Kind  # any but RUN
    tensors: Mapping[str, archives.StoredTensor]
    table: naming.Table
    description: Mapping[str, Any]  # the JSON beside the file; empty if there is none


def inspect_weights(path: Path) -> WeightsFile:
    """Returns the kind, the tensors, the table of names and the JSON description of a file or folder of weights.

    Names lose the prefix "module." if all have it. Raises FileNotFoundError if there is no such file, folder or part,
    and ValueError for a damaged file, JSON that is no object, a folder that does not have exactly one model, a tensor
    in two parts, and a model of another kind, which is named.
    """
    files, tensors = _files(path), dict[str, archives.StoredTensor]()
    for file in files:
        archive = archives.read(file)
        twice = sorted(tensors.keys() & archive.tensors.keys())
        if twice:
            raise ValueError(f"{file}: found {', '.join(twice)}, which another part has too; fetch all parts again.")
        tensors |= archive.tensors
    if tensors and all(name.startswith("module.") for name in tensors):  # docs/official.md 15.1
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    kind = _kind(files[0], tensors, archive.container)
    return WeightsFile(files[0], kind, tensors, _table(kind, tensors), _description(files[0], kind))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        parts = read_json(index).get("weight_map")
        names = set(parts.values()) if isinstance(parts, dict) else set()
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError(f"{index}: found no weight_map to files in its own folder; fetch it again.")
        return [path / name for name in sorted(names)]
    for name in FILE_NAMES:
        if (path / name).exists():
            return [path / name]
    others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(others) != 1:
        found = ", ".join(file.name for file in others) or "none"
        raise ValueError(f"{path}: found neither a run nor one file of weights ({found}); give the file itself.")
    return others


def _kind(file: Path, tensors: Mapping[str, Any], container: str) -> Kind:
    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in tensors)

    needs = "needs a vision transformer of CLIP or of RICE"
    for pattern, model, advice in OTHER_MODELS:
        if has(pattern):
            raise ValueError(f"{file}: found {model}, {needs}; {advice}.")
    if has(r"image_encoder\.model\..*"):
        return Kind.OFFICIAL
    if has(r"vision_model\..*|visual_projection\.weight"):
        model_type = str(read_json(file.parent / "config.json").get("model_type", "clip"))
        if not model_type.startswith("clip"):
            raise ValueError(f"{file}: found {model_type} (says config.json), {needs}; {GIVE_CLIP}.")
        return Kind.HUGGING_FACE
    if has(r"visual\..*"):
        return Kind.OPENAI if container == "TorchScript" else Kind.OPEN_CLIP
    if has(TEXT_MODEL):
        raise ValueError(f"{file}: found a text model without a vision model, {needs}; {GIVE_CLIP}.")
    names = ", ".join(list(tensors)[:3]) or "no tensor"
    raise ValueError(f"{file}: found no model that is known here ({names}, ...), {needs}; {GIVE_CLIP}.")


def _table(kind: Kind, tensors: Mapping[str, Any]) -> naming.Table:
    tables = {Kind.OPENAI: naming.OPENAI, Kind.OPEN_CLIP: naming.OPEN_CLIP, Kind.HUGGING_FACE: naming.HUGGING_FACE}
    if kind in tables:
        return tables[kind]
    if "transformer.contrastive_norm.norm_s" in tensors:
        return naming.OFFICIAL_CONTRASTIVE
    has_heads = any(name.startswith("transformer.heads.") for name in tensors)
    return naming.OFFICIAL if has_heads else naming.OFFICIAL_NO_HEAD


def _description(file: Path, kind: Kind) -> Mapping[str, Any]:
    """Returns the JSON beside the file if it describes a model of this kind, else {}. Raises ValueError if damaged."""
    if kind == Kind.OPEN_CLIP:
        return read_json(file.parent / "open_clip_config.json")
    if kind == Kind.OPENAI:
        return {}
    description = read_json(file.parent / "config.json")
    ours = "loss" in description and "data" in description  # our exports in the official names have our config
    return description if ours == (kind == Kind.OFFICIAL) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} without a file. Raises ValueError for other content, OSError on reading."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: found no JSON ({error}); fetch it again.") from error
    if isinstance(found, dict):
        return found
    raise ValueError(f"{path}: found a {type(found).__name__}, needs a JSON object; fetch it again.")
