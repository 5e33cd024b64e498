"""Finds out which kind of model a file or folder of weights has, without reading the tensors' values.

The tensors' names decide. Models that this project cannot use are recognised by name, and the error says what they are.
"""

import enum
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rice_jax.weights import archives, naming
from rice_jax.weights.files import find_files, read_json
from rice_jax.weights.wrappers import unwrap


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


_WHOLE = "save the whole model (of transformers: CLIPVisionModelWithProjection or CLIPModel), and give that"
PROJECTIONS = {  # the tensor that makes embeddings of the tower's outputs, and what to do without it
    Kind.HUGGING_FACE: ("visual_projection.weight", f"a CLIPVisionModel has none: {_WHOLE}"),
    Kind.OPEN_CLIP: ("visual.proj", f"no embedding can be made without it: {_WHOLE}"),
}


class WeightsFile(NamedTuple):
    """A file of weights, or the several that Hugging Face splits a model into. Its tensors are not yet read."""

    path: Path  # the first file's
    kind: Kind  # any but RUN
    tensors: Mapping[str, archives.StoredTensor]
    table: naming.Table
    description: Mapping[str, Any]  # the JSON beside the file; empty if there is none
    notes: tuple[str, ...] = ()  # for the user: what was read beside or around the model


def inspect_weights(path: Path) -> WeightsFile:
    """Returns the kind, the tensors, the table of names and the JSON description of a file or folder of weights.

    Wrappers around the model are seen through. Raises FileNotFoundError if there is no such file, folder or part, and
    ValueError for a damaged file, JSON that is no object, a folder or file that does not have exactly one model, a
    tensor in two parts, a tower without its projection, and a model of another kind, which is named.
    """
    (files, notes), found = find_files(path), dict[str, archives.StoredTensor]()
    for file in files:
        archive = archives.read(file)
        twice = sorted(found.keys() & archive.tensors.keys())
        if twice:
            names = ", ".join(twice[:5]) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
            raise ValueError(f"{file}: found {names}, which another part has too; fetch all parts again.")
        found |= archive.tensors
    tensors, more = unwrap(found, files[0])
    kind = _kind(files[0], tensors, archive.container)
    if kind in PROJECTIONS and PROJECTIONS[kind][0] not in tensors:
        name, advice = PROJECTIONS[kind]
        raise ValueError(f"{files[0]}: found a vision tower without its projection {name}; {advice}.")
    table = _table(kind, tensors)
    counters = [name for name, tensor in tensors.items() if tensor.shape == () and not naming.is_known(name, table)]
    if counters:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in counters}
        more += (f"{', '.join(counters[:3])}{', ...' * (len(counters) > 3)}: single numbers of no known use, left out",)
    return WeightsFile(files[0], kind, tensors, table, _description(files[0], kind), notes + more)


def _kind(file: Path, tensors: Mapping[str, Any], container: str) -> Kind:
    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in tensors)

    needs = "needs a vision transformer of CLIP or of RICE"
    for pattern, model, advice in OTHER_MODELS:
        if has(rf"(?:.*\.)?(?:{pattern})"):
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
    if has(rf"(?:.*\.)?(?:{TEXT_MODEL})"):
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
