"""Compares conversion with a copy of the same files: python -m benchmarks.conversion --layout NAME --source DIR

`convert` reads, checks and writes every picture and flushes it to the disk. `cp -r` copies the source, and `sync`
flushes the copied files. Both write to a new folder under --scratch, so to the same file system. Files of the turn
before are removed before the time starts.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import turns
from data_pipeline import convert
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax import errors


def copying(source: Path, output: Path) -> Callable[[], None]:
    def run() -> None:
        subprocess.run(["cp", "-r", str(source), str(output)], check=True)
        subprocess.run(["find", str(output), "-type", "f", "-exec", "sync", "{}", "+"], check=True)

    return run


def converting(arguments: argparse.Namespace, output: Path) -> Callable[[], None]:
    words = {"layout": arguments.layout, "source": arguments.source, "output": output, "workers": arguments.workers}
    words |= {"splits": arguments.splits} if arguments.splits else {}

    def run() -> None:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # tables of convert
            status = convert.main(["--frames=all", *(f"--{name}={value}" for name, value in words.items())])
        if status:
            raise SystemExit(status)  # convert has printed the error

    return run


def main(arguments: argparse.Namespace) -> None:
    files = [path for path in arguments.source.rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        output = Path(scratch) / "output"
        candidates = {"convert": converting(arguments, output), "copy": copying(arguments.source, output)}
        seconds = turns.in_turn(candidates, arguments.repeats, lambda: shutil.rmtree(output, ignore_errors=True))
    report = {
        "layout": arguments.layout,
        "workers": arguments.workers,
        "repeats": arguments.repeats,
        "files": len(files),
        "megabytes": megabytes,
        "seconds": seconds,
        "megabytes_per_second": {name: megabytes / taken.wall for name, taken in seconds.items()},
        "convert_over_copy": turns.ratio(seconds["convert"], seconds["copy"]),
    }
    turns.write_report(arguments.output, report)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.conversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=sorted(convert.LAYOUTS), required=True)
    parser.add_argument("--source", type=parse_path, required=True, help="as for data_pipeline.convert")
    parser.add_argument("--splits", help="splits to convert, as for data_pipeline.convert; all files are copied")
    parser.add_argument("--workers", type=parse_count, default=turns.cores())
    parser.add_argument(
        "--scratch", type=parse_path, default=Path("build/benchmarks"), help="folder that both write to"
    )
    parser.add_argument("--repeats", type=parse_count, default=3)
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/conversion.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.run(main, parse())
