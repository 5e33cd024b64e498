"""Digests of arrays: 64 bits a leaf, the same on every mesh and for every dtype, in one pass over the memory.

Each word of 32 bits goes into two sums modulo 2^32. In both it is mapped one to one and then weighted by an odd number,
so that a change of one word, hence any one flipped bit, changes both. The first is linear, with a weight for each
place. In any such sum two flipped sign bits cancel, whatever the odd weights; so the second mixes its words before they
are added, and of further changes about one in 2^32 leaves it, and one in 2^64 both, as they were.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

GOLDEN, MIX = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B)  # odd, hence one to one modulo 2^32


def digest(leaf: Array) -> UInt32[Array, "2"]:
    """Of one array of any dtype and rank."""
    words = _words(leaf)
    row = _place(words.shape[:-1])
    column = jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    mixed = words ^ (column * GOLDEN)
    mixed = (mixed ^ (mixed >> 15)) * MIX
    mixed = mixed ^ (mixed >> 13)
    # One reduction for both: apart they are two passes, and on a CPU 25 times slower.
    zero = jnp.zeros((), jnp.uint32)
    linear, mixed = jax.lax.reduce(
        (words * (2 * column + 1), mixed), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (words.ndim - 1,)
    )
    sums = jnp.sum(linear * (2 * row + 1)), jnp.sum(mixed * (row * GOLDEN ^ (row >> 7) | 1))
    return jnp.stack(sums)


def _words(leaf: Array) -> UInt32[Array, "*rows columns"]:
    """The bits of an array as words: those of 8 or 16 bits one each, those of 64 bits two."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(4, leaf.dtype.itemsize)}").astype(jnp.uint32)
    return words if words.ndim else words[None]


def _place(shape: tuple[int, ...]) -> UInt32[Array, "*rows"]:
    """Each element's number, in C order, modulo 2^32; without a reshape, which would gather a sharded array."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return place


def digests(tree: Any) -> UInt32[Array, "leaves 2"]:
    """Of every leaf in the order of jax.tree.leaves, whole on every process; returns before the device has made it."""
    leaves = jax.tree.leaves(tree)
    mesh = next((x.sharding.mesh for x in leaves if isinstance(getattr(x, "sharding", None), NamedSharding)), None)
    return _program(NamedSharding(mesh, PartitionSpec()) if mesh is not None else None)(leaves)


@functools.cache
def _program(whole: NamedSharding | None) -> Any:
    return jax.jit(lambda leaves: jnp.stack([digest(leaf) for leaf in leaves]), out_shardings=whole)


def shapes_and_dtypes(tree: Any) -> dict[str, str]:
    """{path: '(32, 16) float32'}; Orbax' metadata spells containers otherwise than the state, names are what agrees."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    return {_name(path): f"{tuple(leaf.shape)} {leaf.dtype}" for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def as_text(words: np.ndarray) -> list[str]:
    """[leaves, 2] as 16 hex digits a leaf."""
    return [f"{first:08x}{second:08x}" for first, second in words.tolist()]
