"""Runs all commands in minutes, on data that needs no download: python -m rice_jax.demo [--output DIR]

Draws a livestream shop, converts it, trains, evaluates and draws some rankings, and prints each command as a user would
type it. After an interruption the same command continues. It writes DIR/report.json, Recall@1 of chance, of a colour
histogram and of the model before and after training, and DIR/queries.png, eight queries with their rankings.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_pipeline.format.reader import open_dataset
from data_pipeline.system.paths import parse_path
from data_pipeline.system.signals import STOPS, heard
from rice_jax import errors
from rice_jax.config import from_json
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import make_mesh
from rice_jax.retrieval.evaluation import evaluate_split
from rice_jax.retrieval.histogram import histogram_recall
from rice_jax.retrieval.model import Model
from rice_jax.training import step

SHOP = ("--products", "120", "--clips", "960")  # drawn in seconds, enough to learn from


def demo(output: Path, overrides: list[str]) -> None:
    """Runs the demo in `output`; `overrides` are --config.field=value words. Raises SystemExit if a command failed."""
    start = time.monotonic()
    shop, records, run, evaluation = (output / name for name in ("shop", "records", "run", "evaluation"))
    run_command("data_pipeline.synthetic", "--output", shop, *SHOP)
    run_command("data_pipeline.convert", "--layout", "lpr750k", "--source", shop, "--output", records)
    run_command("rice_jax.train", "--config", "demo", f"--config.data.path={records}", "--workdir", run, *overrides)
    run_command("rice_jax.evaluate", "--workdir", run, "--data", records, "--output", evaluation)
    picture = output / "queries.png"
    run_command("rice_jax.show", "--evaluation", evaluation, "--data", records, "--output", picture)
    report = compare(run, records, evaluation)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{'recall@1 in percent':>22}")
    for name, figures in report.items():
        print(f"{name.replace('_', ' '):>22}{figures['recall@1']:8.1f}")
    print(
        f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Look at {picture}, and at {shop} for the pictures.\n"
        "Next: your own clips and shop images, docs/own_clips.md; an LPR download, README.md; why it works,\n"
        "rice_jax/losses/equations.py; other settings, for example\n"
        f"  python -m rice_jax.train --config demo:icl --config.data.path={records} --workdir {output / 'icl'}"
    )


def compare(run: Path, records: Path, evaluation: Path) -> dict[str, dict[str, float]]:
    """Returns {NAME: {"recall@1": percent}} of chance, colour_histogram, untrained and trained, on the test split.

    Raises OSError or ValueError if a file is missing or damaged.
    """
    split, trained = open_dataset(records).split("test"), json.loads((evaluation / "metrics.json").read_text())
    config = from_json((run / "config.json").read_text())
    net, mesh = build_model(config), make_mesh(data=-1, fsdp=1)
    start = step.init_state(net, config, step.abstract_state(net, config, mesh))
    size = -(-config.eval_batch_size // mesh.size) * mesh.size
    untrained = evaluate_split(Model(config, net, start.params, mesh, batch_size=size), split)
    recall = {
        "chance": trained["chance_recall@1"],
        "colour_histogram": histogram_recall(split),
        "untrained": untrained.figures["recall@1"],
        "trained": trained["recall@1"],
    }
    return {name: {"recall@1": float(value)} for name, value in recall.items()}


def run_command(module: str, *words: str | Path) -> None:
    """Prints and runs `python -m MODULE WORDS`; passes signals to stop on to it.

    Raises SystemExit with its status if that is not 0, and prints what to do, unless such a signal ended it.
    """
    line = [module, *map(str, words)]
    print("\n$ python -m " + " ".join(line), flush=True)
    process = subprocess.Popen([sys.executable, "-m", *line])
    with heard((signal.SIGINT, *STOPS), process.send_signal):
        status = process.wait()
    if status:
        status = status if status > 0 else 128 - status
        if status - 128 not in (signal.SIGINT, *STOPS):  # the command says those itself
            errors.fail(
                f"the demo ends, because {module} ended with status {status}; remove the cause and run the same demo "
                "again, which goes on, or give it another --output to begin anew.", status=status,
            )  # fmt: skip
        raise SystemExit(status)


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.demo") -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "--config.field=value changes the training's config, configs/demo.py."
    parser.add_argument("--output", type=parse_path, default=Path("build/demo"), help="folder (default: build/demo)")
    arguments, rest = parser.parse_known_args(argv)
    if wrong := [word for word in rest if not word.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    return arguments, rest


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.demo") -> None:
    arguments, overrides = parse(argv, prog)
    errors.run(lambda output: demo(output, overrides), arguments.output, long=True)


if __name__ == "__main__":
    command()
