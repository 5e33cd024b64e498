"""Which clips a run shows, and when: its plan, and the check of a run's ledger against it.

The ledger is what the devices really saw: step.py digests the rows of every global batch, metrics.jsonl keeps the
digests. The plan says what they should have seen. Where both agree for all of an epoch, it showed no clip twice.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from data_pipeline.format.reader import Dataset, Split
from data_pipeline.input.plan import Plan, rows_without


def kept_rows(config: Any, train: Split) -> Int[np.ndarray, " kept"] | None:
    """The clips that config.data.skip_clips leaves; None: all. ValueError for an id that the split does not have."""
    return rows_without(train.clip_ids, config.data.skip_clips) if config.data.skip_clips else None


def make_plan(config: Any, dataset: Dataset) -> Plan:
    """The plan of a config whose batch_size is no longer 0. ValueError when the set fills no batch."""
    train = dataset.split(config.data.train_split)
    return Plan(
        train.num_clips,
        config.batch_size,
        config.seed,
        keep=kept_rows(config, train),
        product=np.asarray(train.columns["product"]) if config.data.spread_products else None,
        content_hash=dataset.content_hash,
    )


def digest(rows: Int[np.ndarray, " G"]) -> str:
    """step.ledger of a global batch's rows, in NumPy, as metrics.jsonl has it."""
    row, place = rows.astype(np.uint32), np.arange(len(rows), dtype=np.uint32)
    first = np.sum((row + np.uint32(1)) * (2 * place + np.uint32(1)), dtype=np.uint32)
    second = np.sum((row + np.uint32(7)) * (row + np.uint32(11)) * (place + np.uint32(13)), dtype=np.uint32)
    return f"{first:08x}{second:08x}"


def read_ledger(workdir: Path) -> dict[int, str]:
    """{update: digest} of a run, updates counted from 1.

    Raises:
      FileNotFoundError: no metrics.jsonl.
      ValueError: a line of it that is no JSON. A last line that a kill left half written does not count.
    """
    path, found = workdir / "metrics.jsonl", {}
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the --workdir of a training run.")
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
            if "ledger" in line:
                found[int(line["step"])] = str(line["ledger"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number}: is no line of metrics ({error}); restore the file.") from error
    return found


class Epoch(NamedTuple):
    """What an epoch showed, by plan and ledger."""

    number: int  # from 0
    updates: range  # counted from 1, as far as the run goes
    shown: int  # clips, by the updates that the ledger has
    twice: list[int]  # rows that were shown more than once; the plan has none
    left_out: list[int]  # rows that the whole epoch does not show: they fill no batch
    checked: list[int]  # updates whose digest is the plan's
    wrong: list[int]  # updates whose digest is not


def check_epoch(plan: Plan, ledger: dict[int, str], number: int, *, last_update: int) -> Epoch:
    """Compares an epoch's updates, up to the run's last, with the plan. The ledger may lack updates to come."""
    first = number * plan.batches_per_epoch + 1
    updates = range(first, min(first + plan.batches_per_epoch, last_update + 1))
    batches = {update: plan.batch(update - 1) for update in updates if update in ledger}
    wrong = [update for update, rows in batches.items() if ledger[update] != digest(rows)]
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
