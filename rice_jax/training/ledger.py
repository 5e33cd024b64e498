"""The plan of a run, and the check of its ledger: which clips each update should show, and which it did.

Every update digests the rows of its global batch on the devices (batch_digest), and metrics.jsonl keeps the digests:
they are the ledger. The plan gives the rows that an update should have. If both agree for all updates of an epoch, no
clip was shown twice in it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int, UInt32

from data_pipeline.format.reader import Dataset, Split
from data_pipeline.input.plan import Plan, rows_without
from rice_jax.config import Config


def kept_rows(config: Config, train: Split) -> Int[np.ndarray, " kept"] | None:
    """Returns the rows left without the ids in data.skip_clips, ascending; None if it is (). ValueError: unknown id."""
    return rows_without(train.clip_ids, config.data.skip_clips) if config.data.skip_clips else None


def make_plan(config: Config, dataset: Dataset) -> Plan:
    """Returns the plan. Raises ValueError if clips fill no batch, or split, columns, seed, size or an id is bad."""
    train = dataset.split(config.data.train_split)
    return Plan(
        train.num_clips,
        config.batch_size,
        config.seed,
        keep=kept_rows(config, train),
        product=np.asarray(train.columns["product"]) if config.data.spread_products else None,
        content_hash=dataset.content_hash,
    )


def batch_digest(rows: Int[Array | np.ndarray, " G"], xp: Any = np) -> UInt32[Array | np.ndarray, "2"]:
    """Returns two position-weighted sums of a global batch's rows, uint32, modulo 2^32. xp: numpy; in jit jax.numpy."""
    row, position = rows.astype(xp.uint32), xp.arange(len(rows), dtype=xp.uint32)
    first = xp.sum((row + 1) * (2 * position + 1), dtype=xp.uint32)
    return xp.stack([first, xp.sum((row + 7) * (row + 11) * (position + 13), dtype=xp.uint32)])


def as_hex(digest: UInt32[Array | np.ndarray, "2"]) -> str:
    """Returns the digest as metrics.jsonl has it: 16 hexadecimal digits."""
    return "".join(f"{word:08x}" for word in np.asarray(digest))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, in order, without a half-written last one (no newline at its end).

    Raises ValueError if a line is no JSON or has no integer "step", and OSError if the file cannot be read.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            lines.append(json.loads(text))
            int(lines[-1]["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number}: is no line of metrics ({error}); restore the file.") from error
    return lines


def read_ledger(workdir: Path) -> dict[int, str]:
    """Returns each update's digest by its number. Raises FileNotFoundError, or ValueError for a line without step."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the --workdir of a training run.")
    return {line["step"]: line["ledger"] for line in read_metrics(path) if "ledger" in line}


class Epoch(NamedTuple):
    """The comparison of one epoch's plan with the ledger."""

    number: int  # from 0
    updates: range  # numbers from 1, up to the run's last update
    shown: int  # number of clips in the updates that the ledger contains
    twice: list[int]  # rows planned more than once in them; a plan has none
    left_out: list[int]  # rows that the epoch does not show, because they fill no batch
    checked: list[int]  # updates with the plan's digest
    wrong: list[int]  # updates with another digest


def check_epoch(plan: Plan, ledger: dict[int, str], number: int, *, last_update: int) -> Epoch:
    """Returns epoch `number`, from 0, compared with the plan up to `last_update`, without updates the ledger lacks."""
    first = number * plan.batches_per_epoch + 1
    updates = range(first, min(first + plan.batches_per_epoch, last_update + 1))
    batches = {update: plan.batch(update - 1) for update in updates if update in ledger}
    wrong = [update for update, rows in batches.items() if ledger[update] != as_hex(batch_digest(rows))]
    rows, counts = np.unique(np.concatenate([*batches.values(), np.zeros(0, np.int64)]), return_counts=True)
    return Epoch(
        number=number,
        updates=updates,
        shown=int(counts.sum()),
        twice=rows[counts > 1].tolist(),
        left_out=sorted(plan.left_out(number).tolist()),
        checked=[update for update in batches if update not in wrong],
        wrong=wrong,
    )
