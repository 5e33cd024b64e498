"""Converts a source to records: python -m data_pipeline.convert --layout lpr750k --source DIR --output DIR

Reads the lists, finds the pictures, decodes every one as a check, and writes shards, columns and, last, the manifest.
If a run is killed or fails, the same command continues it. Exit status: 0 done (or done before), 1 failed, 2 wrong use.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.conversion.finish import Converted, encode_json, make_manifest
from data_pipeline.conversion.report import count_split, lost_boxes, print_report
from data_pipeline.conversion.shards import Entry, ShardNote, write_shard
from data_pipeline.conversion.survey import list_splits
from data_pipeline.faults import BadInputError, FailedError, Fault, counted
from data_pipeline.format.manifest import COLUMNS, MANIFEST, shard_name
from data_pipeline.format.reader import open_dataset
from data_pipeline.format.schema import SCHEMA_VERSION
from data_pipeline.format.tfrecord import sync_folder, write_file
from data_pipeline.layouts.detect import LAYOUTS, SAMPLED_FRAMES, open_source
from data_pipeline.layouts.listing import NONE, Layout, Listing
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
from data_pipeline.system.output_folder import WORK, claim
from data_pipeline.system.paths import parse_path
from data_pipeline.system.workers import Workers

IMAGES_A_CLIP = 8  # an images shard has so many times the records of a clips shard
FAULTS, REPORT = "faults.txt", "report.json"
SHOWN_FAULTS = 20
MAX_FAULTS = 10_000  # then writing stops, since so many faults have a common cause


@dataclasses.dataclass(frozen=True)
class Options:
    layout: str
    source: Path
    output: Path
    splits: tuple[str, ...] | None = None  # None: those that the source has
    train_annotation: str | None = None
    frames: str = "sampled"
    on_error: str = "fail"
    max_skip_rate: float = 0.01
    workers: int = 1
    clips_per_shard: int | None = None  # None: by the number of clips


def convert(options: Options) -> dict[str, Any]:
    """Converts a source unless it is converted already, and returns the report (the content of report.json, or {}).

    Raises WrongUseError for a source or an output that do not fit the options or an output that another run writes to,
    BadInputError for faults of whole lists, FailedError for faults that are not to be skipped, a split without a clip,
    a converted set that is damaged, or a lost lease, OSError for a file that cannot be read or written, and
    BrokenProcessPool if a worker died.
    """
    stored_frames = SAMPLED_FRAMES if options.frames == "sampled" else None
    layout, splits = open_source(
        options.layout, options.source, stored_frames, wanted=options.splits, train_annotation=options.train_annotation
    )
    refuse_list_faults(layout)
    identity = {
        "schema_version": SCHEMA_VERSION,
        "layout": options.layout,
        "splits": list(splits),
        "frames": options.frames,
        "stored_frames": stored_frames,
        "clips_per_shard": options.clips_per_shard,
        "lists": layout.checksums(splits),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    with Lease(options.output) as lease:
        # The lists may change between the runs, when a fault is corrected: each shard's note has its own inputs.
        if claim(options.output, identity, options.output / MANIFEST, may_change=("lists",)):
            refuse_damage(options.output)
            print(f"{options.output}: already converted, nothing to do.")
            warn_of_changes(options, layout)
            try:
                report: dict[str, Any] = json.loads((options.output / REPORT).read_bytes())
            except (FileNotFoundError, ValueError):
                return {}  # it was removed or edited; nothing but this function reads it
            return report
        return _convert(options, layout, splits, identity, lease)


def _convert(
    options: Options, layout: Layout, splits: Sequence[str], identity: dict[str, Any], lease: Lease
) -> dict[str, Any]:
    work = options.output / WORK
    with Workers(options.workers, layout) as workers:
        listings, tables = list_splits(layout, splits, workers.run)
        refuse_list_faults(layout)
        for listing in listings:
            if not listing.listed:
                raise FailedError(
                    f"{options.source}: found no {listing.split} clip in its list, needs at least one; restore the "
                    "list, or leave the split out with --splits, in another --output."
                )
        remarks = layout.locate(listings, workers.run, work)
    with Workers(options.workers, layout) as workers:  # new processes, since the layout has now located the pictures
        converted = [convert_split(workers, options, listing, tables["product"], lease) for listing in listings]
    lease.check()
    judge_faults(options, converted)
    remarks += [remark for split in converted if (remark := lost_boxes(split))]
    manifest = make_manifest(options.output, identity, converted, tables)
    report = {
        "layout": options.layout,
        "content_hash": manifest["content_hash"],
        "splits": {split.listing.split: count_split(split) for split in converted},
        "remarks": remarks,
    }
    write_file(options.output / REPORT, encode_json(report))
    remove_abandoned(options.output)  # of workers that outlived a killed run for a moment
    sync_folder(options.output / COLUMNS)
    sync_folder(options.output)
    lease.check()
    write_file(options.output / MANIFEST, encode_json(manifest))
    sync_folder(options.output)
    shutil.rmtree(work)
    print_report(report)
    return report


# --- shards -----------------------------------------------------------------------------------------------------------


def write_shards(
    workers: Workers,
    options: Options,
    listing: Listing,
    kind: str,
    make_entry: Callable[[int], Entry | None],
    lease: Lease,
) -> list[ShardNote]:
    """Writes all shards of one kind, "clips" or "images", and returns their notes in order.

    The shard of an entry depends on the sorted ids alone. make_entry(ordinal) returns what to write, or None. It is
    called when its shard is due, since LPR4M has 4 million clips. Without skip, over MAX_FAULTS faults end it early.
    """
    size = options.clips_per_shard or min(1024, max(64, -(-len(listing) // 64)))
    total = len(listing)
    if kind == "images":
        size, total = IMAGES_A_CLIP * size, len(listing.images)
    count = -(-total // size)
    skip = options.on_error == "skip"

    def task(number: int) -> tuple[list[Entry], str, Path, Path, bool]:
        ordinals = range(number * size, min(total, (number + 1) * size))
        entries = [entry for entry in map(make_entry, ordinals) if entry is not None]
        path = options.output / shard_name(listing.split, kind, number, count)
        return entries, listing.split, path, options.output / WORK, skip

    notes: list[ShardNote] = []
    weigh = lambda task: len(task[0])
    label = f"{listing.split}: {kind}"
    for note in workers.run(write_shard, map(task, range(count)), label, total=total, unit=kind[:-1], weigh=weigh):
        lease.check()  # or workers would go on for hours beside those of the new holder
        notes.append(note)
        if not skip and sum(len(note.faults) for note in notes) > MAX_FAULTS:
            break
    return notes


def convert_split(
    workers: Workers, options: Options, listing: Listing, products: Sequence[str], lease: Lease
) -> Converted:
    """Writes all shards of a split and returns it as Converted. products: the texts of the column "product"."""

    def image_entry(ordinal: int) -> Entry:
        image = listing.images[ordinal]
        return Entry(ordinal, image.id, image, image.product, int(listing.image_products[ordinal]))

    def clip_entry(ordinal: int) -> Entry | None:
        if converted.true_rows[ordinal] == NONE:
            return None
        product = int(listing.columns["product"][ordinal])
        return Entry(
            ordinal=ordinal,
            id=listing.clip_ids[ordinal].decode(),
            source=listing.source(ordinal),
            product=products[product] if product != NONE else "",  # its shop image's if its row has none
            product_index=product,
            image_index=int(converted.true_rows[ordinal]),
        )

    images = write_shards(workers, options, listing, "images", image_entry, lease)  # first, as clips contain their rows
    converted = Converted.with_images(listing, images, skip_faults=options.on_error == "skip")
    converted.clips = write_shards(workers, options, listing, "clips", clip_entry, lease)
    return converted


# --- faults -----------------------------------------------------------------------------------------------------------


def show_faults(faults: Sequence[Fault]) -> str:
    """Returns the first SHOWN_FAULTS faults, one a line, then the number of the others; "" without faults."""
    more = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    return "\n".join([*map(str, faults[:SHOWN_FAULTS]), *more])


def refuse_list_faults(layout: Layout) -> None:
    """Returns None if the lists and names as a whole have no faults. Raises BadInputError that shows them otherwise."""
    if faults := list(dict.fromkeys(layout.faults)):
        raise BadInputError("bad lists", show_faults(faults))


def refuse_damage(output: Path) -> None:
    """Raises FailedError, which says what to do, if `open_dataset` refuses the finished set. OSError: unreadable."""
    try:
        open_dataset(output)
    except (ValueError, FileNotFoundError) as err:
        again = f"give another --output, or delete the folder {output} and run the same command again"
        raise FailedError(f"{err} To convert again, {again}: a finished set is not changed.") from err


def warn_of_changes(options: Options, layout: Layout) -> None:
    """Warns on stderr of pictures that were written after the set was converted: it contains what they were before."""
    converted = (options.output / MANIFEST).stat().st_mtime_ns
    if changed := layout.changed_since(converted):
        print(
            f"warning: {options.source}: found {counted(len(changed), 'file')} with pictures, written after the "
            f"conversion (first {changed[0]}), and the converted set has what was there before; to have the new "
            "pictures, convert to another --output.",
            file=sys.stderr,
        )


def judge_faults(options: Options, converted: Sequence[Converted]) -> None:
    """Writes all faults to faults.txt and their number on stderr; without faults deletes the file.

    Raises FailedError at any fault if on_error is "fail", else if more than max_skip_rate of a split are skipped.
    """
    faults = list(dict.fromkeys(fault for split in converted for fault in split.faults))  # splits share shop images
    path = options.output / FAULTS
    path.unlink(missing_ok=True)
    if not faults:
        return
    write_file(path, "".join(f"{fault}\n" for fault in faults).encode("utf-8", "backslashreplace"))
    if options.on_error == "fail":
        found = counted(len(faults), "fault") + (" before it stopped looking" if len(faults) > MAX_FAULTS else "")
        raise FailedError(
            f"{show_faults(faults)}\n{options.source}: found {found}, listed in {path}; correct the source and run the "
            "same command again (finished shards are kept), or leave the clips out with --on-error=skip."
        )
    for split in converted:
        clips = "clips", split.skipped_clips, split.skipped_clips + len(split.clip_ordinals)
        images = "shop images", split.skipped_images, split.skipped_images + len(split.image_ordinals)
        for kind, skipped, listed in (clips, images):
            if skipped > options.max_skip_rate * listed:
                raise FailedError(
                    f"{options.source}: skipped {skipped} of {listed} {split.listing.split} {kind} "
                    f"({', '.join(f'{reason} {count}' for reason, count in split.reasons.items())}), needs at most "
                    f"{options.max_skip_rate:.2%}; the faults are in {path}: correct them, or raise --max-skip-rate."
                )
    left_out = f"left out clips and images for {counted(len(faults), 'fault')}, listed in {path}."
    print(f"{options.source}: {left_out}", file=sys.stderr)


# --- the command ------------------------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None, prog: str) -> Options:
    """Returns the options in the arguments, by default sys.argv. Raises SystemExit: 2 for wrong ones, 0 for --help."""
    parser = make_parser(prog, __doc__)
    parser.add_argument("--layout", required=True, choices=sorted(LAYOUTS), help="layout of the source on disk")
    folder: dict[str, Any] = {"required": True, "type": parse_path, "metavar": "DIR"}
    parser.add_argument("--source", help="the unpacked download, or your folder", **folder)
    parser.add_argument("--output", help="folder of the records, created if missing", **folder)
    parser.add_argument("--splits", type=parse_splits, metavar="LIST", help="of train,val,test (all of the source)")
    parser.add_argument("--train-annotation", metavar="NAME", help="training list, if annotations/ has several")
    parser.add_argument(
        "--frames", choices=("sampled", "all"), default="sampled",
        help=f"store at most the {SAMPLED_FRAMES} evenly spaced frames that the official code samples, or all",
    )  # fmt: skip
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail",
        help="at a fault: collect all and fail, or leave the clip out",
    )  # fmt: skip
    parser.add_argument(
        "--max-skip-rate", type=_rate, default=0.01, metavar="R",
        help="with skip: fail above this share of a split's clips or images (0.01)",
    )  # fmt: skip
    add_workers(parser)
    parser.add_argument("--clips-per-shard", type=parse_count, metavar="N", help="64 to 1,024, by the number of clips")
    return Options(**vars(parser.parse_args(arguments)))


def _rate(text: str) -> float:
    rate: float = parse_number(float, text, "0 to 1")
    if not 0 <= rate <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, needs 0 to 1")
    return rate


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_pipeline.convert") -> int:
    """Runs the command and returns its exit status, 0, 1 or 2. Raises SystemExit for wrong options and --help."""
    options = parse_options(arguments, prog)
    return exit_status(lambda: convert(options), output=options.output, kept="finished shards are kept")


if __name__ == "__main__":
    sys.exit(main())
