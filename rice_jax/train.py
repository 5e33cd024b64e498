"""Train RICE: python -m rice_jax.train --config FILE[:ARG] --workdir DIR [--config.field=value ...]

FILE is a path or the name of a shipped config (grocery, lpr750k, ...). The same command goes on where an earlier run
of it stopped: after N updates the next batch is the plan's number N, whatever happened in between. On several hosts
it is the same command on each, and --workdir a folder that all share.
"""

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from data_pipeline.format.reader import Dataset, Split, open_dataset
from data_pipeline.input.batches import train_batches
from data_pipeline.input.plan import Plan
from rice_jax import config as config_module
from rice_jax.checkpoints.run_folder import read_config, write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import FREE, differences, fitted, from_json, to_json, validate
from rice_jax.models.rice import Rice, build_model
from rice_jax.parallel import hosts
from rice_jax.parallel.mesh import check_batches, make_mesh, parameter_table, path_name, process_rows, to_global
from rice_jax.retrieval.evaluation import evaluate_split, one_line
from rice_jax.retrieval.model import Model, frame_options
from rice_jax.training import guards, ledger
from rice_jax.training.logs import Log, Progress
from rice_jax.training.step import State, abstract_state, init_state, make_train_step
from rice_jax.weights.start import initialise


def train_and_evaluate(config: Any, workdir: Path) -> dict[str, int | float]:
    """Trains to config.num_updates, from the newest checkpoint in `workdir` if there is one, and evaluates.

    With several processes (rice_jax.parallel.hosts) all of them must call it; process 0 writes.

    Args:
      config: a locked or unlocked config, such as configs.grocery.get_config(); docs/config.md lists its fields.
      workdir: the run's folder, made if missing: checkpoints, config.json, metrics.jsonl and TensorBoard.

    Returns:
      The figures of the last evaluation, as Result.figures of rice_jax.retrieval.evaluation: "recall@1" and others in
      percent, "queries" and so on. Empty if config.data.eval_split is "".

    Raises:
      ValueError: the config is invalid or does not fit the data, `workdir` has another run, a checkpoint or record is
        damaged, or the loss was not finite for too many updates in a row.
      OSError: a file is missing or cannot be written.
      SystemExit: a signal stopped the run, after a checkpoint was saved.

    Example:
      from pathlib import Path
      from configs import smoke

      config = smoke.get_config()
      config.data.path = "records"  # made by data_pipeline.convert
      figures = rice_jax.train_and_evaluate(config, Path("runs/smoke"))
      print(figures["recall@1"])  # percent, of the validation split
    """
    run, start, state = set_up(config, workdir)
    config, net, mesh, train, held_out, plan, abstract, checkpoints, meta, log = run
    train_step = make_train_step(net, config, mesh, abstract)
    progress = Progress(total=config.num_updates, batch_size=config.batch_size)
    pending: list[tuple[int, Any]] = []  # metrics that the device may still be computing
    batches = train_batches(
        train,
        plan,
        process_rows(config.batch_size, mesh),
        frame_options(config.data, train=True),
        start_step=start,
        threads=config.data.threads,
        workers=config.data.workers,
        cache_bytes=config.data.cache_bytes,
    )
    stop, watch = guards.Stop(), guards.Watch(config.stall_seconds, ends=config.stall_ends)
    finite = guards.NotFinite(
        workdir / "not_finite.jsonl",
        patience=config.max_nonfinite_updates,
        parameters=[path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract.params)],
        clips_of=lambda update: [train.clip_ids[row] for row in plan.batch(update - 1)],
    )
    # Nothing in the loop waits for the device but the marked lines.
    with stop.listening(), watch, checkpoints, log, batches:
        done = start
        try:
            if held_out is not None:
                if evaluation_is_due(start, config) and not log.has_evaluation(start, held_out.name):
                    with stop.at_once():  # killed between save and evaluation
                        evaluate_held_out(config, net, state, mesh, held_out, log, start)
                checkpoints.recall = log.recalls(held_out.name)
            for step in range(start, config.num_updates):
                watch.waits_for("input", step)
                batch = to_global(next(batches), mesh)
                watch.waits_for("device" if progress.started else "", step)  # compiling takes as long as it takes
                with jax.transfer_guard("disallow"):  # a hidden copy between host and device is an error
                    state, metrics = train_step(state, batch)
                del batch
                done = step + 1
                pending.append((done, metrics))
                jax.block_until_ready(pending[-2:][0])  # waits for the step before: two in flight, and no more batches
                if not progress.started:
                    log.say(f"update {done} compiled and done after {progress.start(done)}")
                if done % config.log_every == 0 or done == config.num_updates:
                    pending = log.write_updates(pending[:-1], finite.look) + pending[-1:]  # waits, not for the newest
                    log.say(progress.line(done, log.newest))
                stopping = stop.agreed(done)
                if stopping or checkpoint_is_due(done, config) or checkpoints.failed():
                    pending = log.write_updates(pending, finite.look)  # waits; a checkpoint's updates are in the log
                    watch.waits_for("", done)
                    checkpoints.save(done, state, meta)  # waits for the copy to the host, not for the disk
                    progress.pause(done)
                if stopping:
                    raise guards.StoppedError
                if held_out is not None and evaluation_is_due(done, config):
                    pending = log.write_updates(pending, finite.look)
                    watch.waits_for("", done)
                    with stop.at_once():
                        evaluate_held_out(config, net, state, mesh, held_out, log, done)  # waits
                    checkpoints.recall = log.recalls(held_out.name)
                    progress.pause(done)
            watch.waits_for("", done)
            if done > start:
                checkpoints.finish(done, state, meta)
        except guards.StoppedError:
            log.write_updates(pending, finite.look)
            checkpoints.finish(done, state, meta)
            log.say(f"stopped at step {done}; the same command goes on")
            raise SystemExit(stop.status) from None
        if start == config.num_updates:
            log.say(f"{workdir}: all {start} updates are done; give another --workdir to train anew.")
        return log.last_evaluation(held_out.name) if held_out is not None else {}


class Run(NamedTuple):
    """What the loop works with, all but the state, which each update takes and gives anew."""

    config: Any  # with what the data set decides filled in
    net: Rice
    mesh: Mesh
    train: Split
    held_out: Split | None
    plan: Plan
    abstract: State  # the state's shapes and shardings
    checkpoints: Checkpoints
    meta: dict[str, Any]  # what a checkpoint says of the run
    log: Log


def set_up(config: Any, workdir: Path) -> tuple[Run, int, State]:
    """The run, the updates that are done, and the state after them: the newest checkpoint's, or a new one.

    Raises:
      ValueError: a config that does not hold together or does not fit the data, a workdir of another run, or a damaged
        checkpoint.
    """
    validate(config)
    dataset = open_dataset(config.data.path)
    train = dataset.split(config.data.train_split)
    keep = ledger.kept_rows(config, train)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    config = fitted(
        config, clips=train.num_clips if keep is None else len(keep), splits=dataset.splits, devices=mesh.size
    )
    held_out = dataset.split(config.data.eval_split) if config.data.eval_split else None
    plan = ledger.make_plan(config, dataset)
    check_batches(mesh, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size)

    net = build_model(config)
    abstract = abstract_state(net, config, mesh)
    hosts.check_shared(workdir)
    checkpoints = Checkpoints(
        workdir,
        kept=config.checkpoints_kept,
        kept_every=config.checkpoints_kept_every,
        kept_best=config.checkpoints_kept_best,
    )
    start = hosts.ask_first(checkpoints.latest)
    config.init_from = config.init_from or hosts.ask_first(lambda: saved_start(workdir, start))
    meta = {"plan": plan.fingerprint, "data": dataset.content_hash, "config": to_json(config)}
    refuse_other_run(workdir, config, checkpoints.meta(start) if start else None, meta)
    if hosts.is_first():
        write_config(workdir, meta["config"])
    if start is None:
        start, state = 0, init_state(net, config, abstract)
        state, notes = initialise(state, config, workdir) if config.init_from else (state, [])
    else:
        (start, state), notes = checkpoints.restore(abstract), []
    log = Log(workdir, step=start)
    size = sum(x.size for x in jax.tree.leaves(abstract.params))
    for note in notes:
        log.say(note)
    log.say(
        f"{size:,} parameters on {mesh.size} {jax.devices()[0].platform} device(s), mesh {dict(mesh.shape)}, "
        f"{jax.process_count()} process(es)"
    )
    if mesh.size > 1:
        log.say(parameter_table(abstract, abstract.params))
    log.say(
        f"{plan.num_kept} clips, {plan.batches_per_epoch} batches of {config.batch_size} an epoch; "
        f"from update {start} to {config.num_updates}"
    )
    return Run(config, net, mesh, train, held_out, plan, abstract, checkpoints, meta, log), start, state


def checkpoint_is_due(done: int, config: Any) -> bool:
    return done == config.num_updates or bool(done % config.checkpoint_every == 0)


def evaluation_is_due(done: int, config: Any) -> bool:
    """After the last update always; between, every eval_every updates, 0 meaning never."""
    return done == config.num_updates or bool(done and config.eval_every and done % config.eval_every == 0)


def evaluate_held_out(config: Any, net: Any, state: Any, mesh: Any, held_out: Any, log: Log, done: int) -> None:
    weights = state.average or state.params
    encoder = Model(config, net, weights, mesh, batch_size=config.eval_batch_size)
    figures = evaluate_split(encoder, held_out).figures
    log.write(done, {f"{held_out.name}/{name}": value for name, value in figures.items()})
    log.say(f"step {done}  {held_out.name}: {one_line(figures)}")


def saved_start(workdir: Path, start: int | None) -> str:
    """The init_from of the run that goes on, which needs not be said again; ValueError for imported weights."""
    held = read_config(workdir)
    if start == 0:
        raise ValueError(
            f"{workdir} holds imported weights and no run; give another --workdir, and --config.init_from={workdir}."
        )
    return from_json(held).init_from if start and held is not None else ""


def refuse_other_run(workdir: Path, config: Any, saved: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """ValueError when the workdir's checkpoints are of another config or of other data, naming what differs."""
    held = read_config(workdir)
    if saved is None or held is None:
        return  # nothing trained here yet, so nothing to lose
    changed = differences(from_json(held), config, free=FREE)
    if changed:
        raise ValueError(
            f"{workdir} holds a run with another config; take another --workdir, or undo:\n  " + "\n  ".join(changed)
        )
    if saved["plan"] != now["plan"]:
        raise ValueError(
            f"{workdir}: the checkpoint's order of data (plan {saved['plan']}, data {saved['data'][:12]}) is not this "
            f"run's ({now['plan']}, data {now['data'][:12]}): data.path holds other clips; give those of before."
        )


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all hosts must have alike: the config, and what the data set holds, wherever it lies."""
    validate(arguments.config)
    data = Dataset(Path(arguments.config.data.path))
    return {"command": "train", "data": data.content_hash, **hosts.of_config(arguments.config)}


def main(arguments: argparse.Namespace) -> None:
    # A run that goes on need not compile anew; in the workdir, so that it goes when the run goes.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(arguments.workdir / "compiled"))
    train_and_evaluate(arguments.config, arguments.workdir)


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.train") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=Path, required=True, help="folder of the run: checkpoints, metrics, TensorBoard"
    )
    hosts.add_flags(parser)
    return config_module.parse(parser, argv)


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.train") -> None:
    hosts.run(main, parse(argv, prog), facts, stops_together=True)


if __name__ == "__main__":
    command()
