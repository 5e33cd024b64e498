"""Compares our input with the official transforms in Pillow: python -m benchmarks.pipeline --data DIR

The official transforms (docs/official.md 9) read JPEG files, which are written from the training pictures of a
converted set. They convert to RGB, resize to 256 x 256 (bilinear), crop 224 at random, flip, normalise floats of 0 to
1, put channels first and stack. Ours is `train_batches`, from records to batches of uint8, which the device normalises.
Both use the same clips, the same number of frames, one process and equal threads. Only the operating system caches.
"""

import argparse
import concurrent.futures
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import turns
from data_pipeline.format.reader import Split, open_dataset
from data_pipeline.input.batches import train_batches
from data_pipeline.input.decode import load_picture
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.plan import Plan
from data_pipeline.input.sampling import sample_frames
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax import errors
from rice_jax.models.arrays import MEAN, STD

OPTIONS = FrameOptions(tail_cut=False)  # a tail cut would give the two different numbers of frames


def write_pictures(split: Split, rows: np.ndarray, folder: Path) -> dict[int, tuple[list[Path], Path]]:
    """Writes the pictures of clips and returns, by row, the files of the sampled frames and of the shop image."""
    files = {}
    for row in rows.tolist():
        record = split.clip(row)
        chosen = sample_frames(len(record.frames), OPTIONS.num_frames)
        paths = [folder / f"{row}-{position}.jpg" for position in chosen]
        for path, position in zip(paths, chosen, strict=True):
            path.write_bytes(record.frames[position].encoded)
        image = folder / f"{row}-shop.jpg"
        image.write_bytes(split.image(int(split.columns["image"][row])).encoded)
        files[row] = paths, image
    return files


def official_picture(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        picture = opened.convert("RGB").resize((OPTIONS.resize, OPTIONS.resize), Image.Resampling.BILINEAR)
    room = OPTIONS.resize - OPTIONS.image_size
    left, top = random.randint(0, room), random.randint(0, room)
    picture = picture.crop((left, top, left + OPTIONS.image_size, top + OPTIONS.image_size))
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(picture).transpose(2, 0, 1).astype(np.float32) / 255
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def official_example(files: tuple[list[Path], Path]) -> tuple[np.ndarray, np.ndarray]:
    clip = np.zeros((OPTIONS.num_frames, 3, OPTIONS.image_size, OPTIONS.image_size), np.float32)
    for slot, path in enumerate(files[0]):
        clip[slot] = official_picture(path)
    return clip, official_picture(files[1])


def official_epoch(
    plan: Plan, files: dict[int, tuple[list[Path], Path]], threads: int, batches: int
) -> Callable[[], int]:
    def run() -> int:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for number in range(batches):
                examples = list(pool.map(official_example, [files[row] for row in plan.batch(number).tolist()]))
                np.stack([clip for clip, _ in examples]), np.stack([image for _, image in examples])
        return batches

    return run


def our_epoch(split: Split, plan: Plan, threads: int, batches: int) -> Callable[[], int]:
    def run() -> int:
        with train_batches(split, plan, np.arange(plan.batch_size), OPTIONS, threads=threads) as ours:
            for _ in range(batches):
                next(ours)
        return batches

    return run


def level_difference(files: dict[int, tuple[list[Path], Path]]) -> int:
    """Returns the largest difference between both ways of decoding and resizing, in levels of 0 to 255.

    It is taken over the first frames of at most 20 clips.
    """
    largest = 0
    for path in [paths[0] for paths, _ in files.values()][:20]:
        with Image.open(path) as opened:
            theirs = np.asarray(opened.convert("RGB").resize((OPTIONS.resize,) * 2, Image.Resampling.BILINEAR), int)
        largest = max(largest, int(np.abs(load_picture(path.read_bytes(), OPTIONS, train=True) - theirs).max()))
    return largest


def main(arguments: argparse.Namespace) -> None:
    split = open_dataset(arguments.data).split("train")
    size, batches = arguments.batch_size, -(-arguments.clips // arguments.batch_size)
    plan = Plan(split.num_clips, size, seed=0)
    batches = min(batches, plan.batches_per_epoch)
    rows = np.concatenate([plan.batch(number) for number in range(batches)])
    with tempfile.TemporaryDirectory() as folder:
        files = write_pictures(split, rows, Path(folder))
        difference = level_difference(files)
        candidates = {
            "official": official_epoch(plan, files, arguments.threads, batches),
            "ours": our_epoch(split, plan, arguments.threads, batches),
        }
        seconds = turns.in_turn(candidates, arguments.repeats)
    pictures = sum(len(paths) + 1 for paths, _ in files.values())
    report: dict[str, Any] = {
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "examples": len(rows),
        "pictures": pictures,
        "batch_size": size,
        "level_difference": difference,
        "seconds": seconds,
        "examples_per_second": {name: len(rows) / taken.wall for name, taken in seconds.items()},
        "pictures_per_processor_second": {name: pictures / taken.processor for name, taken in seconds.items()},
        "times_faster": turns.ratio(seconds["official"], seconds["ours"]),
    }
    turns.write_report(arguments.output, report)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=parse_path, required=True, help="a converted set; its training split is used")
    parser.add_argument(
        "--clips", type=parse_count, default=128, help="number of clips to read, rounded up to whole batches"
    )
    parser.add_argument("--batch_size", type=parse_count, default=32)
    parser.add_argument("--threads", type=parse_count, default=turns.cores())
    parser.add_argument("--repeats", type=parse_count, default=5)
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/pipeline.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.run(main, parse())
