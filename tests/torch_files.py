"""Writes files as torch does, without torch: pickle opcodes by hand, storages as stored zip entries."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STORAGES = {
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
}
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


class View(NamedTuple):
    """A tensor as a part of a storage; strides and offset are in numbers, not bytes."""

    storage: np.ndarray  # 1-D
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """Returns a value's opcodes as torch's pickler writes them. Tensors go to `storages`; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.ndarray):
        strides = tuple(stride // value.itemsize for stride in np.empty(value.shape, value.dtype).strides)
        value = View(value.reshape(-1), 0, value.shape, strides)
    if isinstance(value, View):
        key, storages[len(storages) :] = str(len(storages)), [value.storage]
        kind = f"ctorch\n{STORAGES[str(value.storage.dtype)]}\n".encode()
        storage = b"(" + text("storage") + kind + text(key) + text("cpu") + number(value.storage.size) + b"tQ"
        arguments = storage + number(value.offset) + numbers(value.shape) + numbers(value.strides)
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89" + ORDERED_DICT + b"tR"
    if isinstance(value, Mapping):
        return b"}(" + b"".join(text(k) + pickled(v, storages) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(pickled(each, storages) for each in value) + b"e"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    return text(value) if isinstance(value, str) else number(value)


def write_archive(
    path: Path,
    pickle: bytes,
    storages: list[np.ndarray],
    *,
    script: bool = False,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle)
        if script:
            file.writestr("archive/constants.pkl", b"\x80\x02).")
            file.writestr("archive/code/__torch__/model.py", "class Model(Module):\n  pass\n")
        for key, storage in enumerate(storages):
            file.writestr(f"archive/data/{key}", storage.tobytes())
        file.writestr("archive/version", "3\n")


def write_state_dict(path: Path, tensors: Mapping[str, Any], **options: Any) -> None:
    """Writes what torch.save(model.state_dict(), path) does."""
    storages: list[np.ndarray] = []
    items = b"".join(text(name) + pickled(value, storages) for name, value in tensors.items())
    metadata = b"}" + text("_metadata") + ORDERED_DICT + b"sb"  # an OrderedDict's own attribute
    write_archive(path, b"\x80\x02" + ORDERED_DICT + b"(" + items + b"u" + metadata + b".", storages, **options)


def write_torchscript(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes what torch.jit.save(model, path) does: a tree of objects of classes that only the archive defines."""
    storages: list[np.ndarray] = []

    def module(prefix: str, name: str) -> bytes:
        inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        attributes = text("training") + b"\x89" + text("_is_full_backward_hook") + b"N"
        attributes += text("sizes") + b"ctorch.jit._pickle\nbuild_intlist\n](K\x01K\x02e\x85R"
        for child in dict.fromkeys(key.partition(".")[0] for key in inside):
            value = pickled(inside[child], storages) if child in inside else module(f"{prefix}{child}.", child)
            attributes += text(child) + value
        return f"c__torch__.model.{name or 'clip'}\nModule\n".encode() + b")\x81}(" + attributes + b"ub"

    write_archive(path, b"\x80\x02" + module("", "") + b".", storages, script=True)
