"""LPR750K as downloaded: pictures in folders, and lists of their paths (docs/official.md 8.1 to 8.3, 8.8, 8.9)."""

import os
from pathlib import Path
from typing import Any, ClassVar

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format.schema import Picture, ShopImage
from data_pipeline.layouts import annotations
from data_pipeline.layouts.listing import ClipEntry, ClipListing, ClipSource, FoundFrame, TrainingRow
from data_pipeline.layouts.pictures import MISSING_FRAME, SUFFIXES, PictureReader
from data_pipeline.layouts.text_layout import NO_IMAGE, TITLES, TRUTH, TextLayout

QUERIES, GALLERY = "query_tenframes.json", "gallery_main.txt"


class Lpr750k(TextLayout):
    """The source folder with annotations/, query/, gallery/, training_image/, training_video_0x/."""

    TEST_LISTS: ClassVar[tuple[str, ...]] = (QUERIES, GALLERY, TRUTH)

    def __init__(self, source: Path, train_annotation: str | None, stored_frames: int | None) -> None:
        super().__init__(source, train_annotation, stored_frames)
        self.pictures = PictureReader(source)

    def shop_image(self, row: TrainingRow) -> ShopImage:
        if row.image_path is None:
            detail = "found LPR4M's 11 columns, needs LPR750K's with the shop image's path in column 4; "
            raise BadInputError("wrong number of columns", f"{detail}give --layout lpr4m.")
        return ShopImage(row.image_id, row.image_path, row.image_title, row.product)

    def listed_clips(self, split: str) -> tuple[list[ClipListing], list[Fault]]:
        path = self.find_list(QUERIES)
        return self.read_queries(path, annotations.load_json_object(path, self.faults), _query_frames)

    def galleries(self, split: str) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        """Returns galleries and row faults. Files of one name and bytes are one image. WrongUseError: not one list."""
        path = self.find_list(GALLERY)
        titles = annotations.load_texts(self.find_optional(TITLES), self.faults)
        galleries: dict[str, list[ShopImage]] = {}
        faults: list[Fault] = []
        first: dict[str, tuple[Picture, str]] = {}  # by file name: its first picture and the reference to it
        for number, _, line in annotations.read_lines(path):
            if not line:
                continue
            try:
                livestream, name = _gallery_row(line)
                image_id = _image_id(name)
                reference = f"gallery/{livestream}/{name}"
                picture = self.pictures.find(reference, missing=NO_IMAGE)
                known, known_reference = first.setdefault(name, (picture, reference))
                # The official code reads the file that each row names, so that other bytes are another image.
                if known is not picture and self.pictures.read(known) == self.pictures.read(picture):
                    reference = known_reference
                    self.copies.append(picture.path)
                image = ShopImage(image_id, reference, titles.get(image_id, ""))
                galleries.setdefault(livestream, []).append(image)
            except BadInputError as err:
                faults.append(err.at(str(path.relative_to(self.source)), number))
        return galleries, faults

    def find_frames(self, source: ClipSource, split: str) -> tuple[ClipEntry, list[FoundFrame]]:
        listed = self.read_entry(source)
        folder = "query/" if isinstance(listed, ClipListing) else ""
        positions = self.stored_positions(len(listed.frames))
        return listed, [FoundFrame(each, self._find_frame(folder + listed.frames[each])) for each in positions]

    def _find_frame(self, path: str) -> Picture | BadInputError:
        try:
            return self.pictures.find(path, missing=MISSING_FRAME)
        except BadInputError as err:
            return err

    def find_image(self, image: ShopImage, split: str) -> Picture:
        return self.pictures.find(image.reference, missing=NO_IMAGE)


def _query_frames(entry: Any) -> tuple[str, ...]:
    frames = entry.get("frames") if isinstance(entry, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
        detail = f'found {entry!r:.80}, needs {{"frames": [paths], "gt": [ids]}}; correct the entry.'
        raise BadInputError("not a list", detail)
    return tuple(map(annotations.slashes, frames))


def _gallery_row(line: bytes) -> tuple[str, str]:
    try:
        livestream, name = annotations.slashes(line.decode("utf-8")).split("/")
    except UnicodeDecodeError as err:
        raise BadInputError("not UTF-8", f"found byte {line[err.start]:#04x}, needs UTF-8; convert it.") from err
    except ValueError as err:
        detail = f"found {line!r:.80}, needs LIVESTREAM/FILE with one slash; correct the line."
        raise BadInputError("bad gallery row", detail) from err
    return annotations.checked_id(livestream, "livestream"), name


def _image_id(name: str) -> str:
    """Returns a file's image id: <uuid> for <uuid>-0.jpg, <uuid>.jpg and <uuid>. Raises BadInputError if it is none."""
    stem, suffix = os.path.splitext(name)  # the official parser leaves the second's suffix: docs/official.md 8.8
    stem = stem if suffix.lower() in SUFFIXES else name
    return annotations.checked_id("-".join(stem.split("-")[:5]), "image")
