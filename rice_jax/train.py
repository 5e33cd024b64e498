"""Train RICE: python -m rice_jax.train --config FILE[:ARG] --workdir DIR [--config.field=value ...]

FILE is a path or the name of a shipped config (grocery, lpr750k, ...). The same command continues an interrupted run:
after N updates the next batch is always number N of the plan. On several hosts it is the same command on each, with a
--workdir that all of them share.
"""

import argparse
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipeline.format.reader import Dataset, Split, open_dataset
from data_pipeline.input.batches import Batches, train_batches
from data_pipeline.input.plan import Plan
from data_pipeline.input.stored_frames import missing_frames
from data_pipeline.system.paths import local_path, parse_path
from rice_jax.checkpoints.run_folder import is_run, one_writer, read_config, write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import FREE, Config, differences, fit_to_data, from_json, parse_arguments, to_json, validate
from rice_jax.errors import warn
from rice_jax.models.rice import Rice, build_model
from rice_jax.parallel import hosts
from rice_jax.parallel.devices import find_devices
from rice_jax.parallel.mesh import (
    check_batches,
    make_mesh,
    parameter_table,
    path_name,
    process_rows,
    slice_sizes,
    to_global,
)
from rice_jax.preflight.advice import evaluation_remedies, memory_advice, remedies, resume_remedies
from rice_jax.retrieval.evaluation import evaluate_split, find_queries, one_line, warn_of_unreadable
from rice_jax.retrieval.model import Model, frame_options
from rice_jax.training import guards, ledger
from rice_jax.training.logs import Log, Progress
from rice_jax.training.step import (
    State,
    abstract_state,
    check_switches,
    guarded,
    init_state,
    make_train_step,
    own_switches,
)
from rice_jax.weights.start import initialise


@own_switches()
def train_and_evaluate(config: Config, workdir: str | Path) -> dict[str, int | float]:
    """Trains to config.num_updates, from the newest checkpoint in `workdir` if there is one, and evaluates.

    With several processes (rice_jax.parallel.hosts) all of them must call it; process 0 writes.

    Args:
      config: a config, locked, frozen or neither, such as configs.grocery.get_config(); docs/config.md lists its
        fields. It is not changed.
      workdir: the run's folder, made if missing: checkpoints, config.json, metrics.jsonl and TensorBoard.

    Returns:
      The figures of the last evaluation, as Result.figures of rice_jax.retrieval.evaluation: "recall@1" and others in
      percent, "queries" and so on. Empty if config.data.eval_split is "".

    Raises:
      ValueError: the config is invalid or does not fit the data, `workdir` has another run, or one that is at work, or
        is no path of this machine, a checkpoint or record is damaged, init_from's weights do not fit, or the loss was
        not finite for too many updates in a row.
      OSError: a file is missing, cannot be read in three attempts, or cannot be written.
      MemoryError: the memory is too small; the message has settings that need less.
      SystemExit: a signal stopped the run, after a checkpoint was saved; its status is 143 or 130.

    Example:
      from pathlib import Path
      from configs import smoke

      config = smoke.get_config()
      config.data.path = "records"  # made by data_pipeline.convert
      figures = rice_jax.train_and_evaluate(config, Path("runs/smoke"))
      print(figures["recall@1"])  # percent, of the validation split
    """
    with contextlib.ExitStack() as held:
        return _train(config, local_path(workdir), held)


def _train(config: Config, workdir: Path, held: contextlib.ExitStack) -> dict[str, int | float]:
    run, start, state = set_up(config, workdir, held)
    config, log, checkpoints = run.config, run.log, run.checkpoints
    train_step = make_train_step(run.model, config, run.mesh, run.abstract)
    progress = Progress(total=config.num_updates, batch_size=config.batch_size)
    ends = {"true": True, "false": False, "auto": jax.process_count() > 1}[config.stall_ends]
    stop, watch = guards.Stop(), guards.Watch(config.stall_seconds, ends=ends)
    not_finite = guards.NotFinite(
        workdir / "not_finite.jsonl",
        patience=config.max_nonfinite_updates,
        parameters=[path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.abstract.params)],
        clips_of=lambda update: [run.train.clip_ids[row] for row in run.plan.batch(update - 1)],
    )
    done = start
    pending: list[tuple[int, Any]] = []  # metrics of updates that the device may still be computing
    # Only the lines marked "waits" wait for the device.
    memory = memory_advice(lambda: remedies_of(config, run.mesh, checkpoints))
    with memory, stop.listening(), watch, checkpoints, log, run.batches:
        try:
            if evaluation_is_due(done, config) and not log.has_evaluation(done, config.data.eval_split):
                with stop.interruptible():
                    evaluate_held_out(run, state, done, stop)
            for step in range(start, config.num_updates):
                watch.waits_for("input", step)
                batch = to_global(next(run.batches), run.mesh)
                if progress.started:
                    watch.waits_for("device", step)
                else:
                    watch.pause()  # the first update compiles, for an unknown time
                with guarded():
                    state, metrics = train_step(state, batch)
                del batch
                done = step + 1
                pending.append((done, metrics))
                jax.block_until_ready(pending[-2:][0])  # waits for the update before: at most two are in flight
                if not progress.started:
                    log.say(f"update {done} compiled and done after {progress.start(done)}")
                if step % config.log_every == 0 and pending[:-1]:  # the update before, whose loss is there by now
                    pending = log.write_updates(pending[:-1], not_finite.check) + pending[-1:]
                    log.say(progress.line(step, log.newest))
                stopping = stop.agreed()
                saving = stopping or checkpoint_is_due(done, config) or checkpoints.failed()
                if saving or evaluation_is_due(done, config):
                    pending = log.write_updates(pending, not_finite.check)  # waits; the log never lags a checkpoint
                    if done % config.log_every == 0 or done == config.num_updates:
                        log.say(progress.line(done, log.newest))
                if saving:
                    watch.pause()
                    checkpoints.save(done, state, run.meta)  # waits for the copy to the host, not for the disk
                    progress.pause(done)
                if stopping:
                    raise guards.StoppedError
                if evaluation_is_due(done, config):
                    watch.pause()
                    with stop.interruptible():
                        evaluate_held_out(run, state, done, stop)  # waits
                    progress.pause(done)
            watch.pause()
            if done > start:
                checkpoints.finish(done, state, run.meta)
        except guards.StoppedError:
            log.write_updates(pending, not_finite.check)
            checkpoints.finish(done, state, run.meta)
            log.say(f"stopped at step {done}; the same command goes on")
            raise SystemExit(128 + stop.received) from None  # as shells define it
        except MemoryError:  # of an evaluation, which leaves the state whole
            if jax.process_count() == 1:  # else the others may not come
                log.write_updates(pending, not_finite.check)
                checkpoints.finish(done, state, run.meta)
            raise
        if start == config.num_updates:
            log.say(
                f"{workdir}: all {start} updates are done; give another --workdir to train anew; {longer(workdir)}."
            )
        return log.last_evaluation(config.data.eval_split) if config.data.eval_split else {}


class Run(NamedTuple):
    """All that the loop works with, except the state, which every update replaces."""

    config: Config  # with batch_size and data.eval_split resolved
    model: Rice
    mesh: Mesh
    train: Split
    held_out: Split | None
    plan: Plan
    abstract: State  # shapes, dtypes and shardings of the state
    checkpoints: Checkpoints
    meta: dict[str, Any]  # of a checkpoint: fingerprint of the plan, content hash of the data, config as JSON
    log: Log
    batches: Batches  # this process's rows of the training batches that are left


def set_up(config: Config, workdir: Path, held: contextlib.ExitStack) -> tuple[Run, int, State]:
    """Returns the run, the number of updates done, and the state after them: the newest checkpoint's, or a new one.

    `held` gets the lease of `workdir`, which ends with it. Raises ValueError if the config misfits itself, data,
    devices or init_from's weights, data are damaged, or `workdir` has another run, a run that is at work, or no sound
    checkpoint, or none can be saved there; FileNotFoundError without data or weights; OSError on reading or writing;
    MemoryError if the state does not fit.
    """
    check_switches()
    config = validate(config)
    find_devices()  # first, because what follows would fail without a clear error
    dataset = open_dataset(config.data.path)
    train = dataset.split(config.data.train_split)
    keep = ledger.kept_rows(config, train)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    clips = train.num_clips if keep is None else len(keep)
    saved = 0 if config.batch_size else hosts.ask_first(lambda: saved_batch_size(workdir))
    config = fit_to_data(config, clips=clips, splits=dataset.splits, devices=mesh.size, saved=saved)
    held_out = dataset.split(config.data.eval_split) if config.data.eval_split else None
    if held_out is not None and not held_out.galleries:
        raise ValueError(
            f"data.eval_split {held_out.name}: this split has no galleries to rank in; set it to another one, val or "
            f"test (the set has {', '.join(dataset.splits)}), or to nothing (--config.data.eval_split=)."
        )
    plan = ledger.make_plan(config, dataset)
    check_batches(mesh, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size)

    model = build_model(config)
    abstract = abstract_state(model, config, mesh)
    check = held.enter_context(one_writer(workdir))
    checkpoints = Checkpoints(
        workdir, check=check, kept=config.checkpoints_kept,
        kept_every=config.checkpoints_kept_every, kept_best=config.checkpoints_kept_best,
    )  # fmt: skip
    start = hosts.ask_first(checkpoints.latest)
    text = hosts.ask_first(lambda: checkpoints.config(start))
    config.init_from = config.init_from or saved_init_from(workdir, text, start)
    meta = {"plan": plan.fingerprint, "data": dataset.content_hash, "config": to_json(config)}
    refuse_other_run(workdir, text, config, checkpoints.meta(start) if start else None, meta)
    if hosts.is_first():
        write_config(workdir, meta["config"])
    notes: list[str] = []
    with memory_advice(lambda: remedies_of(config, mesh, checkpoints)):
        if start is None:
            start, state = 0, init_state(model, config, abstract)
            if config.init_from:
                state, notes = initialise(state, config, workdir)
        else:
            start, state = checkpoints.restore(abstract)
    if start < config.num_updates:
        checkpoints.try_out()  # before hours of updates, none of which could be saved
    log = Log(workdir, step=start, check=check)
    if held_out is not None:
        checkpoints.recall = log.recalls(held_out.name)
        if start < config.num_updates or not log.has_evaluation(start, held_out.name):
            find_queries(config, held_out)  # before hours of updates that could not be evaluated
    check_frames(config, train, np.arange(clips) if keep is None else keep, begun=bool(start))
    batches = train_batches(
        train, plan, process_rows(config.batch_size, mesh), frame_options(config.data, train=True), start_step=start,
        threads=config.data.threads, workers=config.data.workers, cache_bytes=config.data.cache_bytes,
        check_frames=False,
    )  # fmt: skip
    for note in notes:
        log.say(note)
    size = sum(x.size for x in jax.tree.leaves(abstract.params))
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
    return Run(config, model, mesh, train, held_out, plan, abstract, checkpoints, meta, log, batches), start, state


def check_frames(config: Config, train: Split, rows: np.ndarray, *, begun: bool) -> None:
    """Raises ValueError, or warns of a run that has begun, if the clips `rows` lack stored frames for config.data."""
    missing = missing_frames(train, rows, frame_options(config.data, train=True), train=True, prefix="data.")
    if missing is None:
        return
    if not begun:
        raise ValueError("; ".join(missing) + ".")
    how = "evenly spaced" if config.data.frame_sampling == "uniform" else "random"
    if hosts.is_first():
        warn(
            f"{missing[0]}; this run goes on as it began: it shows {how} ones of the stored frames, and all of them "
            "where data.num_frames is as many or more."
        )


def remedies_of(config: Config, mesh: Mesh, checkpoints: Checkpoints) -> Iterable[dict[str, Any]]:
    """Returns changes of config fields that save memory, those alone that may change once there is a checkpoint."""
    devices, in_slice = mesh.size, slice_sizes(mesh.devices.flat)[0]
    return (resume_remedies if checkpoints.steps() else remedies)(config, devices, in_slice)


def checkpoint_is_due(done: int, config: Config) -> bool:
    return done == config.num_updates or done % config.checkpoint_every == 0


def evaluation_is_due(done: int, config: Config) -> bool:
    """Returns whether eval_split is set and `done` is num_updates, or above 0 and a multiple of a set eval_every."""
    last, every = done == config.num_updates, config.eval_every
    return bool(config.data.eval_split) and (last or bool(done and every and done % every == 0))


def evaluate_held_out(run: Run, state: State, done: int, stop: guards.Stop) -> None:
    """Evaluates the average, else the parameters; logs the figures, and sets checkpoints.recall.

    Pictures that cannot be read are warned of and do not end the training. Raises ValueError if no clip can be read,
    and StoppedError between two batches after a signal.
    """
    assert run.held_out is not None
    name, weights = run.held_out.name, state.average or state.params
    encoder = Model(
        run.config, run.model, weights, run.mesh, batch_size=run.config.eval_batch_size, before_batch=stop.check
    )
    memory = memory_advice(lambda: evaluation_remedies(run.config, run.mesh.size))
    with memory, jax.debug_infs(False):  # -inf is the score of no shop image
        result = evaluate_split(encoder, run.held_out, gallery=run.config.data.eval_gallery, on_error="miss")
    warn_of_unreadable(run.held_out, result.faults)
    figures = hosts.ask_first(lambda: result.figures)  # the same on all, since they decide which checkpoints to keep
    run.log.write_evaluation(done, name, figures)
    run.log.say(f"step {done}  {name}: {one_line(figures)}")
    run.checkpoints.recall = run.log.recalls(name)


def saved_batch_size(workdir: Path) -> int:
    """Returns the batch_size of the run in `workdir`, or 0 without one. Raises ValueError for a bad config.json."""
    held = read_config(workdir) if is_run(workdir) else None
    return 0 if held is None else from_json(held).batch_size


def saved_init_from(workdir: Path, held: str | None, start: int | None) -> str:
    """Returns init_from of the run's config `held`, or "". Raises ValueError for imported weights, no run (start 0)."""
    if start == 0:
        raise ValueError(
            f"{workdir} holds imported weights and no run; give another --workdir, and --config.init_from={workdir}."
        )
    return from_json(held).init_from if start and held is not None else ""


def refuse_other_run(
    workdir: Path, held: str | None, config: Config, saved: dict[str, Any] | None, now: dict[str, Any]
) -> None:
    """Raises ValueError, naming the differences, if the newest checkpoint is of another config or of other data.

    `held`: the run's config as JSON. `saved`: that checkpoint's meta data, or None, which raises nothing; `now`: this
    run's. Fields in FREE may differ.
    """
    if saved is None or held is None:
        return  # nothing was trained here, so nothing can be lost
    if changed := differences(from_json(held), config, free=FREE):
        if any(line.startswith("num_updates:") for line in changed):
            changed.append(f"the learning rate falls to 0 at num_updates, so that it cannot change; {longer(workdir)}")
        elif any(line.startswith("data.skip_clips:") for line in changed):
            changed.append(f"data.skip_clips decides the clips of every update; {longer(workdir)}")
        raise ValueError(
            f"{workdir} holds a run with another config; take another --workdir, or undo:\n  " + "\n  ".join(changed)
        )
    if saved["plan"] != now["plan"]:
        cause = "data.path holds other clips; give the data set of that run"
        if saved["data"] == now["data"]:
            cause = f"another version of rice_jax made its plan; use {saved.get('version', 'that version')}"
        raise ValueError(
            f"{workdir}: its checkpoint is of plan {saved['plan']} and data {saved['data'][:12]}, this run has "
            f"{now['plan']} and {now['data'][:12]}: {cause}, or give another --workdir."
        )


def longer(workdir: Path) -> str:
    """Returns, as a clause, how to train on from the weights of the run in `workdir`."""
    return (
        f"to train on from its weights, with a new optimiser and schedule, give another --workdir and "
        f"--config.init_from={workdir}"
    )


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns a dict that hosts must share, of config and data. Raises ValueError if bad, FileNotFoundError if none."""
    validate(arguments.config)
    data = Dataset(Path(arguments.config.data.path))
    return {"command": "train", "data": data.content_hash, **hosts.of_config(arguments.config)}


def main(arguments: argparse.Namespace) -> None:
    # A continued run need not compile again. In the workdir the cache is deleted together with the run.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(arguments.workdir / "compiled"))
    train_and_evaluate(arguments.config, arguments.workdir)


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.train") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = "folder of the run: checkpoints, metrics, TensorBoard"
    parser.add_argument("--workdir", type=parse_path, required=True, help=about)
    hosts.add_flags(parser)
    return parse_arguments(parser, argv)


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.train") -> None:
    hosts.run(main, parse(argv, prog), facts, stops_together=True)


if __name__ == "__main__":
    command()
