"""Switches of jax, as JAX_DEBUG_NANS=1: they work in the guarded update, or one line refuses them."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rice_jax
from configs import smoke
from rice_jax import evaluate, train
from rice_jax.training import step


@pytest.fixture
def switch() -> Iterator[object]:
    names = (
        "jax_debug_nans", "jax_debug_infs", "jax_enable_x64", "jax_disable_jit", "jax_transfer_guard",
        "jax_numpy_rank_promotion", "jax_numpy_dtype_promotion",
    )  # fmt: skip
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


@pytest.mark.parametrize(
    ("name", "message"),
    [("jax_enable_x64", "JAX_ENABLE_X64: training computes in float32 .*; unset it"),
     ("jax_disable_jit", "JAX_DISABLE_JIT: updates need compiling, .*; unset it")],
)  # fmt: skip
def test_a_switch_that_cannot_work_is_refused_before_anything_is_made(
    switch, tmp_path: Path, name: str, message: str
) -> None:
    switch(name, True)
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(smoke.get_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_transfer_guard", "disallow"),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
    ],
)
def test_a_switch_meant_for_other_code_ends_no_command(
    switch, converted: Path, tmp_path: Path, name: str, value: str
) -> None:
    config = smoke.get_config()
    config.data.path, config.num_updates, config.optimizer.warmup_updates = str(converted), 1, 0
    switch(name, value)
    figures = train.train_and_evaluate(config, tmp_path / "run")
    model = rice_jax.load(tmp_path / "run")
    size = config.data.image_size
    assert model.match(np.zeros((1, 2, size, size, 3), np.uint8), None, np.zeros((1, size, size, 3), np.uint8)).shape
    evaluate.command(["--workdir", str(tmp_path / "run"), "--data", str(converted), "--split", "val"])
    written = json.loads((tmp_path / "run" / "evaluation-val" / "metrics.json").read_text())
    assert written["recall@1"] == figures["recall@1"]
