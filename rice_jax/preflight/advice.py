"""What to set where a step does not fit, and the largest batch that does."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from rice_jax.config import flat
from rice_jax.preflight.assess import Report
from rice_jax.preflight.describe import as_flags, say, short

CHUNKS = {"loss.micro_batch": 128, "loss.pair_chunk": 16, "loss.icl_chunk": 128}  # large enough to keep a chip busy


def remedies(config: Any, devices: int) -> Iterator[dict[str, Any]]:
    """Changes that save memory, each with all before it; those that cost least time first.

    None of them changes the loss but the last, a smaller batch.
    """
    f = flat(config)
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
