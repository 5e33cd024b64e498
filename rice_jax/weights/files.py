"""Finds the files of a model: one file, the parts that it was split into, or the one model in a folder."""

import json
import re
from pathlib import Path
from typing import Any

FILE_NAMES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
INDEX_NAMES = tuple(f"{name}.index.json" for name in FILE_NAMES)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")


def find_files(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Returns the files of the model at `path`, sorted if there are several, and notes for the user.

    `path` is a file, a part of a model or its index (then all parts are returned), or a folder with one model. A folder
    that has none of the usual names may have its only file of weights one level below. Raises FileNotFoundError if
    `path` or a part of the model is missing, and ValueError for a folder without exactly one model and for an index
    without files in its own folder.
    """
    if path.name in INDEX_NAMES and path.is_file():
        return _indexed(path), ()
    if path.is_dir():
        return _in_folder(path), ()
    part = PART.fullmatch(path.name)
    index = next((index for name in INDEX_NAMES if (index := path.parent / name).is_file()), None)
    if not path.is_file() or (part is None and (index is None or path not in _indexed(index))):
        return [path], ()
    files = _indexed(index) if index is not None else _all_parts(path.parent, part) if part else [path]
    if len(files) == 1:
        return files, ()
    return files, (f"{path.name} is a part of a model; all {len(files)} parts in its folder were read",)


def _indexed(index: Path) -> list[Path]:
    parts = read_json(index).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) else set()
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{index}: found no weight_map to files in its own folder; fetch it again.")
    return _existing(index.parent, sorted(names))


def _all_parts(folder: Path, part: re.Match[str]) -> list[Path]:
    count = int(part["count"])
    names = [f"{part['stem']}-{number:05}-of-{part['count']}{part['suffix']}" for number in range(1, count + 1)]
    return _existing(folder, names)


def _existing(folder: Path, names: list[str]) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(
            f"{folder}: the model has {len(names)} parts, and {', '.join(missing[:3])}{more} are missing here; "
            "fetch all parts into one folder, and give that folder."
        )
    return [folder / name for name in names]


def _in_folder(path: Path) -> list[Path]:
    for name in INDEX_NAMES:
        if (path / name).is_file():
            return _indexed(path / name)
    for name in FILE_NAMES:
        if (path / name).is_file():
            return [path / name]
    for pattern in ("*", "*/*"):  # programs that train often have a folder `checkpoints` or one for each step
        found = sorted(file for file in path.glob(pattern) if file.suffix in SUFFIXES and file.is_file())
        parts = [match for file in found if (match := PART.fullmatch(file.name))]
        if parts and len({(match["stem"], match["count"], match["suffix"]) for match in parts}) == 1 == len(
            {file.parent for file in found}
        ):
            return _all_parts(found[0].parent, parts[0])
        if len(found) == 1:
            return found
        if found:
            break
    names = ", ".join(str(file.relative_to(path)) for file in found[:5]) or "none"
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise ValueError(f"{path}: found neither a run nor one file of weights ({names}{more}); give the file itself.")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} without a file. Raises ValueError for other content, OSError on reading."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: found no JSON ({error}); fetch it again.") from error
    if isinstance(found, dict):
        return found
    raise ValueError(f"{path}: found a {type(found).__name__}, needs a JSON object; fetch it again.")
