"""What a run goes on from: a copy of the checkpoints alone, and a checkpoint that does not fit into memory."""

import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

import rice_jax
from configs import smoke
from rice_jax import train
from rice_jax.checkpoints.orbax import Orbax
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json


def smoke_config(data: Path, **changes: Any) -> Any:
    config = smoke.get_config()
    config.data.path = str(data)
    config.data.eval_split = ""
    config.update({"num_updates": 3, **changes})
    return config


@pytest.fixture(scope="module")
def run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(smoke_config(converted), workdir)
    return workdir


@pytest.fixture
def half(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run / "checkpoints", tmp_path / "half" / "checkpoints")
    return tmp_path / "half"


def test_a_copy_of_the_checkpoints_alone_is_opened_with_the_config_they_were_saved_with(run: Path, half: Path) -> None:
    model = rice_jax.load(half)
    assert model.step == 3 and to_json(model.config) == (run / "config.json").read_text()
    assert model.fingerprint == rice_jax.load(run).fingerprint


def test_training_goes_on_from_such_a_copy_only_with_its_config(run: Path, half: Path, converted: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)holds a run with another config.*optimizer.learning_rate: 0.001 -> 0.5"):
        train.train_and_evaluate(smoke_config(converted, optimizer={"learning_rate": 0.5}), half)
    assert not (half / "config.json").exists()
    train.train_and_evaluate(smoke_config(converted), half)
    assert (half / "config.json").read_text() == (run / "config.json").read_text()


def test_a_damaged_config_is_named_and_the_checkpoints_replace_it(half: Path) -> None:
    (half / "config.json").write_text('{"batch_si')
    with pytest.raises(ValueError, match=r"restore config.json, or remove it: the checkpoints have a copy"):
        rice_jax.load(half)
    (half / "config.json").unlink()
    assert rice_jax.load(half).step == 3


def test_a_folder_with_neither_config_is_refused(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "meta", lambda self, step: {"plan": "p"})
    with pytest.raises(FileNotFoundError, match=r"found no config\.json, nor a config in the checkpoint"):
        rice_jax.load(half)


def test_a_state_that_does_not_fit_names_fields_that_may_change_and_keeps_the_checkpoint(
    half: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")

    monkeypatch.setattr(Orbax, "restore", full)
    remedy = r"(?s)checkpoints/3: memory ran out .*End what else uses the memory.*--config.mesh.data=2 "
    remedy += r"--config.mesh.fsdp=4$"
    with pytest.raises(MemoryError, match=remedy):
        train.train_and_evaluate(smoke_config(converted), half)
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["3"]


def test_a_workdir_where_no_checkpoint_can_be_opened_is_refused_before_the_first_update(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a name that Orbax takes for a pattern: what it writes has no manifest."""
    real = Orbax.wait_until_finished

    def without_manifest(self: Orbax) -> None:
        real(self)
        for path in tmp_path.rglob("weights/manifest.ocdbt"):
            path.unlink()

    monkeypatch.setattr(Orbax, "wait_until_finished", without_manifest)
    with pytest.raises(
        ValueError,
        match=r"cannot be saved there \(it cannot be read back: no manifest.ocdbt in weights\); remove the c",
    ):
        train.train_and_evaluate(smoke_config(converted), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
