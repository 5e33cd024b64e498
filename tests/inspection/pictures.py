"""Pictures of a camera that stands still, of packages on white ground, and the like, as encoded bytes."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipeline.inspection import fingerprints
from data_pipeline.inspection.duplicates import Duplicates, duplicates

SIDE = 256


def smooth(seed: int, side: int = SIDE, cells: int = 9) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray | Image.Image, quality: int = 85, size: tuple[int, int] | None = None) -> bytes:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    (picture.resize(size) if size else picture).convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


def fixed_camera(count: int, share: float, seed: int = 0) -> list[np.ndarray]:
    """Frames that differ in a patch, each of its own colours and at its own place."""
    rng, background = np.random.default_rng(seed), smooth(1_000 + seed)
    side = round(SIDE * share**0.5)
    frames = []
    for number in range(count):
        frame = background.copy()
        x, y = rng.integers(0, SIDE - side, 2)
        frame[y : y + side, x : x + side] = smooth(5_000 + number, side, 4)
        frames.append(frame)
    return frames


def fingerprints_of(pictures: Sequence[bytes]) -> fingerprints.Fingerprints:
    each = [fingerprints.inspect_picture(data, "picture.jpg").fingerprint for data in pictures]
    return np.array(each, fingerprints.FINGERPRINT)


def groups_within(pictures: Sequence[bytes]) -> list[list[int]]:
    return [group.rows for group in duplicates(fingerprints_of(pictures), None, pictures.__getitem__)]


def groups_across(pictures: Sequence[bytes], others: Sequence[bytes]) -> list[Duplicates]:
    ours, theirs = fingerprints_of(pictures), fingerprints_of(others)
    return list(duplicates(ours, theirs, pictures.__getitem__, others.__getitem__))
