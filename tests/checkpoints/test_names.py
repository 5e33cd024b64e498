"""A run's folder may have any name: it is no pattern, no option and no address."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rice_jax.checkpoints.store import Checkpoints
from rice_jax.training.step import State
from tests.odd_names import ODD_NAMES

STATE = State(jnp.int32(3), {"kernel": jnp.arange(6.0).reshape(2, 3)}, {"mu": jnp.ones(4)}, {})
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


def save_and_reopen(workdir: Path) -> None:
    with Checkpoints(workdir, kept=1) as checkpoints:
        checkpoints.try_out()
        checkpoints.save(6, STATE, {"plan": "p"})
    assert os.listdir(workdir / "checkpoints") == ["6"]
    found = Checkpoints(workdir)
    number, state = found.restore(ABSTRACT)
    assert number == 6 and found.meta(6)["plan"] == "p"
    np.testing.assert_array_equal(state.params["kernel"], STATE.params["kernel"])


def test_a_run_saves_and_reopens_whatever_its_folder_is_called(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ODD_NAMES:
        (tmp_path / name).mkdir()
        save_and_reopen(Path(name))
    assert sorted(os.listdir(tmp_path)) == sorted(ODD_NAMES)
    assert capfd.readouterr().err == ""


def test_a_path_with_dots_is_what_the_system_makes_of_it(tmp_path: Path) -> None:
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "disk" / "run").mkdir()
    save_and_reopen(tmp_path / "link" / ".." / "run")
    assert (tmp_path / "disk" / "run" / "checkpoints" / "6").is_dir() and not (tmp_path / "run").exists()


def test_a_path_that_is_too_long_is_refused_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path
    monkeypatch.chdir(workdir)
    while len(str(workdir)) < 3850:
        workdir = workdir / ("x" * 200)
        os.mkdir("x" * 200)
        os.chdir("x" * 200)
    with pytest.raises(ValueError, match=r"a checkpoint cannot be saved there \(.*, or give another --workdir"):
        Checkpoints(workdir / ("y" * (4060 - len(str(workdir)))), kept=1).try_out()


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    workdir = Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe9"))
    with pytest.raises(ValueError, match=r"latin-\\xe9': the name of this folder is not UTF-8; rename it\."):
        Checkpoints(workdir, kept=1)


def test_opened_folders_are_closed(tmp_path: Path) -> None:
    save_and_reopen(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Checkpoints(tmp_path).restore(ABSTRACT)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
