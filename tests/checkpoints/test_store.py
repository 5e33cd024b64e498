"""Checkpoints: saving and restoring on any mesh, retention, damaged steps, older and newer schemas, failed saves."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rice_jax
from configs import smoke
from rice_jax import errors
from rice_jax.checkpoints import reading, store
from rice_jax.checkpoints.reading import DamagedError, MissingError
from rice_jax.checkpoints.retention import steps_to_keep
from rice_jax.checkpoints.run_folder import write_config
from rice_jax.checkpoints.step_folder import SCHEMA, seal
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json
from rice_jax.models.rice import Rice, build_model
from rice_jax.training import step
from tests import official


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_fast() -> Iterator[None]:
    """As in a command, else Orbax prints pages for each damaged file; and without the pause before a second look."""
    errors.one_line_warnings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PAUSES", {MissingError: (0.0,), OSError: (0.0, 0.0)})
        yield


def configured(**changes: Any) -> tuple[Rice, Any]:
    config = smoke.get_config()
    config.optimizer.ema_decay = 0.9
    config.model.update(changes)
    return build_model(config), config


CONFIGURED = configured()


def state_on(mesh: jax.sharding.Mesh, **changes: Any) -> tuple[step.State, step.State]:
    net, config = configured(**changes)
    abstract = step.abstract_state(net, config, mesh)
    return abstract, step.init_state(net, config, abstract)


def same(a: Any, b: Any) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)


def flip(path: Path, position: int | None = None, bit: int = 3) -> None:
    """Flips one bit; by default of the byte in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(data)


def data_files(folder: Path) -> list[Path]:
    """Returns the files of an item's arrays. Orbax may read only one of them."""
    return list(folder.glob("**/d/*"))


def flip_data(folder: Path) -> None:
    for path in data_files(folder):
        flip(path)


@pytest.mark.parametrize(("saved", "opened"), [((2, 4), [(1, 1), (2, 1), (1, 4), (8, 1)]), ((1, 1), [(2, 4)])])
def test_a_state_comes_back_exactly_on_other_meshes(
    tmp_path: Path, saved: tuple[int, int], opened: list[tuple[int, int]]
) -> None:
    _, state = state_on(official.mesh_of(*saved))
    with Checkpoints(tmp_path, kept=2) as checkpoints:
        checkpoints.save(3, state, {"plan": "p"})
    for sizes in opened:
        mesh = official.mesh_of(*sizes)
        found = Checkpoints(tmp_path)
        assert found.latest() == 3 and found.meta(3)["plan"] == "p" and found.meta(3)["step"] == 3
        number, restored = found.restore(step.abstract_state(*CONFIGURED, mesh))
        assert number == 3 and same(restored, state)
        assert all(leaf.sharding.mesh.shape == mesh.shape for leaf in jax.tree.leaves(restored))


def test_a_new_state_is_sharded() -> None:
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


def test_saving_an_older_step_than_the_newest_is_an_error(tmp_path: Path) -> None:
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
        Checkpoints(tmp_path).restore_params(abstract, 1)


def test_the_moving_average_is_restored_as_the_parameters(tmp_path: Path) -> None:
    abstract, state = state_on(official.mesh_of(1, 1))
    state = state._replace(average=jax.tree.map(lambda x: x + 1, state.average))
    with Checkpoints(tmp_path, kept=1) as checkpoints:
        checkpoints.save(1, state, {})
    _, params = Checkpoints(tmp_path).restore_params(abstract)
    np.testing.assert_array_equal(params["logit_scale"], state.params["logit_scale"] + 1)


# --- Retention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"newest": None}, [2, 3, 4, 5, 6, 7]),
        ({"newest": 2}, [6, 7]),
        ({"newest": 9}, [2, 3, 4, 5, 6, 7]),
        ({"newest": 1, "every": 3}, [3, 6, 7]),
        ({"newest": 1, "recall": {2: 0.5, 3: 0.9, 5: 0.9, 99: 1.0}}, [5, 7]),  # of equal ones the newest; 99 is gone
    ],
)
def test_each_rule_keeps_its_steps(rules: dict[str, Any], expected: list[int]) -> None:
    assert steps_to_keep([2, 3, 4, 5, 6, 7], **{"every": 0, "recall": {}} | rules) == set(expected)
    assert steps_to_keep([], newest=1, every=1, recall={3: 1.0}) == set()


def test_newest_every_and_best_are_kept_together(tmp_path: Path) -> None:
    _, state = state_on(official.mesh_of(1, 1))
    with Checkpoints(tmp_path, kept=1, kept_every=4, kept_best=True) as checkpoints:
        for number, recall in [(2, 0.5), (3, 0.9), (4, 0.1), (5, 0.2), (6, 0.9), (7, 0.3)]:
            checkpoints.save(number, state, {})
            checkpoints.recall[number] = recall  # an evaluation comes after the save
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6", "7"]


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, step.State, step.State]:
    """A workdir with steps 3 and 6, the abstract state, and that of step 3."""
    workdir = tmp_path_factory.mktemp("two_steps")
    abstract, state = state_on(official.mesh_of(1, 1))
    with Checkpoints(workdir, kept=2) as checkpoints:
        checkpoints.save(3, state, {"plan": "p"})
        checkpoints.save(6, jax.tree.map(lambda x: x + 1, state), {"plan": "p"})
    return workdir, abstract, state


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "array data flipped": lambda folder: flip_data(folder / "weights"),
    "array data truncated": lambda folder: [truncate(path) for path in data_files(folder / "optimizer")],
    "array data gone": lambda folder: [path.unlink() for path in data_files(folder / "optimizer")],
    "metadata flipped": lambda folder: flip(folder / "weights" / "_METADATA", 0),
    "metadata truncated": lambda folder: truncate(folder / "weights" / "_METADATA"),
    "metadata gone": lambda folder: (folder / "optimizer" / "_METADATA").unlink(),
    "manifest truncated": lambda folder: truncate(folder / "weights" / "manifest.ocdbt"),
    "meta flipped": lambda folder: flip(folder / "meta" / "metadata", 12, bit=0),
    "meta truncated": lambda folder: truncate(folder / "meta" / "metadata"),
    "digest.json flipped": lambda folder: flip(folder / "digest.json", 700, bit=0),
    "digest.json truncated": lambda folder: truncate(folder / "digest.json"),
    "digest.json gone": lambda folder: (folder / "digest.json").unlink(),
    "a part gone": lambda folder: shutil.rmtree(folder / "weights"),
    "an empty folder": empty,
    "the folder of another step": lambda folder: shutil.copytree(
        folder.with_name("3"), folder, dirs_exist_ok=True, copy_function=shutil.copy
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_line_warns_about_a_damaged_step_and_the_step_before_is_used(
    two_steps: tuple[Path, step.State, step.State], tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    workdir, abstract, state = two_steps
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](tmp_path / "checkpoints" / "6")
    with Checkpoints(tmp_path, kept=2) as checkpoints:
        assert checkpoints.latest() is not None
        number, restored = checkpoints.restore(abstract)
        assert number == 3 and same(restored, state)
        printed = capfd.readouterr().err
        one_line = r"warning: .*/checkpoints/6.*; it is skipped and becomes 6\.damaged at the next save\.\n"
        assert re.fullmatch(one_line, printed), printed
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]  # not renamed yet
        checkpoints.save(6, state, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "6.damaged"]
    number, restored = Checkpoints(tmp_path).restore(abstract)
    assert number == 6 and same(restored, state)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("trials", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_random_flips_are_found_or_harmless(
    two_steps: tuple[Path, step.State, step.State], tmp_path: Path, trials: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bit flips anywhere in the files of a step: the restored numbers are exactly those of one of the two steps."""
    workdir, abstract, state = two_steps
    rng = np.random.default_rng(0)
    after = jax.tree.map(lambda x: x + 1, state)
    outcomes = []
    for trial in range(trials):
        folder = tmp_path / str(trial)
        shutil.copytree(workdir, folder)
        files = sorted(path for path in (folder / "checkpoints" / "6").rglob("*") if path.is_file())
        path = files[trial % len(files)]
        if path.stat().st_size:
            flip(path, int(rng.integers(path.stat().st_size)), bit=int(rng.integers(8)))
        number, restored = Checkpoints(folder).restore(abstract)
        assert same(restored, state if number == 3 else after), path
        outcomes.append(number)
        shutil.rmtree(folder)
    assert set(outcomes) == {3, 6}
    assert all(line.startswith("warning: ") for line in capfd.readouterr().err.splitlines())


def test_a_folder_that_is_not_named_after_a_step_is_skipped_with_a_warning(
    two_steps: tuple[Path, step.State, step.State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(two_steps[0], tmp_path, dirs_exist_ok=True)
    for name in ("9.bak", "007", "x", "9.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert Checkpoints(tmp_path).steps() == [3, 6]
    printed = capsys.readouterr().err
    assert printed.count("is not named after a step") == 3 and printed.count("\n") == 3


def test_without_an_undamaged_step_restoring_is_an_error(
    two_steps: tuple[Path, step.State, step.State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, abstract, _ = two_steps
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for number in ("3", "6"):
        flip_data(tmp_path / "checkpoints" / number / "weights")
    checkpoints = Checkpoints(tmp_path, kept=2)
    with pytest.raises(ValueError, match=r"no undamaged checkpoint is left \(damaged: 3, 6\); restore one from a copy"):
        checkpoints.restore(abstract)
    with pytest.raises(ValueError, match="or move that folder away to begin anew"):
        checkpoints.latest()
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    assert Checkpoints(tmp_path, kept=2).latest() is None


def test_a_killed_first_save_counts_as_no_checkpoint_and_two_unfinished_ones_as_damage(
    two_steps: tuple[Path, step.State, step.State], tmp_path: Path
) -> None:
    shutil.copytree(two_steps[0] / "checkpoints" / "3", tmp_path / "checkpoints" / "3")
    (tmp_path / "checkpoints" / "3" / "digest.json").unlink()
    assert Checkpoints(tmp_path, kept=1).latest() is None
    shutil.copytree(tmp_path / "checkpoints" / "3", tmp_path / "checkpoints" / "6")
    with pytest.raises(ValueError, match="no undamaged checkpoint is left"):
        Checkpoints(tmp_path, kept=1).latest()


# --- Schemas ----------------------------------------------------------------------------------------------------------


def test_a_step_without_digests_is_restored_with_a_warning(
    two_steps: tuple[Path, step.State, step.State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, abstract, state = two_steps
    shutil.copytree(workdir / "checkpoints" / "3", tmp_path / "checkpoints" / "3")
    (tmp_path / "checkpoints" / "3" / "digest.json").unlink()
    (tmp_path / "checkpoints" / "3" / "meta" / "metadata").write_text('{"step": 3, "version": "0.1.0", "plan": "p"}')
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.meta(3)["plan"] == "p"
    number, restored = checkpoints.restore(abstract)
    assert number == 3 and same(restored, state)
    assert "is of a version without digests" in capsys.readouterr().err


def test_a_step_of_a_newer_version_is_refused(two_steps: tuple[Path, step.State, step.State], tmp_path: Path) -> None:
    shutil.copytree(two_steps[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "6" / "digest.json"
    mark = json.loads(path.read_text()) | {"schema": SCHEMA + 1}
    del mark["sha256"]
    path.write_text(json.dumps(seal(mark)))
    with pytest.raises(ValueError, match=r"checkpoints/6 has schema 3 .* use that version or a newer one"):
        Checkpoints(tmp_path, kept=1)


def test_the_file_that_a_checkpoint_of_another_version_is_told_by_has_its_version(
    two_steps: tuple[Path, step.State, step.State],
) -> None:
    about = json.loads((two_steps[0] / "checkpoints" / "6" / "meta" / "metadata").read_text())
    assert about["version"] == rice_jax.__version__


# --- Saves that fail --------------------------------------------------------------------------------------------------


def test_a_failed_save_is_a_warning_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is raised in the background, as for a full disk."""
    _, state = state_on(official.mesh_of(1, 1))
    full = OSError(28, "No space left on device")
    with Checkpoints(tmp_path, kept=2) as checkpoints:
        monkeypatch.setattr(checkpoints._orbax, "save", lambda *_: (_ for _ in ()).throw(full))
        checkpoints.save(1, state, {})
        checkpoints._join()
        assert "the checkpoint of step 1 was not saved (no space left there)" in capsys.readouterr().err
        assert not checkpoints.failed()  # too early to try again
        monkeypatch.setattr(store, "RETRY_SECONDS", 0.0)
        assert checkpoints.failed() and checkpoints.steps() == []
        monkeypatch.undo()
        checkpoints.save(2, state, {})
    assert Checkpoints(tmp_path).steps() == [2]


def test_the_last_save_is_retried_and_then_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state = state_on(official.mesh_of(1, 1))
    monkeypatch.setattr(store, "FINAL_PAUSES", (0.0, 0.0))
    tries = []

    def fails(*_: object, **__: object) -> None:
        tries.append(1)
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, kept=2)
    checkpoints.finish(2, state, {})
    monkeypatch.setattr(checkpoints._orbax, "save", fails)
    with pytest.raises(ValueError, match=r"step 4 could not be saved \(no space left there\).* goes on from step 2"):
        checkpoints.finish(4, state, {})
    assert len(tries) == 2
    with pytest.raises(ValueError, match="the newest checkpoint was not saved"):
        checkpoints.__exit__(None)  # nor does a with block end without an error


def test_weights_beside_damaged_moments_are_restored(
    two_steps: tuple[Path, step.State, step.State], tmp_path: Path
) -> None:
    workdir, abstract, _ = two_steps
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    flip_data(tmp_path / "checkpoints" / "6" / "optimizer")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_params(abstract, 6)[1]["logit_scale"] is not None
    with pytest.raises(
        DamagedError, match=r"checkpoints/6 is damaged \(.*; restore it from a copy, or take another .*3"
    ):
        checkpoints.restore(abstract, 6)


def test_a_library_call_changes_no_hook_and_a_command_prints_one_line_for_a_damaged_step(
    two_steps: tuple[Path, step.State, step.State], tmp_path: Path
) -> None:
    workdir, _, _ = two_steps
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for path in data_files(tmp_path / "checkpoints" / "6" / "weights"):
        truncate(path)
    write_config(tmp_path, to_json(CONFIGURED[1]))
    code = """
import gc, logging, sys, warnings
import rice_jax.retrieval.model  # so that jax and Orbax have changed what they change when they are imported
from rice_jax import errors

def state():
    hooks = sys.excepthook, sys.unraisablehook, sys.displayhook
    return hooks, list(warnings.filters), logging.getLogger("absl").level, logging.root.level, sys.stdout

def main(folder):
    print(rice_jax.load(folder).step)
    gc.collect()  # of the coroutines about which Python complains

before = state()
main(sys.argv[1])
assert state() == before
print("as a command:", file=sys.stderr)
errors.run(main, sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "3\n3\n"), done.stderr
    as_command = done.stderr.partition("as a command:\n")[2]
    assert as_command.count("\n") == 1 and "it is skipped." in as_command, done.stderr
