"""Eight CPU devices, so that every test may ask for a mesh; fixed before jax is imported."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Half of the time of these tests is compiling programs that run once.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

# One cache of compiled programs for all processes of a run of pytest-xdist, and those that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rice_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import numpy as np
import pytest
from hypothesis import settings

jax.config.update("jax_default_matmul_precision", "highest")

# A busy machine is no finding, and a finding is the same everywhere: HYPOTHESIS_PROFILE=fresh takes other examples.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("fresh", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

HERE = Path(__file__).parent
collect_ignore = ["gpu"]  # its tests need a GPU, and not this file: make test-gpu


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=HERE / "golden", help="folder of golden files, X.npz")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a golden file that holds what the test reads: `X_six_updates.npz` as updates_file, others golden_file.

    The marker `holds` names beginnings of arrays; a file needs one of them.
    """
    if not {"golden_file", "updates_file"} & set(metafunc.fixturenames):
        return
    folder = metafunc.config.getoption("--golden")
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise pytest.UsageError(f"--golden {folder}: holds no golden file; give a folder of X.npz.")
    marker = metafunc.definition.get_closest_marker("holds")
    for fixture, updates in (("golden_file", False), ("updates_file", True)):
        if fixture in metafunc.fixturenames:
            chosen = [path for path in files if path.stem.endswith("_six_updates") == updates]
            if marker:
                chosen = [path for path in chosen if any(name.startswith(marker.args) for name in np.load(path).files)]
            metafunc.parametrize(fixture, chosen, ids=[path.stem for path in chosen])


@pytest.fixture(scope="module", autouse=True)
def _forgotten_programs() -> Iterator[None]:
    """A process drops its compiled programs with each file: those of all are gigabytes, and nearly more mappings than
    Linux allows."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def no_silent_broadcast() -> Iterator[None]:
    """Makes a broadcast between arrays of different rank an error, for losses and ranks; models may broadcast."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted set of real photographs: 24 training clips of three products, one validation and three test clips."""
    from unittest import mock

    from data_pipeline.convert import Options, convert
    from tests import lpr_layouts
    from tests.lpr_layouts import TinyClip

    folder = tmp_path_factory.mktemp("data")
    clips = [TinyClip(k % 2, 1000 * (k + 20), 1 + k % 4, k % 3) for k in range(24)]
    with mock.patch.object(lpr_layouts, "TRAIN", clips):
        source = lpr_layouts.make_lpr750k(folder / "lpr750k")
    convert(Options(layout="lpr750k", source=source, output=folder / "records", workers=1))
    return folder / "records"
