"""Topologies to compile for: slices of TPUs as libtpu describes them, without a TPU, and CPU devices."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

GIB = 2**30


class Chip(NamedTuple):
    kind: str  # jax's device_kind
    memory_bytes: int  # that a program may fill
    flops_per_second: float  # in bfloat16
    link_bytes_per_second: float  # sent to the neighbours, over all links together
    shapes: tuple[str, ...]  # of slices


SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Of cubes of 4x4x4; 16x16x24 is the largest slice.
CUBES = tuple(f"{a}x{b}x{c}" for a in (4, 8, 12, 16) for b in range(a, 17, 4) for c in range(b, 25, 4))
CHIPS = {
    # Memory: libtpu 0.0.52 refuses programs that need more. The chip has more, and the runtime keeps a part of it.
    # FLOP and links: from the tables of https://cloud.google.com/tpu/docs/v5e (also v5p, v6e). Links are half of
    # "bidirectional ICI bandwidth per chip": 400 GB/s of v5e, 1,200 of v5p (given as 4,800 Gbit/s a way), 800 of v6e.
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 197e12, 200e9, SQUARES),
    "v5p": Chip("TPU v5", int(95.73 * GIB), 459e12, 600e9, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", *CUBES)),
    "v6e": Chip("TPU v6 lite", int(31.24 * GIB), 918e12, 400e9, SQUARES),
}
# Without these libtpu queries a server that only TPU machines have, takes a lock that ends a second process, and writes
# much to stderr and to the disk.
LIBTPU_ENVIRONMENT = {
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
    slices: int = 1  # of equal shape, joined by the hosts' network


def parse(name: str) -> Topology:
    """Returns the topology of a name such as 'v5e:16x16', '2xv5e:16x16' (two such slices) or 'cpu:8'.

    Raises ValueError for another form, an unknown chip, or a shape that the chip does not have: libtpu silently takes
    some of these for others ("" for a v2, v5p:4x4 for a flat slice).
    """
    where = f"--topology {name or repr(name)}"
    several = re.match(r"([1-9][0-9]{0,2})x(?=v)", name)
    slices = int(several[1]) if several else 1
    generation, _, shape = name[several.end() if several else 0 :].partition(":")
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
        shown = [s for s in chip.shapes if s in SQUARES or s in ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")]
        more = ", ... 16x16x24" if len(shown) < len(chip.shapes) else ""
        raise ValueError(
            f"{where}: found no {generation} slice of shape {shape or 'nothing'}; shapes are {', '.join(shown)}{more}."
        )
    return Topology(name, slices * int(np.prod([int(side) for side in shape.split("x")])), chip, slices)


def devices(topology: Topology) -> list[Any]:
    """Returns the devices of a topology, in the order of jax. Programs can be compiled for those of a TPU, but not run.

    Sets LIBTPU_ENVIRONMENT. Raises ValueError if libtpu is missing, refuses it or describes another, or CPUs are few.
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
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        one = topology.name.removeprefix(f"{topology.slices}x")
        description = topologies.get_topology_desc(platform="tpu", topology_name=one, num_slices=topology.slices)
        slice_devices: Any = description.devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology {topology.name}: libtpu refuses it ({str(error).splitlines()[0]}); try "
            "another topology or another libtpu."
        ) from error
    kinds: set[str] = {device.device_kind for device in slice_devices}
    if len(slice_devices) != topology.size or kinds != {topology.chip.kind}:
        raise ValueError(
            f"--topology {topology.name}: libtpu describes {len(slice_devices)} x {', '.join(sorted(kinds))}, needs "
            f"{topology.size} x {topology.chip.kind}; install another libtpu."
        )
    return list(slice_devices)
