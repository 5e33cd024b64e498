"""Eight CPU devices, so that every test may ask for a mesh; fixed before jax is imported."""

import os
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

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # a broadcast nobody meant is an error
jax.config.update("jax_default_matmul_precision", "highest")

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=HERE / "golden", help="folder of golden rice_*.npz files")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a golden file: those with inputs, and those of updates, which belong to one of them."""
    folder = metafunc.config.getoption("--golden")
    for name, pattern in (("golden_file", "rice_*.npz"), ("updates_file", "rice_*_updates.npz")):
        if name in metafunc.fixturenames:
            files = sorted(folder.glob(pattern))
            if name == "golden_file":
                files = [path for path in files if not path.stem.endswith("_updates")]
            metafunc.parametrize(name, files, ids=[path.stem for path in files])


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
