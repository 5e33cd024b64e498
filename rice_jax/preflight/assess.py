"""What a config asks of devices that need not be here: its own training step, compiled for them ahead of time.

python -m rice_jax.preflight --config FILE[:ARG] --topology v5e:16x16 [--config.field=value ...] [--search] [--json OUT]

Prints the memory of a device against what it has, what crosses devices, FLOP, the floor of a step's time and the input
that keeps up with it; where it does not fit, what to set. Topologies: v5e, v5p and v6e slices (pip install
'rice_jax[preflight]'; no TPU needed), or cpu:N. Reads no data. Status 0: it fits; 1: it does not; 2: wrong use.
"""

import argparse
import concurrent.futures
import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipeline.format.tfrecord import write_file
from rice_jax import config as configuration
from rice_jax.losses import global_batch as losses
from rice_jax.models import vit as model
from rice_jax.parallel import mesh as sharding
from rice_jax.preflight import costs, topologies
from rice_jax.preflight import hlo as programs
from rice_jax.preflight.topologies import GIB, Topology
from rice_jax.training.step import abstract_state, make_train_step

FRAMES_A_CORE = 1700  # JPEGs of 348 px read, decoded, resized and cropped a second (benchmarks.pipeline, RESULTS.md)
CHUNKS = {"loss.micro_batch": 128, "loss.pair_chunk": 16, "loss.icl_chunk": 128}  # large enough to keep a chip busy


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


def assess(config: Any, topology: Topology, make_loss: Callable[..., Any] = losses.make_loss) -> Report:
    """Compiles the config's training step for the topology and reads what it asks.

    Args:
      make_loss: another formulation, with the arguments of losses.make_loss.

    Raises:
      ValueError: a config that does not hold together, a mesh or a batch that does not divide the devices.
    """
    config = checked(config)
    devices = topologies.devices(topology)
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    sharding.check_batches(mesh, batch_size=config.batch_size)
    net = model.build(config)
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
        exchanges = programs.collectives(compiled.as_text())
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
        collectives=None if exchanges is None else programs.bytes_by_kind(exchanges),
        sent_bytes=sent,
        floor_seconds=floor,
        compute_seconds=compute,
        link_seconds=link,
        hosts=topologies.hosts(devices),
        frames_per_second=frames,
        cores=None if frames is None else math.ceil(frames / FRAMES_A_CORE),
        compile_seconds=time.monotonic() - start,
    )


def assess_apart(config: Any, topology: Topology, make_loss: Callable[..., Any] = losses.make_loss) -> Report:
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
    configuration.validate(config)
    if not config.batch_size:
        raise ValueError("batch_size 0 fits itself to a data set, and none is read; give --config.batch_size=N.")
    return config


def abstract_batch(config: Any, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a global batch as data_pipeline.batches makes it."""
    rows, side, slots = config.batch_size, config.data.image_size, config.data.num_frames

    def of(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding.batch_sharding(mesh))

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


# --- what to set, and how much fits -----------------------------------------------------------------------------------


def remedies(config: Any, devices: int) -> Iterator[dict[str, Any]]:
    """Changes that save memory, each with all before it; those that cost least time first.

    None of them changes the loss but the last, a smaller batch.
    """
    f = configuration.flat(config)
    changes: dict[str, Any] = {}
    for name, size in CHUNKS.items():
        if not 0 < f[name] <= size and (name != "loss.icl_chunk" or config.batch_size >= 2**16):
            changes[name] = size
    if changes:
        yield dict(changes)
    if config.model.remat == "none":
        changes["model.remat"] = "dots"
        yield dict(changes)
    if not 0 < config.loss.micro_batch <= 32:
        changes["loss.micro_batch"] = 32
        yield dict(changes)
    if config.model.remat != "full":
        changes["model.remat"] = "full"
        yield dict(changes)
    for fsdp in (4, 16):
        if config.mesh.fsdp < fsdp and devices % fsdp == 0 and config.model.width % fsdp == 0:
            yield changes | {"mesh.data": devices // fsdp, "mesh.fsdp": fsdp}
    size = config.batch_size // devices
    while size > 1:
        size //= 2
        yield changes | {"batch_size": size * devices}


def with_changes(config: Any, changes: dict[str, Any]) -> Any:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        section, _, leaf = name.rpartition(".")
        (config[section] if section else config)[leaf] = value
    return config


def advise(config: Any, devices: int, ask: Callable[[Any], Report]) -> dict[str, Any] | None:
    """The first remedy with which the config fits; None when not even one example a device does."""
    for changes in remedies(config, devices):
        report = ask(with_changes(config, changes))
        say(f"{as_flags(changes)}: {short(report)}")
        if report.fits:
            return changes
    return None


def largest(config: Any, devices: int, ask: Callable[[Any], Report]) -> Report:
    """The report of the largest batch that fits, a multiple of the devices. When none fits, that of one row a device.

    Where a device has more than 64 rows, their number is a multiple of 16, which shortens the search. Taken for
    granted: more rows take more memory.
    """
    tried: dict[int, Report] = {}

    def fits(rows: int) -> bool:
        report = tried[rows] = ask(with_changes(config, {"batch_size": rows * devices}))
        say(f"batch_size {report.batch_size} ({rows} a device): {short(report)}")
        return report.fits

    low, high = 0, max(1, config.batch_size // devices)
    while fits(high):
        low, high = high, 2 * high
    while high - low > (unit := 16 if low >= 64 else 1):
        # Where a straight line meets what there is, which is mostly right; every third time the middle, which ends it.
        rows = crossing(low, high, tried[low], tried[high]) if low and len(tried) % 3 else (low + high) // 2
        rows = max(low + unit, min(rows // unit * unit, high - 1))
        low, high = (rows, high) if fits(rows) else (low, rows)
    return tried[low or 1]


def crossing(low: int, high: int, fits: Report, fits_not: Report) -> int:
    """Rows at which the memory, taken as growing evenly, is all that there is; the middle where it is not known."""
    a, b = fits.device_bytes, fits_not.device_bytes
    if a is None or b is None or b <= a:
        return (low + high) // 2
    return low + int((high - low) * (fits.available_bytes - a) / (b - a))


# --- words ------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, flush=True)  # a compilation may take a minute


def as_flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def readable(size: int | None) -> str:
    if size is None:
        return "not known"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def short(report: Report) -> str:
    verdict = "fits" if report.fits else "does not fit"
    asked, has = readable(report.device_bytes), readable(report.available_bytes)
    return f"{asked} of {has}, {verdict} ({report.compile_seconds:.0f} s)"


def describe(report: Report) -> str:
    rows = report.batch_size // math.prod(report.mesh.values())
    flops, again = report.flops_per_example, report.repeated_share
    memory = [
        ("arguments", report.argument_bytes, "the state and a batch"),
        ("temporaries", report.temp_bytes, ""),
        ("other", report.other_bytes, "the program, and results beside the state"),
        ("next batch", report.batch_bytes, "copied in while a step runs"),
        ("in all", report.device_bytes, f"of {readable(report.available_bytes)}"),
    ]
    lines = [
        f"{report.topology}: mesh {report.mesh}, batch_size {report.batch_size} ({rows} a device); "
        f"compiled in {report.compile_seconds:.0f} s",
        "",
        "memory of a device" + (": fits" if report.fits else ": DOES NOT FIT"),
        *(f"  {name:<12} {readable(size):>11}  {note}".rstrip() for name, size, note in memory),
    ]
    if report.peak_bytes:
        lines.append(
            f"  the compiler's own peak, without the program and the next batch: {readable(report.peak_bytes)}"
        )
    if report.collectives is not None:
        lines += ["", "crosses devices, MB a device and step"]
        lines += [f"  {kind:<20} {size / 1e6:9.1f}" for kind, size in report.collectives.items()] or ["  nothing"]
    lines += [
        "",
        f"{flops / 1e12:.3g} TFLOP an example, {100 * again:.0f} % of it made again to save memory; "
        f"{report.flops_per_device / 1e12:.3g} a device and step",
    ]
    if report.floor_seconds and report.frames_per_second:
        links = "" if report.link_seconds is None else f", links {report.link_seconds:.2g}"
        lines += [
            f"floor of a step, at the chip's published peak: {report.floor_seconds:.3g} s "
            f"(compute {report.compute_seconds:.3g}{links})",
            f"input at the floor: {report.frames_per_second:,.0f} frames/s of each of {report.hosts} host(s), "
            f"{report.cores} core(s) at {FRAMES_A_CORE:,} frames/s a core",
        ]
    return "\n".join(lines)


def main(arguments: argparse.Namespace, make_loss: Callable[..., Any] = losses.make_loss) -> None:
    use_this_host()
    topology, config = arguments.topology, arguments.config
    if topology.chip is None:
        count = f"--xla_force_host_platform_device_count={topology.size}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"  # of two, the last holds
    ask = functools.partial(assess_apart if topology.chip else assess, topology=topology, make_loss=make_loss)
    changes = None
    try:
        report = largest(config, topology.size, ask) if arguments.search else ask(config)
        say(describe(report))
        if config.eval_batch_size % topology.size:
            configuration.warn(
                f"eval_batch_size {config.eval_batch_size} does not divide by {topology.size} devices: training will "
                "refuse it; set a multiple."
            )
        if not report.fits and not arguments.search:
            say("\nwhat to set:")
            changes = advise(config, topology.size, ask)
    except ValueError as error:
        configuration.fail(str(error), status=2)
    if changes:
        say(f"\nIt fits with {as_flags(changes)}")
    elif not report.fits:
        say("\nOne example a device does not fit either; take a larger topology or a smaller model.")
    if arguments.json:
        found = dataclasses.asdict(report) | {"fits_with": changes}
        write_file(arguments.json, (json.dumps(found, indent=2) + "\n").encode())
    raise SystemExit(0 if report.fits else 1)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rice_jax.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:4x4x4, v6e:..., or cpu:8")
    parser.add_argument("--search", action="store_true", help="find the largest batch_size that fits")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report as JSON, too")
    arguments = configuration.parse(parser, argv)
    try:
        arguments.topology = topologies.parse(arguments.topology)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return arguments


if __name__ == "__main__":
    configuration.run(main, parse())
