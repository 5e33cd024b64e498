"""The part that the layouts LPR750K and LPR4M share: training lists, test clips, and the files that both need."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_pipeline.faults import BadInputError, Fault, WrongUseError
from data_pipeline.format.manifest import SPLITS
from data_pipeline.format.schema import ShopImage
from data_pipeline.format.tfrecord import file_crc
from data_pipeline.layouts import annotations
from data_pipeline.layouts.img2dataset import name_of
from data_pipeline.layouts.listing import ClipEntry, ClipListing, ClipSource, Layout, TrainingRow

TRUTH, BOXES = "test_videoid_to_gtimage_*.json", "test_frameid2gtbox_*.json"
SPEECH, TITLES = "test_videoid_asr_*.txt", "test_image_title_*.txt"
VALIDATION = "training_videoinfo_val*"
NO_IMAGE = "image id without an image"


class TextLayout(Layout):
    """A layout with a folder annotations/. Its training and validation clips are lines of text files."""

    FOLDERS: ClassVar[tuple[str, ...]] = ("annotations",)
    TEST_LISTS: ClassVar[tuple[str, ...]]  # patterns of the files of a test split; without the first there is none

    def __init__(self, source: Path, train_annotation: str | None, stored_frames: int | None) -> None:
        super().__init__(source, stored_frames)
        self.train_annotation = train_annotation  # name of the training list if there are several; None: there is one

    @abc.abstractmethod
    def shop_image(self, row: TrainingRow) -> ShopImage:
        """Returns the shop image of a training row. LPR750K raises BadInputError if the row has no picture's path."""

    def splits(self) -> tuple[str, ...]:
        folder = self.source / "annotations"
        exists = {
            "train": bool(annotations.training_lists(self.source, self.train_annotation)),
            "val": any(folder.glob(VALIDATION)),
            "test": any(folder.glob(self.TEST_LISTS[0])),
        }
        return tuple(split for split in SPLITS if exists[split])

    def training_lists(self, split: str) -> list[Path]:
        """Returns the files of the training list, [] if there is none, or the one validation list.

        Raises WrongUseError if the validation or chosen training list is missing, or if there are several of either.
        """
        if split == "train":
            return annotations.training_lists(self.source, self.train_annotation)
        return [self.find_list(VALIDATION, needed_for="validation")]

    def find_list(self, pattern: str, *, needed_for: str = "the test split") -> Path:
        """Returns the one file of annotations/ that matches. Raises WrongUseError if there is none or several."""
        found = sorted((self.source / "annotations").glob(pattern))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            advice = "keep one of them there" if found else "unpack the annotations there"
            raise WrongUseError(
                f"{self.source / 'annotations' / pattern}: found {names}, needs one file for {needed_for}; "
                f"{advice}, or leave the split out with --splits."
            )
        return found[0]

    def find_optional(self, pattern: str) -> Path | None:
        """Returns the file of annotations/ that matches, None if there is none. Raises WrongUseError for several."""
        return self.find_list(pattern) if any((self.source / "annotations").glob(pattern)) else None

    def test_lists(self) -> list[Path]:
        """Returns the test split's files. Raises WrongUseError if a needed one is missing or any is ambiguous."""
        optional = map(self.find_optional, (BOXES, SPEECH, TITLES))
        return [*map(self.find_list, self.TEST_LISTS), *(path for path in optional if path)]

    def checksums(self, splits: Sequence[str]) -> dict[str, list[int]]:
        training = [split for split in splits if split != "test"]
        if training == ["val"] and "train" in self.splits():
            training.append("train")  # validation's gallery has its shop images
        files = [path for split in training for path in self.training_lists(split)]
        files += self.test_lists() if "test" in splits else []
        return {path.name: [path.stat().st_size, file_crc(path)] for path in files}

    @functools.cached_property
    def truth(self) -> dict[str, tuple[str, ...]]:
        return annotations.load_id_lists(self.find_list(TRUTH), self.faults)

    def read_entry(self, source: ClipSource) -> ClipEntry:
        """Returns a ClipListing itself, or a location's row. Raises BadInputError if it is bad, OSError on reading."""
        return source if isinstance(source, ClipListing) else annotations.read_row(self.source, source)

    def read_queries(
        self, file: Path, entries: Mapping[str, Any], frames_of: Callable[[Any], tuple[str, ...]]
    ) -> tuple[list[ClipListing], list[Fault]]:
        """Returns the test clips of `file` with their truth, boxes and speech, and a fault for each that is unusable.

        entries: the content of the file by clip id. frames_of: returns the frames of an entry or raises BadInputError.
        Raises WrongUseError if truth is missing or a list ambiguous, BadInputError if truth or boxes cannot be read.
        """
        truth = self.truth  # loaded first, for the order of the faults
        boxes = annotations.load_boxes(self.find_optional(BOXES), self.faults)
        speech = annotations.load_texts(self.find_optional(SPEECH), self.faults)
        name = str(file.relative_to(self.source))
        clips, faults = [], []
        for clip_id, entry in entries.items():
            try:
                frames = frames_of(entry)
                frame_boxes = [boxes.get(name_of(frame)) for frame in frames]
                clip = ClipListing(
                    clip_id=annotations.checked_id(clip_id, "clip"),
                    livestream=annotations.livestream_of(clip_id),
                    frames=frames,
                    truth=truth.get(clip_id, ()),
                    file=name,
                    boxes=tuple(each or () for each in frame_boxes) if any(frame_boxes) else None,
                    speech=speech.get(clip_id, ""),
                )
                clips.append(clip)
            except BadInputError as err:
                faults.append(err.at(name, 0, f"clip {clip_id}"))
        return clips, faults
