"""Small models whose weights are known, and the command in this process."""

from pathlib import Path

import numpy as np
import pytest

from rice_jax.weights.__main__ import main, parse
from tests import clip_files, official

GOLDEN = Path(__file__).parents[1] / "golden"


def call(*words: object) -> None:
    """Runs `python -m rice_jax.weights` with these words; its errors are raised."""
    main(parse([str(word) for word in words]))


@pytest.fixture(scope="module")
def tower() -> clip_files.Tensors:
    return clip_files.vision_tower()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Returns the tensors of an official model, from figures that the official code computed."""
    return {name: array.copy() for name, array in official.load(GOLDEN / "rice_w64.npz").group("param/").items()}
