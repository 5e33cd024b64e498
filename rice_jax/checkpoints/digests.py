"""Digests of arrays: 64 bits a leaf, the same on every mesh, computed on the devices in one pass over the memory.

A digest is two sums of an array's 32-bit words, modulo 2^32. Both map each word one to one and multiply it by an odd
weight that depends on its position, so a change of one word, hence any one flipped bit, changes both sums. The first
sum is linear, and in any linear sum two flipped sign bits cancel. Therefore the second mixes the bits of each word
before it adds them: of all other changes about one in 2^32 leaves it unchanged, and one in 2^64 both.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from rice_jax.parallel.mesh import path_name

GOLDEN, MIX = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B)  # odd, hence one to one modulo 2^32


def digest(leaf: Array) -> UInt32[Array, "2"]:
    """Returns both sums, uint32 [2], of an array of any rank and any dtype but complex, PRNG keys too; for jit."""
    words = _words(leaf)
    row = _ordinals(words.shape[:-1])
    column = jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    mixed = words ^ (column * GOLDEN)
    mixed = (mixed ^ (mixed >> 15)) * MIX
    mixed = mixed ^ (mixed >> 13)
    # One reduction for both sums: two would be two passes, and on a CPU 25 times slower.
    zero = jnp.zeros((), jnp.uint32)
    linear, mixed = jax.lax.reduce(
        (words * (2 * column + 1), mixed), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (words.ndim - 1,)
    )
    return jnp.stack([jnp.sum(linear * (2 * row + 1)), jnp.sum(mixed * (row * GOLDEN ^ (row >> 7) | 1))])


def _words(leaf: Array) -> UInt32[Array, "*rows columns"]:
    """Returns the bits as words: one an element of 8, 16 or 32 bits, two, on a new last axis, of 64; never rank 0."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(4, leaf.dtype.itemsize)}").astype(jnp.uint32)
    return words if words.ndim else words[None]


def _ordinals(shape: tuple[int, ...]) -> UInt32[Array, "*rows"]:
    """Returns each element's ordinal in C order, modulo 2^32. A reshaped range would gather a sharded array."""
    ordinals, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        ordinals += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return ordinals


def digests(tree: Any) -> UInt32[Array, "leaves 2"]:
    """Returns the digest of each leaf (at least 1), as jax.tree.leaves orders them, replicated, without waiting."""
    leaves = jax.tree.leaves(tree)
    mesh = next((x.sharding.mesh for x in leaves if isinstance(getattr(x, "sharding", None), NamedSharding)), None)
    return _compiled(NamedSharding(mesh, PartitionSpec()) if mesh is not None else None)(leaves)


@functools.cache
def _compiled(replicated: NamedSharding | None) -> Any:
    return jax.jit(lambda leaves: jnp.stack([digest(leaf) for leaf in leaves]), out_shardings=replicated)


def shapes_and_dtypes(tree: Any) -> dict[str, str]:
    """Returns {path: "(32, 16) float32"} of the leaves, in the order of jax.tree.leaves."""
    # Orbax' metadata have other containers than the state, but the names in the paths are the same.
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    return {path_name(path): f"{tuple(leaf.shape)} {leaf.dtype}" for path, leaf in leaves}


def as_text(words: np.ndarray) -> list[str]:
    """Returns digests, uint32 [leaves, 2], as strings of 16 hex digits."""
    return [f"{first:08x}{second:08x}" for first, second in words.tolist()]
