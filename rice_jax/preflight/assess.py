"""What a config asks of devices that need not be here: its own training step, compiled for them ahead of time.

python -m rice_jax.preflight --config FILE[:ARG] --topology v5e:16x16 [--config.field=value ...] [--search] [--json OUT]

Prints the memory of a device against what it has, what crosses devices, FLOP, the floor of a step's time and the input
that keeps up with it; where it does not fit, what to set. Topologies: v5e, v5p and v6e slices (pip install
'rice_jax[preflight]'; no TPU needed), or cpu:N. Reads no data. Status 0: it fits; 1: it does not; 2: wrong use.
"""

import concurrent.futures
import copy
import dataclasses
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rice_jax.config import validate
from rice_jax.losses import global_batch
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import batch_sharding, check_batches, make_mesh
from rice_jax.preflight import costs, hlo, topologies
from rice_jax.preflight.topologies import Topology
from rice_jax.training.step import abstract_state, make_train_step

FRAMES_A_CORE = 1700  # JPEGs of 348 px read, decoded, resized and cropped a second (benchmarks.pipeline, RESULTS.md)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a step of one config asks of one device. Bytes, seconds and FLOP; None: not known.

    device_bytes is the sum of what the compiler lists and of the next batch, which arrives while a step runs: the safe
    side, since the compiler's own peak can lie a few percent lower.
    """

    topology: str
    mesh: dict[str, int]
    batch_size: int
    fits: bool
    device_bytes: int | None
    available_bytes: int
    argument_bytes: int  # the state and a batch
    batch_bytes: int
    temp_bytes: int | None
    other_bytes: int | None  # results that reuse no argument, and the program itself
    peak_bytes: int | None  # the compiler's own, without the program and the next batch
    flops_per_example: float
    flops_per_device: float
    repeated_share: float  # of those FLOP: made again to save memory
    collectives: dict[str, int] | None  # kind -> bytes of the arrays, a device and step
    sent_bytes: float | None  # over a device's links, if they form rings
    floor_seconds: float | None
    compute_seconds: float | None
    link_seconds: float | None
    hosts: int
    frames_per_second: float | None  # that each host reads at the floor
    cores: int | None  # that this takes, of each host
    compile_seconds: float


class DoesNotFit(Exception):  # noqa: N818 -- an answer rather than an error
    """The compiler refuses the program for its memory; `asked` bytes, if it says how many."""

    def __init__(self, asked: int | None) -> None:
        super().__init__(asked)
        self.asked = asked


def assess(config: Any, topology: Topology, make_loss: Callable[..., Any] = global_batch.make_loss) -> Report:
    """Compiles the config's training step for the topology and reads what it asks.

    Args:
      make_loss: another formulation, with the arguments of losses.make_loss.

    Raises:
      ValueError: a config that does not hold together, a mesh or a batch that does not divide the devices.
    """
    config = checked(config)
    devices = topologies.devices(topology)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    check_batches(mesh, batch_size=config.batch_size)
    net = build_model(config)
    state, batch = abstract_state(net, config, mesh), abstract_batch(config, mesh)
    arguments, next_batch = bytes_on_a_device((state, batch)), bytes_on_a_device(batch)
    available = topology.chip.memory if topology.chip else physical_memory() // topology.size
    start = time.monotonic()
    asked = temporaries = other = peak = exchanges = None
    try:
        step: Any = make_train_step(net, config, mesh, state, make_loss=make_loss)
        compiled = compile_for(topology, step.lower(state, batch))
        memory = compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes  # laid out as the device wants them
        temporaries = memory.temp_size_in_bytes
        peak = memory.peak_memory_in_bytes if topology.chip else None  # the CPU's leaves the temporaries out
        other = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
        asked = arguments + temporaries + other + next_batch
        exchanges = hlo.collectives(compiled.as_text())
    except DoesNotFit as refusal:
        if refusal.asked is not None:
            asked, temporaries = refusal.asked + next_batch, refusal.asked - arguments
    cost = costs.example_cost(config, devices=mesh.size)
    flops = cost.total * config.batch_size / mesh.size
    sent = None if exchanges is None else sum(one.sent * one.times for one in exchanges)
    compute = link = floor = frames = None
    if topology.chip:
        compute = flops / topology.chip.flops
        link = None if sent is None else sent / topology.chip.sent
        floor = max(compute, link or 0.0)
        frames = config.batch_size * (1 + config.data.num_frames) / floor / topologies.hosts(devices)
    return Report(
        topology=topology.name,
        mesh={str(axis): size for axis, size in mesh.shape.items()},
        batch_size=config.batch_size,
        fits=exchanges is not None and asked is not None and asked <= available,
        device_bytes=asked,
        available_bytes=available,
        argument_bytes=arguments,
        batch_bytes=next_batch,
        temp_bytes=temporaries,
        other_bytes=other,
        peak_bytes=peak,
        flops_per_example=cost.total,
        flops_per_device=flops,
        repeated_share=cost.repeated / cost.total,
        collectives=None if exchanges is None else hlo.bytes_by_kind(exchanges),
        sent_bytes=sent,
        floor_seconds=floor,
        compute_seconds=compute,
        link_seconds=link,
        hosts=topologies.hosts(devices),
        frames_per_second=frames,
        cores=None if frames is None else math.ceil(frames / FRAMES_A_CORE),
        compile_seconds=time.monotonic() - start,
    )


def assess_apart(config: Any, topology: Topology, make_loss: Callable[..., Any] = global_batch.make_loss) -> Report:
    """`assess` in a process of its own. ValueError, too, when libtpu ends that process, as it does where it fails."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=in_silence) as pool:
        try:
            return pool.submit(assess, config, topology, make_loss).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(
                f"--topology {topology.name}: libtpu {metadata.version('libtpu')} ended its process at work on this "
                "program, which says nothing of the program; try another libtpu, batch_size or topology."
            ) from error


def in_silence() -> None:
    """libtpu and jax write of missing TPUs, and libtpu of its own failures at length."""
    use_this_host()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def use_this_host() -> None:
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is left alone


def checked(config: Any) -> Any:
    """A copy of the config that needs no data set. ValueError for values that cannot be meant."""
    config = copy.deepcopy(config)
    config.data.path = config.data.path or "none"  # never opened
    validate(config)
    if not config.batch_size:
        raise ValueError("batch_size 0 fits itself to a data set, and none is read; give --config.batch_size=N.")
    return config


def abstract_batch(config: Any, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a global batch as data_pipeline.input.batches makes it."""
    rows, side, slots = config.batch_size, config.data.image_size, config.data.num_frames

    def of(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))

    return {
        "frames": of(slots, side, side, 3, dtype=jnp.uint8),
        "mask": of(slots, dtype=jnp.int32),
        "image": of(side, side, 3, dtype=jnp.uint8),
        "product": of(dtype=jnp.int32),
        "index": of(dtype=jnp.int32),
    }


def bytes_on_a_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compile_for(topology: Topology, lowered: Any) -> Any:
    """The compiled program; DoesNotFit when the compiler refuses it for its memory."""
    if topology.chip is None:
        return lowered.compile()
    # O0 takes a tenth of the time, and memory and exchanges come out within 4 %. Gathers on the sparse cores of v5p and
    # v6e make a text that jax 0.10 cannot read.
    options = {
        "xla_tpu_offload_gather_to_sparsecore": False,
        "xla_tpu_enable_offloading_scatter_to_sparsecore": False,
    }
    settings: Any = jax.config
    effort = settings.jax_optimization_level
    settings.update("jax_optimization_level", "O0")
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(asked_bytes(str(error))) from error
    finally:
        settings.update("jax_optimization_level", effort)


def asked_bytes(refusal: str) -> int | None:
    """The largest size that a compiler's refusal names: what it asked exceeds what there is, however it is put."""
    sizes = re.findall(r"(\d+(?:\.\d+)?) ?(K|M|G|T|b)(?:i?B|ytes)?\b", refusal)
    return max((int(float(n) * 1024 ** "bKMGT".index(unit)) for n, unit in sizes), default=None)
