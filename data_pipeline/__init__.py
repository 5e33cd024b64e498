"""Clips of livestreams with their shop images: conversion of downloads to records, and batches for training.

    open_dataset                                  a converted set: records, columns, galleries, truth
    Plan                                          the order of the clips in a training run
    train_batches, clip_batches, image_batches    NumPy batches for training and evaluation
    FrameOptions                                  how pictures become frames

`python -m data_pipeline.convert` makes a converted set. Public are these names and the commands convert, doctor and
synthetic. A name's module is imported when the name is first used, so that `import data_pipeline` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.format.reader import open_dataset
    from data_pipeline.input.batches import clip_batches, image_batches, train_batches
    from data_pipeline.input.options import FrameOptions
    from data_pipeline.input.plan import Plan

__all__ = ["FrameOptions", "Plan", "clip_batches", "image_batches", "open_dataset", "train_batches"]

_MODULES = {
    "FrameOptions": "data_pipeline.input.options",
    "Plan": "data_pipeline.input.plan",
    "clip_batches": "data_pipeline.input.batches",
    "image_batches": "data_pipeline.input.batches",
    "open_dataset": "data_pipeline.format.reader",
    "train_batches": "data_pipeline.input.batches",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
