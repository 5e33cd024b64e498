"""Detection of a source's layout, and opening a source as a layout with the splits to read."""

import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.faults import WrongUseError
from data_pipeline.format.manifest import SPLITS
from data_pipeline.layouts.img2dataset import FOLDERS_ABOVE
from data_pipeline.layouts.listing import Layout
from data_pipeline.layouts.lpr4m import Lpr4m
from data_pipeline.layouts.lpr750k import Lpr750k
from data_pipeline.layouts.own_folder import OwnFolder

LAYOUTS: Mapping[str, type[Lpr750k | Lpr4m | OwnFolder]] = {"lpr750k": Lpr750k, "lpr4m": Lpr4m, "folder": OwnFolder}
SAMPLED_FRAMES = 10  # the most frames of a clip that the official code samples: docs/official.md 9.1


def open_source(
    name: str,
    source: Path,
    stored_frames: int | None,
    *,
    wanted: tuple[str, ...] | None = None,
    train_annotation: str | None = None,
) -> tuple[Layout, tuple[str, ...]]:
    """Returns a source folder as the layout `name`, and the splits to read in the order train, val, test.

    wanted: splits to read; None: all that the source has, with a message on stderr about the others. train_annotation,
    stored_frames: as in `TextLayout`. Raises WrongUseError if the folder lacks the layout's folders, a wanted split or
    any split, has several training lists, or lacks the one that train_annotation names (an own folder has none), and
    BadInputError if an own folder's table cannot be read. Other faults are in the layout's `faults`; with one there may
    be no split. Raises KeyError for a `name` that is not in LAYOUTS.
    """
    kind = LAYOUTS[name]
    if absent := [f"{folder}/" for folder in kind.FOLDERS if not (source / folder).is_dir()]:
        raise WrongUseError(
            f"{source}: found no folder {' and '.join(absent)}, needs the layout {name} of docs/data_formats.md; "
            "correct the path."
        )
    layout: Layout = kind(source, train_annotation, stored_frames)
    available = layout.splits()
    splits = tuple(split for split in SPLITS if split in (wanted or available))
    if missing := [split for split in splits if split not in available]:
        raise WrongUseError(
            f"{source}: found nothing for {', '.join(missing)} (only for {', '.join(available) or 'no split'}), "
            f"needs it in {layout.FOLDERS[0]}/; leave the split out with --splits."
        )
    if not splits and not layout.faults:
        raise WrongUseError(
            f"{source / kind.FOLDERS[0]}: found no clips of train, val or test, needs at least one; "
            "correct the path or --layout."
        )
    if left_out := [split for split in SPLITS if split not in splits and not wanted and not layout.faults]:
        print(f"{source}: found nothing for {', '.join(left_out)}; reading {', '.join(splits)}.", file=sys.stderr)
    return layout, splits


def layout_of(source: Path) -> str | None:
    """Returns the layout that a folder's subfolders show: "folder", "lpr4m" or "lpr750k"; None if they show none."""
    if (source / "clips").is_dir() and (source / "shop").is_dir():
        return "folder"
    if not (source / "annotations").is_dir():
        return None
    downloads = [above + folder for above in FOLDERS_ABOVE for folder in ("training_frame", "test_frame")]
    return "lpr4m" if any((source / download).is_dir() for download in downloads) else "lpr750k"
