"""RICE in JAX: which shop image does a clip of a livestream show?

    model = rice_jax.load("runs/grocery")

`load`, `Model` and `train_and_evaluate` are imported when they are first used, so `import rice_jax` imports no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rice_jax.version import __version__

if TYPE_CHECKING:
    from rice_jax.retrieval.model import Model, load
    from rice_jax.train import train_and_evaluate

__all__ = ["Model", "__version__", "load", "train_and_evaluate"]

_MODULES = {
    "Model": "rice_jax.retrieval.model",
    "load": "rice_jax.retrieval.model",
    "train_and_evaluate": "rice_jax.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
