"""Exported programs give the model's figures in a process that has jax and nothing of rice_jax."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from jax import export
from safetensors.numpy import load_file

from rice_jax.retrieval.model import Model
from rice_jax.weights import exports
from tests import official
from tests.retrieval.test_matching import random_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    m = random_model(official.mesh_of(1, 2), **{"eval_flip": True})  # parameters split over two devices
    folder = tmp_path_factory.mktemp("exports") / "programs"
    exports.export_programs(m, folder)
    return m, folder


def pictures(clips: int, slots: int, images: int) -> dict[str, Any]:
    rng = np.random.default_rng(clips)
    frames = rng.integers(0, 256, (clips, slots, 32, 32, 3), np.uint8)
    mask = (np.arange(slots) < rng.integers(1, slots + 1, (clips, 1))).astype(np.int32)
    return {"frames": frames, "mask": mask, "images": rng.integers(0, 256, (images, 32, 32, 3), np.uint8)}


def test_a_fresh_process_with_jax_alone_gives_the_models_figures(made: tuple[Model, Path], tmp_path: Path) -> None:
    m, folder = made
    inputs = pictures(clips=5, slots=4, images=7)
    np.savez(tmp_path / "inputs.npz", **inputs)
    script = f"""
import sys
import numpy as np
{inspect.getsource(exports.load_programs)}
programs = load_programs({str(folder)!r})
x = np.load("inputs.npz")
clips = x["frames"], x["mask"]
np.savez(
    "outputs.npz",
    encode_images=programs["encode_images"](x["images"]),
    encode_clips=programs["encode_clips"](*clips),
    match=programs["match"](*clips, x["images"]),
)
ours = [name for name in sys.modules if name.partition(".")[0] in ("rice_jax", "data_pipeline", "flax", "jaxtyping")]
assert not ours, ours
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    clips = inputs["frames"], inputs["mask"]
    expected = {
        "encode_images": m.encode_images(inputs["images"]),
        "encode_clips": m.encode_clips(*clips),
        "match": m.match(*clips, inputs["images"]),
    }
    with np.load(tmp_path / "outputs.npz") as found:
        assert {name: found[name].shape for name in found.files} == {name: x.shape for name, x in expected.items()}
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, atol=1e-5, err_msg=name)


def test_a_file_is_for_several_platforms_and_any_batch_and_holds_no_parameters(
    made: tuple[Model, Path],
) -> None:
    m, folder = made
    about = json.loads((folder / "programs.json").read_text())
    assert list(about["programs"]) == ["encode_images", "encode_clips", "match"]
    assert about["model"] == m.fingerprint and about["mirror_images_added"] is True
    parameters = load_file(folder / "parameters.safetensors")
    np.testing.assert_array_equal(parameters["encoder/conv1/kernel"], m.params["encoder"]["conv1"]["kernel"])
    for name, said in about["programs"].items():
        data = (folder / f"{name}.stablehlo").read_bytes()
        assert len(data) < 100_000
        exported = export.deserialize(bytearray(data))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert [f"{x.dtype} {x.shape}" for x in exported.in_avals[len(parameters) :]] == said["inputs"]
    assert about["programs"]["match"]["inputs"][0] == "uint8 (b, n, 32, 32, 3)"


def test_files_of_a_newer_jax_are_refused_with_both_versions(made: tuple[Model, Path], tmp_path: Path) -> None:
    about = json.loads((made[1] / "programs.json").read_text())
    (tmp_path / "programs.json").write_text(json.dumps(about | {"jax": [99, 1, 0]}))
    with pytest.raises(ValueError, match=r"written by jax 99\.1\.0, which jax .* may not read; install jax>=99\.1\.0"):
        exports.load_programs(tmp_path)


@pytest.mark.parametrize("pfr", [0.0, 1.0])
def test_a_model_without_pmd_has_no_program_match(tmp_path: Path, pfr: float) -> None:
    m = random_model(official.mesh_of(1, 1), **{"loss.pmd": 0.0, "loss.pfr": pfr})
    exports.export_programs(m, tmp_path)  # an empty folder will do
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "encode_clips.stablehlo", "encode_images.stablehlo", "parameters.safetensors", "programs.json",
    ]  # fmt: skip


def test_programs_with_other_figures_than_the_models_are_not_exported(tmp_path: Path) -> None:
    m = random_model(official.mesh_of(1, 1), **{"loss.pmd": 0.0, "loss.pfr": 0.0})
    load = exports.load_programs

    def load_wrong(folder: Path) -> Any:
        return load(folder) | {"encode_clips": lambda *clips: load(folder)["encode_clips"](*clips) + 1e-4}

    with (
        mock.patch.object(exports, "load_programs", load_wrong),
        pytest.raises(ValueError, match=r"encode_clips read back differs from the model by 1\.0e-04; nothing was"),
    ):
        exports.export_programs(m, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_not_changed(made: tuple[Model, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="needs an empty or new folder"):
        exports.export_programs(made[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
