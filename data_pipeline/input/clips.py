"""Examples of a split as arrays: its clips and shop images by row, decoded, cropped, in slots with a mask.

An array is a pure function of the split, the options, the seed, the epoch and the rows asked for.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.format.reader import Split
from data_pipeline.input.augment import FIRST_FRAME, SHOP_IMAGE, WHOLE_CLIP, augment, draw_words
from data_pipeline.input.decode import Pixels, centre_crop, load
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.sampling import choose_frames

Arrays = dict[str, NDArray[Any]]
Kind = Literal["clip", "image"]
LISTED = {"clip": "it", "image": "its clips"}
PADDING = -1  # the row of an example that only fills a batch


class PictureCache:
    """Pictures by key, first come, up to `limit` bytes; none is ever thrown out, none is stored above the limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.pictures: dict[tuple[str, int, int], Pixels] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type["PictureCache"], tuple[int]]:
        return PictureCache, (self.limit,)  # each worker fills its own

    def add(self, key: tuple[str, int, int], pixels: Pixels) -> None:
        with self.lock:
            if key not in self.pictures and self.used + pixels.nbytes <= self.limit:
                self.pictures[key] = pixels
                self.used += pixels.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The pictures of a split as the network sees them."""

    split: Split
    options: FrameOptions
    seed: int
    train: bool
    cache: PictureCache

    def blank(self, count: int, names: Sequence[str]) -> Arrays:
        """The named arrays of `count` examples, all zero, to be filled."""
        side, slots = self.options.image_size, self.options.num_frames
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "frames": ((slots, side, side, 3), np.uint8),
            "mask": ((slots,), np.int32),
            "image": ((side, side, 3), np.uint8),
            "product": ((), np.int32),
            "index": ((), np.int32),
            "row": ((), np.int32),
            "valid": ((), np.bool_),
        }
        return {name: np.zeros((count, *shapes[name][0]), shapes[name][1]) for name in names}

    def fill_clips(self, blank: Arrays, rows: NDArray[np.integer], epoch: int) -> None:
        """Puts clips into "frames" and "mask", which are zero; a PADDING row becomes one black frame."""
        for place, row in enumerate(rows.tolist()):
            kept = 1 if row == PADDING else self._fill(blank["frames"][place], row, epoch)
            blank["mask"][place, :kept] = 1

    def fill_images(self, blank: Arrays, rows: NDArray[np.integer], examples: NDArray[np.integer], epoch: int) -> None:
        """Puts shop images into "image", each with the random words of the example that shows it."""
        for place, (row, example) in enumerate(zip(rows.tolist(), examples.tolist(), strict=True)):
            if row != PADDING:
                pixels = self._loaded("image", row, [0])[0]
                blank["image"][place] = self._finished(pixels, example, epoch, SHOP_IMAGE)

    def _fill(self, slots: Pixels, row: int, epoch: int) -> int:
        """Puts a clip's frames into `slots`, [N, px, px, 3], from the front; returns how many."""
        clip_words = draw_words(self.seed, epoch, row, WHOLE_CLIP, 2 + self.options.num_frames)
        count = int(self.split.columns["frames"][row])
        chosen = choose_frames(count, self.options, clip_words, train=self.train).tolist()
        for slot, pixels in enumerate(self._loaded("clip", row, chosen)):
            picture = FIRST_FRAME + (0 if self.options.consistent_augment else slot)
            slots[slot] = self._finished(pixels, row, epoch, picture)
        return len(chosen)

    def _finished(self, pixels: Pixels, example: int, epoch: int, picture: int) -> Pixels:
        if not self.train:
            return centre_crop(pixels, self.options)
        return augment(pixels, self.options, draw_words(self.seed, epoch, example, picture))

    def _loaded(self, kind: Kind, row: int, positions: Sequence[int]) -> list[Pixels]:
        """Pictures of one record, decoded and resized; the record is read only for what the cache does not hold."""
        encoded: Sequence[bytes] = ()
        loaded = []
        for position in positions:
            pixels = self.cache.pictures.get((kind, row, position))
            if pixels is None:
                encoded = encoded or self._read(kind, row)
                try:
                    pixels = load(encoded[position], self.options, train=self.train)
                except ValueError as err:
                    what = f"frame {position + 1} of {len(encoded)}" if kind == "clip" else "the picture"
                    raise self._fault(kind, row, f"{what} {err}") from err
                self.cache.add((kind, row, position), pixels)
            loaded.append(pixels)
        return loaded

    def _read(self, kind: Kind, row: int) -> Sequence[bytes]:
        """The encoded pictures of a record."""
        try:
            frames = self.split.clip(row).frames if kind == "clip" else [self.split.image(row)]
            encoded = [frame.encoded for frame in frames]
        except ValueError as err:  # names shard and record, and says what to do
            raise ValueError(f"{self._name(kind, row)}: {err} Or list {LISTED[kind]} in skip_clips.") from err
        if kind == "clip" and len(encoded) != self.split.columns["frames"][row]:
            raise self._fault(kind, row, f"found {len(encoded)} frames, needs {self.split.columns['frames'][row]}")
        return encoded

    def _name(self, kind: Kind, row: int) -> str:
        return f"{kind} {(self.split.clip_ids if kind == 'clip' else self.split.image_ids)[row]}"

    def _fault(self, kind: Kind, row: int, fault: str) -> ValueError:
        return ValueError(
            f"{self.split.where(kind, row)} ({self._name(kind, row)}): {fault}; "
            f"convert again, or list {LISTED[kind]} in skip_clips."
        )
