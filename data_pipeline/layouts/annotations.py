"""The text files that LPR750K and LPR4M share: training lists, truth, galleries, titles, speech (SPEC 8.3-8.8).

Everything here is text from a download: it is parsed as what it must be, with limits, and never evaluated.
"""

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.faults import BadInputError, Fault, WrongUseError
from data_pipeline.format.schema import Box, Clip, Picture
from data_pipeline.format.tfrecord import file_crc
from data_pipeline.input.sampling import sample_frames
from data_pipeline.layouts.img2dataset import name_of
from data_pipeline.layouts.listing import ClipListing, Row, RowLocation, TextLayout
from data_pipeline.layouts.pictures import SUFFIXES

TRUTH, BOXES = "test_videoid_to_gtimage_*.json", "test_frameid2gtbox_*.json"
SPEECH, TITLES = "test_videoid_asr_*.txt", "test_image_title_*.txt"
NO_IMAGE = "image id without an image"
MAX_LINE_BYTES = 1 << 24  # a clip of one hour at a frame a second takes 0.5 MB
MAX_JSON_BYTES = 1 << 30
MAX_ID_BYTES = 200  # LPR4M's clip ids have 64
T = TypeVar("T")
LIST_OF_STRINGS = re.compile(  # possessive (+): a hostile cell costs time linear in its length
    r"""\[\s*+(?:STRING\s*+(?:,\s*+STRING\s*+)*+,?+\s*+)?+\]""".replace(
        "STRING", r"""(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
    )
)


# --- a clip -----------------------------------------------------------------------------------------------------------


def stored_positions(count: int, stored_frames: int | None) -> tuple[int, ...]:
    """Which of a clip's frames are stored: those that SPEC 9.1 reads, or (None) all."""
    return tuple(sample_frames(count, stored_frames).tolist()) if stored_frames else tuple(range(count))


def clip_of(
    listed: Row | ClipListing, frames: tuple[Picture, ...], positions: tuple[int, ...], num_frames: int, failed: int = 0
) -> Clip:
    """The clip of a training row or of a query, with the frames that are to be stored.

    positions: theirs in the list; num_frames: how many exist; failed: how many downloads are known to have failed.
    """
    clip = Clip(
        id=listed.clip_id,
        livestream=listed.livestream,
        frames=frames,
        positions=positions,
        original_frames=num_frames,
        image_ids=listed.truth if isinstance(listed, ClipListing) else (listed.image_id,),
        boxes=None if listed.boxes is None else tuple(listed.boxes[position] for position in positions),
        speech=listed.speech,
        failed_downloads=failed,
    )
    if isinstance(listed, ClipListing):
        return clip
    return dataclasses.replace(
        clip,
        product=listed.product,
        category=listed.category,
        category_name=listed.category_name,
        title=listed.image_title,
        scale=listed.scale,
        duration=listed.duration,
        number=listed.number,
    )


# --- a training row ---------------------------------------------------------------------------------------------------


def parse_row(line: bytes) -> Row:
    """The row of one line without its line end, in LPR750K's or LPR4M's columns (SPEC 8.3, 8.4).

    Told apart by column 4, which is the picture's path in the first and its title in the second. Not stripped before it
    is split: the last cell may be empty, and stripping would take it away.
    """
    try:
        cells = line.decode("utf-8").split("\t")
    except UnicodeDecodeError as err:
        raise BadInputError(
            "not UTF-8",
            f"found byte {line[err.start]:#04x} at position {err.start}, needs UTF-8; convert the file's encoding.",
        ) from err
    has_path = len(cells) > 4 and cells[4].lower().endswith(tuple(SUFFIXES))
    if len(cells) < 10 if has_path else len(cells) != 11:
        raise BadInputError(
            "wrong number of columns",
            f"found {len(cells)} columns between tabs, column 4 {'a' if has_path else 'no'} picture path, needs 10 or "
            "more with the path (LPR750K) or 11 without (LPR4M); restore the line, an empty last cell keeps its tab.",
        )
    frames = parse_frames(cells[1])
    boxes = parse_boxes(cells[2], len(frames))
    if has_path:
        image_path, title, category, category_name, product, speech, *types = cells[4:]
        scale, duration, number = (*types, "", "", "")[:3]
    else:
        title, category, category_name, speech, scale, duration, number = cells[4:]
        image_path, product = None, cells[3]
    return Row(
        clip_id=checked_id(cells[0], "clip"),
        livestream=livestream_of(cells[0]),
        frames=frames,
        boxes=boxes,
        image_id=checked_id(cells[3], "image"),
        image_path=image_path,
        image_title=title,
        category=category,
        category_name=category_name,
        product=product or cells[3],
        speech=speech,
        scale=scale,
        duration=duration,
        number=number,
        columns=len(cells),
    )


def parse_frames(cell: str) -> tuple[str, ...]:
    """A list of strings, written as JSON or as Python does."""
    frames = _parse_list(cell, "frame")
    if not all(isinstance(frame, str) for frame in frames):
        raise _not_a_list(cell, "frame")
    if not frames:
        raise BadInputError("clip without frames", "found an empty frame list, needs at least one; remove the line.")
    if not "".join(frames).isprintable():
        raise BadInputError("bad id", f"found unprintable characters in {cell!r:.80}, needs names; correct the cell.")
    return tuple(frames)


def parse_boxes(cell: str, num_frames: int) -> tuple[tuple[Box, ...], ...] | None:
    """For each frame its boxes (one, several or none: all zeros); None where the cell gives none at all."""
    boxes = _parse_list(cell, "box") if cell.strip() else []
    if not boxes:
        return None
    if len(boxes) != num_frames:
        raise BadInputError(
            "frames and boxes differ",
            f"found {num_frames} frames and {len(boxes)} boxes, needs one box a frame; correct either list.",
        )
    return tuple(boxes_of_frame(of_frame) for of_frame in boxes)


def boxes_of_frame(value: Any) -> tuple[Box, ...]:
    """[x1, y1, x2, y2] or a list of such; all zeros mean that there is none (SPEC 8.5)."""
    if not isinstance(value, list):
        raise _bad_box(value)
    boxes = value if all(isinstance(each, list) for each in value) else [value]
    return tuple(box for box in map(_box, boxes) if any(box))


def _box(value: Any) -> Box:
    numbers = isinstance(value, list) and all(
        isinstance(side, int | float) and not isinstance(side, bool) and abs(side) < 1e9 for side in value
    )
    if not numbers or len(value) != 4:
        raise _bad_box(value)
    left, top, right, bottom = map(float, value)
    return left, top, right, bottom


def _bad_box(value: Any) -> BadInputError:
    return BadInputError("bad box", f"found the box {value!r:.80}, needs four numbers [x1, y1, x2, y2]; correct it.")


def _parse_list(cell: str, what: str) -> list:
    """A list cell. JSON first, which is quick; else a flat list of quoted strings, as Python's repr writes it.

    literal_eval sees only cells that the pattern has shown to be flat lists of string literals: it cannot recurse.
    """
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(cell.strip()) if LIST_OF_STRINGS.fullmatch(cell.strip()) else None
        except (ValueError, SyntaxError, MemoryError):
            value = None
    if not isinstance(value, list):
        raise _not_a_list(cell, what)
    return value


def _not_a_list(cell: str, what: str) -> BadInputError:
    needs = "strings" if what == "frame" else "boxes"
    return BadInputError(
        "not a list", f"found {cell!r:.80} in the {what} column, needs a list of {needs}; correct the cell."
    )


def checked_id(text: str, what: str) -> str:
    if not text or not text.isprintable() or len(text.encode()) > MAX_ID_BYTES:
        raise BadInputError(
            "bad id", f"found the {what} id {text!r:.80}, needs 1 to {MAX_ID_BYTES} printable bytes; correct it."
        )
    return text


def livestream_of(clip_id: str) -> str:
    """The first five groups of a clip id (SPEC 8.5)."""
    return "-".join(clip_id.split("-")[:5])


def lines(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1 within the part, offset, content without line end) of the lines that start in [begin, end).

    Empty lines are counted and left out. A line longer than the limit ends there, and its rest is another line.
    """
    with path.open("rb") as file:
        file.seek(max(0, begin - 1))
        if begin:
            file.readline()  # the end of a line that belongs to the part before
        number, offset = 0, file.tell()
        while end is None or offset < end:
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            number += 1
            content = line.rstrip(b"\r\n")
            if content:
                yield number, offset, content
            offset += len(line)


def read_line(root: Path, line: RowLocation) -> Row:
    with open(root / line.file, "rb") as file:
        file.seek(line.offset)
        return parse_row(file.read(line.length))


# --- test -------------------------------------------------------------------------------------------------------------


def queries(
    source: Path,
    file: Path,
    entries: Mapping[str, T],
    frames_of: Callable[[T], tuple[str, ...]],
    truth: Mapping[str, tuple[str, ...]],
    list_faults: list[Fault],
) -> tuple[list[ClipListing], list[Fault]]:
    """The test clips that `file` lists, with their truth, boxes and speech; and a fault for each of the others.

    entries: what the file says of each clip id, from which `frames_of` makes its frames.
    list_faults: gets what is wrong with the files of boxes and speech.
    """
    boxes = load_boxes(find_optional(source, BOXES), list_faults)
    speech = load_texts(find_optional(source, SPEECH), list_faults)
    name = str(file.relative_to(source))
    clips, faults = [], []
    for clip_id, entry in entries.items():
        try:
            frames = frames_of(entry)
            of_frame = [boxes.get(name_of(frame)) for frame in frames]
            clip = ClipListing(
                clip_id=checked_id(clip_id, "clip"),
                livestream=livestream_of(clip_id),
                frames=frames,
                truth=truth.get(clip_id, ()),
                file=name,
                boxes=tuple(each or () for each in of_frame) if any(of_frame) else None,
                speech=speech.get(clip_id, ""),
            )
            clips.append(clip)
        except BadInputError as err:
            faults.append(err.at(name, 0, f"clip {clip_id}"))
    return clips, faults


# --- files ------------------------------------------------------------------------------------------------------------


def checksums(layout: TextLayout, splits: Sequence[str], test_files: Callable[[], list[Path]]) -> dict[str, list[int]]:
    """Size and CRC32C of the lists of the splits, by file name."""
    wanted = [split for split in splits if split != "test"]
    if wanted == ["val"] and "train" in layout.splits():
        wanted.append("train")  # validation's gallery has its shop images
    files = [path for split in wanted for path in layout.training_lists(split)]
    files += test_files() if "test" in splits else []
    return {path.name: [path.stat().st_size, file_crc(path)] for path in files}


def find_one(source: Path, pattern: str, *, needed_for: str) -> Path:
    """The one file of `annotations/` that matches; WrongUseError if there is none or more."""
    found = sorted((source / "annotations").glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise WrongUseError(
            f"{source / 'annotations' / pattern}: found {names}, needs one file for {needed_for}; "
            "unpack the annotations there, or leave the split out with --splits."
        )
    return found[0]


def find_optional(source: Path, pattern: str) -> Path | None:
    return find_one(source, pattern, needed_for="one use") if any((source / "annotations").glob(pattern)) else None


def training_lists(source: Path, chosen: str | None) -> list[Path]:
    """The parts of the one training list that is not the validation list, or of the one chosen by name (SPEC 8.2, 8.4).

    Several files are one list if their names differ in a trailing _part_NN only.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted((source / "annotations").glob("training_videoinfo_*")):
        name = re.sub(r"_part_\d+$", "", path.name.removesuffix(".txt"))
        if name != "training_videoinfo_val" or chosen:
            found.setdefault(name, []).append(path)
    if chosen:
        for name, parts in found.items():
            if chosen in (name, f"{name}.txt"):
                return parts
            if exact := [path for path in parts if chosen in (path.name, path.name.removesuffix(".txt"))]:
                return exact
    elif len(found) <= 1:
        return next(iter(found.values()), [])
    names = ", ".join(found) or "none"
    raise WrongUseError(
        f"{source / 'annotations'}: found training lists {names}, needs "
        + (f"{chosen}; correct --train-annotation." if chosen else "one; choose with --train-annotation NAME.")
    )


def load_json_object(path: Path, faults: list[Fault]) -> dict[str, Any]:
    """A JSON object. A repeated key and bytes that are not UTF-8 are faults, and the rest is read all the same.

    BadInputError: nothing of it can be read.
    """
    file = _shown(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        detail = f"found over {MAX_JSON_BYTES:,} bytes, needs less; restore the file."
        raise BadInputError("oversized file", detail, file)
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        detail = f"found {err.reason} at byte {err.start}; convert its encoding."
        faults.append(Fault("not UTF-8", file, detail))
        text = data.decode("utf-8", "replace")

    def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, each in pairs:
            if key in value:
                detail = f"found the id {key} twice, needs each once; remove one."
                faults.append(Fault("duplicate id", file, detail))
            value.setdefault(key, each)
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as err:
        detail = f"found {err.msg} in line {err.lineno}; restore the file."
        raise BadInputError("not JSON", detail, file) from err
    except ValueError as err:  # a number of thousands of digits
        raise BadInputError("not JSON", f"cannot be read ({err}); restore the file.", file) from err
    except RecursionError as err:
        raise BadInputError("not JSON", "found lists in lists without end; restore the file.", file) from err
    if not isinstance(value, dict):
        detail = f"found a {type(value).__name__}, needs an object; restore the file."
        raise BadInputError("not JSON", detail, file)
    return value


def load_id_lists(path: Path, faults: list[Fault]) -> dict[str, tuple[str, ...]]:
    """A JSON object of lists of ids: truth, galleries (SPEC 8.6). An entry at fault is left out."""
    lists = {}
    for key, ids in load_json_object(path, faults).items():
        try:
            if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
                raise BadInputError(
                    "not a list", f"found {ids!r:.80} for {key}, needs a list of image ids; correct it."
                )
            lists[checked_id(key, "clip or livestream")] = tuple(checked_id(each, "image") for each in ids)
        except BadInputError as err:
            faults.append(err.at(_shown(path)))
    return lists


def load_texts(path: Path | None, faults: list[Fault]) -> dict[str, str]:
    """id TAB text, one a line: titles, speech (SPEC 8.6). No file: no texts."""
    texts: dict[str, str] = {}
    for line in decoded_lines(path, faults) if path else ():
        key, _, text = line.partition("\t")
        texts[key] = text
    return texts


def decoded_lines(path: Path, faults: list[Fault]) -> Iterator[str]:
    """The lines of a small list; one that is not UTF-8 is left out."""
    for number, _, line in lines(path):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as err:
            detail = f"found byte {line[err.start]:#04x} in line {number}, needs UTF-8; convert the file's encoding."
            faults.append(Fault("not UTF-8", _shown(path), detail))


def load_boxes(path: Path | None, faults: list[Fault]) -> dict[str, tuple[Box, ...]]:
    """Boxes by frame id (SPEC 8.6); an entry at fault is left out. No file: no boxes."""
    boxes: dict[str, tuple[Box, ...]] = {}
    if path is None:
        return boxes
    for frame_id, value in load_json_object(path, faults).items():
        try:
            boxes[frame_id] = boxes_of_frame(value)
        except BadInputError as err:
            faults.append(err.at(_shown(path), 0, f"frame {frame_id:.{MAX_ID_BYTES}}"))
    return boxes


def _shown(path: Path) -> str:
    """A list's path below its source: it lies in annotations/, or is LPR4M's list of urls."""
    return f"{path.parent.name}/{path.name}" if path.parent.name == "annotations" else path.name
