"""Times candidates in turn, and writes a report on the screen and in a file."""

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipeline.system.processes import cores


class Seconds(NamedTuple):
    wall: float
    processor: float  # of all threads and of ended child processes; steadier than wall on a busy machine


def in_turn(
    candidates: Mapping[str, Callable[[], object]], repeats: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, Seconds]:
    """Returns the medians of `repeats` calls of each candidate, after one call of each that is not counted.

    The order is A B A B ..., so that other work of the machine affects all of them equally. `prepare` runs before each
    call and is not timed.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in candidates}
    for number in range(repeats + 1):
        for name, call in candidates.items():
            prepare()
            start = _now()
            jax.block_until_ready(call())
            if number:
                taken[name].append(Seconds(*(b - a for a, b in zip(start, _now(), strict=True))))
    return {name: Seconds(*np.median(values, axis=0).tolist()) for name, values in taken.items()}


def _now() -> Seconds:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Seconds(time.perf_counter(), sum(used.ru_utime + used.ru_stime for used in usage))


def ratio(above: Seconds, below: Seconds) -> dict[str, float]:
    return {unit: a / b for unit, a, b in zip(Seconds._fields, above, below, strict=True)}


def write_report(output: Path, report: Mapping[str, Any]) -> None:
    """Prints the machine and the report, and writes both as JSON. Seconds become {"wall", "processor"}."""
    machine = {
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
    }
    text = json.dumps(_plain(machine | dict(report)), indent=2) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(text, end="")


def _plain(value: Any) -> Any:
    if isinstance(value, Seconds):
        return value._asdict()
    return {name: _plain(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value
