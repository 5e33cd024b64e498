"""LPR4M as downloaded: lists of ids, and pictures that img2dataset has numbered (docs/official.md 8.4 to 8.7)."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import BadInputError, Fault, WrongUseError
from data_pipeline.format.schema import Picture, ShopImage
from data_pipeline.layouts.annotations import decoded_lines, load_id_lists, load_texts
from data_pipeline.layouts.download_index import Index
from data_pipeline.layouts.img2dataset import FAILED, STORED, find_download, hash_names, list_names, name_of
from data_pipeline.layouts.listing import (
    ClipEntry,
    ClipListing,
    ClipSource,
    FoundFrame,
    Listing,
    RunTasks,
    TrainingRow,
)
from data_pipeline.layouts.pictures import MISSING_FRAME
from data_pipeline.layouts.text_layout import NO_IMAGE, TITLES, TRUTH, TextLayout

GALLERIES, FRAME_URLS = "test_liveid_to_gallery_*.json", "test_frame_url_*.txt"
LINES_A_TASK = 1000


class Lpr4m(TextLayout):
    """The source folder with annotations/ and the downloads training_frame, training_image, test_frame, test_image."""

    TEST_LISTS: ClassVar[tuple[str, ...]] = (TRUTH, GALLERIES)

    def __init__(self, source: Path, train_annotation: str | None, stored_frames: int | None) -> None:
        super().__init__(source, train_annotation, stored_frames)
        self.indices: dict[str, Index] = {}  # by folder of the download; `locate` fills it

    def test_lists(self) -> list[Path]:
        urls = self._frame_urls()
        return [*super().test_lists(), *([urls] if urls else [])]

    def shop_image(self, row: TrainingRow) -> ShopImage:
        return ShopImage(row.image_id, row.image_id, row.image_title, row.product)

    def frames_to_locate(self, listed: ClipEntry) -> Sequence[str]:
        return [name_of(listed.frames[position]) for position in self.stored_positions(len(listed.frames))]

    def listed_clips(self, split: str) -> tuple[list[ClipListing], list[Fault]]:
        """Returns the test clips, grouped from frame ids (CLIP-NUMBER) as LPR4M does not list its queries, and faults.

        Raises WrongUseError if a list or test_frame is missing, ambiguous or needs pyarrow, BadInputError on reading.
        """
        urls = self._frame_urls()
        if urls is None:
            names = list_names(find_download(self.source, "test_frame"))
        else:
            names = map(name_of, decoded_lines(urls, self.faults))
        frames: dict[str, set[str]] = {}
        for name in names:
            frames.setdefault(name.rpartition("-")[0], set()).add(name)
        in_order = lambda of_clip: tuple(sorted(of_clip, key=lambda name: (len(name), name)))
        return self.read_queries(urls or self.source / "test_frame", frames, in_order)

    def galleries(self, split: str) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        path = self.find_list(GALLERIES)
        titles = load_texts(self.find_optional(TITLES), self.faults)
        galleries = {
            livestream: [ShopImage(image_id, image_id, titles.get(image_id, ""), image_id) for image_id in image_ids]
            for livestream, image_ids in load_id_lists(path, self.faults).items()
        }
        return galleries, []

    def changed_since(self, time: int) -> list[str]:
        shards: list[str] = []
        for kind in sorted({_download_of(split, kind) for split in self.splits() for kind in ("image", "frame")}):
            with contextlib.suppress(WrongUseError):  # a download may be deleted when it is converted
                download = find_download(self.source, kind)
                shards += [f"{download.folder}/{shard}{'.tar' if download.tars else ''}" for shard in download.shards]
        return [path for path in shards if (self.source / path).stat().st_mtime_ns > time]

    def _frame_urls(self) -> Path | None:
        found = [*self.source.glob(FRAME_URLS), *(self.source / "annotations").glob(FRAME_URLS)]
        if len(found) > 1:
            names = " and ".join(sorted(str(path.relative_to(self.source)) for path in found))
            raise WrongUseError(f"{self.source}: found {names}, needs one {FRAME_URLS}; keep one of them.")
        return found[0] if found else None

    def locate(self, listings: Sequence[Listing], run: RunTasks, work: Path) -> list[str]:
        for folder in sorted({_download_of(each.split, kind) for each in listings for kind in ("image", "frame")}):
            kind = folder.rpartition("_")[2]
            users = [listing for listing in listings if _download_of(listing.split, kind) == folder]
            index = self.indices[folder] = Index(find_download(self.source, folder), work)
            if kind == "image":
                names = [image.reference for listing in users for image in listing.images]
                index.add(np.unique(hash_names(names)), run)
            else:
                index.add(_unique(listing.frame_hashes for listing in users), run)
                # All frames of the clips that miss one to store, since `find_frames` samples such a clip again.
                gaps = [each for user in users for each in _hash_frames(user, _clips_with_gaps(user, index), run)]
                index.add(_unique(gaps), run)
            users[0].faults += index.faults
        return [remark for folder, index in self.indices.items() for remark in _remarks(folder, index)]

    def find_frames(self, source: ClipSource, split: str) -> tuple[ClipEntry, list[FoundFrame]]:
        listed = self.read_entry(source)
        index = self.indices[_download_of(split, "frame")]
        names = [name_of(text) for text in listed.frames]
        positions = self.stored_positions(len(names))
        places = index.find(hash_names([names[position] for position in positions]))
        if (places["state"] != STORED).any():
            places = index.find(hash_names(names))
            missing = places["state"] != STORED
            exists = np.flatnonzero(~missing)
            chosen = exists[self.stored_positions(len(exists))]
            positions = sorted([*chosen.tolist(), *np.flatnonzero(missing).tolist()])
            places = places[positions]
        return listed, [
            FoundFrame(position, self._picture(index, names[position], place))
            for position, place in zip(positions, places, strict=True)
        ]

    def _picture(self, index: Index, name: str, place: np.void) -> Picture | BadInputError | None:
        if place["state"] == STORED:
            return index.download.picture(name, place)
        if place["state"] == FAILED or not index.complete:
            return None
        detail = f"found no download of frame {name} in {index.download.folder}, not even a failed one, needs one; "
        detail += "run img2dataset again, or convert with --on-error=skip, which leaves the clip out."
        return BadInputError(MISSING_FRAME, detail)

    def find_image(self, image: ShopImage, split: str) -> Picture:
        index = self.indices[_download_of(split, "image")]
        place = index.find(hash_names([image.reference]))[0]
        if place["state"] != STORED:
            failed, again = "it is in no shard", "download it"
            if place["state"] == FAILED:
                failed = "its download failed"
                again = "download it again (delete its shard's _stats.json first, or img2dataset skips it)"
            detail = f"found no picture of image {image.id} in {index.download.folder} ({failed}), needs one; "
            detail += f"{again}, or convert with --on-error=skip, which leaves the image and its clips out."
            raise BadInputError(NO_IMAGE, detail)
        return index.download.picture(image.reference, place)


def _download_of(split: str, kind: str) -> str:
    return f"{'test' if split == 'test' else 'training'}_{kind}"


def _unique(hashes: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]))


def _clips_with_gaps(listing: Listing, index: Index) -> NDArray[np.int64]:
    missing = np.concatenate([[0], np.cumsum(index.find(listing.frame_hashes)["state"] != STORED)])
    ends = np.cumsum(listing.hash_counts)
    return np.flatnonzero(missing[ends] > missing[ends - listing.hash_counts])


def _hash_frames(listing: Listing, ordinals: NDArray[np.int64], run: RunTasks) -> list[NDArray[np.uint64]]:
    parts = [ordinals[begin : begin + LINES_A_TASK].tolist() for begin in range(0, len(ordinals), LINES_A_TASK)]
    tasks = ([[listing.source(ordinal) for ordinal in part]] for part in parts)
    return list(run(hash_frames, tasks, f"{listing.split}: clips with failed downloads", total=len(parts)))


def hash_frames(layout: Lpr4m, sources: Sequence[ClipSource]) -> NDArray[np.uint64]:
    """Returns `hash_names` of all frames of clips, in order. Raises BadInputError for bad lines, OSError on reading."""
    return np.concatenate([hash_names([name_of(text) for text in layout.read_entry(each).frames]) for each in sources])


def _remarks(folder: str, index: Index) -> list[str]:
    remarks = [f"{folder}: {index.failed:,} of {index.listed:,} downloads failed ({index.download.folder})"]
    if not index.complete:
        remarks.append(
            f"{folder}: tables (.parquet) missing or unread: frames that are not there count as failed downloads; "
            "to tell them from frames never asked for, keep the tables beside the shards and pip install "
            "'rice_jax[parquet]'."
        )
    return remarks
