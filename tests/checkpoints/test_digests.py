"""Digests of arrays: each change changes them, and they are the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rice_jax.checkpoints.digests import as_text, digests, shapes_and_dtypes
from tests import official

DTYPES = ["float32", "bfloat16", "float16", "int8", "bool", "uint32", "int16"]


def text(array: object) -> str:
    return as_text(np.asarray(digests([jnp.asarray(array)])))[0]


def some(shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    values = np.random.default_rng(0).normal(size=shape) * 50
    return jnp.asarray(values > 0 if dtype == "bool" else values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_both_words(dtype: str) -> None:
    array = np.asarray(some((3, 5), dtype))
    before, changed = text(array), []
    bits = 1 if dtype == "bool" else 8 * array.dtype.itemsize  # a bool has one
    for position in range(array.size):
        for bit in range(bits):
            data = bytearray(array.tobytes())
            data[position * array.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            changed.append(text(np.frombuffer(bytes(data), array.dtype).reshape(array.shape)))
    assert all(now[:8] != before[:8] and now[8:] != before[8:] for now in changed)
    assert len({before, *changed}) == 1 + array.size * bits


def test_two_changes_that_cancel_in_a_linear_sum_are_noticed() -> None:
    """Flips two sign bits, swaps a number and its negative, swaps rows or columns, transposes."""
    array = np.array(some((6, 6)))
    changed = [array.copy() for _ in range(5)]
    changed[0][1, 2] *= -1
    changed[0][4, 3] *= -1
    array[2, 2] = -array[5, 1]
    for other in changed[1:]:
        other[2, 2] = array[2, 2]
    changed[1][2, 2], changed[1][5, 1] = array[5, 1], array[2, 2]
    changed[2] = changed[2][[1, 0, 2, 3, 4, 5]]
    changed[3] = changed[3][:, [0, 1, 5, 3, 4, 2]]
    changed[4] = changed[4].T
    assert len({text(array), *map(text, changed)}) == 6


def test_the_definition_in_plain_numpy() -> None:
    array = np.array(some((4, 3, 5)))
    words = array.view(np.uint32).reshape(12, 5).astype(object)  # Python's integers, which do not overflow
    linear = mixed = 0
    for row in range(12):
        by_column = 0
        for column in range(5):
            linear += words[row, column] * (2 * column + 1) * (2 * row + 1)
            h = words[row, column] ^ (column * 0x9E3779B9) % 2**32
            h = (h ^ h >> 15) * 0x85EBCA6B % 2**32
            by_column += h ^ h >> 13
        mixed += by_column * ((row * 0x9E3779B9) % 2**32 ^ row >> 7 | 1)
    assert text(array) == f"{linear % 2**32:08x}{mixed % 2**32:08x}"


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "fsdp"), PartitionSpec("fsdp", "data")])
def test_a_digest_is_the_same_on_every_mesh(spec: PartitionSpec) -> None:
    array = some((8, 16, 3))
    placed = jax.device_put(array, NamedSharding(official.mesh_of(2, 4), spec))
    assert as_text(np.asarray(digests([placed]))) == [text(array)]


def test_scalars_empty_arrays_and_keys_have_digests() -> None:
    leaves = [jnp.float32(3), jnp.zeros((0, 4)), jax.random.key(1), jnp.zeros(3), jnp.zeros((3, 1))]
    assert len(np.asarray(digests(leaves))) == 5
    assert text(jnp.float32(3)) != text(jnp.float32(-3))


def test_a_leaf_is_described_by_path_shape_and_dtype() -> None:
    assert shapes_and_dtypes({"a": {"b": jnp.zeros((2, 3), jnp.bfloat16)}}) == {"a/b": "(2, 3) bfloat16"}
