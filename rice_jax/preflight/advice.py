"""Finds settings with which a step fits into memory, and the largest batch that fits."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from rice_jax.config import FREE, Config, flatten, set_field
from rice_jax.errors import EXHAUSTED
from rice_jax.preflight.report import Report, as_flags, one_line

Assess = Callable[[Config], Report]
CHUNKS = {"loss.micro_batch": 128, "loss.pair_chunk": 16, "loss.icl_chunk": 128}  # large enough to keep a chip busy


def remedies(config: Config, devices: int, in_slice: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields changes {field: value} that save memory, those first that cost least time.

    Chunks, where they are smaller than a device's share of the batch, and remat add up. To them the later changes add
    a split by fsdp, and the last ones a smaller batch instead, which alone changes the loss. in_slice: the number of
    devices of a slice, which fsdp must divide; None: of all.
    """
    f, remat = flatten(config), config.model.remat
    rows = config.batch_size // devices
    pictures = rows * (1 + config.data.num_frames)
    shares = {"loss.micro_batch": pictures, "loss.pair_chunk": rows, "loss.icl_chunk": rows}
    sizes = {name: size for name, size in CHUNKS.items() if size < shares[name]}
    if config.batch_size < 2**16:
        sizes.pop("loss.icl_chunk", None)
    changes: dict[str, Any] = {name: size for name, size in sizes.items() if not 0 < f[name] <= size}
    if changes:
        yield dict(changes)
    for name, value, helps in (
        ("model.remat", "dots", remat == "none"),
        ("loss.micro_batch", 32, pictures > 32 and not 0 < config.loss.micro_batch <= 32),
        ("model.remat", "full", remat != "full"),
    ):
        if helps:
            changes[name] = value
            yield dict(changes)
    for fsdp in (4, 16):
        if config.mesh.fsdp < fsdp and (in_slice or devices) % fsdp == 0 and config.model.width % fsdp == 0:
            yield changes | {"mesh.data": devices // fsdp, "mesh.fsdp": fsdp}
    while rows > 1:
        rows //= 2
        yield changes | {"batch_size": rows * devices}


def resume_remedies(config: Config, devices: int, in_slice: int) -> list[dict[str, Any]]:
    """Returns the parts of `remedies` that a run with a checkpoint may change: a split by fsdp, if devices allow it."""
    parts = [
        {name: value for name, value in changes.items() if name in FREE}
        for changes in remedies(config, devices, in_slice)
    ]
    return [part for number, part in enumerate(parts) if part and part not in parts[:number]]


def evaluation_remedies(config: Config, devices: int) -> list[dict[str, Any]]:
    """Returns changes {field: value} with which an evaluation encodes fewer clips at once, [] if one a device is."""
    shares = (config.eval_batch_size // part // devices for part in (2, 4, 16, 64))
    sizes = dict.fromkeys(max(1, share) * devices for share in shares)  # each once, in order
    return [{"eval_batch_size": size} for size in sizes if size < config.eval_batch_size]


class OutOfMemoryError(MemoryError):
    """Memory ran out. The message says what to set."""


@contextlib.contextmanager
def memory_advice(changes: Callable[[], Iterable[dict[str, Any]]]) -> Iterator[None]:
    """Raises OutOfMemoryError with what to set when the block exhausts the memory of a device or of this machine.

    changes: returns {field: value} that save memory, in the order in which to try them, [] if there are none. Other
    exceptions of the block pass, and so does an OutOfMemoryError.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        said = [line.strip() for line in lines if EXHAUSTED.search(line)]
        if isinstance(error, MemoryError):
            cause, what = lines[0][:300], "the memory"
        elif said:
            cause, what = f"the memory of a device is too small ({said[0][:200]})", "the device"
        else:
            raise
        found = list(changes())
        lines = [
            f"{cause}. End what else uses {what}, "
            + ("or run the same command with the first of these that fits:" if found else "or take larger devices."),
            *map(as_flags, found),
        ]
        if any("batch_size" in one for one in found):
            lines[0] = lines[0].replace("that fits:", "that fits; only another batch_size changes the loss:")
        raise OutOfMemoryError("\n  ".join(lines)) from error


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
