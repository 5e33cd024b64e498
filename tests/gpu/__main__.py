"""Runs the tests of this folder on this machine's GPU: `make test-gpu`. Words after it go to pytest, such as -k golden.

The other tests run on eight CPU devices, which tests/conftest.py sets up; so it is not loaded here.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cuda")  # also of the commands that the tests start
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # they share the GPU with this process
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"

import pytest

from rice_jax.errors import run
from rice_jax.parallel.devices import find_devices

HERE = Path(__file__).parent


def main(words: list[str]) -> None:
    """Raises SystemExit with pytest's status, and ValueError if jax finds no GPU."""
    platforms = {device.platform for device in find_devices()}
    if platforms != {"gpu"}:
        raise ValueError(
            f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: found {', '.join(platforms)} devices, needs a GPU; unset it."
        )
    raise SystemExit(pytest.main(["--confcutdir", str(HERE), str(HERE), *words]))


if __name__ == "__main__":
    run(main, sys.argv[1:])
