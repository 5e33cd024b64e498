"""Is this data fit to train on? python -m data_pipeline.doctor PATH

PATH is a source folder of any layout, before it is converted, or a converted set. Every list and every picture is
looked at; all faults are told, not only the first, in OUTPUT/report.html and OUTPUT/report.json. Killed, the same
command goes on where it stopped. Exit status: 0 training is safe (there may be warnings), 1 it is not, 2 wrong use.
"""

import argparse
import collections
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.faults import WrongUseError
from data_pipeline.format.manifest import MANIFEST
from data_pipeline.format.tfrecord import write_file
from data_pipeline.inspection.converted import ConvertedSet
from data_pipeline.inspection.cross_checks import compare
from data_pipeline.inspection.findings import Findings, distributions
from data_pipeline.inspection.fingerprints import append_known, load_known
from data_pipeline.inspection.page import make_page
from data_pipeline.inspection.source import RawSource
from data_pipeline.inspection.summary import Inspectable
from data_pipeline.layouts.detect import LAYOUTS, SAMPLED_FRAMES, layout_of, open_source
from data_pipeline.system.command_line import add_workers, exit_status, make_parser
from data_pipeline.system.output_folder import WORK, locked
from data_pipeline.system.workers import Workers

CONVERTED = "converted"
BUILD = Path("build/doctor")
SHOWN = 5  # faults of a kind on the screen: one lost archive is not to drown in its thousand missing frames


def examine(options: argparse.Namespace) -> dict[str, Any]:
    """Examines, writes report.html and report.json, and gives the report; WrongUseError."""
    begin = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    with locked(options.output):
        return _examine(options, begin)


def _examine(options: argparse.Namespace, begin: float) -> dict[str, Any]:
    work = options.output / WORK
    work.mkdir(exist_ok=True)
    patient = _patient(options, work)
    findings = Findings(frozenset(options.accept))
    findings.add(patient.faults)
    findings.add(compare(patient))
    report = {
        "path": str(options.path),
        "layout": options.layout,
        **findings.as_json(),
        "remarks": patient.remarks,
        "distributions": distributions(patient),
        "seconds": round(time.monotonic() - begin, 1),
    }
    write_file(options.output / "report.json", _json(report).encode("utf-8", "backslashreplace"))
    page = make_page(f"Data doctor: {options.path}", report, patient)
    write_file(options.output / "report.html", page.encode("utf-8", "backslashreplace"))
    return report


def _patient(options: argparse.Namespace, work: Path) -> Inspectable:
    store = work / "looks.bin"
    known, known_file = load_known(store), work / "known.npy"
    np.save(known_file, known)
    if len(known):
        print(f"{options.output}: {len(known):,} pictures were looked at before and are as they were then, if their "
              "files are.")  # fmt: skip
    remember = lambda looks: append_known(store, looks)
    if options.layout == CONVERTED:
        converted = ConvertedSet(options.path, options.workers)
        converted.examine(known_file, remember)
        return converted
    layout, splits = open_source(
        options.layout, options.path, stored_frames=SAMPLED_FRAMES if options.frames == "sampled" else None
    )
    patient = RawSource(layout, splits, options.workers)
    with Workers(options.workers, layout) as workers:
        patient.read_lists(workers.run, work)
    patient.examine(known_file, remember)
    return patient


def _json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def _printable(text: str) -> str:
    """Names of files may hold bytes that are no text: as escapes, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- the command ------------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any], output: Path) -> None:
    for kind, each in report["counts"].items():
        print(f"{each['severity']:<8} {kind:<40} {each['count']:>9,}")
    shown: collections.Counter[str] = collections.Counter()
    for fault in report["faults"]:
        shown[fault["kind"]] += 1
        if shown[fault["kind"]] > SHOWN:
            continue
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
    parser.add_argument("path", type=Path, metavar="PATH", help="a source folder, or a converted set")
    parser.add_argument("--layout", choices=(*sorted(LAYOUTS), CONVERTED), help="what PATH is (found out)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the report (build/doctor/NAME)")
    parser.add_argument(
        "--frames", choices=("all", "sampled"), default="all",
        help=f"look at every listed frame, or at the {SAMPLED_FRAMES} a clip that a conversion stores",
    )  # fmt: skip
    parser.add_argument(
        "--accept", type=lambda text: text.split(","), default=[], metavar="KINDS",
        help="kinds of faults that you know of, separated by commas: they become warnings",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print report.json in place of the summary")
    add_workers(parser)
    options = parser.parse_args(arguments)
    options.output = options.output or BUILD / options.path.resolve().name
    return options


def complete(options: argparse.Namespace) -> None:
    """Finds out what was not said; WrongUseError."""
    if not options.path.is_dir():
        raise WrongUseError(f"{options.path}: found no folder, needs a source or a converted set; correct the path.")
    options.layout = options.layout or (CONVERTED if _is_converted(options.path) else layout_of(options.path))
    if options.layout is None:
        raise WrongUseError(
            f"{options.path}: found neither manifest.json nor annotations/ nor clips/ and shop/, needs one of them; "
            "correct the path, or say --layout."
        )
    if options.output.resolve().is_relative_to(options.path.resolve()):
        raise WrongUseError(
            f"{options.output}: found the output inside of what is examined, needs it elsewhere; give --output."
        )


def _is_converted(path: Path) -> bool:
    """Also where the conversion is unfinished, or its manifest is lost."""
    return (path / MANIFEST).exists() or any(path.glob("*.tfrecord")) or (path / WORK).is_dir()


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_pipeline.doctor") -> int:
    options = parse_options(arguments, prog)
    report: dict[str, Any] = {}

    def job() -> bool:
        with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
            complete(options)
            report.update(examine(options))
            if not options.json:
                print_report(report, options.output)
        return bool(report["safe"])

    status = exit_status(job, output=options.output, kept="what was looked at is known")
    if options.json and report:
        print(_printable(_json(report)), end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
