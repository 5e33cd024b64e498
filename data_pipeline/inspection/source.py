"""A source folder examined: its lists by the readers that a conversion uses, and every picture that they name."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.conversion.shards import scale_boxes
from data_pipeline.conversion.survey import list_splits
from data_pipeline.faults import BadInputError, Fault, WrongUseError
from data_pipeline.format.schema import Box, Picture, ShopImage
from data_pipeline.inspection.fingerprints import FINGERPRINT, NOTHING, Viewer
from data_pipeline.inspection.summary import UNLISTED, OnNewFingerprints, PartResult, SplitSummary
from data_pipeline.layouts.img2dataset import compare_shard, hash_names
from data_pipeline.layouts.listing import TABLES, ClipListing, Layout, Listing, RowLocation, RunTasks
from data_pipeline.layouts.lpr4m import Lpr4m
from data_pipeline.layouts.pictures import SUFFIXES, PictureReader
from data_pipeline.system.workers import Workers

CLIPS_A_TASK = 64
IMAGES_A_TASK = 512
BOX_SLACK = 0.5  # px by which a box may stick out: the rounding of a download that shrank its frame
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]")  # and what stands for a character that was lost
TEXTS = ("image_title", "category", "category_name", "product", "speech", "scale", "duration", "number")
T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass
class SourceContext:
    """What the workers share: the layout, and what earlier runs saw."""

    layout: Layout
    known_file: Path

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "known_file": self.known_file}

    @functools.cached_property
    def viewer(self) -> Viewer:
        return Viewer(self.layout.source, np.load(self.known_file, mmap_mode="r"))


class RawSource:
    """The source folder as a patient; `examine` fills the charts."""

    def __init__(self, layout: Layout, splits: Sequence[str], workers: int) -> None:
        self.layout, self.splits, self.workers = layout, splits, workers
        self.charts: list[SplitSummary] = []
        self.listings: list[Listing] = []
        self.tables: Mapping[str, Sequence[str]] = {}
        self.faults: list[Fault] = []
        self.remarks: list[str] = []
        self.failed = 0  # downloads that are known to have failed
        self.knows_products = False

    # --- lists --------------------------------------------------------------------------------------------------------

    def read_lists(self, run: RunTasks, work: Path) -> None:
        """Lists, and where the pictures are; a split that cannot be read is a fault, and the others go on."""
        self._all_but_bad(self.splits, lambda splits: self._list(splits, run))
        for listing in self.listings:
            self.faults += [*listing.faults, *_empty_lists(listing)]
            listing.faults = []
        self._all_but_bad(self.listings, lambda listings: self._locate(listings, run, work))
        for index in self.layout.indices.values() if isinstance(self.layout, Lpr4m) else ():
            numbers = range(len(index.download.shards))
            tasks = ((index.download, number) for number in numbers)
            for faults in run(
                compare_shard, tasks, f"{index.download.folder}: sidecars", total=len(numbers), unit="shard"
            ):
                self.faults += faults
        self.faults += [*self.layout.faults, *(fault for listing in self.listings for fault in listing.faults)]
        images = (image for listing in self.listings for image in listing.images)
        self.knows_products = any(image.product not in ("", image.id) for image in images)

    def _list(self, splits: Sequence[str], run: RunTasks) -> None:
        self.listings, self.tables = list_splits(self.layout, splits, run)

    def _locate(self, listings: Sequence[Listing], run: RunTasks, work: Path) -> None:
        self.remarks = self.layout.locate(listings, run, work)
        self.listings = list(listings)

    def _all_but_bad(self, items: Sequence[T], read: Callable[[Sequence[T]], None]) -> None:
        """read(items); where that fails, of those items with which it alone does not, and a fault for each other."""
        try:
            read(items)
            return
        except (BadInputError, WrongUseError):
            sound = []
        for item in items:
            try:
                read([item])
                sound.append(item)
            except (BadInputError, WrongUseError) as err:
                split = item.split if isinstance(item, Listing) else str(item)
                self.faults.append(_of_split(err, self.layout, split))
        self.listings = []
        if sound:
            read(sound)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def examine(self, known_file: Path, remember: OnNewFingerprints) -> None:
        """Looks at every picture; what is seen is handed to `remember` part by part."""
        names = [hash_names(self.layout.copies)]

        def take(part: PartResult) -> PartResult:
            remember(part.fresh)
            self.faults += part.faults
            self.failed += part.failed
            names.append(part.names)
            return part

        with Workers(self.workers, SourceContext(self.layout, known_file)) as workers:
            for listing in self.listings:
                images = list(map(take, _look_at_images(workers, listing)))
                clips = list(map(take, _look_at_clips(workers, listing)))
                self.charts.append(_chart(listing, images, clips))
            if self.layout.stored_frames is None:
                self._look_at_others(workers, np.unique(np.concatenate(names)), take)

    def _look_at_others(
        self, workers: Workers, named: NDArray[np.uint64], take: Callable[[PartResult], PartResult]
    ) -> None:
        """Pictures of the folder that no list names: no part of the training, and worth knowing when they are bad."""
        others = list(_pictures_below(self.layout.source))
        if others:
            others = np.array(others)[~np.isin(hash_names(others), named)].tolist()
        if others:
            self.remarks.append(f"{len(others):,} pictures of the folder are named by no list (first {others[0]}).")
        tasks = [(others[begin : begin + IMAGES_A_TASK],) for begin in range(0, len(others), IMAGES_A_TASK)]
        run = workers.run(
            examine_others, tasks, "not listed", total=len(others), unit="picture", weigh=lambda each: len(each[0])
        )
        for part in run:
            take(part)

    # --- for a person -------------------------------------------------------------------------------------------------

    def frame_name(self, chart: SplitSummary, clip: int, frame: int) -> str:
        return _name(self._frame(chart, clip, frame))

    def image_name(self, chart: SplitSummary, image: int) -> str:
        return _name(self.layout.find_image(self._listing(chart).images[image], chart.split))

    def frame(self, chart: SplitSummary, clip: int, frame: int) -> bytes:
        return self._folder.read(self._frame(chart, clip, frame))

    def image(self, chart: SplitSummary, image: int) -> bytes:
        return self._folder.read(self.layout.find_image(self._listing(chart).images[image], chart.split))

    def picture(self, fault: Fault) -> bytes | None:
        if not fault.file.lower().endswith(tuple(SUFFIXES)) or not os.path.isfile(self.layout.source / fault.file):
            return None  # the member of a tar, or no picture
        try:
            return self._folder.read(Picture("", fault.file))
        except BadInputError:
            return None

    def clip_source(self, chart: SplitSummary, clip: int) -> tuple[str, int]:
        """File and line that list a clip."""
        source = self._listing(chart).source(clip)
        return source.file, source.number if isinstance(source, RowLocation) else 0

    @functools.cached_property
    def _folder(self) -> PictureReader:
        return PictureReader(self.layout.source)

    def _listing(self, chart: SplitSummary) -> Listing:
        return next(listing for listing in self.listings if listing.split == chart.split)

    def _frame(self, chart: SplitSummary, clip: int, frame: int) -> Picture:
        _, found = self.layout.find_frames(self._listing(chart).source(clip), chart.split)
        picture = found[frame].picture
        assert isinstance(picture, Picture)  # its look is sound
        return picture


def _empty_lists(listing: Listing) -> Iterator[Fault]:
    """Parts of a list that say nothing, as an interrupted download leaves them."""
    told = {fault.file for fault in listing.faults}
    for number, file in enumerate(listing.files):
        if file not in told and not np.any(listing.lines["file"] == number):
            yield Fault("empty list", file, "found no line, needs one a clip; restore the file, or remove it.")


def _of_split(error: BadInputError | WrongUseError, layout: Layout, split: str) -> Fault:
    if isinstance(error, BadInputError):
        return error.at(layout.FOLDERS[0], 0, f"split {split}")
    return Fault("split cannot be read", layout.FOLDERS[0], str(error), 0, f"split {split}")


def _name(picture: Picture) -> str:
    return f"{picture.path}/{picture.member}" if picture.member else picture.path


def _pictures_below(root: Path) -> Iterator[str]:
    """Paths of all files that are called as pictures are, links to folders not followed."""
    for folder, inner, files in os.walk(root):
        inner.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.relpath(os.path.join(folder, name), root)


# --- tasks ------------------------------------------------------------------------------------------------------------


def _look_at_images(workers: Workers, listing: Listing) -> Iterator[PartResult]:
    images = listing.images
    tasks = ((listing.split, images[at : at + IMAGES_A_TASK]) for at in range(0, len(images), IMAGES_A_TASK))
    return workers.run(
        examine_images,
        tasks,
        f"{listing.split}: images",
        total=len(images),
        unit="image",
        weigh=lambda each: len(each[1]),
    )


def _look_at_clips(workers: Workers, listing: Listing) -> Iterator[PartResult]:
    def task(begin: int) -> tuple[str, list[tuple[str, RowLocation | ClipListing]]]:
        rows = range(begin, min(len(listing), begin + CLIPS_A_TASK))
        return listing.split, [(listing.clip_ids[row].decode(), listing.source(row)) for row in rows]

    tasks = map(task, range(0, len(listing), CLIPS_A_TASK))
    return workers.run(
        examine_clips,
        tasks,
        f"{listing.split}: clips",
        total=len(listing),
        unit="clip",
        weigh=lambda each: len(each[1]),
    )


def _rows(task: tuple[Any, ...]) -> int:
    return len(task[1])


class _Part:
    """Fills an Examined, a picture at a time."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.looks: list[NDArray[np.void]] = []
        self.fresh: list[NDArray[np.void]] = []
        self.names: list[str] = []
        self.result = PartResult()

    def look(self, found: Picture | BadInputError | None, fault: Callable[[BadInputError], Fault]) -> NDArray[np.void]:
        look: NDArray[np.void] = NOTHING
        problems: Sequence[BadInputError] = ()
        try:
            if isinstance(found, BadInputError):
                raise found
            if found is None:
                self.result.failed += 1
            else:
                self.names.append(_name(found))
                seen = self.viewer.look(found)
                look, problems = seen.look, seen.problems
                if not seen.known and not problems:
                    self.fresh.append(look)
        except BadInputError as err:
            problems = [err]
        self.result.faults += map(fault, problems)
        self.looks.append(look)
        return look

    def close(self) -> PartResult:
        self.result.looks = np.array(self.looks, FINGERPRINT)
        self.result.fresh = np.array(self.fresh, FINGERPRINT)
        self.result.names = hash_names(self.names)
        return self.result


def examine_images(surgery: SourceContext, split: str, images: Sequence[ShopImage]) -> PartResult:
    """Looks at shop images (in a worker)."""
    part = _Part(surgery.viewer)
    for image in images:
        found: Picture | BadInputError
        try:
            found = surgery.layout.find_image(image, split)
        except BadInputError as err:
            found = err
        part.look(found, lambda err, image=image: err.at(err.file or image.reference, 0, f"image {image.id}"))
    return part.close()


def examine_clips(
    surgery: SourceContext, split: str, clips: Sequence[tuple[str, RowLocation | ClipListing]]
) -> PartResult:
    """Looks at the frames of clips, and holds their boxes against them (in a worker)."""
    part = _Part(surgery.viewer)
    for clip_id, source in clips:
        number = source.number if isinstance(source, RowLocation) else 0
        fault = lambda err, file=source.file, number=number, clip=clip_id: err.at(file, number, f"clip {clip}")
        try:
            listed, found = surgery.layout.find_frames(source, split)
        except BadInputError:
            part.result.counts.append(0)  # told when the lists were read
            continue
        part.result.counts.append(len(found))
        for name in TEXTS:
            text = getattr(listed, name, "")
            if CONTROL.search(text):
                detail = f"found {text!r:.80} as {name}, needs text without control characters; correct the cell."
                part.result.faults.append(fault(BadInputError("control characters", detail)))
        before: set[str] = set()
        for each in found:
            look = part.look(each.picture, fault)
            if not isinstance(each.picture, Picture):
                continue
            name = _name(each.picture)
            if name in before:
                detail = f"found the frame {name} twice in the clip's list, needs each once; remove one."
                part.result.faults.append(fault(BadInputError("frame listed twice", detail)))
            before.add(name)
            if listed.boxes and look["key"]:
                errors = box_faults(listed.boxes[each.position], each.picture, look, name)
                part.result.faults += map(fault, errors)
    return part.close()


def examine_others(surgery: SourceContext, paths: Sequence[str]) -> PartResult:
    """Looks at pictures that no list names (in a worker)."""
    part = _Part(surgery.viewer)
    for path in paths:
        part.look(
            Picture(os.path.splitext(os.path.basename(path))[0], path),
            lambda err, path=path: err.at(path, subject=UNLISTED),
        )
    return part.close()


def box_faults(boxes: Sequence[Box], picture: Picture, look: NDArray[np.void], name: str) -> Iterator[BadInputError]:
    """Boxes that cannot be those of the frame, as it is stored."""
    width, height = int(look["width"]), int(look["height"])
    for box, scaled in zip(boxes, scale_boxes(boxes, picture, (width, height)), strict=True):
        left, top, right, bottom = scaled
        size = "x".join(map(str, picture.original_size or (width, height)))
        if right <= left or bottom <= top:
            detail = f"found the box {list(box)} in frame {name}, needs x1 < x2 and y1 < y2; correct it."
            yield BadInputError("box inside out", detail)
        elif min(left, top) < -BOX_SLACK or right > width + BOX_SLACK or bottom > height + BOX_SLACK:
            detail = f"found the box {list(box)} in frame {name}, needs it within {size} pixels; correct it."
            yield BadInputError("box outside the frame", detail)


def _chart(listing: Listing, images: Sequence[PartResult], clips: Sequence[PartResult]) -> SplitSummary:
    return SplitSummary(
        split=listing.split,
        clip_ids=[each.decode() for each in listing.clip_ids.tolist()],
        image_ids=[image.id for image in listing.images],
        images_of=listing.columns["image"],
        columns={name: listing.columns[name] for name in TABLES},
        image_products=listing.image_products,
        galleries={name: np.array(rows, np.int32) for name, rows in listing.galleries.items()},
        truth=listing.truth,
        counts=np.array([count for part in clips for count in part.counts], np.int64),
        looks=np.concatenate([np.zeros(0, FINGERPRINT), *(part.looks for part in clips)]),
        image_looks=np.concatenate([np.zeros(0, FINGERPRINT), *(part.looks for part in images)]),
    )
