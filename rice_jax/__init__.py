"""RICE in JAX: which shop image does a clip of a livestream show? `model = rice_jax.load(RUN)`."""

from rice_jax.retrieval.model import Model, load
from rice_jax.version import __version__

__all__ = ["Model", "__version__", "load"]
