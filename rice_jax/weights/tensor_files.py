"""Writes tensors as safetensors files, and keeps the official model's unused tensors in a run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

UNUSED = "unused.safetensors"


def write_safetensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Writes tensors as float32 to a file that everybody may read; safetensors makes it readable for its owner only."""
    # Contiguous, because safetensors writes an array's memory and ignores its strides.
    arrays = {name: np.ascontiguousarray(x, np.float32).reshape(np.shape(x)) for name, x in tensors.items()}
    save_file(arrays, path, {"format": "pt"})  # transformers needs this entry
    path.chmod(0o644)


def read_unused(run: Path) -> dict[str, np.ndarray]:
    """Returns the official tensors that a run keeps only for its exports, by their official names; {} if none."""
    return load_file(run / UNUSED) if (run / UNUSED).exists() else {}


def save_unused(unused: Mapping[str, np.ndarray], run: Path) -> None:
    """Writes the official tensors that nothing reads (docs/official.md 5.8) to a run's folder. No file if none."""
    if unused:
        write_safetensors(unused, run / UNUSED)
