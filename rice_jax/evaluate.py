"""Evaluates a run: python -m rice_jax.evaluate --workdir RUN --data DIR [--split test] [--subset FILE] [--output DIR]
    [--score matching] [--on-error miss]

Prints Recall@k by the official definition and writes metrics.json and rankings.jsonl to --output. DIR may be another
converted set than the one trained on. After an interruption the same command continues with the pictures that are not
encoded yet. With --score matching the matching decoder also scores each clip against its whole gallery, and the figures
are given for the embedding, the decoder and the sum of both. On several hosts run the same command on each; RUN and
--output must be folders that all of them share.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipeline.format.reader import Dataset, open_dataset
from data_pipeline.format.tfrecord import write_file
from data_pipeline.owner import remove_abandoned
from data_pipeline.system.paths import parse_path
from rice_jax.checkpoints.run_folder import one_writer
from rice_jax.config import PER_HOST, flatten, split_override
from rice_jax.parallel import hosts
from rice_jax.preflight.advice import evaluation_remedies, memory_advice
from rice_jax.retrieval import evaluation
from rice_jax.retrieval.embeddings import EmbeddingStore
from rice_jax.retrieval.model import load
from rice_jax.training.step import own_switches
from rice_jax.version import __version__

MAX_NAME = 240  # bytes of a folder's name; most file systems take 255


@own_switches()
def evaluate(arguments: argparse.Namespace) -> None:
    model = load(arguments.workdir, step=arguments.step, overrides=arguments.overrides)
    dataset = open_dataset(arguments.data)
    split = dataset.split(arguments.split)
    subset = read_ids(arguments.subset) if arguments.subset else None
    config = {name: value for name, value in flatten(model.config).items() if name not in PER_HOST}
    overrides = {name: config[name] for name in arguments.overrides if name in config}
    own_data = model.meta.get("data") == dataset.content_hash
    output = arguments.output or arguments.workdir / folder_name(
        arguments, subset, overrides, data=None if own_data else dataset.content_hash
    )
    with one_writer(output) as check:
        # The folder is named after all that decides an embedding or its row, so no other model's embeddings are read.
        about = {
            "model": model.fingerprint,
            "step": model.step,
            "data": dataset.content_hash,
            "split": split.name,
            "subset": arguments.subset.name if arguments.subset else None,
            "overrides": overrides,
            "version": __version__,
        }
        key = _digest([about, config, subset])[:16]
        store = EmbeddingStore(output / "embeddings" / key)
        if hosts.is_first():
            remove_abandoned(output / "embeddings" / key)
        hosts.agree({"the model in --workdir": key})  # or one result would mix two models
        memory = memory_advice(lambda: evaluation_remedies(model.config, model.mesh.size))
        with memory, jax.debug_infs(False):  # -inf is the score of no shop image
            result = evaluation.evaluate_split(
                model, split, subset=subset, score=arguments.score, on_error=arguments.on_error, store=store,
                show_progress=not arguments.json,
            )  # fmt: skip
        evaluation.warn_of_unreadable(split, result.faults)
        if not hosts.is_first():
            return
        check()
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in evaluation.rankings(result, split))
        write_file(output / "rankings.jsonl", lines.encode())
        about |= {"score": arguments.score, "rankings": hashlib.sha256(lines.encode()).hexdigest()}
        if any(result.faults.values()):
            ids = {"clip": split.clip_ids, "image": split.image_ids}
            about["unreadable"] = {kind: [ids[kind][row] for row in rows] for kind, rows in result.faults.items()}
        write_file(output / "metrics.json", (json.dumps(result.figures | about, indent=2) + "\n").encode())
        print(
            json.dumps(result.figures) if arguments.json else f"{evaluation.table(result.figures)}\nwritten to {output}"
        )


def folder_name(
    arguments: argparse.Namespace, subset: Sequence[str] | None, overrides: dict[str, Any], *, data: str | None
) -> str:
    """Returns the name of the results' folder: "evaluation-SPLIT", then each option that sets the results apart.

    A subset adds the name of its file and a digest of its ids; --score, --step and `overrides`, fields by name, add
    their values; `data` is the content hash of a set that the run was not trained on, else None. The same options give
    the same name, and others give another one.
    """
    parts = ["evaluation", arguments.split]
    if subset is not None:
        parts.append(f"{_cut(_plain(arguments.subset.stem), 80)}-{_digest(subset)[:8]}")
    if arguments.score != "embedding":
        parts.append(arguments.score)
    if arguments.on_error != "fail":
        parts.append(arguments.on_error)
    given = {"step": arguments.step, "data": data and data[:8]} | dict(sorted(overrides.items()))
    parts += [f"{name}={str(value).lower()}" for name, value in given.items() if value is not None]
    name = _plain("-".join(parts))
    return name if len(name.encode()) <= MAX_NAME else f"{_cut(name, MAX_NAME - 9)}-{_digest(name)[:8]}"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.=,+-]", "_", text)


def _cut(text: str, size: int) -> str:
    """Returns the start of a text, at most `size` bytes of UTF-8, without a part of a character."""
    return text.encode()[:size].decode(errors="ignore")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns a dict that hosts must share, of options and data's content. Raises OSError, ValueError if unreadable."""
    return {
        "command": "evaluate",
        "data": Dataset(arguments.data).content_hash,
        "--subset": read_ids(arguments.subset) if arguments.subset else None,
        "--on-error": arguments.on_error,
        **{f"--{name}": getattr(arguments, name) for name in ("split", "score", "step")},
        **{f"--config.{name}": text for name, text in arguments.overrides.items() if name not in PER_HOST},
    }


def read_ids(path: Path) -> list[str]:
    """Returns the lines of a text file without empty ones, byte order marks, and spaces and tabs at their ends.

    Lines end as on Linux, Windows or old Macs. Raises ValueError if there are none, or the file is not UTF-8; OSError
    if it cannot be read.
    """
    advice = "save it as UTF-8, a plain text file with one clip id a line"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; {advice}.") from error
    if "\0" in text:  # UTF-16 or UTF-32 without a byte order mark
        raise ValueError(f"{path}: has characters of 0, as UTF-16 has, and is not UTF-8; {advice}.")
    ids = [line.strip(" \t\ufeff") for line in text.split("\n")]  # splitlines would also split at U+2028
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
    parser.add_argument(
        "--subset", type=parse_path, help="text file of clip ids, one a line: evaluate only these queries"
    )
    score = "rank by the embedding alone, or also by the decoder's cosine (raw: its h . w) and by the sum of both"
    parser.add_argument("--score", choices=evaluation.SCORES, default="embedding", help=score)
    on_error = "clips and shop images that cannot be read: end with an error, or name them, count such clips as misses "
    on_error += "and leave such images out of their galleries (default: fail)"
    parser.add_argument("--on-error", choices=("fail", "miss"), default="fail", help=on_error)
    output = "folder for the results (default: RUN/evaluation-SPLIT, its name followed by the other options)"
    parser.add_argument("--output", type=parse_path, help=output)
    parser.add_argument("--step", type=int, help="number of updates of the checkpoint (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")
    hosts.add_flags(parser)
    arguments, rest = parser.parse_known_args(argv)
    try:
        arguments.overrides = dict(split_override(word) for word in rest)
        if "data.eval_gallery" in arguments.overrides:
            raise ValueError("--config.data.eval_gallery: this command ranks in whole galleries always; leave it out.")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return arguments


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.evaluate") -> None:
    hosts.run(evaluate, parse(argv, prog), facts)


if __name__ == "__main__":
    command()
