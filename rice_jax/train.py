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
from rice_jax.sources import initialise
from rice_jax.step import abstract_state, init_state, make_train_step


def train_and_evaluate(config: Any, workdir: Path) -> dict[str, int | float]:
    """Trains from scratch or from the newest checkpoint to config.num_updates; returns the last evaluation's figures.

    Raises:
      ValueError: a config that does not hold together or does not fit the data, a workdir of another run, a damaged
        checkpoint or record, or a loss that stays not finite.
    """
    # --- Config, data, mesh ---
    configuration.validate(config)
    dataset = open_dataset(config.data.path)
    train = dataset.split(config.data.train_split)
    keep = rows_without(train.clip_ids, config.data.skip_clips) if config.data.skip_clips else None
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    config = configuration.fitted(
        config, clips=train.num_clips if keep is None else len(keep), splits=dataset.splits, devices=mesh.size
    )
    held_out = dataset.split(config.data.eval_split) if config.data.eval_split else None
    plan = Plan(
        train.num_clips,
        config.batch_size,
        config.seed,
        keep=keep,
        product=np.asarray(train.columns["product"]) if config.data.spread_products else None,
        content_hash=dataset.content_hash,
    )
    sharding.check_batches(mesh, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size)

    # --- Model and state: the newest checkpoint's, or new ones ---
    net = model.build(config)
    abstract = abstract_state(net, config, mesh)
    checkpoints = Checkpoints(workdir, kept=config.checkpoints_kept)
    start = checkpoints.latest()
    config.init_from = config.init_from or saved_start(workdir, start)
    meta = {"plan": plan.fingerprint, "data": dataset.content_hash, "config": configuration.to_json(config)}
    refuse_other_run(workdir, config, checkpoints.meta(start) if start else None, meta)
    write_config(workdir, meta["config"])
    if start is None:
        start, state = 0, init_state(net, config, abstract)
        state, notes = initialise(state, config, workdir) if config.init_from else (state, [])
    else:
        state, notes = checkpoints.restore(start, abstract), []
    log = Log(workdir, step=start, patience=config.max_nonfinite_updates)
    size = sum(x.size for x in jax.tree.leaves(abstract.params))
    for note in notes:
        log.say(note)
    log.say(f"{size:,} parameters on {mesh.size} {jax.devices()[0].platform} device(s), mesh {dict(mesh.shape)}")
    log.say(
        f"{plan.num_kept} clips, {plan.batches_per_epoch} batches of {config.batch_size} an epoch; "
        f"from update {start} to {config.num_updates}"
    )

    # --- The loop. Nothing in it waits for the device but the marked lines. ---
    train_step = make_train_step(net, config, mesh, abstract)
    progress = Progress(total=config.num_updates, batch_size=config.batch_size)
    pending: list[tuple[int, Any]] = []  # metrics that the device may still be computing
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
    with checkpoints, log, batches:
        if held_out is not None and evaluation_is_due(start, config) and not log.has_evaluation(start, held_out.name):
            evaluate_held_out(config, net, state, mesh, held_out, log, start)  # killed between save and evaluation
        for step in range(start, config.num_updates):
            batch = sharding.to_global(next(batches), mesh)
            with jax.transfer_guard("disallow"):  # a hidden copy between host and device is an error
                state, metrics = train_step(state, batch)
            del batch
            done = step + 1
            pending.append((done, metrics))
            jax.block_until_ready(pending[-2:][0])  # waits for the step before: two in flight, and no more batches
            if not progress.started:
                log.say(f"update {done} compiled and done after {progress.start(done)}")
            if done % config.log_every == 0 or done == config.num_updates:
                pending = log.write_updates(pending[:-1]) + pending[-1:]  # waits, for all but the newest
                log.say(progress.line(done, log.newest))
            if done % config.checkpoint_every == 0 or done == config.num_updates:
                pending = log.write_updates(pending)  # waits; a checkpoint's updates are all in the log
                checkpoints.save(done, state, meta)  # waits for the copy to the host, not for the disk
                progress.pause(done)
            if held_out is not None and evaluation_is_due(done, config):
                pending = log.write_updates(pending)
                evaluate_held_out(config, net, state, mesh, held_out, log, done)  # waits
                progress.pause(done)
        if start == config.num_updates:
            log.say(f"{workdir}: all {start} updates are done; give another --workdir to train anew.")
        return log.last_evaluation(held_out.name) if held_out is not None else {}


def evaluation_is_due(done: int, config: Any) -> bool:
    """After the last update always; between, every eval_every updates, 0 meaning never."""
    return done == config.num_updates or bool(done and config.eval_every and done % config.eval_every == 0)


def evaluate_held_out(config: Any, net: Any, state: Any, mesh: Any, held_out: Any, log: Log, done: int) -> None:
    weights = state.average or state.params
    encoder = retrieval.Model(config, net, weights, mesh, batch_size=config.eval_batch_size)
    figures = retrieval.evaluate(encoder, held_out).figures
    log.write(done, {f"{held_out.name}/{name}": value for name, value in figures.items()})
    log.say(f"step {done}  {held_out.name}: {retrieval.one_line(figures)}")


def saved_start(workdir: Path, start: int | None) -> str:
    """The init_from of the run that goes on, which needs not be said again; ValueError for imported weights."""
    held = read_config(workdir)
    if start == 0:
        raise ValueError(
            f"{workdir} holds imported weights and no run; give another --workdir, and --config.init_from={workdir}."
        )
    return configuration.from_json(held).init_from if start and held is not None else ""


def refuse_other_run(workdir: Path, config: Any, saved: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """ValueError when the workdir's checkpoints are of another config or of other data, naming what differs."""
    held = read_config(workdir)
    if saved is None or held is None:
        return  # nothing trained here yet, so nothing to lose
    changed = configuration.differences(configuration.from_json(held), config, free=configuration.FREE)
    if changed:
        raise ValueError(
            f"{workdir} holds a run with another config; take another --workdir, or undo:\n  " + "\n  ".join(changed)
        )
    if saved["plan"] != now["plan"]:
        raise ValueError(
            f"{workdir}: the checkpoint's order of data (plan {saved['plan']}, data {saved['data'][:12]}) is not this "
            f"run's ({now['plan']}, data {now['data'][:12]}): data.path holds other clips; give those of before."
        )


def main(arguments: argparse.Namespace) -> None:
    # A run that goes on need not compile anew; in the workdir, so that it goes when the run goes.
    jax.config.update("jax_compilation_cache_dir", str(arguments.workdir / "compiled"))
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
