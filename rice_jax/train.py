"""Train RICE: python -m rice_jax.train --config FILE[:ARG] --workdir DIR [--config.field=value ...]

FILE is a path or the name of a shipped config (grocery, lpr750k, ...). The same command goes on where an earlier run
of it stopped: after N updates the next batch is the plan's number N, whatever happened in between.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipeline.batches import train_batches
from data_pipeline.plan import Plan, rows_without
from data_pipeline.records import open_dataset
from rice_jax import config as configuration
from rice_jax import model, retrieval, sharding
from rice_jax.checkpoints import Checkpoints, read_config, write_config
from rice_jax.logs import Log, Progress
from rice_jax.step import abstract_state, init_state, make_train_step

# What a run may change when it goes on: none of it moves a batch or a loss.
FREE = (
    "mesh",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "checkpoints_kept",
    "data.path",
    "data.threads",
    "data.workers",
)


def train_and_evaluate(config: Any, workdir: Path) -> dict[str, float]:
    """Trains from scratch or from the newest checkpoint to config.num_updates; returns the last evaluation's figures.

    Raises:
      ValueError: a config that does not hold together or does not fit the data, or a workdir of another run.
    """
    # --- Config, data, mesh ---
    configuration.validate(config)
    claim_workdir(workdir, config)
    dataset = open_dataset(config.data.path)
    train, held_out = dataset.split(config.data.train_split), dataset.split(config.data.eval_split)
    keep = rows_without(train.clip_ids, config.data.skip_clips) if config.data.skip_clips else None
    product = np.asarray(train.columns["product"]) if config.data.spread_products else None
    plan = Plan(
        train.num_clips, config.batch_size, config.seed, keep=keep, product=product, content_hash=dataset.content_hash
    )
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)

    # --- Model and state: the newest checkpoint's, or new ones ---
    net = model.build(config)
    abstract = abstract_state(net, config, mesh)
    checkpoints = Checkpoints(workdir, kept=config.checkpoints_kept)
    meta = {"plan": plan.fingerprint, "data": dataset.content_hash, "config": configuration.to_json(config)}
    start = checkpoints.latest()
    if start is None:
        start, state = 0, init_state(net, config, abstract)
    else:
        check_plan(checkpoints.meta(start), meta)
        state = checkpoints.restore(start, abstract)
    log = Log(workdir, step=start)
    if start == config.num_updates:
        log.say(f"{workdir}: all {start} updates are done; give another --workdir to train anew.")
        return log.last_evaluation(held_out.name)
    size = sum(x.size for x in jax.tree.leaves(abstract.params))
    log.say(f"{size:,} parameters on {mesh.size} {jax.devices()[0].platform} device(s), mesh {dict(mesh.shape)}")
    log.say(
        f"{plan.num_kept} clips, {plan.batches_per_epoch} batches of {config.batch_size} an epoch; "
        f"from update {start} to {config.num_updates}"
    )

    # --- The loop. Nothing in it waits for the device but the marked lines. ---
    train_step = make_train_step(net, config, mesh, abstract)
    progress = Progress(step=start, total=config.num_updates, batch_size=config.batch_size)
    pending: list[tuple[int, Any]] = []  # metrics that the device may still be computing
    figures: dict[str, float] = {}
    batches = train_batches(
        train,
        plan,
        sharding.process_rows(config.batch_size, mesh),
        retrieval.frame_options(config.data, train=True),
        start_step=start,
        threads=config.data.threads,
        workers=config.data.workers,
        cache_bytes=config.data.cache_bytes,
    )
    with checkpoints, batches:
        for step in range(start, config.num_updates):
            batch = sharding.to_global(next(batches), mesh)
            state, step_metrics = train_step(state, batch)
            del batch
            pending.append((step + 1, step_metrics))
            jax.block_until_ready(
                pending[-2:][0]
            )  # waits for the step before: two in flight, and only their batches alive
            last = step + 1 == config.num_updates
            if (step + 1) % config.log_every == 0 or last:
                flush(log, pending if last else pending[:-1])  # waits, for all but the newest step
                pending = [] if last else pending[-1:]
                if log.newest:
                    log.say(progress.line(step + 1, log.newest))
            if last or (config.eval_every and (step + 1) % config.eval_every == 0):
                weights = state.average or state.params
                encoder = retrieval.Model(config, net, weights, mesh, batch_size=config.eval_batch_size)
                figures = retrieval.evaluate(encoder, held_out).figures  # waits
                log.write(step + 1, {f"{held_out.name}/{name}": value for name, value in figures.items()})
                log.say(f"step {step + 1}  {held_out.name}: {retrieval.one_line(figures)}")
                progress.pause()
            if last or (step + 1) % config.checkpoint_every == 0:
                checkpoints.save(step + 1, state, meta)  # waits for the copy to the host, not for the disk
    log.close()
    return figures


def claim_workdir(workdir: Path, config: Any) -> None:
    """Makes the workdir this config's; ValueError when it holds another's, naming the fields that differ."""
    held = read_config(workdir)
    if held is None:
        write_config(workdir, configuration.to_json(config))
        return
    changed = configuration.differences(configuration.from_json(held), config, free=FREE)
    if changed:
        raise ValueError(
            f"{workdir} holds a run with another config; take another --workdir, or undo:\n  " + "\n  ".join(changed)
        )


def check_plan(saved: dict[str, Any], now: dict[str, Any]) -> None:
    if saved["plan"] != now["plan"]:
        raise ValueError(
            f"the checkpoint's order of data (plan {saved['plan']}, data {saved['data'][:12]}) is not this run's "
            f"({now['plan']}, data {now['data'][:12]}): data.path holds other clips; give the set it was trained on."
        )


def flush(log: Log, metrics: list[tuple[int, Any]]) -> None:
    for step, values in metrics:
        log.write(step, jax.device_get(values))


def main(arguments: argparse.Namespace) -> None:
    train_and_evaluate(arguments.config, arguments.workdir)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rice_jax.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="folder of the run: checkpoints, metrics, TensorBoard"
    )
    return configuration.parse(parser, argv)


if __name__ == "__main__":
    configuration.run(main, parse())
