"""Compiles a config's own training step for devices that need not be here, and reports what each device needs.

python -m rice_jax.preflight --config FILE[:ARG] --topology v5e:16x16 [--config.field=value ...] [--search] [--json OUT]

Prints the memory that a device needs and has, the bytes that cross devices, FLOP, the shortest time of a step and the
input rate for it; and if the step does not fit, settings with which it does. Topologies are v5e, v5p and v6e slices
(pip install 'rice_jax[preflight]'; no TPU needed), or cpu:N. Reads no data. The exit status is 0 if the step fits, 1 if
it does not, and 2 for wrong use.
"""

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

from data_pipeline.format.tfrecord import write_file
from data_pipeline.system.paths import parse_path
from rice_jax.config import parse_arguments
from rice_jax.errors import fail, run, warn
from rice_jax.losses import global_batch
from rice_jax.preflight import topologies
from rice_jax.preflight.advice import first_remedy, largest_batch
from rice_jax.preflight.assessment import assess, assess_in_subprocess, use_cpu_backend
from rice_jax.preflight.report import as_flags, describe
from rice_jax.training.step import own_switches


@own_switches()
def main(arguments: argparse.Namespace, make_loss: Callable[..., Any] = global_batch.make_loss) -> None:
    """Prints the report, writes the one of --json, and raises SystemExit: 0 it fits, 1 it does not, 2 a ValueError.

    make_loss: the formulation of the loss. Raises OSError if the JSON cannot be written.
    """
    use_cpu_backend()
    topology, config = arguments.topology, arguments.config
    if topology.chip is None:
        count = f"--xla_force_host_platform_device_count={topology.size}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"  # the last of several values is used
    function = assess_in_subprocess if topology.chip else assess
    assess_config, changes = functools.partial(function, topology=topology, make_loss=make_loss), None
    try:
        report = largest_batch(config, topology.size, assess_config) if arguments.search else assess_config(config)
        print(describe(report), flush=True)
        if config.eval_batch_size % topology.size:
            warn(
                f"eval_batch_size {config.eval_batch_size} does not divide by {topology.size} devices: training will "
                "refuse it; set a multiple."
            )
        if not report.fits and not arguments.search:
            print("\nwhat to set:", flush=True)
            changes = first_remedy(config, topology.size, assess_config)
    except ValueError as error:
        fail(str(error), status=2)
    if changes:
        print(f"\nIt fits with {as_flags(changes)}")
    elif not report.fits:
        print("\nOne example a device does not fit either; take a larger topology or a smaller model.")
    if arguments.json:
        fields = dataclasses.asdict(report) | {"fits_with": changes}
        write_file(arguments.json, (json.dumps(fields, indent=2) + "\n").encode())
    raise SystemExit(0 if report.fits else 1)


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.preflight") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:4x4x4, v6e:..., 2xv5e:16x16, or cpu:8")
    parser.add_argument("--search", action="store_true", help="find the largest batch_size that fits")
    parser.add_argument("--json", type=parse_path, metavar="OUT", help="also write the report as JSON")
    arguments = parse_arguments(parser, argv)
    try:
        arguments.topology = topologies.parse(arguments.topology)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return arguments


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.preflight") -> None:
    """Runs the command with `argv`, or the command line. Raises SystemExit: 0 fits, 1 does not or failed, 2 misuse."""
    run(main, parse(argv, prog))


if __name__ == "__main__":
    command()
