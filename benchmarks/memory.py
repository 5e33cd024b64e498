"""Compares preflight's memory of a step with the memory of real steps on this CPU: python -m benchmarks.memory

Each case has a process of its own. It compiles the step, resets the peak of resident memory (/proc/self/clear_refs),
puts the state on the device and runs steps, with the next batch copied in as training does. The growth of resident
memory up to the peak is compared with preflight's figure for cpu:1. Needs Linux.
"""

import argparse
import concurrent.futures
import ctypes
import gc
import multiprocessing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import training_step, turns
from configs import default
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax.config import Config
from rice_jax.errors import run
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import make_mesh, to_global
from rice_jax.preflight import topologies
from rice_jax.preflight.advice import with_changes
from rice_jax.preflight.assessment import abstract_batch, assess
from rice_jax.training import step

SIZES: dict[str, dict[str, Any]] = {  # changes of the default config; activations need more memory than parameters
    "tiny": {"data.num_frames": 2, "data.image_size": 32, "model.patch_size": 16, "model.width": 64, "model.layers": 2,
             "model.heads": 2, "model.hidden": 256, "model.embedding": 32, "model.decoder_heads": 2},
    "small": {"data.num_frames": 4, "data.image_size": 96, "model.patch_size": 16, "model.width": 192,
              "model.layers": 6, "model.heads": 3, "model.hidden": 768, "model.embedding": 128,
              "model.decoder_heads": 3},
}  # fmt: skip
CHUNKS = {"loss.micro_batch": 32, "loss.pair_chunk": 8}
STEPS = 3


def resident(field: str) -> int:
    """Returns bytes of resident memory. `field`: VmRSS for now, VmHWM for the peak since its reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measured(config: Config) -> int:
    """Returns the largest growth of resident memory in bytes over STEPS updates, after compiling.

    Raises ValueError when the loss is not finite.
    """
    net, mesh = build_model(config), make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    abstract = step.abstract_state(net, config, mesh)
    compiled = step.make_train_step(net, config, mesh, abstract).lower(
        abstract, abstract_batch(config, mesh)
    ).compile()  # fmt: skip
    start = jax.tree.map(np.array, step.init_state(net, config, abstract))  # on the host: init_state compiles, too
    drawn = [training_step.draw(config) for _ in range(2)]
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise the state would use memory that compiling has freed
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding, may_alias=False), start, abstract)
    batch = to_global(drawn[0], mesh)
    for number in range(STEPS):
        state, metrics = compiled(state, batch)
        batch = to_global(drawn[(number + 1) % 2], mesh)
        if not np.isfinite(float(metrics["loss"])):
            raise ValueError(f"update {number}: found the loss {metrics['loss']}, needs a finite one; find the cause.")
    return resident("VmHWM") - before


def compare(size: str, batch_size: int, micro_batches: bool) -> dict[str, Any]:
    changes = SIZES[size] | (CHUNKS if micro_batches else {}) | {"batch_size": batch_size}
    config = with_changes(default.get_config(), changes)
    predicted = assess(config, topologies.parse("cpu:1")).device_bytes or 0
    grown = measured(config)
    return {
        "size": size,
        "batch_size": batch_size,
        "micro_batches": micro_batches,
        "predicted_bytes": predicted,
        "measured_bytes": grown,
        "predicted_over_measured": predicted / grown,
    }


def main(arguments: argparse.Namespace) -> None:
    cases = []
    for batch_size in arguments.batch_size:
        for micro_batches in (False, True):
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                cases.append(pool.submit(compare, arguments.size, batch_size, micro_batches).result())
    turns.write_report(arguments.output, {"sizes": SIZES[arguments.size], "chunks": CHUNKS, "cases": cases})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch_size", type=parse_count, nargs="+", default=[32, 64, 96])
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/memory.json"))
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/clear_refs").exists():
        parser.exit(2, "error: /proc/self/clear_refs is missing; run this on Linux.\n")
    return arguments


if __name__ == "__main__":
    run(main, parse())
