"""Inspects a source folder: its lists, by the readers that a conversion uses, and every picture."""

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.conversion.shards import scale_boxes
from data_pipeline.conversion.survey import list_splits
from data_pipeline.faults import BadInputError, Fault, WrongUseError, counted
from data_pipeline.format.schema import Box, Picture, ShopImage
from data_pipeline.inspection import fingerprints
from data_pipeline.inspection.findings import UNLISTED
from data_pipeline.inspection.fingerprints import Fingerprints, picture_name
from data_pipeline.inspection.store import GrowingArray, KnownFingerprints
from data_pipeline.inspection.summary import InspectedData, PartResult, SplitSummary
from data_pipeline.layouts.img2dataset import compare_shard, hash_names
from data_pipeline.layouts.listing import NONE, TABLES, ClipListing, Layout, Listing, RowLocation, RunTasks
from data_pipeline.layouts.lpr4m import Lpr4m
from data_pipeline.layouts.names import is_leftover
from data_pipeline.layouts.pictures import SUFFIXES, PictureReader
from data_pipeline.system.workers import Workers

CLIPS_A_TASK = 64
PICTURES_A_TASK = 512
BOX_SLACK = 0.5  # pixels by which a box may leave its frame: the rounding of a download that shrank the frame
RESHAPED = "frame of another shape"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]")  # with U+FFFD, which replaces a lost character
TEXTS = ("image_title", "category", "category_name", "product", "speech", "scale", "duration", "number")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SourceContext:
    """The data that all workers need."""

    layout: Layout
    folder: PictureReader
    known: KnownFingerprints


class InspectedSource(InspectedData):
    """A source folder. `read_lists`, then `inspect_pictures` fill in the results."""

    def __init__(self, layout: Layout, splits: Sequence[str], workers: int, **shared: Any) -> None:
        """shared: the arguments of `InspectedData`."""
        super().__init__(**shared)
        self.layout, self.splits, self.workers = layout, splits, workers
        self.folder = PictureReader(layout.source)
        self.listings: list[Listing] = []

    # --- lists --------------------------------------------------------------------------------------------------------

    def read_lists(self, run: RunTasks) -> None:
        """Reads the lists and finds the pictures. A split that cannot be read becomes a fault; the others go on.

        Fills in `listings`, `tables`, `remarks` and `knows_products`, and adds to `findings`. run: runs tasks, as
        Workers.run does. Raises BadInputError or WrongUseError only if the others cannot be read together.
        """
        self._without_bad(self.splits, lambda splits: self._list(splits, run))
        for listing in self.listings:
            self.findings.add([*listing.faults, *_empty_lists(listing)])
            listing.faults = []
        if self.sample:
            chosen = [self.sample.rows(map(bytes.decode, listing.clip_ids.tolist())) for listing in self.listings]
            self.listings = list(map(take_clips, self.listings, chosen))
        self._without_bad(self.listings, lambda listings: self._locate(listings, run))
        for index in self.layout.indices.values() if isinstance(self.layout, Lpr4m) else ():
            download = index.download
            tasks = ((download, number) for number in range(len(download.shards)))
            label = f"{download.folder}: sidecars"
            for faults in run(compare_shard, tasks, label, total=len(download.shards), unit="shard"):
                self.findings.add(faults)
        self.findings.add([*self.layout.faults, *(fault for listing in self.listings for fault in listing.faults)])
        images = (image for listing in self.listings for image in listing.images)
        self.knows_products = any(image.product not in ("", image.id) for image in images)

    def _list(self, splits: Sequence[str], run: RunTasks) -> None:
        self.listings, self.tables = list_splits(self.layout, splits, run)

    def _locate(self, listings: Sequence[Listing], run: RunTasks) -> None:
        self.remarks = self.layout.locate(listings, run, self.work)
        self.listings = list(listings)

    def _without_bad(self, items: Sequence[T], read: Callable[[Sequence[T]], None]) -> None:
        """Reads all items; if that raises, each alone, adds faults of bad ones, and reads the rest, which may raise."""
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
                subject = f"split {item.split if isinstance(item, Listing) else item}"
                folder = self.layout.FOLDERS[0]
                if isinstance(err, BadInputError):
                    self.findings.add([err.at(folder, 0, subject)])
                else:
                    self.findings.add([Fault("split cannot be read", folder, str(err), 0, subject)])
        self.listings = []
        if sound:
            read(sound)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def inspect_pictures(self, known: KnownFingerprints) -> None:
        """Inspects the pictures of all lists, then, if every frame is inspected, the pictures that no list names.

        Fills in `summaries`, and adds to `findings` and `remarks`. known: fingerprints of earlier runs.
        """
        names = GrowingArray(self.work / "names.run", np.uint64)
        names.append(hash_names(self.layout.copies))
        with Workers(self.workers, SourceContext(self.layout, self.folder, known)) as workers:

            def run(function: Callable, tasks: Iterable[tuple], label: str, total: int, unit: str) -> PartResult:
                results = workers.run(function, tasks, label, total=total, unit=unit, weigh=lambda task: len(task[-1]))
                return self.join_parts(results, label.replace(": ", "-"), names if total else None)

            for listing in self.listings:
                split, shown = listing.split, listing.images
                tasks = ((split, shown[at : at + PICTURES_A_TASK]) for at in range(0, len(shown), PICTURES_A_TASK))
                images = run(inspect_images, tasks, f"{split}: images", len(shown), "image")
                clips = run(inspect_clips, _clip_tasks(listing), f"{split}: clips", len(listing), "clip")
                self.summaries.append(_summary(listing, images, clips))
            listed = names.mapped()
            listed.sort()
            if self.layout.stored_frames is None and not self.sample:
                tasks = ((paths,) for paths in self._unlisted(listed))
                run(inspect_unlisted, tasks, "not listed", 0, "picture")

    def _unlisted(self, listed: NDArray[np.uint64]) -> Iterator[list[str]]:
        """Yields paths, in the source, of pictures that no list names; then adds a remark if there are any.

        listed: ascending hashes of the names of those that a list names.
        """
        count, first = 0, ""
        paths = _pictures_below(self.layout.source)
        while part := list(itertools.islice(paths, PICTURES_A_TASK)):
            hashes = hash_names(part)
            at = np.searchsorted(listed, hashes)
            known = (at < len(listed)) & (listed[np.minimum(at, len(listed) - 1)] == hashes) if len(listed) else at > 0
            if others := list(itertools.compress(part, ~known)):
                count, first = count + len(others), first or others[0]
                yield others
        if count:
            is_or_are = "is" if count == 1 else "are"
            named = f"{counted(count, 'picture')} of the folder {is_or_are} named by no list"
            self.remarks.append(f"{named} (first {first}).")

    # --- access -------------------------------------------------------------------------------------------------------

    def frame_name(self, summary: SplitSummary, clip: int, frame: int) -> str:
        return picture_name(self._frame(summary, clip, frame))

    def image_name(self, summary: SplitSummary, image: int) -> str:
        return picture_name(self._image(summary, image))

    def frame(self, summary: SplitSummary, clip: int, frame: int) -> bytes:
        return self.folder.read(self._frame(summary, clip, frame))

    def image(self, summary: SplitSummary, image: int) -> bytes:
        return self.folder.read(self._image(summary, image))

    def faulty_picture(self, file: str) -> bytes | None:
        if not file.lower().endswith(tuple(SUFFIXES)) or not os.path.isfile(self.layout.source / file):
            return None  # a member of a tar, or no picture
        with contextlib.suppress(BadInputError):
            return self.folder.read(Picture("", file))
        return None

    def clip_source(self, summary: SplitSummary, clip: int) -> tuple[str, int]:
        source = self._listing(summary).source(clip)
        return source.file, source.number if isinstance(source, RowLocation) else 0

    def _listing(self, summary: SplitSummary) -> Listing:
        return next(listing for listing in self.listings if listing.split == summary.split)

    def _frame(self, summary: SplitSummary, clip: int, frame: int) -> Picture:
        _, found = self.layout.find_frames(self._listing(summary).source(clip), summary.split)
        picture = found[frame].picture
        assert isinstance(picture, Picture)  # the frame is sound
        return picture

    def _image(self, summary: SplitSummary, image: int) -> Picture:
        return self.layout.find_image(self._listing(summary).images[image], summary.split)


def take_clips(listing: Listing, rows: NDArray[np.int64]) -> Listing:
    """Returns a listing of some clips, by ascending row, and the shop images that they show, without faults."""
    images = np.unique(listing.columns["image"][rows])
    images = images[images != NONE]
    renumber = np.full(len(listing.images) + 1, NONE, np.int32)  # the last entry maps NONE to NONE
    renumber[images] = np.arange(len(images))
    columns = {name: values[rows] for name, values in listing.columns.items()}
    begins = np.cumsum(listing.hash_counts) - listing.hash_counts
    hashes = [listing.frame_hashes[begins[row] : begins[row] + listing.hash_counts[row]] for row in rows]
    clip_ids = listing.clip_ids[rows]
    chosen = {clip_id.decode() for clip_id in clip_ids.tolist()}
    galleries = {name: renumber[np.array(shown, np.int64)] for name, shown in listing.galleries.items()}
    return dataclasses.replace(
        listing,
        clip_ids=clip_ids,
        columns=columns | {"image": renumber[columns["image"]]},
        images=[listing.images[image] for image in images],
        galleries={name: shown[shown != NONE].tolist() for name, shown in galleries.items()},
        faults=[],
        frame_hashes=np.concatenate([*hashes, np.zeros(0, np.uint64)]),
        hash_counts=listing.hash_counts[rows],
        lines=listing.lines[rows] if len(listing.lines) else listing.lines,
        clips=[listing.clips[row] for row in rows] if listing.clips else [],
        truth={clip_id: images for clip_id, images in listing.truth.items() if clip_id in chosen},
        image_products=listing.image_products[images],
    )


def _empty_lists(listing: Listing) -> Iterator[Fault]:
    """Yields a fault for each file of a list without a line (from an interrupted download) that has no fault yet."""
    reported = {fault.file for fault in listing.faults}
    for number, file in enumerate(listing.files):
        if file not in reported and not np.any(listing.lines["file"] == number):
            yield Fault("empty list", file, "found no line, needs one a clip; restore the file, or remove it.")


def _pictures_below(root: Path) -> Iterator[str]:
    """Yields the paths, relative to root, of files with a picture's suffix, in order, but leftovers.

    Links to folders are left, except for those at the top, which a conversion follows.
    """
    links = [path for path in sorted(root.iterdir()) if path.is_symlink()]
    outside = [path for path in links if not path.resolve().is_relative_to(root.resolve())]
    for folder, inner, files in itertools.chain(os.walk(root), *map(os.walk, outside)):
        inner[:] = sorted(name for name in inner if not is_leftover(name, True))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not is_leftover(name, False):
                yield os.path.relpath(os.path.join(folder, name), root)


def _summary(listing: Listing, images: PartResult, clips: PartResult) -> SplitSummary:
    return SplitSummary(
        split=listing.split,
        clip_ids=[clip_id.decode() for clip_id in listing.clip_ids.tolist()],
        image_ids=[image.id for image in listing.images],
        clip_images=listing.columns["image"],
        columns={name: listing.columns[name] for name in TABLES},
        image_products=listing.image_products,
        galleries={name: np.array(rows, np.int32) for name, rows in listing.galleries.items()},
        truth=listing.truth,
        frame_counts=np.asarray(clips.frame_counts),
        frame_fingerprints=clips.fingerprints,
        image_fingerprints=images.fingerprints,
    )


# --- tasks ------------------------------------------------------------------------------------------------------------


def _clip_tasks(listing: Listing) -> Iterator[tuple[str, list[tuple[str, RowLocation | ClipListing]]]]:
    for begin in range(0, len(listing), CLIPS_A_TASK):
        rows = range(begin, min(len(listing), begin + CLIPS_A_TASK))
        yield listing.split, [(listing.clip_ids[row].decode(), listing.source(row)) for row in rows]


class _Part:
    """Collects the result of a task, one picture at a time."""

    def __init__(self, context: SourceContext) -> None:
        self.context = context
        self.fingerprints: list[Fingerprints] = []
        self.new: list[Fingerprints] = []
        self.names: list[str] = []
        self.faults: list[Fault] = []
        self.frame_counts: list[int] = []

    def inspect(self, found: Picture | BadInputError | None, fault: Callable[[BadInputError], Fault]) -> Fingerprints:
        """Returns the fingerprint of a picture, NO_FINGERPRINT if it is not sound; `fault` places its problems.

        found: as a layout gives it. A BadInputError becomes a fault; None, a download known to have failed, is none.
        """
        fingerprint: Fingerprints = fingerprints.NO_FINGERPRINT
        problems: Sequence[BadInputError] = ()
        try:
            if isinstance(found, BadInputError):
                raise found
            if found is not None:
                self.names.append(picture_name(found))
                inspected = fingerprints.inspect_file(self.context.folder, found, self.context.known.find)
                fingerprint, problems = inspected.fingerprint, inspected.problems
                if not inspected.known and not problems:
                    self.new.append(fingerprint)
        except BadInputError as err:
            problems = [err]
        self.faults += map(fault, problems)
        self.fingerprints.append(fingerprint)
        return fingerprint

    def result(self) -> PartResult:
        of_all, of_new = (np.array(each, fingerprints.FINGERPRINT) for each in (self.fingerprints, self.new))
        return PartResult(of_all, of_new, self.faults, self.frame_counts, hash_names(self.names))


def inspect_images(context: SourceContext, split: str, images: Sequence[ShopImage]) -> PartResult:
    part = _Part(context)
    for image in images:
        found: Picture | BadInputError
        try:
            found = context.layout.find_image(image, split)
        except BadInputError as err:
            found = err
        part.inspect(found, lambda err, image=image: err.at(err.file or image.reference, 0, f"image {image.id}"))
    return part.result()


def inspect_clips(
    context: SourceContext, split: str, clips: Sequence[tuple[str, RowLocation | ClipListing]]
) -> PartResult:
    """Returns fingerprints, frame counts, faults of clips (clip id, where listed); one that cannot be parsed has 0."""
    part = _Part(context)
    reshaped = False
    for clip_id, source in clips:
        number = source.number if isinstance(source, RowLocation) else 0
        fault = lambda err, file=source.file, number=number, clip=clip_id: err.at(file, number, f"clip {clip}")
        try:
            listed, found = context.layout.find_frames(source, split)
        except BadInputError:
            part.frame_counts.append(0)  # already a fault of the lists
            continue
        part.frame_counts.append(len(found))
        for name in TEXTS:
            text = getattr(listed, name, "")
            if CONTROL.search(text):
                detail = f"found {text!r:.80} as {name}, needs text without control characters; correct the cell."
                part.faults.append(fault(BadInputError("control characters", detail)))
        before: set[str] = set()
        for frame in found:
            fingerprint = part.inspect(frame.picture, fault)
            if not isinstance(frame.picture, Picture):
                continue
            name = picture_name(frame.picture)
            if name in before:
                detail = f"found the frame {name} twice in the clip's list, needs each once; remove one, and its box."
                part.faults.append(fault(BadInputError("frame listed twice", detail)))
            before.add(name)
            if listed.boxes and fingerprint["key"]:
                for error in box_faults(listed.boxes[frame.position], frame.picture, fingerprint, name):
                    if error.reason != RESHAPED or not reshaped:  # once a task, since a download has millions of them
                        part.faults.append(fault(error))
                    reshaped |= error.reason == RESHAPED
    return part.result()


def inspect_unlisted(context: SourceContext, paths: Sequence[str]) -> PartResult:
    part = _Part(context)
    for path in paths:
        picture = Picture(os.path.splitext(os.path.basename(path))[0], path)
        part.inspect(picture, lambda err, path=path: err.at(path, subject=UNLISTED))
    return part.result()


def box_faults(boxes: Sequence[Box], picture: Picture, fingerprint: Fingerprints, name: str) -> Iterator[BadInputError]:
    """Yields BadInputError for each box of frame `name` that is inverted or leaves it by more than BOX_SLACK pixels.

    If a conversion leaves the boxes out, since the frame has not its original's shape, yields one error of RESHAPED.
    """
    width, height = int(fingerprint["width"]), int(fingerprint["height"])
    in_frame = scale_boxes(boxes, picture, (width, height))
    if in_frame is None:
        detail = f"found frame {name} of {width}x{height} pixels, needs the shape of its original "
        detail += f"({'x'.join(map(str, picture.original_size or ()))}); its boxes, and those of frames like it, are "
        yield BadInputError(RESHAPED, f"{detail}left out. img2dataset keeps the shape with --resize_mode keep_ratio.")
    for box, scaled in zip(boxes if in_frame else (), in_frame or (), strict=True):
        left, top, right, bottom = scaled
        size = "x".join(map(str, picture.original_size or (width, height)))
        if right <= left or bottom <= top:
            detail = f"found the box {list(box)} in frame {name}, needs x1 < x2 and y1 < y2; correct it."
            yield BadInputError("box inside out", detail)
        elif min(left, top) < -BOX_SLACK or right > width + BOX_SLACK or bottom > height + BOX_SLACK:
            detail = f"found the box {list(box)} in frame {name}, needs it within {size} pixels; correct it."
            yield BadInputError("box outside the frame", detail)
