"""The report of a preflight as text."""

import math
from typing import Any

from rice_jax.preflight.assess import FRAMES_A_CORE, Report
from rice_jax.preflight.topologies import GIB


def readable(size: int | None) -> str:
    if size is None:
        return "not known"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


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


def short(report: Report) -> str:
    verdict = "fits" if report.fits else "does not fit"
    asked, has = readable(report.device_bytes), readable(report.available_bytes)
    return f"{asked} of {has}, {verdict} ({report.compile_seconds:.0f} s)"


def say(line: str) -> None:
    print(line, flush=True)  # a compilation may take a minute


def as_flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())
