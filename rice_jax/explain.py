"""Explains an update: python -m rice_jax.explain --workdir RUN --step N [--data DIR] [--output FILE.png]

Draws the clips and shop images of update N as the network saw them, cropped and flipped, and prints all their ids. Then
it checks the ledger of that update's epoch: whether each update so far saw the clips of the plan, and none twice; and
it prints the clips that the epoch leaves out. Exit status 1: an update saw other clips, or the data set is another.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.format.reader import Dataset, Split, open_dataset
from data_pipeline.input.batches import train_batches
from data_pipeline.input.plan import Plan
from data_pipeline.system.paths import parse_path
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import Config, from_json
from rice_jax.errors import run
from rice_jax.parallel.devices import find_devices
from rice_jax.retrieval.model import frame_options
from rice_jax.training.ledger import Epoch, check_epoch, make_plan, read_ledger

SIDE, GAP, TEXT = 72, 6, 16  # px: a picture, between pictures, a line of text
SHOWN = 5  # ids or numbers in a message


def draw_update(split: Split, plan: Plan, config: Config, update: int, *, examples: int) -> Image.Image:
    """Returns an RGB picture of an update's first `examples` pairs, one a line. Raises ValueError if unreadable."""
    rows = np.arange(min(examples, plan.batch_size))
    options = frame_options(config.data, train=True)
    threads = config.data.threads
    with train_batches(
        split, plan, rows, options, start_step=update - 1, threads=threads, check_frames=False
    ) as batches:  # the frames that the run took
        batch = next(batches)
    slots = batch["frames"].shape[1]
    font = ImageFont.load_default(11)
    texts = [f"{split.clip_ids[row]}  shows  {_image_of(split, row)}"[:160] for row in batch["index"].tolist()]
    width = max((slots + 1) * (SIDE + GAP) + 2 * GAP, *(GAP + int(font.getlength(text)) for text in texts))
    sheet = Image.new("RGB", (width + GAP, len(rows) * (SIDE + TEXT + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for line, text in enumerate(texts):
        x, y = GAP, GAP + line * (SIDE + TEXT + GAP)
        pen.text((x, y), text, "#30343b", font)
        for column, picture in enumerate([batch["image"][line], *batch["frames"][line][: batch["mask"][line].sum()]]):
            shown = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            sheet.paste(shown, (x + column * (SIDE + GAP) + (GAP if column else 0), y + TEXT))
    return sheet


def _image_of(split: Split, row: int) -> str:
    return split.image_ids[int(split.columns["image"][row])]


def explain(arguments: argparse.Namespace) -> None:
    workdir, update = arguments.workdir, arguments.step
    find_devices()  # first, because what follows would fail without a clear error
    checkpoints = Checkpoints(workdir)
    newest = checkpoints.latest()
    if (text := checkpoints.config(newest)) is None:
        raise FileNotFoundError(f"{workdir}: found no config.json; give the --workdir of a training run.")
    config, ledger = from_json(text), read_ledger(workdir)
    trained_on = checkpoints.meta(newest).get("data") if newest else None
    dataset = _open(arguments.data, config, trained_on)
    split, plan = dataset.split(config.data.train_split), make_plan(config, dataset)
    if not 1 <= update <= config.num_updates:
        raise ValueError(f"--step {update}: this run has updates 1 to {config.num_updates}; give one of them.")
    epoch = check_epoch(plan, ledger, plan.epoch(update - 1), last_update=config.num_updates)
    rows = plan.batch(update - 1).tolist()

    output = arguments.output or workdir / f"update-{update}.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_update(split, plan, config, update, examples=arguments.examples).save(output)
    pairs = [{"clip": split.clip_ids[row], "image": _image_of(split, row)} for row in rows]
    if arguments.json:
        found = epoch._asdict() | {"updates": [epoch.updates.start, epoch.updates.stop - 1]}
        found |= {name: [split.clip_ids[row] for row in found[name]] for name in ("twice", "left_out")}
        print(json.dumps({"update": update, "pairs": pairs, "ledger": ledger.get(update), "epoch": found}))
    else:
        print("\n".join(_report(split, plan, epoch, ledger, update, pairs)))
        print(f"written to {output}: the first {min(arguments.examples, len(rows))} pairs as the network saw them")
    if epoch.wrong:
        more = f" and {len(epoch.wrong) - SHOWN} more" if len(epoch.wrong) > SHOWN else ""
        other_data = "" if trained_on else "give the --data that the run was trained on, or "
        raise ValueError(
            f"{workdir}: update{'s' * (len(epoch.wrong) > 1)} {', '.join(map(str, epoch.wrong[:SHOWN]))}{more} saw "
            f"other clips than the plan of this data set and config; {other_data}restore the run's config.json if it "
            "was changed. If that does not help, do not rely on this run."
        )


def _open(data: Path | None, config: Config, trained_on: str | None) -> Dataset:
    """Returns the data set at `data`, or else at the config's path. Raises FileNotFoundError if there is none.

    `trained_on` is the content hash in the newest checkpoint. Raises ValueError if the set is damaged, or has another
    hash: the ledger, rows only, cannot notice.
    """
    try:
        dataset = open_dataset(data or config.data.path)
    except FileNotFoundError as error:
        if data:
            raise
        raise FileNotFoundError(
            f"{config.data.path}: found no data set where the run had it; give its folder with --data."
        ) from error
    if trained_on not in (None, dataset.content_hash):
        raise ValueError(
            f"{dataset.path}: found content hash {dataset.content_hash[:12]}, needs {trained_on[:12]}, on which the "
            "run was trained; give that set as --data."
        )
    return dataset


def _report(
    split: Split, plan: Plan, epoch: Epoch, ledger: dict[int, str], update: int, pairs: list[dict[str, str]]
) -> list[str]:
    yes = "the plan's" if update in epoch.checked else "NOT the plan's" if update in epoch.wrong else "not written yet"
    out = [
        f"update {update}: batch {(update - 1) % plan.batches_per_epoch + 1} of {plan.batches_per_epoch} of epoch "
        f"{epoch.number}, ledger {ledger.get(update, '-')} ({yes})"
    ]
    out += [f"  {position:>5}  {pair['clip']}  shows  {pair['image']}" for position, pair in enumerate(pairs)]
    done = len(epoch.checked) + len(epoch.wrong)
    out.append(
        f"epoch {epoch.number}: updates {epoch.updates.start} to {epoch.updates.stop - 1}, {done} of them written, "
        f"{len(epoch.checked)} with the plan's ledger; {epoch.shown} clips shown, "
        + (f"{len(epoch.twice)} MORE THAN ONCE" if epoch.twice else "none twice")
    )
    names = [split.clip_ids[row] for row in epoch.left_out]
    if not names:
        return [*out, "it leaves out no clip"]
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return [*out, f"it leaves out {len(names)} of {plan.num_kept} clips, which fill no batch: {shown}"]


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.explain") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=parse_path, required=True, help="the training run")
    step = "number of the update, as in metrics.jsonl: 1 is the first"
    parser.add_argument("--step", type=int, required=True, help=step)
    parser.add_argument("--data", type=parse_path, help="the converted set (default: its path in the run's config)")
    parser.add_argument("--output", type=parse_path, help="the picture, .png (default: RUN/update-N.png)")
    parser.add_argument("--examples", type=int, default=16, help="number of pairs to draw (default: 16)")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    arguments = parser.parse_args(argv)
    for name in ("step", "examples"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: found {getattr(arguments, name)}, needs at least 1.")
    if arguments.output and arguments.output.suffix.lower() != ".png":
        parser.error(f"--output: found {arguments.output}, needs a name that ends in .png.")
    return arguments


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.explain") -> None:
    run(explain, parse(argv, prog))


if __name__ == "__main__":
    command()
