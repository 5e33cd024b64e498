"""Measures what the checksums of every record cost the input: python -m benchmarks.integrity --data DIR

Three things are timed: unpacking the records of all training clips with their two CRC32Cs verified, the same without
verification, and making whole batches of them, decoded, cropped and flipped as in training. The result is the
difference of the first two as a share of the third. A difference of two whole pipelines would be lost in the noise of a
busy machine.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import turns
from data_pipeline.format.reader import Split, open_dataset
from data_pipeline.format.tfrecord import FOOTER, HEADER, index_path, unframe_record
from data_pipeline.input.batches import train_batches
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.plan import Plan
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax.errors import run


def framed_records(split: Split) -> list[bytes]:
    """Returns the bytes of each clip's record with its framing, in the order of the rows."""
    framed = []
    for shard in sorted(split.path.glob(f"{split.name}-clips-*.tfrecord")):
        data, offsets = shard.read_bytes(), np.frombuffer(index_path(shard).read_bytes(), "<u8").tolist()
        framed += [data[begin:end] for begin, end in itertools.pairwise(offsets)]
    return framed


def unverified(framed: bytes) -> bytes:
    return framed[HEADER.size : -FOOTER.size]


def main(arguments: argparse.Namespace) -> None:
    split = open_dataset(arguments.data).split("train")
    framed = framed_records(split)
    plan = Plan(split.num_clips, min(arguments.batch_size, split.num_clips), 0)

    def read(unframe: Callable[[bytes], bytes]) -> None:
        for _ in range(arguments.passes):
            for record in framed:
                unframe(record)

    def epoch() -> None:
        with train_batches(split, plan, range(plan.batch_size), FrameOptions(), threads=0) as batches:
            for _ in range(plan.batches_per_epoch):
                next(batches)

    seconds = turns.in_turn(
        {"verified": lambda: read(unframe_record), "unverified": lambda: read(unverified), "input": epoch},
        arguments.repeats,
    )
    clips = plan.batches_per_epoch * plan.batch_size
    checking = (seconds["verified"].processor - seconds["unverified"].processor) / arguments.passes / len(framed)
    making = seconds["input"].processor / clips
    turns.write_report(
        arguments.output,
        {
            "records": len(framed),
            "bytes_a_record": float(np.mean([len(record) for record in framed])),
            "seconds": seconds,
            "microseconds_a_clip": {"checking": 1e6 * checking, "input": 1e6 * making},
            "share_of_the_input": checking / making,
        },
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.integrity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=parse_path, required=True, help="a converted set; its training split is used")
    parser.add_argument("--batch_size", type=parse_count, default=32)
    parser.add_argument("--passes", type=parse_count, default=50, help="passes over the records in each turn")
    parser.add_argument("--repeats", type=parse_count, default=7)
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/integrity.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse())
