"""Finds jax's devices. If those that the user asked for are missing, the error says why, and what to do."""

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Platform(NamedTuple):
    name: str
    drivers: tuple[str, ...]  # files, of which a machine with such a device has one
    plugins: tuple[str, ...]  # Python modules, of which jax needs one
    install: str
    visible: tuple[str, ...]  # environment variables that hide all its devices if they are empty or -1

    @property
    def is_here(self) -> bool:
        return any(Path(path).exists() for path in self.drivers)


NVIDIA = Platform(
    "NVIDIA GPU",
    ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"),
    ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "pip install 'rice_jax[cuda]'",
    ("CUDA_VISIBLE_DEVICES",),
)
AMD = Platform(
    "AMD GPU",
    ("/dev/kfd",),
    ("jax_rocm7_plugin", "jax_rocm60_plugin"),
    "install jax's ROCm plugin",
    ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
)
TPU = Platform("TPU", ("/dev/accel0", "/dev/vfio/0"), ("libtpu",), "pip install 'rice_jax[tpu]'", ())
PLATFORMS = {"cuda": NVIDIA, "gpu": NVIDIA, "rocm": AMD, "tpu": TPU}  # by their names in JAX_PLATFORMS


def find_devices(*, local: bool = False) -> list[jax.Device]:
    """Returns the devices of all processes, or those of this one if `local`.

    Raises ValueError if JAX_PLATFORMS (or the older JAX_PLATFORM_NAME) asks for devices that jax does not find, or,
    without these variables, if a device does not start. An error of the CPU backend passes.
    """
    try:
        return jax.local_devices() if local else jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that some platform started
        settings: Any = jax.config
        variable, asked = "JAX_PLATFORMS", settings.jax_platforms
        if not asked:
            variable, asked = "JAX_PLATFORM_NAME", os.environ.get("JAX_PLATFORM_NAME")
        line = _line(error)
        if asked == "cpu" or (not asked and "'cpu'" in line):  # a CPU is never missing
            raise
        if not asked:
            raise ValueError(
                f"jax cannot start the devices of this machine: {line}. Look at their driver and at what else uses "
                "them, or set JAX_PLATFORMS=cpu to run on the CPUs."
            ) from error
        raise ValueError(_why_missing(variable, asked, error)) from error


def _line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 300 characters; without a message the error's class."""
    return (str(error).splitlines() or [""])[0][:300].rstrip(".") or type(error).__name__


def _why_missing(variable: str, value: str, error: BaseException) -> str:
    """Returns one line: what was asked for, why it is missing, what this machine has, and what to install or unset."""
    reasons, remedies = [], []
    for name in value.split(","):
        platform = PLATFORMS.get(name)
        if platform is None:
            continue
        if not platform.is_here:
            reasons.append(f"this machine has no {platform.name}")
            continue
        if not any(map(importlib.util.find_spec, platform.plugins)):
            reasons.append(f"jax's plugin for the {platform.name} is not installed")
            remedies.append(platform.install)
        for hiding in (name for name in platform.visible if os.environ.get(name, "0") in ("", "-1")):
            reasons.append(f"{hiding}={os.environ[hiding]} hides every {platform.name}")
            remedies.append(f"unset {hiding}")
    if not reasons:
        reasons.append(f"jax says: {_line(error)}")
    here = ["CPUs", *(platform.name for platform in (NVIDIA, AMD, TPU) if platform.is_here)]
    remedies.append(f"unset {variable} to run on what jax finds, or set {variable}=cpu")
    return (
        f"{variable}={value} asks for devices that are not there: {'; '.join(reasons)}. This machine has "
        f"{', '.join(here)}; {', or '.join(remedies)}."
    )
