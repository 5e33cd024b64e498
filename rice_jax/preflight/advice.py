"""Finds settings with which a step fits into memory, and the largest batch that fits."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from rice_jax.config import FREE, Config, flatten, set_field
from rice_jax.preflight.report import Report, as_flags, one_line

Assess = Callable[[Config], Report]
CHUNKS = {"loss.micro_batch": 128, "loss.pair_chunk": 16, "loss.icl_chunk": 128}  # large enough to keep a chip busy


def remedies(config: Config, devices: int) -> Iterator[dict[str, Any]]:
    """Yields changes {field: value} that save memory, those first that cost least time.

    Chunks and remat add up. To them the later changes add a split by fsdp, and the last ones a smaller batch instead,
    which alone changes the loss.
    """
    f, remat = flatten(config), config.model.remat
    sizes = {name: size for name, size in CHUNKS.items() if name != "loss.icl_chunk" or config.batch_size >= 2**16}
    changes: dict[str, Any] = {name: size for name, size in sizes.items() if not 0 < f[name] <= size}
    if changes:
        yield dict(changes)
    for name, value, helps in (
        ("model.remat", "dots", remat == "none"),
        ("loss.micro_batch", 32, not 0 < config.loss.micro_batch <= 32),
        ("model.remat", "full", remat != "full"),
    ):
        if helps:
            changes[name] = value
            yield dict(changes)
    for fsdp in (4, 16):
        if config.mesh.fsdp < fsdp and devices % fsdp == 0 and config.model.width % fsdp == 0:
            yield changes | {"mesh.data": devices // fsdp, "mesh.fsdp": fsdp}
    size = config.batch_size // devices
    while size > 1:
        size //= 2
        yield changes | {"batch_size": size * devices}


def out_of_memory(config: Config, devices: int, *, free_fields_only: bool = False) -> str:
    """Returns what to do when the devices' memory has run out: the remedies as flags, those that cost least time first.

    Those that would change the loss are left out. With `free_fields_only` the flags are those that may change when a
    run goes on.
    """
    choices: list[str] = []
    for changes in remedies(config, devices):
        flags = as_flags({name: value for name, value in changes.items() if name in FREE or not free_fields_only})
        if flags and flags not in choices and "batch_size" not in changes:
            choices.append(flags)
    programs = "end other programs that hold memory of these devices"
    return f"{programs}, or give {', or '.join(choices)}." if choices else f"{programs}, or take more or larger ones."


def with_changes(config: Config, changes: dict[str, Any]) -> Config:
    """Returns a copy of the config with `changes` {dotted name: value}; it is locked if the config is.

    Raises TypeError for a value of another type, and KeyError for an unknown field if it is locked.
    """
    config = copy.deepcopy(config)
    for name, value in changes.items():
        set_field(config, name, value)
    return config


def first_remedy(config: Config, devices: int, assess: Assess) -> dict[str, Any] | None:
    """Returns the first remedy that fits, None if none does. Prints a line per trial. Raises what `assess` raises."""
    for changes in remedies(config, devices):
        report = assess(with_changes(config, changes))
        print(f"{as_flags(changes)}: {one_line(report)}", flush=True)  # a compilation may take a minute
        if report.fits:
            return changes
    return None


def largest_batch(config: Config, devices: int, assess: Assess) -> Report:
    """Returns the report of the largest batch that fits, or of one row a device if none fits. Prints a line per trial.

    The batch is a multiple of the devices, and above 64 rows a device a multiple of 16 rows, which shortens the search.
    The search assumes that more rows need more memory. Raises what `assess` raises.
    """
    tried: dict[int, Report] = {}

    def fits(rows: int) -> bool:
        report = tried[rows] = assess(with_changes(config, {"batch_size": rows * devices}))
        print(f"batch_size {report.batch_size} ({rows} a device): {one_line(report)}", flush=True)
        return report.fits

    low, high = 0, max(1, config.batch_size // devices)
    while fits(high):
        low, high = high, 2 * high
    while high - low > (unit := 16 if low >= 64 else 1):
        # Interpolate between the two; every third trial takes the middle, which guarantees that the search ends.
        rows = _interpolated(low, high, tried[low], tried[high]) if low and len(tried) % 3 else (low + high) // 2
        rows = max(low + unit, min(rows // unit * unit, high - 1))
        low, high = (rows, high) if fits(rows) else (low, rows)
    return tried[low or 1]


def _interpolated(low: int, high: int, at_low: Report, at_high: Report) -> int:
    """Returns the rows that fill the memory if it grows linearly, or the middle if the memory is not known."""
    a, b = at_low.device_bytes, at_high.device_bytes
    if a is None or b is None or b <= a:
        return (low + high) // 2
    return low + int((high - low) * (at_low.available_bytes - a) / (b - a))
