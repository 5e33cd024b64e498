"""What a config asks of devices that need not be here: its own training step, compiled for them ahead of time.

python -m rice_jax.preflight --config FILE[:ARG] --topology v5e:16x16 [--config.field=value ...] [--search] [--json OUT]

Prints the memory of a device against what it has, what crosses devices, FLOP, the floor of a step's time and the input
that keeps up with it; where it does not fit, what to set. Topologies: v5e, v5p and v6e slices (pip install
'rice_jax[preflight]'; no TPU needed), or cpu:N. Reads no data. Status 0: it fits; 1: it does not; 2: wrong use.
"""

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.format.tfrecord import write_file
from rice_jax import config as config_module
from rice_jax.errors import fail, run, warn
from rice_jax.losses import global_batch
from rice_jax.preflight import topologies
from rice_jax.preflight.advice import advise, largest
from rice_jax.preflight.assess import assess, assess_apart, use_this_host
from rice_jax.preflight.describe import as_flags, describe, say


def main(arguments: argparse.Namespace, make_loss: Callable[..., Any] = global_batch.make_loss) -> None:
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
            warn(
                f"eval_batch_size {config.eval_batch_size} does not divide by {topology.size} devices: training will "
                "refuse it; set a multiple."
            )
        if not report.fits and not arguments.search:
            say("\nwhat to set:")
            changes = advise(config, topology.size, ask)
    except ValueError as error:
        fail(str(error), status=2)
    if changes:
        say(f"\nIt fits with {as_flags(changes)}")
    elif not report.fits:
        say("\nOne example a device does not fit either; take a larger topology or a smaller model.")
    if arguments.json:
        found = dataclasses.asdict(report) | {"fits_with": changes}
        write_file(arguments.json, (json.dumps(found, indent=2) + "\n").encode())
    raise SystemExit(0 if report.fits else 1)


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.preflight") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:4x4x4, v6e:..., or cpu:8")
    parser.add_argument("--search", action="store_true", help="find the largest batch_size that fits")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report as JSON, too")
    arguments = config_module.parse(parser, argv)
    try:
        arguments.topology = topologies.parse(arguments.topology)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return arguments


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.preflight") -> None:
    run(main, parse(argv, prog))


if __name__ == "__main__":
    command()
