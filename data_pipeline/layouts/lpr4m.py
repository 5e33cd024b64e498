"""LPR4M as its authors' download gives it: lists of ids, and pictures that img2dataset has numbered (SPEC 8.4-8.7)."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault, WrongUseError
from data_pipeline.format.schema import Clip, Picture, ShopImage
from data_pipeline.layouts import annotations
from data_pipeline.layouts.annotations import BOXES, NO_IMAGE, SPEECH, TITLES, TRUTH
from data_pipeline.layouts.img2dataset import FAILED, STORED, Index, find_download, hash_names, list_names, name_of
from data_pipeline.layouts.listing import ClipListing, FoundFrame, Layout, Listing, Row, RowLocation, Run

GALLERIES, FRAME_URLS = "test_liveid_to_gallery_*.json", "test_frame_url_*.txt"
OUTPUTS = ("image", "frame")
LINES_A_TASK = 1000


class Lpr4m:
    """The source folder with annotations/ and the outputs training_frame, training_image, test_frame, test_image."""

    FOLDERS: ClassVar[tuple[str, ...]] = ("annotations",)

    def __init__(self, source: Path, train_annotation: str | None, stored_frames: int | None) -> None:
        self.source = source
        self.train_annotation = train_annotation
        self.stored_frames = stored_frames  # None: all
        self.faults: list[Fault] = []
        self.copies: list[str] = []
        self.indices: dict[str, Index] = {}  # by output folder; filled by locate()

    def splits(self) -> tuple[str, ...]:
        folder = self.source / "annotations"
        has = {
            "train": bool(annotations.training_lists(self.source, self.train_annotation)),
            "val": any(folder.glob("training_videoinfo_val*")),
            "test": any(folder.glob(TRUTH)),
        }
        return tuple(split for split, there in has.items() if there)

    def training_lists(self, split: str) -> list[Path]:
        if split == "train":
            return annotations.training_lists(self.source, self.train_annotation)
        return [annotations.find_one(self.source, "training_videoinfo_val*", needed_for="validation")]

    def checksums(self, splits: Sequence[str]) -> dict[str, list[int]]:
        return annotations.checksums(self, splits, self._test_files)

    def _test_files(self) -> list[Path]:
        needed = [
            annotations.find_one(self.source, pattern, needed_for="the test split") for pattern in (TRUTH, GALLERIES)
        ]
        optional = [annotations.find_optional(self.source, pattern) for pattern in (BOXES, SPEECH, TITLES)]
        return [*needed, *(path for path in (*optional, self._frame_urls()) if path)]

    # --- lists --------------------------------------------------------------------------------------------------------

    def shop_image(self, row: Row, split: str) -> ShopImage:
        return ShopImage(row.image_id, row.image_id, row.image_title, row.product)

    def frames_to_locate(self, listed: Row | ClipListing) -> Sequence[str]:
        positions = annotations.stored_positions(len(listed.frames), self.stored_frames)
        return [name_of(listed.frames[position]) for position in positions]

    def truth(self) -> dict[str, tuple[str, ...]]:
        return self._truth

    @functools.cached_property
    def _truth(self) -> dict[str, tuple[str, ...]]:
        path = annotations.find_one(self.source, TRUTH, needed_for="the test split")
        return annotations.load_id_lists(path, self.faults)

    def listed_clips(self, split: str) -> tuple[list[ClipListing], list[Fault]]:
        """Clips of the test frames: LPR4M has no list of its queries, a frame's id begins with its clip's."""
        urls = self._frame_urls()
        names: dict[str, list[str]] = {}
        for name in self._names_of_list(urls) if urls else list_names(find_download(self.source, "test_frame")):
            names.setdefault(name.rpartition("-")[0], []).append(name)
        in_order = lambda frames: tuple(sorted(set(frames), key=lambda name: (len(name), name)))
        return annotations.queries(
            self.source, urls or self.source / "test_frame", names, in_order, self.truth(), self.faults
        )

    def galleries(self, split: str) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        path = annotations.find_one(self.source, GALLERIES, needed_for="the test split")
        titles = annotations.load_texts(annotations.find_optional(self.source, TITLES), self.faults)
        shelves = {
            livestream: [ShopImage(image_id, image_id, titles.get(image_id, ""), image_id) for image_id in image_ids]
            for livestream, image_ids in annotations.load_id_lists(path, self.faults).items()
        }
        return shelves, []

    def _frame_urls(self) -> Path | None:
        found = [*self.source.glob(FRAME_URLS), *(self.source / "annotations").glob(FRAME_URLS)]
        if len(found) > 1:
            raise WrongUseError(f"{self.source}: found {len(found)} files {FRAME_URLS}, needs one; remove the others.")
        return found[0] if found else None

    def _names_of_list(self, path: Path) -> list[str]:
        return [name_of(line) for line in annotations.decoded_lines(path, self.faults)]

    # --- where the pictures are ---------------------------------------------------------------------------------------

    def locate(self, listings: Sequence[Listing], run: Run, work: Path) -> list[str]:
        """Looks up the pictures of all splits in the downloads.

        First the frames to be stored; then, for clips that miss one of these, all frames: what is left is sampled anew.
        """
        images, frames = ({_output(listing.split, what) for listing in listings} for what in OUTPUTS)
        for kind in sorted(images | frames):
            users = [listing for listing in listings if kind in (_output(listing.split, what) for what in OUTPUTS)]
            index = self.indices[kind] = Index(find_download(self.source, kind), work)
            if kind in images:
                names = [image.reference for listing in users for image in listing.images]
                index.add(np.unique(hash_names(names)), run)
            else:
                index.add(_unique(listing.frame_hashes for listing in users), run)
                gaps = [each for user in users for each in _all_frames(user, self._clips_with_gaps(user, index), run)]
                index.add(_unique(gaps), run)
            users[0].faults += index.faults
        return [remark for kind, index in self.indices.items() for remark in _remarks(kind, index)]

    def _clips_with_gaps(self, listing: Listing, index: Index) -> NDArray[np.int64]:
        missing = np.concatenate([[0], np.cumsum(~index.stored(listing.frame_hashes))])
        ends = np.cumsum(listing.hash_counts)
        gaps: NDArray[np.int64] = np.flatnonzero(missing[ends] > missing[ends - listing.hash_counts])
        return gaps

    # --- pictures -----------------------------------------------------------------------------------------------------

    def read_clip(self, source: RowLocation | ClipListing, split: str) -> Clip:
        listed = source if isinstance(source, ClipListing) else annotations.read_line(self.source, source)
        frames, positions, existing, failed = self._frames(listed.frames, _output(split, "frame"))
        return annotations.clip_of(listed, frames, positions, existing, failed)

    def find_frames(self, source: RowLocation | ClipListing, split: str) -> tuple[Row | ClipListing, list[FoundFrame]]:
        listed = source if isinstance(source, ClipListing) else annotations.read_line(self.source, source)
        index = self.indices[_output(split, "frame")]
        positions = annotations.stored_positions(len(listed.frames), self.stored_frames)
        names = [name_of(listed.frames[position]) for position in positions]
        found: list[FoundFrame] = []
        for position, name, place in zip(positions, names, index.find(hash_names(names)), strict=True):
            picture: Picture | BadInputError | None = None
            if place["state"] == STORED:
                picture = index.download.picture(name, place)
            elif place["state"] != FAILED and index.complete:
                picture = _missing_frames(index, [name], len(listed.frames))
            found.append(FoundFrame(position, picture))
        return listed, found

    def _frames(self, listed: Sequence[str], kind: str) -> tuple[tuple[Picture, ...], tuple[int, ...], int, int]:
        """Pictures to store, their positions, how many frames exist, how many of those looked up failed."""
        index = self.indices[kind]
        names = [name_of(text) for text in listed]
        positions = annotations.stored_positions(len(names), self.stored_frames)
        existing, failed = len(names), 0
        places = index.find(hash_names([names[position] for position in positions]))
        if (places["state"] != STORED).any():
            places = index.find(hash_names(names))
            self._refuse_missing(index, names, places)
            there = np.flatnonzero(places["state"] == STORED)
            existing, failed = len(there), len(names) - len(there)
            chosen = annotations.stored_positions(existing, self.stored_frames)
            positions = tuple(there[list(chosen)].tolist())
            places = places[list(positions)]
        pictures = tuple(
            index.download.picture(names[position], place) for position, place in zip(positions, places, strict=True)
        )
        return pictures, positions, existing, failed

    def _refuse_missing(self, index: Index, names: Sequence[str], places: NDArray[np.void]) -> None:
        absent = [name for name, place in zip(names, places, strict=True) if place["state"] not in (STORED, FAILED)]
        if absent and index.complete:
            raise _missing_frames(index, absent, len(names))
        if not (places["state"] == STORED).any():
            raise BadInputError(
                "clip without frames",
                f"found none of its {len(names)} frames in {index.download.folder} (all downloads failed), needs one; "
                "download them again.",
            )

    def read_image(self, image: ShopImage, split: str) -> Picture:
        kind = _output(split, "image")
        index = self.indices[kind]
        place = index.find(hash_names([image.reference]))[0]
        if place["state"] != STORED:
            failed = "its download failed" if place["state"] == FAILED else "it is in no shard"
            raise BadInputError(
                NO_IMAGE,
                f"found no picture of image {image.id} in {index.download.folder} ({failed}), needs one; "
                "download it again.",
            )
        return index.download.picture(image.reference, place)


def _missing_frames(index: Index, absent: Sequence[str], num_frames: int) -> BadInputError:
    return BadInputError(
        "missing frame",
        f"found no picture for {len(absent)} of {num_frames} frames in {index.download.folder} (first {absent[0]}), "
        "needs every frame that its download did not report as failed; run img2dataset again.",
    )


def _output(split: str, what: str) -> str:
    return f"{'test' if split == 'test' else 'training'}_{what}"


def _unique(hashes: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]))


def _all_frames(listing: Listing, rows: NDArray[np.int64], run: Run) -> list[NDArray[np.uint64]]:
    """Hashes of all frames of the given clips, read by the workers."""
    parts = [rows[begin : begin + LINES_A_TASK].tolist() for begin in range(0, len(rows), LINES_A_TASK)]
    tasks = ([[listing.source(row) for row in part]] for part in parts)
    return list(run(hash_all_frames, tasks, f"{listing.split}: clips with failed downloads", total=len(parts)))


def hash_all_frames(layout: Layout, sources: Sequence[RowLocation | ClipListing]) -> NDArray[np.uint64]:
    hashes = []
    for source in sources:
        listed = source if isinstance(source, ClipListing) else annotations.read_line(layout.source, source)
        hashes.append(hash_names([name_of(text) for text in listed.frames]))
    return np.concatenate(hashes)


def _remarks(kind: str, index: Index) -> list[str]:
    remarks = [f"{kind}: {index.failed:,} of {index.listed:,} downloads failed ({index.download.folder})"]
    if not index.complete:
        remarks.append(
            f"{kind}: tables (.parquet) missing or unread: frames that are not there count as failed downloads; "
            "to tell them from frames never asked for, pip install 'rice_jax[parquet]'."
        )
    return remarks
