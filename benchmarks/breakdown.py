"""Measures the parts of a training step: python -m benchmarks.breakdown --config NAME --config.data.path=DIR

Six compiled pieces are timed in turn on one real batch. The parts are differences of their medians:
input           making a batch from the records; a run does this beside the step, here the step waits for it
encoder         loss and gradient of ICL (and frame ICL) alone: pictures normalised and encoded, forward and backward
mining          similarities and the three hardest, without gradient, timed separately
decoder         loss and gradient of ICL and PMD, minus encoder and mining
reconstruction  loss and gradient of all losses, minus those of ICL and PMD
optimiser       the training step, minus loss and gradient: moments, weights, norm, average
A part that costs little can be below 0 on a busy machine.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turns
from data_pipeline.format.reader import Split, open_dataset
from data_pipeline.input.batches import train_batches
from data_pipeline.input.plan import Plan
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax import errors
from rice_jax.config import Config, fit_to_data, parse_arguments, validate
from rice_jax.losses import pairs
from rice_jax.losses.global_batch import make_loss
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import make_mesh, parameter_specs, to_global
from rice_jax.retrieval.model import frame_options
from rice_jax.training import step


def differentiated(config: Config, params: Any, batch: Any, **weights: float) -> Callable[[], Any]:
    """Returns a call that computes loss and gradient with other loss weights.

    A loss of weight 0 is left out, with the parameters that only it uses.
    """
    config = copy.deepcopy(config)
    config.loss.update(weights)
    net, mesh = build_model(config), make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    unused = {"decoder": net.decoder, "reconstruction": net.reconstruction}
    params = {name: part for name, part in params.items() if unused.get(name, net) is not None}
    loss = make_loss(net, config.loss, mesh, parameter_specs(params, mesh))
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda: compiled(params, batch, step.random_key(0))


def mining(config: Config) -> Callable[[], Any]:
    rng, shape = np.random.default_rng(0), (config.batch_size, config.model.embedding)
    images, clips = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    own = jnp.eye(config.batch_size, dtype=bool)
    compiled = jax.jit(pairs.mine_hard)
    return lambda: compiled(images, clips, own)


def updating(config: Config, batch: Any) -> Callable[[], Any]:
    net, mesh = build_model(config), make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    abstract = step.abstract_state(net, config, mesh)
    compiled = step.make_train_step(net, config, mesh, abstract)
    held = [step.init_state(net, config, abstract)]  # donated by each step

    def run() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return held[0], metrics

    return run


def reading(config: Config, split: Split) -> tuple[Any, Callable[[], Any]]:
    """Returns the batches and a call that makes the next one. Without a cache, as in the first epoch."""
    plan = Plan(split.num_clips, config.batch_size, config.seed)
    options, rows = frame_options(config.data, train=True), np.arange(config.batch_size)
    batches = train_batches(split, plan, rows, options, threads=0)
    return batches, lambda: next(batches)


def main(arguments: argparse.Namespace) -> None:
    config = arguments.config
    validate(config)
    dataset = open_dataset(config.data.path)
    split = dataset.split(config.data.train_split)
    config = fit_to_data(config, clips=split.num_clips, splits=dataset.splits, devices=1)
    batches, read = reading(config, split)
    with batches:
        batch = to_global(read(), make_mesh(data=1, fsdp=1, devices=jax.devices()[:1]))
        params = jax.jit(lambda: step.init_params(build_model(config), config, step.random_key(0)))()
        pieces = {
            "input": read,
            "icl": differentiated(config, params, batch, pmd=0.0, pfr=0.0),
            "mining": mining(config),
            "icl_pmd": differentiated(config, params, batch, pfr=0.0),
            "icl_pmd_pfr": differentiated(config, params, batch),
            "step": updating(config, batch),
        }
        seconds = turns.in_turn(pieces, arguments.repeats)
    parts = {
        unit: parts_of({name: taken[k] for name, taken in seconds.items()})
        for k, unit in enumerate(turns.Seconds._fields)
    }
    whole = {unit: sum(part.values()) for unit, part in parts.items()}
    report = {
        "sizes": {"batch_size": config.batch_size, "frames": config.data.num_frames, "pixels": config.data.image_size}
        | {name: config.model[name] for name in ("width", "layers", "patch_size")},
        "dtype": config.model.dtype,
        "repeats": arguments.repeats,
        "pieces_seconds": seconds,
        "parts_seconds": parts,
        "percent_of_step": {
            unit: {name: 100 * value / whole[unit] for name, value in part.items()} for unit, part in parts.items()
        },
    }
    turns.write_report(arguments.output, report)


def parts_of(piece: dict[str, float]) -> dict[str, float]:
    """Returns the six parts from the seconds of the six pieces. Their sum is that of input and step."""
    return {
        "input": piece["input"],
        "encoder": piece["icl"],
        "mining": piece["mining"],
        "decoder": piece["icl_pmd"] - piece["icl"] - piece["mining"],
        "reconstruction": piece["icl_pmd_pfr"] - piece["icl_pmd"],
        "optimiser": piece["step"] - piece["icl_pmd_pfr"],
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.breakdown", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=parse_count, default=5)
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/breakdown.json"))
    return parse_arguments(parser, argv)


if __name__ == "__main__":
    errors.run(main, parse())
