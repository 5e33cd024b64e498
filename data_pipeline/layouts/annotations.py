"""The text files that LPR750K and LPR4M share: training lists, truth, galleries, titles, speech.

docs/official.md 8.3 to 8.8 describe them. They come from a download, so they are parsed with limits, never evaluated.
"""

import ast
import codecs
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.faults import BadInputError, Fault, WrongUseError, counted
from data_pipeline.format.schema import Box
from data_pipeline.layouts.listing import RowLocation, TrainingRow
from data_pipeline.layouts.names import has_control_characters
from data_pipeline.layouts.pictures import SUFFIXES

MAX_LINE_BYTES = 1 << 24  # a clip of one hour, one frame per second, takes 0.5 MB
MAX_JSON_BYTES = 1 << 30
MAX_ID_BYTES = 200  # LPR4M's clip ids have 64
TYPES = ("scale", "duration", "number")  # the texts from column 4, as TrainingRow's fields
LPR750K_TEXTS = ("image_path", "image_title", "category", "category_name", "product", "speech", *TYPES)
LPR4M_TEXTS = ("image_title", "category", "category_name", "speech", *TYPES)
MARKS = re.compile(rb"(\A|[\r\n])(?:%b)+" % codecs.BOM_UTF8)
LIST_OF_STRINGS = re.compile(  # possessive (+): matching a hostile cell takes time linear in its length
    r"""\[\s*+(?:STRING\s*+(?:,\s*+STRING\s*+)*+,?+\s*+)?+\]""".replace(
        "STRING", r"""(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
    )
)


# --- a training row ---------------------------------------------------------------------------------------------------


def parse_row(line: bytes) -> TrainingRow:
    """Returns the row in a line, given without its line end but unstripped: the last cell may be empty.

    Column 4 is the picture's path in LPR750K, its title in LPR4M: docs/official.md 8.3, 8.4. Raises BadInputError for
    bytes that are not UTF-8, a wrong number of columns, a bad id, and lists of frames or boxes that cannot be parsed.
    """
    if len(line) >= MAX_LINE_BYTES:
        detail = f"found over {MAX_LINE_BYTES:,} bytes in a line, needs fewer; restore the file's line ends."
        raise BadInputError("oversized line", detail)
    try:
        cells = line.decode("utf-8").split("\t")
    except UnicodeDecodeError as err:
        detail = f"found byte {line[err.start]:#04x} at position {err.start}, needs UTF-8; convert the file's encoding."
        raise BadInputError("not UTF-8", detail) from err
    has_path = len(cells) > 4 and cells[4].lower().endswith(tuple(SUFFIXES))
    if len(cells) < 10 if has_path else len(cells) != 11:
        raise BadInputError(
            "wrong number of columns",
            f"found {counted(len(cells), 'column')} between tabs, column 4 {'a' if has_path else 'no'} picture path, "
            "needs 10 or more with the path (LPR750K) or 11 without (LPR4M); restore the line, an empty last cell "
            "keeps its tab.",
        )
    frames = parse_frames(cells[1])
    boxes = parse_boxes(cells[2], len(frames))
    texts = dict(zip(LPR750K_TEXTS if has_path else LPR4M_TEXTS, cells[4:], strict=False))
    if has_path:
        texts["image_path"] = slashes(texts["image_path"])
    return TrainingRow(
        clip_id=checked_id(cells[0], "clip"),
        livestream=livestream_of(cells[0]),
        frames=frames,
        boxes=boxes,
        image_id=checked_id(cells[3], "image"),
        columns=len(cells),
        **texts | {"product": texts.get("product") or cells[3]},
    )


def parse_frames(cell: str) -> tuple[str, ...]:
    """Returns a JSON or Python list's strings, with `slashes`.

    Raises BadInputError if the cell is no list, is empty, or a string has control characters.
    """
    frames = _parse_list(cell, "frame")
    if not frames:
        raise BadInputError("clip without frames", "found an empty frame list, needs at least one; remove the line.")
    if has_control_characters("".join(frames)):
        detail = f"found control characters in {cell!r:.80}, needs names; correct the cell (in a list, a path's "
        raise BadInputError("bad id", f"{detail}backslashes are doubled, or slashes).")
    return tuple(map(slashes, frames))


def slashes(path: str) -> str:
    """Returns a path with slashes for backslashes, which programs on Windows write."""
    return path.replace("\\", "/")


def parse_boxes(cell: str, num_frames: int) -> tuple[tuple[Box, ...], ...] | None:
    """Returns the boxes of each frame, () for a frame without; None if the cell or its list is empty.

    Raises BadInputError if the cell is no list, has not `num_frames` entries, or an entry is neither box nor boxes.
    """
    boxes = _parse_list(cell, "box") if cell.strip() else []
    if not boxes:
        return None
    if len(boxes) != num_frames:
        found = f"{counted(num_frames, 'frame')} and {counted(len(boxes), 'box', 'boxes')}"
        detail = f"found {found}, needs one box a frame; correct either list."
        raise BadInputError("frames and boxes differ", detail)
    return tuple(parse_frame_boxes(value) for value in boxes)


def parse_frame_boxes(value: Any) -> tuple[Box, ...]:
    """Returns the boxes in [x1, y1, x2, y2] or a list of those, zeros left out. Raises BadInputError for all else."""
    boxes = value if isinstance(value, list) and all(isinstance(each, list) for each in value) else [value]
    return tuple(box for box in map(_box, boxes) if any(box))  # zeros: there is no box (docs/official.md 8.5)


def _box(value: Any) -> Box:
    numbers = isinstance(value, list) and all(
        isinstance(side, int | float) and not isinstance(side, bool) and abs(side) < 1e9 for side in value
    )
    if not numbers or len(value) != 4:
        detail = f"found the box {value!r:.80}, needs four numbers [x1, y1, x2, y2]; correct it."
        raise BadInputError("bad box", detail)
    left, top, right, bottom = map(float, value)
    return left, top, right, bottom


def _parse_list(cell: str, what: str) -> list:
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        try:  # literal_eval gets only flat lists of string literals, so it cannot recurse
            value = ast.literal_eval(cell.strip()) if LIST_OF_STRINGS.fullmatch(cell.strip()) else None
        except (ValueError, SyntaxError, MemoryError):
            value = None
    strings = what == "frame"
    if not isinstance(value, list) or (strings and not all(isinstance(each, str) for each in value)):
        needs = "strings" if strings else "boxes"
        detail = f"found {cell!r:.80} in the {what} column, needs a list of {needs}; correct the cell."
        raise BadInputError("not a list", detail)
    return value


def checked_id(text: str, what: str) -> str:
    """Returns `text` if it has 1 to MAX_ID_BYTES bytes and no control character. Raises BadInputError otherwise.

    what: the id's kind, for the message.
    """
    if not text or has_control_characters(text) or len(text.encode()) > MAX_ID_BYTES:
        detail = f"found the {what} id {text!r:.80}, needs 1 to {MAX_ID_BYTES} bytes without control characters; "
        detail += "correct it."
        raise BadInputError("bad id", detail)
    return text


def livestream_of(clip_id: str) -> str:
    """Returns a clip's livestream: the first five groups between hyphens of its id, or all (docs/official.md 8.5)."""
    return "-".join(clip_id.split("-")[:5])


def read_lines(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number, offset, content without line end) of the lines that start in bytes [begin, end) of a file.

    A line ends in LF, CR LF or CR, also within one file. Numbers count from 1 at the first of these lines. A blank line
    has the content b"", and byte order marks at a line's start are left out. Of a line longer than MAX_LINE_BYTES the
    content is its first MAX_LINE_BYTES. end None: to the file's end. Raises BadInputError if the file begins like
    UTF-16, OSError on reading.
    """
    with path.open("rb") as file:
        if not begin:
            _refuse_wide(file.read(4), path)
        start = file.seek(max(begin - 1, 0))  # of the next line
        lines = _raw_lines(io.TextIOWrapper(file, "latin-1", newline=""))  # in Latin 1 each byte is a character
        if begin:
            start += next(lines, (b"", 0))[1]  # the end of a line that starts before `begin`
        for number, (line, length) in enumerate(lines, 1):
            if end is not None and start >= end:
                return
            content = without_marks(line)
            yield number, start + len(line) - len(content), content.rstrip(b"\r\n") if content.strip() else b""
            start += length


def _raw_lines(file: TextIO) -> Iterator[tuple[bytes, int]]:
    """Yields the first MAX_LINE_BYTES of each line, with its end, and its length in bytes."""
    while part := file.readline(MAX_LINE_BYTES):
        line, length = part, len(part)
        while len(part) == MAX_LINE_BYTES and not part.endswith(("\r", "\n")):
            part = file.readline(MAX_LINE_BYTES)
            length += len(part)
        yield line.encode("latin-1"), length


def without_marks(data: bytes) -> bytes:
    """Returns a text in UTF-8 without byte order marks at its lines' starts: files that are joined keep theirs."""
    return MARKS.sub(rb"\1", data) if codecs.BOM_UTF8 in data else data


def wide_encoding(head: bytes) -> str:
    """Returns iconv's name of the encoding if a text file that begins with `head` is in UTF-16 or UTF-32, else ""."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    # Without a byte order mark iconv has to be told the order.
    orders = {"UTF-16LE": rb"([^\0]\0){2}", "UTF-16BE": rb"(\0[^\0]){2}"}
    return next((name for name, pattern in orders.items() if re.match(pattern, head)), "")


def _refuse_wide(head: bytes, path: Path) -> None:
    """Returns None, or raises BadInputError if a list's first bytes have a `wide_encoding`."""
    if wide := wide_encoding(head):
        detail = f"found {wide}, needs UTF-8; convert it: iconv -f {wide} -t UTF-8 FILE > NEW."
        raise BadInputError("not UTF-8", detail, _name_in_source(path))


def read_row(source: Path, location: RowLocation) -> TrainingRow:
    """Returns the row at a location. Raises BadInputError if it cannot be parsed, OSError if it cannot be read."""
    with open(source / location.file, "rb") as file:
        file.seek(location.offset)
        return parse_row(file.read(location.length))


# --- files: what a function cannot read of one (docs/official.md 8.6), it leaves out and adds to its list `faults` ----


def training_lists(source: Path, chosen: str | None) -> list[Path]:
    """Returns the files of the training list: the `chosen` list or part, else the only list that is not validation's.

    Files, sorted, are of one list if names differ only in a trailing _part_NN (docs/official.md 8.2, 8.4). [] if there
    is no list and none is chosen. Raises WrongUseError for several if none is chosen, or if none has the chosen name.
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
    """Returns the JSON object in a file. BadInputError: too large, no such object, UTF-16. OSError: on reading.

    Bytes that are not UTF-8 are replaced. Of a key given twice the first counts. Both become `faults`.
    """
    file = _name_in_source(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        detail = f"found over {MAX_JSON_BYTES:,} bytes, needs less; restore the file."
        raise BadInputError("oversized file", detail, file)
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    _refuse_wide(data, path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        detail = f"found byte {data[err.start]:#04x} in line {data.count(10, 0, err.start) + 1}, needs UTF-8; convert "
        faults.append(Fault("not UTF-8", file, f"{detail}the file's encoding."))
        text = data.decode("utf-8", "replace")

    def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, each in pairs:
            if key in value:
                faults.append(Fault("duplicate id", file, f"found the id {key} twice, needs each once; remove one."))
            value.setdefault(key, each)
        return value

    try:
        value: dict[str, Any] = json.loads(text, object_pairs_hook=unique_keys)
        wrong = "" if isinstance(value, dict) else f"found a {type(value).__name__}, needs an object"
    except json.JSONDecodeError as err:
        wrong = f"cannot be read as JSON in line {err.lineno} ({err.msg})"
    except ValueError as err:  # a number of thousands of digits
        wrong = f"cannot be read ({err})"
    except RecursionError:
        wrong = "found lists nested too deep"
    if wrong:
        raise BadInputError("not JSON", f"{wrong}; restore the file.", file)
    return value


def load_id_lists(path: Path, faults: list[Fault]) -> dict[str, tuple[str, ...]]:
    """Returns tuples of ids by id of a JSON object. Others become `faults`. Raises as `load_json_object` does."""
    lists = {}
    for key, ids in load_json_object(path, faults).items():
        try:
            if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
                detail = f"found {ids!r:.80} for {key}, needs a list of image ids; correct it."
                raise BadInputError("not a list", detail)
            lists[checked_id(key, "clip or livestream")] = tuple(checked_id(each, "image") for each in ids)
        except BadInputError as err:
            faults.append(err.at(_name_in_source(path)))
    return lists


def load_texts(path: Path | None, faults: list[Fault]) -> dict[str, str]:
    """Returns each id's last text in lines ID<tab>TEXT; {} for None. Bad UTF-8 becomes faults. OSError on reading."""
    parts = (line.partition("\t") for line in decoded_lines(path, faults)) if path else ()
    return {key: text for key, _, text in parts}


def decoded_lines(path: Path, faults: list[Fault]) -> Iterator[str]:
    """Yields a list's lines but blank ones. Those that are not UTF-8 become `faults`. Raises OSError on reading."""
    for number, _, line in read_lines(path):
        try:
            if line:
                yield line.decode("utf-8")
        except UnicodeDecodeError as err:
            detail = f"found byte {line[err.start]:#04x} in line {number}, needs UTF-8; convert the file's encoding."
            faults.append(Fault("not UTF-8", _name_in_source(path), detail))


def load_boxes(path: Path | None, faults: list[Fault]) -> dict[str, tuple[Box, ...]]:
    """Returns boxes by frame id; {} for None. Unusable entries become `faults`. Raises as `load_json_object` does."""
    boxes: dict[str, tuple[Box, ...]] = {}
    if path:
        for frame_id, value in load_json_object(path, faults).items():
            try:
                boxes[frame_id] = parse_frame_boxes(value)
            except BadInputError as err:
                faults.append(err.at(_name_in_source(path), 0, f"frame {frame_id:.{MAX_ID_BYTES}}"))
    return boxes


def _name_in_source(path: Path) -> str:
    # A list is in annotations/, except for LPR4M's list of URLs, which may be at the top of the source.
    return f"{path.parent.name}/{path.name}" if path.parent.name == "annotations" else path.name
