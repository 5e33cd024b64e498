"""Training, resuming, evaluating and exporting on a GPU give what they give on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rice_jax
from rice_jax.weights.exports import load_programs

ROOT = Path(__file__).parents[2]
LOSSES = ("loss", "icl", "pmd", "pfr")


def command(module: str, *words: object, **environment: str) -> str:
    """Returns what the command prints; it must succeed."""
    line = [sys.executable, "-m", module, *map(str, words)]
    run = subprocess.run(
        line, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    return run.stdout


def train(records: Path, run: Path, **environment: str) -> str:
    words = ["--config", "smoke", f"--config.data.path={records}", "--workdir", run]
    return command("rice_jax.train", *words, **environment)


def updates(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    command("data_pipeline.synthetic", "--output", folder / "shop", "--products", 12, "--clips", 48)
    words = ["--layout", "lpr750k", "--source", folder / "shop", "--output", folder / "records"]
    command("data_pipeline.convert", *words)
    return folder / "records"


@pytest.fixture(scope="module")
def trained(records: Path) -> Path:
    said = train(records, records.parent / "run")
    assert f"{jax.default_backend()} device(s)" in said
    return records.parent / "run"


def test_the_losses_of_the_first_update_are_those_of_a_cpu(records: Path, trained: Path) -> None:
    train(records, records.parent / "on-cpu", JAX_PLATFORMS="cpu")
    here, there = updates(trained)[0], updates(records.parent / "on-cpu")[0]
    assert here["ledger"] == there["ledger"] and here["finite"]
    assert [here[name] for name in LOSSES] == pytest.approx([there[name] for name in LOSSES], abs=1e-5)


def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(records: Path, trained: Path) -> None:
    resumed = records.parent / "resumed"
    shutil.copytree(trained, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    assert "from update 3 to 6" in train(records, resumed)
    assert [line["step"] for line in updates(resumed)] == [1, 2, 3, 4, 5, 6]
    found, expected = ([line["loss"] for line in updates(run)] for run in (resumed, trained))
    assert found == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_has_the_scores_of_a_cpu(records: Path, trained: Path) -> None:
    scores = []
    for name, environment in (("here", {}), ("on-cpu", {"JAX_PLATFORMS": "cpu"})):
        output = records.parent / f"evaluation-{name}"
        words = ["--workdir", trained, "--data", records, "--output", output, "--score", "matching"]
        command("rice_jax.evaluate", *words, **environment)
        lines = [json.loads(line) for line in (output / "rankings.jsonl").read_text().splitlines()]
        scores.append([score for line in lines for _, score in line["top"]])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_exported_programs_give_the_models_figures(records: Path, trained: Path) -> None:
    command("rice_jax.weights", "export", trained, "--format", "stablehlo", "--output", records.parent / "programs")
    programs, model = load_programs(records.parent / "programs"), rice_jax.load(trained)
    rng, side = np.random.default_rng(0), model.config.data.image_size
    images = rng.integers(0, 256, (3, side, side, 3), np.uint8)
    frames = rng.integers(0, 256, (2, 3, side, side, 3), np.uint8)
    mask = np.ones((2, 3), np.int32)
    np.testing.assert_allclose(programs["encode_images"](images), model.encode_images(images), atol=1e-4)
    np.testing.assert_allclose(programs["match"](frames, mask, images), model.match(frames, mask, images), atol=1e-4)
