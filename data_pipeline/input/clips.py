"""Clips and shop images of a split as arrays: read by row, decoded, cropped, put into slots with a mask.

An array is a pure function of the split, the options, the seed, the epoch and the rows.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.format.manifest import CONVERT_AGAIN
from data_pipeline.format.reader import Split
from data_pipeline.input.augment import FIRST_FRAME, SHOP_IMAGE, WHOLE_CLIP, augment, augment_words
from data_pipeline.input.decode import Pixels, centre_crop, load_picture
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.sampling import choose_frames

Arrays = dict[str, NDArray[Any]]
Kind = Literal["clip", "image"]
# What else to do about a clip or shop image that cannot be read, by whether a split is evaluated that has galleries. A
# run that has begun keeps its plan, and so its skip_clips.
SKIPPING = {
    False: {
        "clip": "begin a new run with the clip in skip_clips",
        "image": "begin a new run with the image's clips in skip_clips",
    },
    True: {
        "clip": "evaluate with --on-error miss, which counts the clip as a miss",
        "image": "evaluate with --on-error miss, which leaves the image out of its galleries",
    },
}
FAULT_BYTES = 1024  # of the text that says why a clip or shop image cannot be read
PADDING = -1  # the row of an example that only fills up a batch


class PictureCache:
    """Loaded pictures by key, at most `limit` bytes of them. The first that fit stay; later ones are not stored.

    A pickled cache arrives empty: each worker fills its own.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.pictures: dict[tuple[str, int, int], Pixels] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type["PictureCache"], tuple[int]]:
        return PictureCache, (self.limit,)

    def add(self, key: tuple[str, int, int], pixels: Pixels) -> None:
        with self.lock:
            if key not in self.pictures and self.used + pixels.nbytes <= self.limit:
                self.pictures[key] = pixels
                self.used += pixels.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipLoader:
    """Loads clips and shop images of a split into arrays. train: augment at random; otherwise take centre crops.

    keep_going: the caller goes on without what cannot be read, so that errors do not say how to.
    """

    split: Split
    options: FrameOptions
    seed: int
    train: bool
    cache: PictureCache
    keep_going: bool = False

    def zeros(self, count: int, names: Sequence[str]) -> Arrays:
        """Returns zeros by name, [count, ...]: bool for "valid", uint8 pictures and "fault", int32 others.

        Raises KeyError for another name.
        """
        side, slots = self.options.image_size, self.options.num_frames
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "frames": ((slots, side, side, 3), np.uint8),
            "mask": ((slots,), np.int32),
            "image": ((side, side, 3), np.uint8),
            **dict.fromkeys(("product", "index", "row"), ((), np.int32)),
            "valid": ((), np.bool_),
            "fault": ((FAULT_BYTES,), np.uint8),
        }
        return {name: np.zeros((count, *shapes[name][0]), shapes[name][1]) for name in names}

    def fill_clips(self, arrays: Arrays, rows: NDArray[np.integer], epoch: int) -> None:
        """Writes the clips `rows` into "frames" and "mask", which must be zero. PADDING gets one black frame.

        Raises ValueError, which names the record, if it or a picture cannot be read, and IndexError for a row outside.
        """
        for position, row in enumerate(rows.tolist()):
            shown = 1 if row == PADDING else self._fill_slots(arrays["frames"][position], row, epoch)
            arrays["mask"][position, :shown] = 1

    def fill_images(self, arrays: Arrays, rows: NDArray[np.integer], examples: NDArray[np.integer], epoch: int) -> None:
        """Writes the shop images `rows` into "image", which must be zero; a PADDING row stays black.

        examples: for each image, the clip row that decides its augmentation. Raises ValueError for a record or picture
        that cannot be read or another number of examples, and IndexError for a row outside.
        """
        for position, (row, example) in enumerate(zip(rows.tolist(), examples.tolist(), strict=True)):
            if row != PADDING:
                pixels = self._load("image", row, [0])[0]
                arrays["image"][position] = self._crop(pixels, example, epoch, SHOP_IMAGE)

    def _fill_slots(self, slots: Pixels, row: int, epoch: int) -> int:
        """Fills `slots`, [N, px, px, 3], from the front with frames; returns how many. ValueError: a bad record."""
        words = augment_words(self.seed, epoch, row, WHOLE_CLIP, 2 + self.options.num_frames)
        count = int(self.split.columns["frames"][row])
        chosen = choose_frames(count, self.options, words, train=self.train).tolist()
        for slot, pixels in enumerate(self._load("clip", row, chosen)):
            picture = FIRST_FRAME + (0 if self.options.consistent_augment else slot)
            slots[slot] = self._crop(pixels, row, epoch, picture)
        return len(chosen)

    def _crop(self, pixels: Pixels, example: int, epoch: int, picture: int) -> Pixels:
        if not self.train:
            return centre_crop(pixels, self.options)
        return augment(pixels, self.options, augment_words(self.seed, epoch, example, picture))

    def _load(self, kind: Kind, row: int, positions: Sequence[int]) -> list[Pixels]:
        """Returns the record's pictures at `positions`, as load_picture does. Raises ValueError for a bad record."""
        encoded: Sequence[bytes] = ()
        loaded = []
        for position in positions:
            pixels = self.cache.pictures.get((kind, row, position))
            if pixels is None:
                encoded = encoded or self._read(kind, row)
                try:
                    pixels = load_picture(encoded[position], self.options, train=self.train)
                except ValueError as err:
                    what = f"frame {position + 1} of {len(encoded)}" if kind == "clip" else "the picture"
                    raise self._error(kind, row, f"{what} {err}") from err
                self.cache.add((kind, row, position), pixels)
            loaded.append(pixels)
        return loaded

    def _read(self, kind: Kind, row: int) -> Sequence[bytes]:
        """Returns a record's encoded pictures. Raises ValueError if unreadable or another number than in "frames"."""
        try:
            pictures = self.split.clip(row).frames if kind == "clip" else [self.split.image(row)]
            encoded = [picture.encoded for picture in pictures]
        except ValueError as err:  # its message names shard and record, and ends with what to do
            skipping = "" if self.keep_going else f" To go on without it, {self._skipping[kind]}."
            raise ValueError(f"{self._name(kind, row)}: {err}{skipping}") from err
        if kind == "clip" and len(encoded) != self.split.columns["frames"][row]:
            raise self._error(kind, row, f"found {len(encoded)} frames, needs {self.split.columns['frames'][row]}")
        return encoded

    @property
    def _skipping(self) -> dict[str, str]:
        return SKIPPING[not self.train and self.split.is_evaluation]

    def _name(self, kind: Kind, row: int) -> str:
        return f"{kind} {(self.split.clip_ids if kind == 'clip' else self.split.image_ids)[row]}"

    def _error(self, kind: Kind, row: int, fault: str) -> ValueError:
        where = f"{self.split.where(kind, row)} ({self._name(kind, row)})"
        skipping = "" if self.keep_going else f", or {self._skipping[kind]}"
        return ValueError(f"{where}: {fault}; {CONVERT_AGAIN}{skipping}.")
