"""Checks whether data is fit to train on: python -m data_pipeline.doctor PATH

PATH is a source folder of any layout, before it is converted, or a converted set. Every list and every picture is
inspected, and all faults are reported, in OUTPUT/report.html and OUTPUT/report.json. If it is killed, the same command
goes on where it stopped. Exit status: 0 training is safe (there may be warnings), 1 it is not, 2 wrong use.
"""

import argparse
import collections
import contextlib
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.faults import WrongUseError, counted
from data_pipeline.format.manifest import MANIFEST
from data_pipeline.format.tfrecord import write_file
from data_pipeline.inspection.converted import InspectedSet
from data_pipeline.inspection.cross_checks import cross_checks
from data_pipeline.inspection.distributions import distributions
from data_pipeline.inspection.findings import Findings
from data_pipeline.inspection.page import make_page
from data_pipeline.inspection.source import InspectedSource
from data_pipeline.inspection.store import KnownFingerprints, append_fingerprints
from data_pipeline.inspection.summary import InspectedData, Sample
from data_pipeline.layouts.detect import LAYOUTS, SAMPLED_FRAMES, layout_of, open_source
from data_pipeline.owner import remove_abandoned
from data_pipeline.system.command_line import (
    add_workers,
    exit_status,
    make_parser,
    parse_count,
    parse_number,
    parse_splits,
)
from data_pipeline.system.lease import Lease
from data_pipeline.system.output_folder import WORK
from data_pipeline.system.paths import parse_path
from data_pipeline.system.streams import lasting_output
from data_pipeline.system.workers import Workers

CONVERTED = "converted"
BUILD = Path("build/doctor")
SHOWN = 5  # faults of a kind on the screen: thousands of missing frames of one lost archive would hide the rest


def inspect(options: argparse.Namespace) -> dict[str, Any]:
    """Inspects the data, writes report.html and report.json, and returns the report.

    Raises WrongUseError if another run uses the output folder, or the source cannot be opened as the layout given, and
    OSError if the output cannot be written. Faults of the data are in the report.
    """
    begin = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    with Lease(options.output) as lease:
        work = options.output / WORK
        work.mkdir(exist_ok=True)
        remove_abandoned(options.output)
        findings = Findings(frozenset(options.accept), options.path)
        data = _inspect_data(options, work, findings)
        findings.add(cross_checks(data))
        report = {
            "path": str(options.path),
            "layout": options.layout,
            "sample": options.sample and {"clips": options.sample, "seed": options.seed},
            **findings.as_json(),
            "remarks": [*_sample_remark(options), *data.remarks],
            "distributions": distributions(data),
            "seconds": round(time.monotonic() - begin, 1),
        }
        lease.check()
        write_file(options.output / "report.json", _json(report).encode("utf-8", "backslashreplace"))
        page = make_page(f"Data doctor: {options.path}", report, data)
        write_file(options.output / "report.html", page.encode("utf-8", "backslashreplace"))
        return report


def _inspect_data(options: argparse.Namespace, work: Path, findings: Findings) -> InspectedData:
    log = work / "fingerprints.bin"
    known = KnownFingerprints(log)
    if known.count:
        pictures = counted(known.count, "picture")
        print(f"{options.output}: found {pictures} inspected by an earlier run; those of unchanged files are not "
              "decoded again.")  # fmt: skip
    sample = Sample(options.sample, options.seed) if options.sample else None
    on_new = functools.partial(append_fingerprints, log)
    shared: dict[str, Any] = {"findings": findings, "work": work, "on_new": on_new, "sample": sample}
    if options.layout == CONVERTED:
        converted = InspectedSet(options.path, options.workers, **shared)
        converted.inspect(known)
        return converted
    stored_frames = SAMPLED_FRAMES if options.frames == "sampled" else None
    layout, splits = open_source(
        options.layout, options.path, stored_frames, wanted=options.splits, train_annotation=options.train_annotation
    )
    source = InspectedSource(layout, splits, options.workers, **shared)
    with Workers(options.workers, layout) as workers:
        source.read_lists(workers.run)
    source.inspect_pictures(known)
    return source


def _sample_remark(options: argparse.Namespace) -> list[str]:
    """Returns [what a sample leaves out], [] if all clips were inspected."""
    if not options.sample:
        return []
    return [
        f"A sample: {counted(options.sample, 'clip')} of each split (seed {options.seed}), and the shop images shown "
        "there, were inspected, and the lists read whole; what other clips have is not known."
    ]


def _json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def _printable(text: str) -> str:
    """Returns the text with bytes that are not UTF-8 (surrogates, from file names) as backslash escapes of JSON."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_report(report: dict[str, Any], output: Path) -> None:
    for kind, each in report["counts"].items():
        cases = f"   (in {each['cases']:,} places)" if each["cases"] > each["count"] else ""
        print(f"{each['severity']:<8} {kind:<40} {each['count']:>9,}{cases}")
    shown: collections.Counter[str] = collections.Counter()
    for fault in report["faults"]:
        shown[fault["kind"]] += 1
        if shown[fault["kind"]] <= SHOWN:
            line = f" line {fault['line']}" if fault["line"] else ""
            subject = f" ({fault['subject']})" if fault["subject"] else ""
            print(_printable(f"{fault['severity']}: {fault['file']:.300}{line}{subject}: {fault['detail']}"))
    if more := sum(max(0, each["count"] - SHOWN) for each in report["counts"].values()):
        print(f"... and {more:,} more")
    for remark in report["remarks"]:
        print(_printable(remark))
    for split, numbers in report["distributions"].items():
        print(
            f"{split}: {numbers['clips']:,} clips, {numbers['sound_frames']:,} of {numbers['frames']:,} frames and "
            f"{numbers['sound_shop_images']:,} of {numbers['shop_images']:,} shop images sound"
        )
    verdict = "nothing found that makes training unsafe" if report["safe"] else "NOT safe to train on"
    print(f"{report['path']}: {verdict}; {output / 'report.html'}")


def parse_options(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = make_parser(prog, __doc__)
    parser.add_argument("path", type=parse_path, metavar="PATH", help="a source folder, or a converted set")
    parser.add_argument("--layout", choices=(*sorted(LAYOUTS), CONVERTED), help="layout of PATH (found by its folders)")
    parser.add_argument("--splits", type=parse_splits, metavar="LIST", help="of a source: of train,val,test (all)")
    parser.add_argument("--train-annotation", metavar="NAME", help="training list, if annotations/ has several")
    parser.add_argument("--output", type=parse_path, metavar="DIR", help="folder of the report (build/doctor/NAME)")
    parser.add_argument(
        "--frames", choices=("all", "sampled"), default="all",
        help=f"inspect every listed frame, or the {SAMPLED_FRAMES} of each clip that a conversion stores",
    )  # fmt: skip
    parser.add_argument(
        "--sample", type=parse_count, metavar="N",
        help="inspect only N clips of each split, and the shop images that they show: a quick look",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=functools.partial(parse_number, int, needed="a whole number"), default=0, metavar="N",
        help="chooses the clips of --sample (0)",
    )  # fmt: skip
    parser.add_argument(
        "--accept", type=lambda text: text.split(","), default=[], metavar="KINDS",
        help="kinds of faults to count as warnings, separated by commas",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print report.json in place of the summary")
    add_workers(parser)
    options = parser.parse_args(arguments)
    options.output = options.output or BUILD / options.path.resolve().name
    return options


def check_options(options: argparse.Namespace) -> None:
    """Sets a missing options.layout. Raises WrongUseError if PATH is no folder, of no layout, or has the output."""
    if not options.path.is_dir():
        raise WrongUseError(f"{options.path}: found no folder, needs a source or a converted set; correct the path.")
    options.layout = options.layout or (CONVERTED if _is_converted(options.path) else layout_of(options.path))
    if options.layout is None:
        raise WrongUseError(
            f"{options.path}: found neither manifest.json nor annotations/ nor clips/ and shop/, needs one of them; "
            "correct the path, or give --layout."
        )
    if options.layout == CONVERTED and (options.splits or options.train_annotation):
        raise WrongUseError(
            f"{options.path}: found --splits or --train-annotation for a converted set, needs neither, since all its "
            "splits are inspected; leave them out."
        )
    if options.output.resolve().is_relative_to(options.path.resolve()):
        raise WrongUseError(
            f"{options.output}: found the output inside the data to inspect, needs another folder; give --output."
        )


def _is_converted(path: Path) -> bool:
    """Returns whether PATH has a manifest, shards or a work folder: a converted set, even an unfinished one."""
    return (path / MANIFEST).exists() or any(path.glob("*.tfrecord")) or (path / WORK).is_dir()


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_pipeline.doctor") -> int:
    options = parse_options(arguments, prog)
    report: dict[str, Any] = {}

    def job() -> bool:
        with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
            check_options(options)
            report.update(inspect(options))
            if not options.json:
                print_report(report, options.output)
        return bool(report["safe"])

    with lasting_output():
        status = exit_status(job, output=options.output, kept="pictures that were inspected are not decoded again")
        if options.json and report:
            print(_printable(_json(report)), end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
