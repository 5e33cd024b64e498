"""Whether the stored frames of a split's clips give the frames that the clips themselves would."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import counted
from data_pipeline.format.reader import Split
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.sampling import sample_frames


def missing_frames(
    split: Split, rows: NDArray[np.integer], options: FrameOptions, *, train: bool, prefix: str = ""
) -> tuple[str, str] | None:
    """Returns None if the stored frames of the clips `rows` give what the clips would, else (fault, remedies), texts.

    The fault names a clip, what is stored of it and what the options need. The remedies are what all these clips could
    give. "random_of_stored" asks for no other frames than the stored ones, so there it is a fault that none is left to
    draw. Outside training frames are evenly spaced. prefix: of the options' names in the texts, as "data.".
    """
    rows = np.asarray(rows, np.int64)
    stored, original = (np.asarray(split.columns[name], np.int64)[rows] for name in ("frames", "original_frames"))
    short = np.flatnonzero(stored < original)
    _, first = np.unique(stored[short] << 32 | original[short], return_index=True)  # of millions of clips few differ
    kinds = {(int(stored[each]), int(original[each])): int(rows[each]) for each in short[np.sort(first)]}
    slots, sampling = options.num_frames, options.frame_sampling if train else "uniform"
    lacking = [kind for kind in kinds if not _suffices(*kind, slots, sampling)]
    if not lacking:
        return None
    found, of = lacking[0]
    name = f"{prefix}num_frames"
    needs = {
        "uniform": f"needs {name} = {slots}"
        if found < slots
        else f"which lack some of the {name} = {slots} evenly spaced ones",
        "random": 'needs all for frame_sampling "random"',
        "random_of_stored": f"needs more than {name} = {slots} to draw from",
    }[sampling]
    ways = [
        f'{prefix}frame_sampling to "{other}"'
        for other in ("random_of_stored", "uniform")
        if train and other != sampling and _all_suffice(kinds, slots, other)
    ]
    if numbers := [n for n in range(1, max(kinds)[0] + 1) if _all_suffice(kinds, n, sampling)]:
        ways.append(f"{name} to one of {numbers}")
    where = f"split {split.name} clip {split.clip_ids[kinds[lacking[0]]]}"
    remedies = "convert again with --frames all into another folder" + (
        ", or set " + ", or ".join(ways) if ways else ""
    )
    return f"{where}: found {counted(found, 'stored frame')} of {of}, {needs}", remedies


def _all_suffice(kinds: Iterable[tuple[int, int]], slots: int, sampling: str) -> bool:
    return all(_suffices(*kind, slots, sampling) for kind in kinds)


def _suffices(stored: int, original: int, slots: int, sampling: str) -> bool:
    """Returns whether `stored` of `original` frames, fewer than all, give what the sampling asks for."""
    if sampling != "uniform":
        return sampling == "random_of_stored" and stored > slots
    if stored < slots:
        return False
    return np.array_equal(sample_frames(original, stored)[sample_frames(stored, slots)], sample_frames(original, slots))
