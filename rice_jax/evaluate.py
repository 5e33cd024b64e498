"""Evaluates a run: python -m rice_jax.evaluate --workdir RUN --data DIR [--split test] [--subset FILE] [--output DIR]
    [--score matching]

Prints Recall@k by the official definition and writes metrics.json and rankings.jsonl to --output. DIR may be another
converted set than the one trained on. After an interruption the same command continues with the pictures that are not
encoded yet. With --score matching the matching decoder also scores each clip against its whole gallery, and the figures
are given for the embedding, the decoder and the sum of both scores. On several hosts run the same command on each; RUN
and --output must be folders that all of them share.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from data_pipeline.format.reader import Dataset, open_dataset
from data_pipeline.format.tfrecord import write_file
from data_pipeline.owner import remove_abandoned
from data_pipeline.system.paths import parse_path
from rice_jax.checkpoints.run_folder import one_writer
from rice_jax.config import PER_HOST, split_override, to_json
from rice_jax.parallel import hosts
from rice_jax.preflight.advice import evaluation_remedies, memory_advice
from rice_jax.retrieval import evaluation
from rice_jax.retrieval.embeddings import EmbeddingStore
from rice_jax.retrieval.model import load
from rice_jax.version import __version__


def evaluate(arguments: argparse.Namespace) -> None:
    with memory_advice(list):
        model = load(arguments.workdir, step=arguments.step, overrides=arguments.overrides)
    dataset = open_dataset(arguments.data)
    split = dataset.split(arguments.split)
    subset = read_ids(arguments.subset) if arguments.subset else None
    name = "-".join(["evaluation", split.name, *([arguments.subset.stem] if arguments.subset else [])])
    output = arguments.output or arguments.workdir / name
    with one_writer(output) as check:
        # The folder is named after all that decides an embedding or its row, so no other model's embeddings are read.
        about = {
            "model": model.fingerprint,
            "step": model.step,
            "data": dataset.content_hash,
            "split": split.name,
            "subset": arguments.subset.name if arguments.subset else None,
            "version": __version__,
        }
        identity = [about, to_json(model.config), subset]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        store = EmbeddingStore(output / "embeddings" / key)
        if hosts.is_first():
            remove_abandoned(output / "embeddings" / key)
        hosts.agree({"the model in --workdir": key})  # or one result would mix two models
        memory = memory_advice(lambda: evaluation_remedies(model.config, model.mesh.size))
        with memory, jax.debug_infs(False):  # -inf is the score of no shop image
            result = evaluation.evaluate_split(
                model, split, subset=subset, score=arguments.score, store=store, show_progress=not arguments.json
            )
        if not hosts.is_first():
            return
        check()
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in evaluation.rankings(result, split))
        write_file(output / "rankings.jsonl", "".join(lines).encode())
        text = json.dumps(result.figures | about | {"score": arguments.score}, indent=2) + "\n"
        write_file(output / "metrics.json", text.encode())
        print(
            json.dumps(result.figures) if arguments.json else f"{evaluation.table(result.figures)}\nwritten to {output}"
        )


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns a dict that hosts must share, of options and data's content. Raises OSError, ValueError if unreadable."""
    return {
        "command": "evaluate",
        "data": Dataset(arguments.data).content_hash,
        "--subset": read_ids(arguments.subset) if arguments.subset else None,
        **{f"--{name}": getattr(arguments, name) for name in ("split", "score", "step")},
        **{f"--config.{name}": text for name, text in arguments.overrides.items() if name not in PER_HOST},
    }


def read_ids(path: Path) -> list[str]:
    """Returns a text file's lines, stripped, but empty ones. Raises ValueError for none or no UTF-8, or OSError."""
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        place = f"{path}: byte {error.start}"
        raise ValueError(f"{place} is not UTF-8; give a text file with one clip id a line.") from error
    if not any(ids):
        raise ValueError(f"{path}: found no clip id; give a text file with one a line.")
    return [clip for clip in ids if clip]


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.evaluate") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = "fields that do not concern the weights: eval_flip, data.test_tail_cut, ..."
    parser.epilog = f"--config.field=value sets {fields}"
    parser.add_argument("--workdir", type=parse_path, required=True, help="the training run")
    parser.add_argument("--data", type=parse_path, required=True, help="a converted data set")
    parser.add_argument("--split", default="test", help="split to evaluate (default: test)")
    parser.add_argument("--subset", type=parse_path, help="text file of clip ids, one a line: only these queries")
    score = "rank by the embedding alone, or also by the decoder's cosine (raw: its h . w) and by the sum of both"
    parser.add_argument("--score", choices=evaluation.SCORES, default="embedding", help=score)
    parser.add_argument("--output", type=parse_path, help="folder of the results (RUN/evaluation-SPLIT[-SUBSET])")
    parser.add_argument("--step", type=int, help="number of updates of the checkpoint (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")
    hosts.add_flags(parser)
    arguments, rest = parser.parse_known_args(argv)
    try:
        arguments.overrides = dict(split_override(word) for word in rest)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return arguments


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.evaluate") -> None:
    hosts.run(evaluate, parse(argv, prog), facts)


if __name__ == "__main__":
    command()
