"""A baseline without learning: ranks shop images by the intersection of their colour histogram with the clip's.

A histogram has 8 x 8 x 8 bins of RGB, at 64 x 64 pixels; a clip's histogram is the mean of those of its frames.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.format.reader import Split
from data_pipeline.input.decode import Pixels, decode, resize
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.sampling import sample_frames

BINS = 8  # a channel
OPTIONS = FrameOptions(image_size=64, resize=64)
Histogram = NDArray[np.float64]


def histogram(pixels: Pixels) -> Histogram:
    """Returns the share of pixels in each bin, float64 [BINS ** 3], red slowest, of a picture [height, width, 3]."""
    red, green, blue = np.moveaxis(pixels.astype(np.int64) * BINS // 256, -1, 0)
    counts = np.bincount(((red * BINS + green) * BINS + blue).reshape(-1), minlength=BINS**3)
    return counts / counts.sum()


def mean_histogram(pictures: Iterable[bytes]) -> Histogram:
    return np.mean([histogram(resize(decode(picture), OPTIONS)) for picture in pictures], axis=0)


def histogram_recall(split: Split, *, frames: int = 10, at: int = 1) -> float:
    """Returns Recall@`at` of the baseline in percent, by the official rules (docs/official.md 10.1, 10.2).

    Equal scores rank in file order, a query without a stored clip counts as missed, and at most `frames` of a clip are
    used. Raises ValueError for an unreadable record or picture, KeyError for a clip without a gallery.
    """
    images = np.array([mean_histogram([split.image(row).encoded]) for row in range(split.num_images)])
    hits = 0
    for row in range(split.num_clips):
        stored = [frame.encoded for frame in split.clip(row).frames]
        query = mean_histogram(stored[position] for position in sample_frames(len(stored), frames))
        gallery = split.gallery_of(row)
        shared = np.minimum(images[gallery], query).sum(axis=1)
        best = gallery[np.argsort(-shared, kind="stable")[:at]]
        hits += bool({split.image_ids[image] for image in best} & set(split.truth(row)))
    return 100 * hits / split.num_truth
