"""The mesh, the sharding rules, and the rows of a batch that a process provides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rice_jax.parallel.mesh import (
    P,
    all_gather_parameter,
    make_mesh,
    mean_over_devices,
    parameter_spec,
    parameter_table,
    process_rows,
    state_shardings,
)
from tests import official


def test_minus_one_takes_the_remaining_devices() -> None:
    assert dict(make_mesh(data=-1, fsdp=2).shape) == {"data": 4, "fsdp": 2}
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": 8}


@pytest.mark.parametrize("sizes", [(3, 1), (16, 1), (-1, 3), (-1, -1), (0, 8)])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"mesh \(data={sizes[0]}, fsdp={sizes[1]}\)"):
        make_mesh(data=sizes[0], fsdp=sizes[1])


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"parameter decoder/novelty of shape \(3, 4\) matches no rule"):
        parameter_spec("decoder/novelty", (3, 4), official.mesh_of(8, 1))


def test_an_axis_that_does_not_divide_is_named_with_parameter_and_shape() -> None:
    with pytest.raises(ValueError, match=r"c_fc/kernel: axis 1 of shape \(6, 12\) does not divide by mesh axis fsdp=8"):
        parameter_spec("decoder/self_layer/mlp/c_fc/kernel", (6, 12), official.mesh_of(1, 8))


def test_moments_are_sharded_as_their_parameters() -> None:
    mesh = official.mesh_of(2, 4)
    name, shape = "encoder/resblocks/mlp/c_fc/kernel", (2, 8, 16)
    assert parameter_spec(f"opt_state/0/mu/{name}", shape, mesh) == parameter_spec(name, shape, mesh)


def test_the_rows_of_one_process_are_all_rows_in_order() -> None:
    assert process_rows(16, official.mesh_of(4, 2)).tolist() == list(range(16))


def test_a_batch_that_does_not_divide_by_the_devices_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size 12 does not divide by the mesh's 8 devices"):
        process_rows(12, official.mesh_of(8, 1))


def test_a_gathered_parameter_is_its_shards_in_order() -> None:
    mesh, spec = official.mesh_of(2, 4), P(None, "fsdp")
    x = jnp.arange(24.0).reshape(3, 8)
    f = jax.shard_map(
        lambda shard: mean_over_devices(all_gather_parameter(shard, spec)),
        mesh=mesh,
        in_specs=spec,
        out_specs=P(),
    )
    np.testing.assert_array_equal(f(x), x)


def test_the_table_has_each_parameters_sharding_and_its_bytes_on_a_device() -> None:
    """A kernel [2, 8, 16] over fsdp=4 is 256 B a device, with two moments 768 B; a bias of 16 is whole: 3 x 64 B."""
    mesh = official.mesh_of(2, 4)
    params = {"resblocks": {"c_fc": {"kernel": jnp.zeros((2, 8, 16)), "bias": jnp.zeros(16)}}}
    state = {"params": params, "opt_state": [{"mu": params, "nu": params}], "step": jnp.int32(0)}
    state = jax.device_put(state, state_shardings(state, mesh))
    lines = parameter_table(state, state["params"]).splitlines()
    assert lines[1].split() == ["resblocks/c_fc/bias", "16", "-", "0.000"]
    assert lines[2].split() == ["resblocks/c_fc/kernel", "2x8x16", "fsdp", "(axis", "2)", "0.001"]
    assert lines[3].split() == ["all", "0.0"]
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held == 3 * 256 + 3 * 64 + 4
    assert "0.0 MB in all" in lines[4]
