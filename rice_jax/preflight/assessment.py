"""Compiles the training step of a config for a topology, and reads memory, traffic and cost off the program."""

import concurrent.futures
import copy
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

from rice_jax.config import Config, validate
from rice_jax.errors import EXHAUSTED
from rice_jax.losses import global_batch
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import batch_sharding, check_batches, make_mesh
from rice_jax.preflight import costs, hlo, topologies
from rice_jax.preflight.report import FRAMES_PER_CORE, Report
from rice_jax.preflight.topologies import Topology
from rice_jax.training.step import abstract_state, make_train_step


def assess(config: Config, topology: Topology, make_loss: Callable[..., Any] = global_batch.make_loss) -> Report:
    """Compiles the config's training step for the topology and returns what each device needs.

    `make_loss` is the formulation of the loss, with the arguments of losses.global_batch.make_loss. Raises ValueError
    for an invalid config, a batch_size of 0, a mesh or a batch that does not fit the devices, too few CPU devices, and
    if libtpu is missing, refuses the topology or describes another. A step too large for the memory is reported.
    """
    config = without_data_set(config)
    devices = topologies.devices(topology)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    check_batches(mesh, batch_size=config.batch_size)
    net = build_model(config)
    state, batch = abstract_state(net, config, mesh), abstract_batch(config, mesh)
    start = time.monotonic()
    step: Any = make_train_step(net, config, mesh, state, make_loss=make_loss)
    compiled, refusal = _compile(step.lower(state, batch), topology)
    if refusal is None:
        memory, collectives = _memory(compiled, topology), hlo.collectives(compiled.as_text())
    else:
        arguments, needed = bytes_on_a_device((state, batch)), parse_needed_bytes(refusal)
        temporaries = None if needed is None else needed - arguments
        memory = {"argument_bytes": arguments, "temp_bytes": temporaries, "other_bytes": None, "peak_bytes": None}
        collectives = None
    compile_seconds = time.monotonic() - start

    batch_bytes, chip = bytes_on_a_device(batch), topology.chip
    hosts = len({device.process_index for device in devices})
    parts = (memory["argument_bytes"], memory["temp_bytes"], memory["other_bytes"] or 0, batch_bytes)
    device_bytes = None if memory["temp_bytes"] is None else sum(parts)
    available = chip.memory_bytes if chip else host_memory_bytes() // topology.size
    cost = costs.example_cost(config, devices=mesh.size)
    flops = cost.total * config.batch_size / mesh.size
    sent = None if collectives is None else sum(one.sent_bytes * one.runs for one in collectives)
    compute_seconds = link_seconds = floor_seconds = frames = None
    if chip:
        compute_seconds = flops / chip.flops_per_second
        link_seconds = None if sent is None else sent / chip.link_bytes_per_second
        floor_seconds = max(compute_seconds, link_seconds or 0.0)
        frames = config.batch_size * (1 + config.data.num_frames) / floor_seconds / hosts
    return Report(
        topology=topology.name,
        mesh={str(axis): size for axis, size in mesh.shape.items()},
        batch_size=config.batch_size,
        fits=collectives is not None and device_bytes is not None and device_bytes <= available,
        device_bytes=device_bytes,
        available_bytes=available,
        batch_bytes=batch_bytes,
        **memory,
        flops_per_example=cost.total,
        flops_per_device=flops,
        repeated_share=cost.repeated / cost.total,
        collectives=None if collectives is None else hlo.bytes_by_kind(collectives),
        sent_bytes=sent,
        floor_seconds=floor_seconds,
        compute_seconds=compute_seconds,
        link_seconds=link_seconds,
        hosts=hosts,
        frames_per_second=frames,
        cores=None if frames is None else math.ceil(frames / FRAMES_PER_CORE),
        compile_seconds=compile_seconds,
    )


def assess_in_subprocess(
    config: Config, topology: Topology, make_loss: Callable[..., Any] = global_batch.make_loss
) -> Report:
    """Returns `assess` from a new process. Raises ValueError where it does, and if libtpu fails, which ends it."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=_prepare_subprocess) as pool:
        try:
            return pool.submit(assess, config, topology, make_loss).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(
                f"--topology {topology.name}: libtpu {metadata.version('libtpu')} ended its process while it compiled "
                "this program, which need not be the program's fault; try another libtpu, batch_size or topology."
            ) from error


def _prepare_subprocess() -> None:
    """Selects the CPU backend, and sends stderr to /dev/null: libtpu and jax complain there of missing TPUs."""
    use_cpu_backend()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def use_cpu_backend() -> None:
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is not initialised


def without_data_set(config: Config) -> Config:
    """Returns a copy of the config that needs no data set. Raises ValueError for an invalid one or batch_size 0."""
    config = copy.deepcopy(config)
    config.data.path = config.data.path or "none"  # never opened
    validate(config)
    if not config.batch_size:
        raise ValueError("batch_size 0 depends on the data set, and preflight reads none; give --config.batch_size=N.")
    return config


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch of train_batches as ShapeDtypeStructs, with shardings: frames, mask, image, product, index."""
    rows, side, slots = config.batch_size, config.data.image_size, config.data.num_frames

    def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))

    return {
        "frames": array(slots, side, side, 3, dtype=jnp.uint8),
        "mask": array(slots, dtype=jnp.int32),
        "image": array(side, side, 3, dtype=jnp.uint8),
        "product": array(dtype=jnp.int32),
        "index": array(dtype=jnp.int32),
    }


def bytes_on_a_device(tree: Any) -> int:
    """Returns the bytes that the arrays (or ShapeDtypeStructs with shardings) of a tree have on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _compile(lowered: Any, topology: Topology) -> tuple[Any, str | None]:
    """Returns (program, None), or (None, message) if a TPU's compiler finds too little memory; other errors pass."""
    if topology.chip is None:
        return lowered.compile(), None
    # O0 takes a tenth of the time, and memory and traffic are within 4 %. jax 0.10 cannot read the text of programs
    # that gather on the sparse cores of v5p and v6e.
    names = ("xla_tpu_offload_gather_to_sparsecore", "xla_tpu_enable_offloading_scatter_to_sparsecore")
    options = dict.fromkeys(names, False)
    settings: Any = jax.config
    level = settings.jax_optimization_level
    settings.update("jax_optimization_level", "O0")
    try:
        return lowered.compile(compiler_options=options), None
    except jax.errors.JaxRuntimeError as error:
        if not EXHAUSTED.search(str(error)):
            raise
        return None, str(error)
    finally:
        settings.update("jax_optimization_level", level)


def _memory(compiled: Any, topology: Topology) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,  # in the layout of the device
        "temp_bytes": memory.temp_size_in_bytes,
        "other_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes if topology.chip else None,  # the CPU's lacks the temporaries
    }


def parse_needed_bytes(refusal: str) -> int | None:
    """Returns the largest size in a compiler's refusal, None if it has none: the program needs more than there is."""
    sizes = re.findall(r"(\d+(?:\.\d+)?) ?(K|M|G|T|b)(?:i?B|ytes)?\b", refusal)
    return max((int(float(n) * 1024 ** "bKMGT".index(unit)) for n, unit in sizes), default=None)
