"""The baseline without learning, against a plain loop."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.format.reader import open_dataset
from data_pipeline.input.decode import decode
from data_pipeline.input.sampling import sample_frames
from rice_jax.retrieval.histogram import BINS, OPTIONS, histogram, histogram_recall, resize


def test_a_histogram_counts_shares_of_pixels_by_bin() -> None:
    pixels = np.array([[(0, 0, 31), (32, 0, 0)], [(31, 31, 0), (255, 255, 255)]], np.uint8)
    found = histogram(pixels)
    assert {bin: found[bin] for bin in np.flatnonzero(found)} == {0: 0.5, BINS * BINS: 0.25, BINS**3 - 1: 0.25}


def plain(encoded: bytes) -> dict[tuple[int, ...], float]:
    pixels = resize(decode(encoded), OPTIONS).reshape(-1, 3)
    counts: dict[tuple[int, ...], float] = {}
    for pixel in pixels.tolist():
        key = tuple(level // 32 for level in pixel)
        counts[key] = counts.get(key, 0) + 1 / len(pixels)
    return counts


@pytest.mark.parametrize("at", [1, 2])
def test_recall_equals_that_of_a_plain_loop(converted: Path, at: int) -> None:
    test = open_dataset(converted).split("test")
    hits = 0
    for row in range(test.num_clips):
        clip = [frame.encoded for frame in test.clip(row).frames]
        frames = [plain(clip[position]) for position in sample_frames(len(clip), 10)]
        scores = []
        for image in test.gallery_of(row):
            shop = plain(test.image(image).encoded)
            query = {key: sum(frame.get(key, 0) for frame in frames) / len(frames) for key in shop}
            scores.append(-sum(min(share, query[key]) for key, share in shop.items()))
        best = [test.image_ids[test.gallery_of(row)[position]] for position in np.argsort(scores, kind="stable")[:at]]
        hits += any(image in test.truth(row) for image in best)
    assert histogram_recall(test, at=at) == pytest.approx(100 * hits / test.num_truth)
    assert hits > 0
