"""Devices that JAX_PLATFORMS asks for and that are not there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from rice_jax.parallel import devices
from rice_jax.parallel.devices import find_devices

ROOT = Path(__file__).parents[2]
LOAD = "import rice_jax; rice_jax.load('nowhere')"
FIND = "from rice_jax.parallel.devices import find_devices; find_devices()"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *words]
    return subprocess.run(
        line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("rice_jax.train", ["--config", "smoke", "--config.data.path={data}", "--workdir", "{tmp}/run"]),
        ("rice_jax.evaluate", ["--workdir", "{tmp}/run", "--data", "{data}"]),
        ("rice_jax.weights", ["import", "{tmp}/ViT.pt", "--output", "{tmp}/out"]),
        ("rice_jax.weights", ["export", "{run}", "--format", "official", "--output", "{tmp}/out"]),
        ("rice_jax.explain", ["--workdir", "{run}", "--step", "1", "--data", "{data}"]),
        ("tests.gpu", []),
    ],
)
def test_a_command_says_in_one_line_what_was_asked_and_what_to_do(
    converted: Path, tmp_path: Path, module: str, words: list[str]
) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    (tmp_path / "trained" / "checkpoints").mkdir(parents=True)
    config = run("-c", f"from configs import smoke; from rice_jax.config import to_json; c = smoke.get_config();"
                       f"c.data.path = {str(converted)!r}; print(to_json(c), end='')")  # fmt: skip
    (tmp_path / "trained" / "config.json").write_text(config.stdout)
    (tmp_path / "trained" / "metrics.jsonl").write_text("")
    places = {"data": converted, "tmp": tmp_path, "run": tmp_path / "trained"}
    ended = run("-m", module, *(word.format(**places) for word in words), JAX_PLATFORMS="cuda")
    assert ended.returncode == 1, ended
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: JAX_PLATFORMS=cuda asks for"), ended
    assert "this machine has no NVIDIA GPU. This machine has CPUs" in ended.stderr
    assert "unset JAX_PLATFORMS to run on what jax finds, or set JAX_PLATFORMS=cpu." in ended.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "environment", "said"),
    [
        (
            LOAD,
            {"JAX_PLATFORMS": "tpu"},
            "JAX_PLATFORMS=tpu asks for devices that are not there: this machine has no TPU",
        ),
        (
            FIND,
            {"JAX_PLATFORMS": "rocm"},
            "JAX_PLATFORMS=rocm asks for devices that are not there: this machine has no AMD",
        ),
        (
            FIND,
            {"JAX_PLATFORMS": "warp"},
            "JAX_PLATFORMS=warp asks for .*: jax says: Unable to initialize backend 'warp'",
        ),
        (FIND, {"JAX_PLATFORMS": "", "JAX_PLATFORM_NAME": "gpu"}, "JAX_PLATFORM_NAME=gpu asks for .* no NVIDIA GPU"),
    ],
)
def test_load_and_find_devices_say_so_too(code: str, environment: dict[str, str], said: str) -> None:
    ended = run("-c", code, **environment)
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and lines[-1].startswith("ValueError: ")
    assert re.search(said, lines[-1]), lines[-1]


def test_preflight_and_show_need_no_device(tmp_path: Path) -> None:
    words = ("--config", "smoke", "--config.loss.pmd=0", "--config.loss.pfr=0", "--topology", "cpu:2")
    ended = run("-m", "rice_jax.preflight", *words, JAX_PLATFORMS="cuda")
    assert ended.returncode == 0 and "memory of a device: fits" in ended.stdout, ended
    ended = run(
        "-m", "rice_jax.show", "--evaluation", str(tmp_path), "--data", "d", "--output", "o.png", JAX_PLATFORMS="tpu"
    )
    assert ended.returncode == 1 and "rankings.jsonl: no such file" in ended.stderr, ended


def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, plugin: bool, asked: str = "cuda") -> None:
    """Makes this machine one with an NVIDIA driver, on which jax asserts that it found no platform."""
    platform = devices.NVIDIA._replace(drivers=(str(tmp_path),), plugins=("json",) if plugin else ("no_such_plugin",))
    monkeypatch.setattr(devices, "NVIDIA", platform)
    monkeypatch.setattr(devices, "PLATFORMS", devices.PLATFORMS | {"cuda": platform, "gpu": platform})

    def fail() -> Any:
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    jax.config.update("jax_platforms", asked)


@pytest.fixture
def platforms_restored() -> Any:
    before = jax.config.jax_platforms
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.usefixtures("platforms_restored")
def test_a_gpu_without_plugin_gets_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here(monkeypatch, tmp_path, plugin=False)
    with pytest.raises(ValueError, match=r"plugin for the NVIDIA GPU is not installed. This machine has CPUs, NVIDIA "
                                         r"GPU; pip install 'rice_jax\[cuda\]', or unset"):  # fmt: skip
        find_devices()


@pytest.mark.usefixtures("platforms_restored")
def test_a_device_that_does_not_start_unasked_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("Unable to initialize backend 'cuda': no driver.")

    monkeypatch.delenv("JAX_PLATFORM_NAME", raising=False)
    monkeypatch.setattr(jax, "devices", fail)
    jax.config.update("jax_platforms", None)
    with pytest.raises(ValueError, match=r"'cuda': no driver. Look at .*, or set JAX_PLATFORMS=cpu to run on the CPUs"):
        find_devices()


@pytest.mark.usefixtures("platforms_restored")
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_a_variable_hides_gets_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hidden: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    here(monkeypatch, tmp_path, plugin=True)
    with pytest.raises(ValueError, match=rf"CUDA_VISIBLE_DEVICES={hidden} hides every NVIDIA GPU.*; unset CUDA_VIS"):
        find_devices()
