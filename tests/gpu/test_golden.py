"""The golden tests of tests/test_golden.py, which compare with figures of the official code, on a GPU."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.test_golden import (
    HERE,
    test_clips_mined_at_each_update,
    test_encoder,
    test_gradients_of_icl,
    test_gradients_of_pfr,
    test_gradients_of_pmd,
    test_gradients_of_the_total,
    test_losses,
    test_matching,
    test_reconstruction,
)
from tests.test_golden import test_losses_of_the_updates as test_losses_of_the_updates

__all__ = [
    "test_clips_mined_at_each_update",
    "test_encoder",
    "test_gradients_of_icl",
    "test_gradients_of_pfr",
    "test_gradients_of_pmd",
    "test_gradients_of_the_total",
    "test_losses",
    "test_losses_of_the_updates",
    "test_matching",
    "test_reconstruction",
]
FILES = sorted(HERE.glob("*.npz"))


@pytest.fixture(params=[path for path in FILES if "_six_updates" not in path.stem], ids=lambda path: path.stem)
def golden_file(request: pytest.FixtureRequest) -> Iterator[Path]:
    """These tests trace parts of the model without the training step, which has the config's precision."""
    with jax.default_matmul_precision("highest"):
        yield request.param


@pytest.fixture(params=[path for path in FILES if "_six_updates" in path.stem], ids=lambda path: path.stem)
def updates_file(request: pytest.FixtureRequest) -> Path:
    return request.param
