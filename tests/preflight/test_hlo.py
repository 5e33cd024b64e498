"""The collectives that are parsed from a program, compared with the known ones of small programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rice_jax.parallel.mesh import BATCH, P
from rice_jax.preflight import hlo
from rice_jax.preflight.hlo import ArrayType
from tests import official

DATA, FSDP = BATCH


def read(f: Callable[..., Any], *shapes: tuple[int, ...], mesh: tuple[int, int] = (8, 1)) -> list[hlo.Collective]:
    """Returns the collectives of f in shard_map. Its arguments are float32 of these global shapes, split on axis 0."""
    specs = P(BATCH)
    mapped = jax.shard_map(f, mesh=official.mesh_of(*mesh), in_specs=specs, out_specs=specs)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.collectives(jax.jit(mapped).lower(*arguments).compile().as_text())


def test_kinds_bytes_and_groups_are_those_of_the_program() -> None:
    def f(x: jax.Array) -> Any:  # [2, 16] on each of 8 devices
        everything = jax.lax.all_gather(x, BATCH, axis=0, tiled=True)  # [16, 16]
        parts = jax.lax.psum_scatter(everything, BATCH, scatter_dimension=0, tiled=True)  # of [16, 16]
        turned = jax.lax.ppermute(jnp.sin(x), DATA, [(i, (i + 1) % 8) for i in range(8)])
        spread = jax.lax.all_to_all(jnp.cos(x), DATA, split_axis=1, concat_axis=0, tiled=True)
        return x * jax.lax.psum(jnp.exp(x), BATCH), parts, turned, spread

    found = {one.kind: one for one in read(f, (16, 16))}
    assert {kind: one.bytes for kind, one in found.items()} == {
        "all-gather": 4 * 16 * 16,
        "reduce-scatter": 4 * 16 * 16,
        "all-reduce": 4 * 2 * 16,
        "collective-permute": 4 * 2 * 16,
        "all-to-all": 4 * 2 * 16,
    }
    assert {one.group_size for one in found.values()} == {8}
    assert {kind: one.sent_bytes / one.bytes for kind, one in found.items()} == {
        "all-gather": 7 / 8, "reduce-scatter": 7 / 8, "all-reduce": 7 / 4, "collective-permute": 1, "all-to-all": 7 / 8,
    }  # fmt: skip
    assert all(one.runs == 1 and not one.trip_counts for one in found.values())


def test_a_collective_along_one_axis_has_a_group_of_that_size() -> None:
    f = lambda x: (x * jax.lax.psum(x, FSDP), x + jax.lax.psum(jnp.sin(x), DATA))
    assert sorted(one.group_size or 0 for one in read(f, (8, 3), mesh=(2, 4))) == [2, 4]
    assert read(lambda x: x * jax.lax.psum(x, FSDP), (8, 3), mesh=(8, 1)) == []


def test_a_collective_in_nested_loops_counts_as_often_as_it_runs() -> None:
    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(x) * jax.lax.pcast(jax.lax.psum(x, BATCH), BATCH, to="varying"), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(inner, jnp.cos(x), length=5)[0], None

    (one,) = read(lambda x: jax.lax.scan(outer, x, length=3)[0], (8, 7))
    assert one.trip_counts == (3, 5) and one.runs == 15
    assert hlo.bytes_by_kind([one]) == {"all-reduce": 15 * 4 * 7}


def test_a_loop_of_unknown_length_has_no_trip_count_and_counts_once() -> None:
    def f(x: jax.Array) -> jax.Array:
        body = lambda x: jax.lax.pcast(jax.lax.psum(x, BATCH), BATCH, to="varying") + 1
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, body, x)

    found = [one for one in read(f, (8, 7)) if one.results[0].shape]
    assert [one.trip_counts for one in found] == [(None,)] and found[0].runs == 1


def test_a_collective_in_a_branch_is_found() -> None:
    f = lambda x: jax.lax.cond(
        jax.lax.axis_index(DATA) >= 0, lambda x: x + jax.lax.all_gather(x, DATA).sum(axis=0), lambda x: x, x
    )
    assert [one.kind for one in read(f, (8, 7))] == ["all-gather"]


TPU = """HloModule jit_f, is_scheduled=true

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12), metadata={op_name="jit(f)"}
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (p.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %sum = (bf16[4,8]{1,0:T(8,128)(2,1)}, f32[]{:T(128)}) all-reduce(%x, %y), channel_id=1, replica_groups=mesh['data'=4,'fsdp'=2] {'data'}, use_global_device_ids=true, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%at, %sum)
}

%async_collective_fusion.1 (a: f32[8,2]) -> f32[16,2] {
  ROOT %g = f32[16,2]{1,0:T(8,128)} all-gather(%a), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}
}

%async_collective_fusion.2 (a: f32[8,2]) -> f32[16,2] {
  ROOT %g.2 = f32[16,2]{1,0:T(8,128)} all-gather(%a), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}
}

ENTRY %main (param.0: f32[8,2]) -> f32[16,2] {
  %param.0 = f32[8,2]{1,0:T(8,128)} parameter(0)
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) while(%t0), condition=%condition, body=%body
  %f1 = f32[16,2]{1,0:T(8,128)} fusion(%param.0), kind=kCustom, calls=%async_collective_fusion.1
  %f2 = f32[16,2]{1,0:T(8,128)} fusion(%f1), kind=kCustom, calls=%async_collective_fusion.2
  %s = (f32[8,2]{1,0}, f32[64,2]{1,0}) all-gather-start(%f2), channel_id=8, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %d = f32[64,2]{1,0} all-gather-done(%s)
  %p.s = (f32[8,2]{1,0}, f32[8,2]{1,0}, u32[], u32[]) collective-permute-start(%f2), source_target_pairs={{0,1},{1,0}}
  ROOT %p.d = f32[8,2]{1,0} collective-permute-done(%p.s)
}
"""  # noqa: E501


def test_the_text_of_the_tpu_compiler_is_parsed() -> None:
    reduce, spread, started, permuted = hlo.collectives(TPU)
    assert reduce.trip_counts == (12,) and reduce.group_size == 4
    assert reduce.results == (ArrayType("bf16", (4, 8)), ArrayType("f32", ())) and reduce.bytes == 4 * 8 * 2 + 4
    assert spread.group_size == 2 and spread.bytes == 16 * 2 * 4  # once, though two fusions hide it
    assert started.results == (ArrayType("f32", (64, 2)),) and permuted.results == (ArrayType("f32", (8, 2)),)
    assert hlo.bytes_by_kind([reduce, spread, started, permuted]) == {
        "all-reduce": 12 * 68,
        "all-gather": 128 + 512,
        "collective-permute": 64,
    }


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="found no ENTRY"):
        hlo.collectives("module @jit_f {}")
