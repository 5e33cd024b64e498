"""Which layout a source folder has, and which splits it has clips for."""

import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.faults import WrongUseError
from data_pipeline.layouts.img2dataset import FOLDERS_ABOVE
from data_pipeline.layouts.listing import Layout
from data_pipeline.layouts.lpr4m import Lpr4m
from data_pipeline.layouts.lpr750k import Lpr750k
from data_pipeline.layouts.own_folder import Folder

LAYOUTS: Mapping[str, type[Lpr750k | Lpr4m | Folder]] = {"lpr750k": Lpr750k, "lpr4m": Lpr4m, "folder": Folder}
SPLITS = ("train", "val", "test")
SAMPLED_FRAMES = 10  # all that SPEC 9.1 ever reads of a clip


def open_source(
    name: str,
    source: Path,
    *,
    wanted: tuple[str, ...] | None = None,
    train_annotation: str | None = None,
    stored_frames: int | None = None,
) -> tuple[Layout, tuple[str, ...]]:
    """The layout of a source and the splits to read, all that it has unless some are wanted; WrongUseError.

    stored_frames: how many evenly spaced frames of a clip are looked at; None: all.
    """
    kind = LAYOUTS[name]
    if absent := [f"{folder}/" for folder in kind.FOLDERS if not (source / folder).is_dir()]:
        raise WrongUseError(
            f"{source}: found no folder {' and '.join(absent)}, needs the layout {name} of docs/data_formats.md; "
            "correct the path."
        )
    layout: Layout = kind(source, train_annotation, stored_frames)
    there = layout.splits()
    splits = tuple(split for split in SPLITS if split in (wanted or there))
    if missing := [split for split in splits if split not in there]:
        raise WrongUseError(
            f"{source}: found nothing for {', '.join(missing)} (only for {', '.join(there) or 'no split'}), "
            f"needs it in {layout.FOLDERS[0]}/; leave the split out with --splits."
        )
    if not splits and not layout.faults:
        raise WrongUseError(
            f"{source / kind.FOLDERS[0]}: found no clips of train, val or test, needs at least one; "
            "correct the path or --layout."
        )
    if left_out := [split for split in SPLITS if split not in splits and not wanted and not layout.faults]:
        print(f"{source}: nothing for {', '.join(left_out)}; reading {', '.join(splits)}.", file=sys.stderr)
    return layout, splits


def layout_of(source: Path) -> str | None:
    """The name of the layout that a folder looks like; None: like none."""
    if (source / "clips").is_dir() and (source / "shop").is_dir():
        return "folder"
    if not (source / "annotations").is_dir():
        return None
    outputs = [above + kind for above in FOLDERS_ABOVE for kind in ("training_frame", "test_frame")]
    return "lpr4m" if any((source / output).is_dir() for output in outputs) else "lpr750k"
