"""Switches of jax, as JAX_DEBUG_NANS=1: they work in the guarded update, or one line refuses them."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from rice_jax import train
from rice_jax.training import step


@pytest.fixture
def switch() -> Iterator[object]:
    names = ("jax_debug_nans", "jax_debug_infs", "jax_enable_x64", "jax_disable_jit")
    before = {name: getattr(jax.config, name) for name in names}
    yield jax.config.update
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(("name", "values"), [("jax_debug_nans", [1.0, -1.0]), ("jax_debug_infs", [1.0, 0.0])])
def test_the_guarded_update_finds_the_number_each_time(switch, name: str, values: list[float]) -> None:
    """Also after jax has turned the switch off in this thread for a moment."""
    good, bad = (jax.device_put(np.full(3, value, np.float32)) for value in values)
    switch(name, True)
    with jax.debug_nans(False), jax.debug_infs(False):
        pass
    update = jax.jit(lambda x: jnp.log(x) * 2.0)
    for _ in range(3):
        with step.guarded():
            update(good)
    with pytest.raises(FloatingPointError, match="encountered in"), step.guarded():
        update(bad)
    assert step.is_looked_at()


def test_without_a_switch_a_hidden_copy_is_an_error() -> None:
    assert not step.is_looked_at()
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"), step.guarded():
        jnp.add(jnp.ones(3), np.ones(3, np.float32))


def test_a_switch_that_cannot_work_is_refused_before_anything_is_made(switch, tmp_path: Path) -> None:
    switch("jax_enable_x64", True)
    with pytest.raises(ValueError, match=r"JAX_ENABLE_X64: training computes in float32 .*; unset it"):
        train.train_and_evaluate(smoke.get_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
