"""Devices that need not be here: slices of TPUs as libtpu describes them, and what each chip has."""

import importlib.util
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

GIB = 2**30


class Chip(NamedTuple):
    kind: str  # jax's device_kind
    memory: int  # bytes that a program may fill
    flops: float  # bfloat16 FLOP a second
    sent: float  # bytes a second to its neighbours, over all its links together
    shapes: tuple[str, ...]  # of slices


SQUARE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = tuple(
    f"{a}x{b}x{c}" for a in (4, 8, 12, 16) for b in range(a, 17, 4) for c in range(b, 25, 4)
)  # whole cubes of 4x4x4; 16x16x24 is the largest slice
CHIPS = {
    # Memory: beyond it libtpu 0.0.52 refuses a program; less than the chip has, since the runtime keeps some.
    # FLOP and links: the tables of https://cloud.google.com/tpu/docs/v5e (also v5p, v6e). Links are half of
    # "bidirectional ICI bandwidth per chip": 400 GB/s of v5e, 1,200 of v5p (given as 4,800 Gbit/s a way), 800 of v6e.
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 197e12, 200e9, SQUARE),
    "v5p": Chip("TPU v5", int(95.73 * GIB), 459e12, 600e9, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", *CUBES)),
    "v6e": Chip("TPU v6 lite", int(31.24 * GIB), 918e12, 400e9, SQUARE),
}
# Without them libtpu asks a server that exists on TPU machines only, takes a lock that a second process dies of, and
# fills stderr and the disk.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}


class Topology(NamedTuple):
    name: str
    size: int  # devices
    chip: Chip | None  # None: a CPU device


def parse(name: str) -> Topology:
    """'v5e:16x16' or 'cpu:8'. ValueError for any other form, generation or shape.

    Only shapes that exist: libtpu takes some for others ("" for a v2, v5p:4x4 for a flat slice) without a word.
    """
    where = f"--topology {name or repr(name)}"
    generation, _, shape = name.partition(":")
    if generation == "cpu":
        if not (shape.isascii() and shape.isdigit() and 1 <= int(shape) <= 1024):
            raise ValueError(f"{where}: needs the number of devices, 1 to 1024; give cpu:8.")
        return Topology(name, int(shape), None)
    if generation not in CHIPS:
        raise ValueError(
            f"{where}: found no such chip, needs {', '.join(CHIPS)} and a shape, or cpu and a number; "
            "give v5e:16x16 or cpu:8."
        )
    chip = CHIPS[generation]
    if shape not in chip.shapes:
        shown = [s for s in chip.shapes if s in SQUARE or s in ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")]
        more = ", ... 16x16x24" if len(shown) < len(chip.shapes) else ""
        raise ValueError(
            f"{where}: found no {generation} slice of shape {shape or 'nothing'}; shapes are {', '.join(shown)}{more}."
        )
    return Topology(name, int(np.prod([int(side) for side in shape.split("x")])), chip)


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for; of a TPU slice without having one.

    Raises:
      ValueError: libtpu is missing or describes another slice; fewer CPU devices than asked.
    """
    if topology.chip is None:
        found = jax.devices("cpu")
        if len(found) < topology.size:
            raise ValueError(
                f"--topology {topology.name}: found {len(found)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.size} before Python starts."
            )
        return found[: topology.size]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology {topology.name}: needs libtpu, the TPU compiler, no TPU; pip install 'rice_jax[preflight]'."
        )
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        described: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology {topology.name}: libtpu refuses it: {str(error).splitlines()[0]}") from error
    kinds: set[str] = {device.device_kind for device in described}
    if len(described) != topology.size or kinds != {topology.chip.kind}:
        raise ValueError(
            f"--topology {topology.name}: libtpu describes {len(described)} x {', '.join(sorted(kinds))}, needs "
            f"{topology.size} x {topology.chip.kind}; install another libtpu."
        )
    return list(described)


def hosts(devices: list[Any]) -> int:
    return len({device.process_index for device in devices})
