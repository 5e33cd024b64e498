"""The report of a preflight, and its text."""

import dataclasses
import math
from typing import Any

from rice_jax.preflight.topologies import GIB

# JPEGs of 348 px that a core reads, decodes, resizes and crops in a second (benchmarks.pipeline, RESULTS.md).
FRAMES_PER_CORE = 1700


@dataclasses.dataclass(frozen=True)
class Report:
    """The needs of one step, on each device, in bytes, seconds and FLOP; None: not known. `--json` writes these fields.

    device_bytes is the sum of the compiler's list and of the next batch, which arrives while a step runs. The peak that
    the compiler states can be a few percent lower.
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
    peak_bytes: int | None  # the compiler's own figure, without the program and the next batch
    flops_per_example: float
    flops_per_device: float
    repeated_share: float  # of flops_per_example: products computed again to save memory
    collectives: dict[str, int] | None  # kind -> bytes of the arrays, in one step
    sent_bytes: float | None  # over the device's links in one step, if the devices form rings
    floor_seconds: float | None  # the larger of the next two
    compute_seconds: float | None  # flops_per_device at the chip's published peak
    link_seconds: float | None  # sent_bytes at the links' published speed
    hosts: int
    frames_per_second: float | None  # frames and shop images that each host reads if steps take floor_seconds
    cores: int | None  # of each host, for that many frames
    compile_seconds: float


def readable_bytes(size: int | None) -> str:
    if size is None:
        return "not known"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def describe(report: Report) -> str:
    rows = report.batch_size // math.prod(report.mesh.values())
    memory = [
        ("arguments", report.argument_bytes, "the state and a batch"),
        ("temporaries", report.temp_bytes, ""),
        ("other", report.other_bytes, "the program, and results beside the state"),
        ("next batch", report.batch_bytes, "copied in while a step runs"),
        ("in all", report.device_bytes, f"of {readable_bytes(report.available_bytes)}"),
    ]
    lines = [
        f"{report.topology}: mesh {report.mesh}, batch_size {report.batch_size} ({rows} a device); "
        f"compiled in {report.compile_seconds:.0f} s",
        "",
        "memory of a device" + (": fits" if report.fits else ": DOES NOT FIT"),
        *(f"  {name:<12} {readable_bytes(size):>11}  {note}".rstrip() for name, size, note in memory),
    ]
    if peak := report.peak_bytes:
        lines.append(f"  the compiler's own peak, without the program and the next batch: {readable_bytes(peak)}")
    if report.collectives is not None:
        lines += ["", "crosses devices, MB a device and step"]
        lines += [f"  {kind:<20} {size / 1e6:9.1f}" for kind, size in report.collectives.items()] or ["  nothing"]
    lines += [
        "",
        f"{report.flops_per_example / 1e12:.3g} TFLOP an example, {100 * report.repeated_share:.0f} % of it made again "
        f"to save memory; {report.flops_per_device / 1e12:.3g} a device and step",
    ]
    if report.floor_seconds and report.frames_per_second:
        links = "" if report.link_seconds is None else f", links {report.link_seconds:.2g}"
        lines += [
            f"floor of a step, at the chip's published peak: {report.floor_seconds:.3g} s "
            f"(compute {report.compute_seconds:.3g}{links})",
            f"input at the floor: {report.frames_per_second:,.0f} frames/s of each of {report.hosts} host(s), "
            f"{report.cores} core(s) at {FRAMES_PER_CORE:,} frames/s a core",
        ]
    return "\n".join(lines)


def one_line(report: Report) -> str:
    verdict = "fits" if report.fits else "does not fit"
    needed, available = readable_bytes(report.device_bytes), readable_bytes(report.available_bytes)
    return f"{needed} of {available}, {verdict} ({report.compile_seconds:.0f} s)"


def as_flags(changes: dict[str, Any]) -> str:
    """Returns {"batch_size": 8} as "--config.batch_size=8"."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())
