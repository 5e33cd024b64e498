"""Runs killed at random moments, each compared with one that nobody touched: python -m tests.chaos

A round trains the smallest RICE, kills it a few times in a phase each (in the middle of an update, of a save, of an
evaluation; and `rice_jax.evaluate` while it writes embeddings), starts the same command again each time, and at the end
compares every line of metrics.jsonl and every bit of the parameters with the undisturbed run's. `changes` goes on with
2, 1 and 4 processes on the same total of 4 devices. Rounds that are done are not done again: build/chaos/report.json.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import rice_jax
from data_pipeline.convert import Options, convert
from data_pipeline.format.reader import open_dataset
from data_pipeline.synthetic import synthesize
from data_pipeline.system.paths import parse_path
from rice_jax.config import from_json
from rice_jax.training import ledger as order

UPDATES, SAVE_EVERY, EVALUATE_EVERY = 12, 3, 4  # intervals that do not divide each other
PHASES = ("update", "save", "evaluation", "embeddings")
PATIENCE = 240.0  # seconds that a command may take on a busy machine; a killed run's others may take 60


# --- a run, from outside ----------------------------------------------------------------------------------------------


def make_data(folder: Path) -> Path:
    """A drawn shop of 24 products, converted."""
    if not (folder / "records" / "manifest.json").exists():
        shutil.rmtree(folder / "shop", ignore_errors=True)
        synthesize(output=folder / "shop", products=24, clips=192, seed=0, workers=2)
        convert(Options(layout="lpr750k", source=folder / "shop", output=folder / "records", workers=2))
    return folder / "records"


class Processes:
    """One command on some processes of this machine, `devices` in all."""

    def __init__(self, command: list[str], log: Path, *, processes: int, devices: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = f"--xla_force_host_platform_device_count={devices // processes}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        self._children, self._log = [], log
        with log.open("ab") as out:
            for number in range(processes):
                joined = ["--coordinator", address, f"--num-processes={processes}", f"--process-id={number}"]
                words = [*command, *(joined if processes > 1 else [])]
                self._children.append(
                    subprocess.Popen([sys.executable, "-m", *words], stdout=out, stderr=out, env=environment)
                )

    def alive(self) -> bool:
        return all(child.poll() is None for child in self._children)

    def signal(self, which: signal.Signals, *, everyone: bool, dice: random.Random) -> None:
        for child in self._children if everyone else [dice.choice(self._children)]:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(which)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit statuses; what has not ended by then is killed, and that is an error."""
        end = time.monotonic() + seconds
        try:
            return [child.wait(max(0.1, end - time.monotonic())) for child in self._children]
        except subprocess.TimeoutExpired:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self._log}: a process still ran after {seconds:.0f} s\n{tail}") from None
        finally:
            for child in self._children:
                child.kill()
                child.wait()


@functools.cache
def words_of(data: Path, workdir: Path) -> list[str]:
    fields = {
        "data.path": data, "num_updates": UPDATES, "checkpoint_every": SAVE_EVERY, "eval_every": EVALUATE_EVERY,
        "log_every": 1, "loss.cross_dropout": 0.1, "checkpoints_kept": 20,
    }  # fmt: skip
    return [
        "rice_jax.train", "--config", "smoke", "--workdir", str(workdir),
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def updates_done(workdir: Path) -> int:
    return max((line["step"] for line in lines_of(workdir)), default=0)


def is_saving(workdir: Path) -> bool:
    """A step's folder under another name, or without the digest that ends its save."""
    folder = workdir / "checkpoints"
    steps = [entry for entry in folder.iterdir() if ".damaged" not in entry.name] if folder.exists() else []
    return any(not (step / "digest.json").exists() for step in steps)


def is_evaluating(workdir: Path) -> bool:
    lines = lines_of(workdir)
    done = max((line["step"] for line in lines), default=0)
    due = done and (done % EVALUATE_EVERY == 0 or done == UPDATES)
    return bool(due) and not any(line["step"] == done and "val/queries" in line for line in lines)


def phase_of(workdir: Path) -> str:
    """Where a run was, by what it has left on the disk."""
    if is_saving(workdir):
        return "save"
    return "evaluation" if is_evaluating(workdir) else "update" if updates_done(workdir) else "start"


def until(true: Callable[[], bool], run: Processes, seconds: float = PATIENCE) -> bool:
    """Waits until something is true; False when the run ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        if not run.alive():
            return False
        time.sleep(0.001)
    raise RuntimeError(f"nothing happened for {seconds:.0f} s")


def parameters_of(workdir: Path) -> str:
    return rice_jax.load(workdir, step=UPDATES).fingerprint


# --- rounds -----------------------------------------------------------------------------------------------------------


def disturbed(
    command: list[str], workdir: Path, targets: list[str], dice: random.Random, *, processes: int, devices: int
) -> list[str]:
    """Runs a command to its end, with a kill in each of the phases on the way; the kills, as 'save by SIGKILL'."""
    kills = []
    for target in targets:
        run = Processes(command, workdir.with_suffix(".log"), processes=processes, devices=devices)
        start = updates_done(workdir)
        wanted = dice.randrange(start + 1, UPDATES + 1) if start < UPDATES else UPDATES
        reached = until(lambda wanted=wanted: updates_done(workdir) >= wanted or is_saving(workdir), run)
        here: dict[str, Callable[[], bool]] = {
            "update": lambda: phase_of(workdir) == "update",
            "save": lambda: is_saving(workdir),
            "evaluation": lambda: is_evaluating(workdir),
        }
        if reached and until(here[target], run):
            time.sleep(dice.random() * {"update": 0.1, "save": 0.2, "evaluation": 0.3}[target])
            gently = target == "update" and dice.random() < 0.5
            # Gently as a scheduler does, all of them; or one of them, whose end the others must notice.
            run.signal(signal.SIGTERM if gently else signal.SIGKILL, everyone=gently, dice=dice)
            statuses = run.wait(PATIENCE if gently else 60 + 30 * (processes > 1))
            if any(statuses):
                kills.append(f"{phase_of(workdir)} by {'SIGTERM' if gently else 'SIGKILL'}")
        else:
            run.wait()
    last = Processes(command, workdir.with_suffix(".log"), processes=processes, devices=devices)
    if any(last.wait()):
        raise RuntimeError(f"the last start failed:\n{workdir.with_suffix('.log').read_text(errors='replace')[-3000:]}")
    return kills


def evaluated(workdir: Path, data: Path, log: Path, dice: random.Random | None) -> tuple[list[str], tuple[str, str]]:
    """rice_jax.evaluate, killed while it writes embeddings if there are dice; the kills, and what it found."""
    output = workdir / "evaluation"
    command = ["rice_jax.evaluate", "--workdir", str(workdir), "--data", str(data), "--output", str(output), "--json"]
    kills = []
    if dice is not None:
        run = Processes(command, log, processes=1, devices=1)
        blocks = lambda: [*output.glob("embeddings/*/*.npy"), *output.glob("embeddings/*/*.tmp")]
        if until(lambda: bool(blocks()), run):
            time.sleep(dice.random() * 0.02)
            run.signal(signal.SIGKILL, everyone=True, dice=dice)
        if any(run.wait()):
            kills.append("embeddings by SIGKILL")
    if any(Processes(command, log, processes=1, devices=1).wait()):
        raise RuntimeError(f"{log}: evaluate failed:\n{log.read_text(errors='replace')[-3000:]}")
    return kills, ((output / "metrics.json").read_text(), (output / "rankings.jsonl").read_text())


def undisturbed(folder: Path, data: Path, *, processes: int, devices: int) -> Path:
    workdir = folder / f"undisturbed-{processes}"
    if not (workdir / "evaluation" / "metrics.json").exists():
        shutil.rmtree(workdir, ignore_errors=True)
        log = workdir.with_suffix(".log")
        if any(Processes(words_of(data, workdir), log, processes=processes, devices=devices).wait()):
            raise RuntimeError(f"the undisturbed run failed:\n{log.read_text(errors='replace')[-3000:]}")
        evaluated(workdir, data, log, None)
    return workdir


def killed_round(folder: Path, data: Path, name: str, *, processes: int, kills: int) -> dict[str, Any]:
    """One run with kills in it against the one without."""
    devices = 2 if processes > 1 else 1
    dice, workdir = random.Random(name), folder / name
    quiet = undisturbed(folder, data, processes=processes, devices=devices)
    shutil.rmtree(workdir, ignore_errors=True)
    targets = [dice.choice(PHASES[:3]) for _ in range(kills)]
    done = disturbed(words_of(data, workdir), workdir, targets, dice, processes=processes, devices=devices)
    expected = tuple((quiet / "evaluation" / file).read_text() for file in ("metrics.json", "rankings.jsonl"))
    # One process evaluates, however many trained: so the rounds with several need not show it again.
    more, figures = evaluated(workdir, data, workdir.with_suffix(".log"), dice) if processes == 1 else ([], expected)
    result = {
        "kills": done + more,
        "metrics_equal": (workdir / "metrics.jsonl").read_text() == (quiet / "metrics.jsonl").read_text(),
        "parameters_equal": parameters_of(workdir) == parameters_of(quiet),
        "evaluation_equal": figures == expected,
        "parameters": parameters_of(workdir),
    }
    if all(equal for name, equal in result.items() if name.endswith("_equal")):
        shutil.rmtree(workdir)
    return result


def changed_round(folder: Path, data: Path, name: str, updates: int = 30) -> dict[str, Any]:
    """2 processes, then 1, then 4, of 4 devices in all: the batches by ledger, ten losses after each change, Recall."""
    workdir, log = folder / name, folder / f"{name}.log"
    dice = random.Random(name)
    command = lambda workdir: [
        *words_of(data, workdir),
        f"--config.num_updates={updates}",
        "--config.checkpoint_every=10",
    ]
    shutil.rmtree(workdir, ignore_errors=True)
    result: dict[str, Any] = {"kills": [], "changes": []}
    for before, after, at in ((2, 1, 10), (1, 4, 20)):
        run = Processes(command(workdir), log, processes=before, devices=4)
        if not until(lambda at=at: (workdir / "checkpoints" / str(at) / "digest.json").exists(), run):
            raise RuntimeError(f"{log}: ended before update {at}:\n{log.read_text(errors='replace')[-3000:]}")
        run.signal(signal.SIGKILL, everyone=False, dice=dice)
        run.wait(90)
        result["kills"].append(f"{phase_of(workdir)} by SIGKILL")
        stayed = folder / f"{name}-stayed-{before}"
        shutil.rmtree(stayed, ignore_errors=True)
        shutil.copytree(workdir, stayed)
        if any(Processes(command(stayed), log, processes=before, devices=4).wait()):
            raise RuntimeError(f"{log}: the run that stayed failed")
        result["changes"].append({"from": before, "to": after, "at": at, "stayed": str(stayed)})
    if any(Processes(command(workdir), log, processes=4, devices=4).wait()):
        raise RuntimeError(f"{log}: the last start failed")
    ours = {line["step"]: line for line in lines_of(workdir) if "loss" in line}
    for change in result["changes"]:
        theirs = {line["step"]: line for line in lines_of(Path(change["stayed"])) if "loss" in line}
        ten = range(change["at"] + 1, change["at"] + 11)
        change["largest_difference"] = max(abs(ours[u]["loss"] - theirs[u]["loss"]) for u in ten)
        change["ledgers_equal"] = all(ours[u]["ledger"] == theirs[u]["ledger"] for u in theirs)
        finals = [
            [line for line in lines_of(run) if "val/queries" in line][-1]
            for run in (workdir, Path(change.pop("stayed")))
        ]
        change["queries_apart"] = (
            abs(finals[0]["val/recall@1"] - finals[1]["val/recall@1"]) / 100 * finals[0]["val/queries"]
        )
    config = from_json((workdir / "config.json").read_text())
    plan, ledger = order.make_plan(config, open_dataset(data)), order.read_ledger(workdir)
    epochs = [order.check_epoch(plan, ledger, e, last_update=updates) for e in range(plan.epoch(updates - 1) + 1)]
    result["ledger_equal"] = not any(epoch.wrong or epoch.twice for epoch in epochs)
    result["losses_equal"] = all(
        change["largest_difference"] <= 1e-5 and change["ledgers_equal"] for change in result["changes"]
    )
    result["recall_equal"] = all(change["queries_apart"] <= 1 for change in result["changes"])
    return result


def rounds(folder: Path, data: Path, count: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "changes", functools.partial(changed_round, folder, data, "changes")
    for number in range(count):
        for kind, processes, kills in (("one", 1, 2), ("two", 2, 1)):
            name = f"{kind}-{number:02d}"
            yield name, functools.partial(killed_round, folder, data, name, processes=processes, kills=kills)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=parse_path, default=Path("build/chaos"))
    parser.add_argument("--rounds", type=int, default=20, help="of each kind (default: 20)")
    arguments = parser.parse_args(argv)
    folder = arguments.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    data, path = make_data(folder), folder / "report.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rounds": {}}
    for name, go in rounds(folder, data, arguments.rounds):
        if name in report["rounds"]:
            continue
        start = time.monotonic()
        result = go() | {"seconds": round(time.monotonic() - start, 1)}
        report["rounds"][name] = result | {"equal": all(v for k, v in result.items() if k.endswith("_equal"))}
        kills = Counter(kill for done in report["rounds"].values() for kill in done["kills"])
        report |= {
            "equal": all(done["equal"] for done in report["rounds"].values()),
            "kills": dict(sorted(kills.items())),
        }
        report["parameters"] = sorted(
            {done["parameters"] for done in report["rounds"].values() if "parameters" in done}
        )
        path.with_suffix(".tmp").write_text(json.dumps(report, indent=2) + "\n")
        path.with_suffix(".tmp").rename(path)
        verdict = "equal" if report["rounds"][name]["equal"] else "NOT EQUAL"
        print(f"{name}: {verdict}  {', '.join(result['kills'])}  {result['seconds']} s", flush=True)
    verdict = "all equal" if report["equal"] else "NOT ALL EQUAL"
    print(f"{len(report['rounds'])} rounds, kills {report['kills']}, {verdict}: {path}")
    return 0 if report["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
