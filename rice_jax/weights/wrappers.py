"""Finds the model in a file of weights, whatever a training program has put around it.

A file of a training has the model's tensors in a dict beside those of the optimizer, `{"model_state_dict": {...}}`, and
modules that wrap the model add parts to the names, such as "module." and "_orig_mod.". The norm before the first block
of a CLIP tower tells where the model is: no other tensor has that name.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

WRAPPERS = {  # parts of names that DDP, torch.compile, FSDP, FairScale, activation checkpoints, DeepSpeed add anywhere
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module",
    "inner",
}  # fmt: skip
TOWERS = (  # the norm's name, the names of the towers that have it, and the one that is meant if it is another
    (re.compile(r"((?:.*\.)?)ln_pre\.(?:weight|bias)"), ("visual.", "image_encoder.model."), "visual."),
    (re.compile(r"((?:.*\.)?)pre_layrnorm\.(?:weight|bias)"), ("vision_model.",), "vision_model."),
)
AVERAGE = re.compile(r"ema|average|avg|swa|teacher|momentum|shadow", re.IGNORECASE)


class _Place(NamedTuple):
    prefix: str  # of all names of the model
    tower: str  # added to the names without the prefix; "" if they have it


def unwrap(tensors: Mapping[str, T], file: Path) -> tuple[dict[str, T], tuple[str, ...]]:
    """Returns the tensors of the only model in a file by the names of our tables, and notes of what was seen through.

    Beside a model, its average (by a name such as "ema") is left out, and a note says so. Without a CLIP tower the
    tensors are returned as they are, except for WRAPPERS in their names. Raises ValueError if the file has several
    models, or two tensors whose names differ in WRAPPERS alone.
    """
    plain = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError(
            f"{file}: found two tensors whose names differ only in {', '.join(sorted(WRAPPERS))}; save one of them."
        )
    notes = () if plain.keys() == tensors.keys() else ("names were read without what wrappers add, such as module.",)
    places = sorted({place for name in plain if (place := _place(name)) is not None})
    trained = [place for place in places if not AVERAGE.search(place.prefix)] or places
    if not trained or trained == [("", "")]:
        return plain, notes
    if len(trained) > 1:
        prefixes = ", ".join(place.prefix or "no prefix" for place in trained)
        raise ValueError(
            f"{file}: found {len(trained)} models, with the prefixes {prefixes}; save one of them alone, by torch.save "
            "or as safetensors."
        )
    ((prefix, tower),) = trained
    model = {tower + name.removeprefix(prefix): x for name, x in plain.items() if name.startswith(prefix)}
    note = f"the model's names begin with {prefix} in the file" if prefix else f"the file is the tower {tower} alone"
    left_out = len(plain) - len(model)
    return model, (*notes, note + (f"; {left_out} tensors beside it are left out" if left_out else ""))


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _place(name: str) -> _Place | None:
    for norm, towers, usual in TOWERS:
        if match := norm.fullmatch(name):
            root = match[1]
            for tower in towers:
                if root == tower or root.endswith(f".{tower}"):
                    return _Place(root.removesuffix(tower), "")
            return _Place(root, usual)
    return None
