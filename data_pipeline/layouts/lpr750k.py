"""LPR750K as its users download it: pictures in folders, lists that name them by path (SPEC 8.1-8.3, 8.8, 8.9)."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.schema import Clip, Picture, ShopImage
from data_pipeline.layouts import annotations
from data_pipeline.layouts.annotations import BOXES, NO_IMAGE, SPEECH, TITLES, TRUTH
from data_pipeline.layouts.listing import ClipListing, FoundFrame, Listing, Row, RowLocation, Run
from data_pipeline.layouts.pictures import SUFFIXES, PictureFolder

QUERIES, GALLERY = "query_tenframes.json", "gallery_main.txt"


class Lpr750k:
    """The source folder with annotations/, query/, gallery/, training_image/, training_video_0x/."""

    FOLDERS: ClassVar[tuple[str, ...]] = ("annotations",)

    def __init__(self, source: Path, train_annotation: str | None, stored_frames: int | None) -> None:
        self.source = source
        self.train_annotation = train_annotation
        self.stored_frames = stored_frames  # None: all
        self.folder = PictureFolder(source)
        self.faults: list[Fault] = []
        self.copies: list[str] = []

    def splits(self) -> tuple[str, ...]:
        folder = self.source / "annotations"
        has = {
            "train": bool(annotations.training_lists(self.source, self.train_annotation)),
            "val": any(folder.glob("training_videoinfo_val*")),
            "test": (folder / QUERIES).exists(),
        }
        return tuple(split for split, there in has.items() if there)

    def training_lists(self, split: str) -> list[Path]:
        if split == "train":
            return annotations.training_lists(self.source, self.train_annotation)
        return [annotations.find_one(self.source, "training_videoinfo_val*", needed_for="validation")]

    def checksums(self, splits: Sequence[str]) -> dict[str, list[int]]:
        return annotations.checksums(self, splits, self._test_files)

    def _test_files(self) -> list[Path]:
        folder = self.source / "annotations"
        optional = (annotations.find_optional(self.source, pattern) for pattern in (BOXES, SPEECH, TITLES))
        return [folder / QUERIES, folder / GALLERY, self._truth_file, *(path for path in optional if path)]

    # --- lists --------------------------------------------------------------------------------------------------------

    def shop_image(self, row: Row, split: str) -> ShopImage:
        if row.image_path is None:
            raise BadInputError(
                "wrong number of columns",
                "found LPR4M's 11 columns, needs LPR750K's with the shop image's path in column 4; "
                "convert with --layout lpr4m.",
            )
        return ShopImage(row.image_id, row.image_path, row.image_title, row.product)

    def frames_to_locate(self, listed: Row | ClipListing) -> Sequence[str]:
        return ()

    def locate(self, listings: Sequence[Listing], run: Run, work: Path) -> list[str]:
        return []

    @functools.cached_property
    def _truth_file(self) -> Path:
        return annotations.find_one(self.source, TRUTH, needed_for="the test split")

    @functools.cached_property
    def _truth(self) -> dict[str, tuple[str, ...]]:
        return annotations.load_id_lists(self._truth_file, self.faults)

    def truth(self) -> dict[str, tuple[str, ...]]:
        return self._truth

    def listed_clips(self, split: str) -> tuple[list[ClipListing], list[Fault]]:
        path = annotations.find_one(self.source, QUERIES, needed_for="the test split")
        entries = annotations.load_json_object(path, self.faults)
        return annotations.queries(self.source, path, entries, _frames_of, self.truth(), self.faults)

    def galleries(self, split: str) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        """Rows of the gallery file. A picture that several livestreams show is stored once.

        The official code reads each row's own file: a file that differs from the first of its name stays apart.
        """
        path = annotations.find_one(self.source, GALLERY, needed_for="the test split")
        titles = annotations.load_texts(annotations.find_optional(self.source, TITLES), self.faults)
        shelves: dict[str, list[ShopImage]] = {}
        faults: list[Fault] = []
        first: dict[tuple[str, str], Picture] = {}
        references: dict[tuple[str, str], str] = {}
        for number, _, line in annotations.lines(path):
            try:
                livestream, name = _gallery_row(line)
                image_id = _image_id(name)
                reference = f"gallery/{livestream}/{name}"
                picture = self.folder.find(reference, missing=NO_IMAGE)
                key = (image_id, name)
                if key not in first:
                    first[key], references[key] = picture, reference
                elif self._same_bytes(first[key], picture):
                    reference = references[key]
                    self.copies.append(picture.path)
                image = ShopImage(image_id, reference, titles.get(image_id, ""))
                shelves.setdefault(livestream, []).append(image)
            except BadInputError as err:
                faults.append(err.at(str(path.relative_to(self.source)), number))
        return shelves, faults

    def _same_bytes(self, one: Picture, other: Picture) -> bool:
        return self.folder.read(one) == self.folder.read(other)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def read_clip(self, source: RowLocation | ClipListing, split: str) -> Clip:
        listed, found = self.find_frames(source, split)
        frames = []
        for each in found:
            if isinstance(each.picture, BadInputError):
                raise each.picture
            if each.picture:
                frames.append(each.picture)
        return annotations.clip_of(listed, tuple(frames), tuple(each.position for each in found), len(listed.frames))

    def find_frames(self, source: RowLocation | ClipListing, split: str) -> tuple[Row | ClipListing, list[FoundFrame]]:
        if isinstance(source, ClipListing):
            listed: Row | ClipListing = source
            paths = [f"query/{frame}" for frame in source.frames]
        else:
            listed = annotations.read_line(self.source, source)
            paths = list(listed.frames)
        positions = annotations.stored_positions(len(paths), self.stored_frames)
        return listed, [FoundFrame(position, self._look_for(paths[position])) for position in positions]

    def _look_for(self, path: str) -> Picture | BadInputError:
        try:
            return self.folder.find(path, missing="missing frame")
        except BadInputError as err:
            return err

    def read_image(self, image: ShopImage, split: str) -> Picture:
        return self.folder.find(image.reference, missing=NO_IMAGE)


def _frames_of(entry: Any) -> tuple[str, ...]:
    frames = entry.get("frames") if isinstance(entry, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
        raise BadInputError(
            "not a list", f'found {entry!r:.80}, needs {{"frames": [paths], "gt": [ids]}}; correct the entry.'
        )
    return tuple(frames)


def _gallery_row(line: bytes) -> tuple[str, str]:
    try:
        livestream, name = line.decode("utf-8").split("/")
    except UnicodeDecodeError as err:
        raise BadInputError("not UTF-8", f"found byte {line[err.start]:#04x}, needs UTF-8; convert it.") from err
    except ValueError as err:
        raise BadInputError(
            "bad gallery row", f"found {line!r:.80}, needs LIVESTREAM/FILE with one slash; correct the line."
        ) from err
    return annotations.checked_id(livestream, "livestream"), name


def _image_id(name: str) -> str:
    """The first five groups of a gallery file's name: <uuid>-0.jpg, <uuid>.jpg and <uuid> all give <uuid>.

    The official parser leaves the suffix in the id of the second form, which no truth entry could match (SPEC 8.8).
    """
    stem, suffix = os.path.splitext(name)
    stem = stem if suffix.lower() in SUFFIXES else name
    return annotations.checked_id("-".join(stem.split("-")[:5]), "image")
