"""Measures the cost of a checkpoint for the training loop: python -m benchmarks.checkpoint --config lpr750k

The state of the config, on one device, is saved several times as the loop saves it. Figures, in seconds:
blocked  until save() returns, with the dispatch of the digest; the save before has ended, as in a run
delay    difference between the next step right after a save and without one. The step is a jitted pass over the whole
         state, which it donates
written  until the step is complete on disk
--scratch keeps one checkpoint at a time.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import turns
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax import config
from rice_jax.checkpoints import digests
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.errors import run
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import make_mesh
from rice_jax.training import step

STEP_SECONDS = 0.26  # preflight's floor of a v5e step of 128 examples a chip, full RICE at ViT-B/32 with 10 frames


def noise(abstract: Any) -> Any:
    """Returns a state of random numbers, because zeros, which moments are at first, would make small files."""
    draw = lambda leaf: 1e4 * jax.random.normal(jax.random.key(0), leaf.shape)
    return jax.jit(lambda: jax.tree.map(lambda leaf: draw(leaf).astype(leaf.dtype), abstract))()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    net = build_model(arguments.config)
    mesh = make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    abstract = step.abstract_state(net, arguments.config, mesh)
    state = noise(abstract)
    # Changes every number, so that no save can reuse files on disk, and donates the state as the step does.
    following = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.block_until_ready(digests.digests(state))  # compiles

    seconds: dict[str, list[float]] = {name: [] for name in ("blocked", "digest", "alone", "after_save", "written")}

    def timed(name: str, call: Any) -> Any:
        since = time.perf_counter()
        result = call()
        seconds[name].append(time.perf_counter() - since)
        return result

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        checkpoints = Checkpoints(folder, kept=1)
        for number in range(1, arguments.repeats + 2):
            state = jax.block_until_ready(following(state))
            timed("digest", lambda tree=state: jax.block_until_ready(digests.digests(tree)))
            state = timed("alone", lambda tree=state: jax.block_until_ready(following(tree)))
            since = time.perf_counter()
            timed("blocked", lambda number=number, tree=state: checkpoints.save(number, tree, {}))
            state = timed("after_save", lambda tree=state: jax.block_until_ready(following(tree)))
            checkpoints.finish(number, state, {})  # saved already: waits
            seconds["written"].append(time.perf_counter() - since)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        shutil.rmtree(Path(folder) / "checkpoints")
    # The first save does not count: it starts threads and makes folders.
    rest = {name: values[1:] for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in rest.items()}
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(abstract.params)),
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)),
        "disk_bytes": size,
        "repeats": arguments.repeats,
        "seconds": rest,
        "median_seconds": median,
        "delay_seconds": median["after_save"] - median["alone"],
        "blocked_share_of_v5e_step": median["blocked"] / STEP_SECONDS,
    }


def main(arguments: argparse.Namespace) -> None:
    turns.write_report(arguments.output, measure(arguments))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=parse_count, default=10)
    parser.add_argument("--scratch", type=parse_path, help="folder on the disk to measure; needs twice the state")
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/checkpoint.json"))
    return config.parse_arguments(parser, argv)


if __name__ == "__main__":
    run(main, parse())
