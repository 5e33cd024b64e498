"""Changes ten thousand single bytes of a converted set, one at a time: python -m tests.corruption

Each is a byte of a shard, an index, a column, a table or the manifest, at a random place and with a random value,
before the set is opened or (shards and indices) after. Then everything that training and evaluation read is read. The
outcome is one of

    refused     ValueError with the name of the file, for a shard also of the record
    harmless    everything that was read is equal to the original
    unnamed     ValueError that does not name the file
    silent      something different was read without an error
    crash       another exception

and only the first two are right. Exit status 1 if there was another one. OUTPUT/report.json has the numbers.
"""

import argparse
import collections
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.convert import Options, convert
from data_pipeline.format.manifest import MANIFEST
from data_pipeline.format.reader import Dataset, open_dataset
from data_pipeline.format.tfrecord import INDEX_SUFFIX, write_file
from data_pipeline.system.paths import parse_path
from tests import lpr_layouts

RIGHT = ("refused", "harmless")
SHOWN = 20  # wrong outcomes in the report


def make_set(folder: Path) -> Path:
    """Makes a small set in which every kind of file occurs, with several clip shards, and returns its folder."""
    source = lpr_layouts.make_lpr750k(folder / "source")
    convert(Options("lpr750k", source, folder / "records", clips_per_shard=3))
    return folder / "records"


def kind_of(path: Path) -> str:
    if path.name == MANIFEST:
        return "manifest"
    if path.name.endswith(INDEX_SUFFIX):
        return "index"
    return "shard" if path.suffix == ".tfrecord" else "column"


def everything(dataset: Dataset) -> str:
    """Returns a digest of all that can be read of a set: records, columns, tables, ids, galleries and truth."""
    digest = hashlib.sha256()
    for texts in dataset.tables.values():
        digest.update(repr(list(texts)).encode())
    for name in dataset.splits:
        split = dataset.split(name)
        columns = {**split.columns, **split.image_columns, **split.galleries}
        digest.update(repr([(name, column.tolist()) for name, column in columns.items()]).encode())
        digest.update(
            repr((list(split.clip_ids), list(split.image_ids), split.truth_by_clip, split.num_truth)).encode()
        )
        for row in range(split.num_clips):
            digest.update(repr(split.clip(row)).encode())
        for row in range(split.num_images):
            digest.update(repr(split.image(row)).encode())
    return digest.hexdigest()


def outcome(folder: Path, path: Path, place: int, value: int, *, opened: bool, expected: str) -> tuple[str, str]:
    """Writes a byte, reads everything, restores the byte, and returns the outcome and the message of the error, or "".

    opened: open the set before the byte is written.
    """
    dataset = open_dataset(folder) if opened else None
    with path.open("r+b", buffering=0) as file:
        file.seek(place)
        before = file.read(1)
        file.seek(place)
        file.write(bytes([value]))
    try:
        found = everything(dataset or open_dataset(folder))
        return ("harmless", "") if found == expected else ("silent", "")
    except ValueError as err:
        shard = path.name.removesuffix(INDEX_SUFFIX)
        named = (f"{shard} record " if kind_of(path) == "shard" else shard) in str(err)
        return ("refused" if named else "unnamed"), str(err)
    except Exception as err:  # every other exception is a finding
        return "crash", repr(err)
    finally:
        with path.open("r+b", buffering=0) as file:
            file.seek(place)
            file.write(before)


def study(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Makes `count` corruptions of the set in `folder`, spread over its kinds of files, and returns a report."""
    rng = np.random.default_rng(seed)
    expected = everything(open_dataset(folder))
    files = collections.defaultdict(list)
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and each.name != "report.json"):
        if path.stat().st_size:
            files[kind_of(path)].append(path)
    kinds = sorted(files)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong: list[dict[str, Any]] = []
    for _ in range(count):
        kind = kinds[rng.choice(len(kinds), p=[{"shard": 0.4, "index": 0.3}.get(each, 0.15) for each in kinds])]
        path = files[kind][rng.integers(len(files[kind]))]
        place = int(rng.integers(path.stat().st_size))
        value = (path.read_bytes()[place] + int(rng.integers(1, 256))) % 256
        opened = kind in ("shard", "index") and bool(rng.integers(2))
        result, words = outcome(folder, path, place, value, opened=opened, expected=expected)
        counts[f"{kind}, {'opened' if opened else 'unopened'}"][result] += 1
        if result not in RIGHT and len(wrong) < SHOWN:
            wrong.append({"file": path.name, "place": place, "value": value, "outcome": result, "words": words})
    total = sum(counts.values(), collections.Counter())
    return {
        "seed": seed,
        "corruptions": count,
        "outcomes": dict(total),
        "by_file": {name: dict(each) for name, each in sorted(counts.items())},
        "wrong": wrong,
        "unchanged_at_the_end": everything(open_dataset(folder)) == expected,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.corruption", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="how many bytes are changed (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=parse_path, default=Path("build/corruption"), metavar="DIR")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = study(make_set(Path(folder)), options.count, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    write_file(options.output / "report.json", json.dumps(report, indent=1).encode() + b"\n")
    print(json.dumps(report, indent=1))
    return 0 if set(report["outcomes"]) <= set(RIGHT) and report["unchanged_at_the_end"] else 1


if __name__ == "__main__":
    sys.exit(main())
