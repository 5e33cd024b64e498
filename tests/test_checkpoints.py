"""Checkpoints: what comes back, on which mesh, and what is refused."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import smoke
from rice_jax import model, step
from rice_jax.checkpoints import Checkpoints
from tests import official


def state_on(mesh: jax.sharding.Mesh, **changes: Any) -> tuple[step.State, step.State]:
    config = smoke.get_config()
    config.optimizer.ema_decay = 0.9
    config.model.update(changes)
    net = model.build(config)
    abstract = step.abstract_state(net, config, mesh)
    return abstract, step.init_state(net, config, abstract)


def test_a_state_of_eight_devices_comes_back_exactly_on_other_meshes(tmp_path: Path) -> None:
    _, state = state_on(official.mesh_of(2, 4))
    with Checkpoints(tmp_path, kept=2) as checkpoints:
        checkpoints.save(3, state, {"plan": "p"})
    for mesh in (official.mesh_of(1, 1), official.mesh_of(8, 1)):
        abstract, _ = state_on(mesh)
        found = Checkpoints(tmp_path)
        assert found.latest() == 3 and found.meta(3)["plan"] == "p" and found.meta(3)["step"] == 3
        for ours, theirs in zip(jax.tree.leaves(found.restore(3, abstract)), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.sharding.mesh.shape == mesh.shape


def test_the_state_is_born_sharded() -> None:
    _, state = state_on(official.mesh_of(2, 4))
    kernel = state.params["encoder"]["resblocks"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32, 16)
    assert state.opt_state[0].mu["encoder"]["resblocks"]["mlp"]["c_fc"]["kernel"].sharding == kernel.sharding


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    _, state = state_on(official.mesh_of(1, 1))
    with Checkpoints(tmp_path, kept=2) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, state, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_an_older_step_than_the_newest_is_not_lost_in_silence(tmp_path: Path) -> None:
    _, state = state_on(official.mesh_of(1, 1))
    with Checkpoints(tmp_path, kept=2) as checkpoints:
        checkpoints.save(5, state, {})
        with pytest.raises(ValueError, match="step 4 was not saved"):
            checkpoints.save(4, state, {})


def test_another_model_is_refused_leaf_by_leaf(tmp_path: Path) -> None:
    _, state = state_on(official.mesh_of(1, 1))
    with Checkpoints(tmp_path, kept=1) as checkpoints:
        checkpoints.save(1, state, {})
    abstract, _ = state_on(official.mesh_of(1, 1), embedding=8)
    with pytest.raises(
        ValueError, match=r"weights/params/encoder/proj: checkpoint \(32, 16\) float32, config \(32, 8\) float32"
    ):
        Checkpoints(tmp_path).restore_params(1, abstract)


def test_the_average_is_what_is_used(tmp_path: Path) -> None:
    abstract, state = state_on(official.mesh_of(1, 1))
    state = state._replace(average=jax.tree.map(lambda x: x + 1, state.average))
    with Checkpoints(tmp_path, kept=1) as checkpoints:
        checkpoints.save(1, state, {})
    params = Checkpoints(tmp_path).restore_params(1, abstract)
    np.testing.assert_array_equal(params["logit_scale"], state.params["logit_scale"] + 1)
