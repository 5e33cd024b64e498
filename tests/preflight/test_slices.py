"""Topologies of several TPU slices."""

import importlib.util

import pytest

from configs import smoke
from rice_jax.preflight import topologies
from rice_jax.preflight.advice import with_changes
from rice_jax.preflight.assessment import assess_in_subprocess

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'rice_jax[preflight]'"
)


def test_a_number_before_the_chip_is_that_of_its_slices() -> None:
    found = topologies.parse("2xv5e:16x16")
    assert (found.size, found.slices, topologies.parse("v5e:2x4").slices) == (512, 2, 1)
    assert topologies.parse("12xv5p:2x2x2").size == 96


@pytest.mark.parametrize("name", ["0xv5e:2x2", "2xcpu:8", "xv5e:2x2", "2x2xv5e:2x2", "-1xv5e:2x2", "2xv5e"])
def test_other_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^--topology {name}: "):
        topologies.parse(name)


@needs_libtpu
def test_a_step_compiles_for_two_slices_and_splits_parameters_inside_each() -> None:
    config = with_changes(smoke.get_config(), {"model.layers": 1, "loss.pmd": 0.0, "loss.pfr": 0.0, "batch_size": 32})
    topology = topologies.parse("2xv5e:2x2")
    report = assess_in_subprocess(with_changes(config, {"mesh.fsdp": 4}), topology)
    assert report.fits and report.mesh == {"data": 2, "fsdp": 4} and report.hosts == 2
    with pytest.raises(ValueError, match=r"mesh\.fsdp 8 does not divide the 4 devices of a slice"):
        assess_in_subprocess(with_changes(config, {"mesh.fsdp": 8}), topology)
