"""Fuzzes parsers and readers: python -m tests.fuzzing [--minutes M] [--only NAME ...]

Hypothesis builds annotations, boxes, records, lists, pictures, frame options and torch's pickles; atheris, where it
has a wheel for this Python, mutates bytes under coverage: records, indices, manifests, lines, tables, files of
fingerprints. Each engine has its minutes, shared by its targets. A target fails if it raises another error than its
users catch, or if something that was read is wrong. Then the exit status is 1, and OUTPUT/report.json has the input.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import pickletools
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.faults import BadInputError, Fault
from data_pipeline.format import example, schema
from data_pipeline.format import reader as records
from data_pipeline.format.manifest import MANIFEST, content_hash, shard_name
from data_pipeline.format.reader import Split, open_dataset
from data_pipeline.format.schema import Clip, Picture, ShopImage
from data_pipeline.format.tfrecord import frame_record, index_path, unframe_record, write_file
from data_pipeline.input import decode as decode_module
from data_pipeline.input.augment import WHOLE_CLIP, augment_words
from data_pipeline.input.decode import MAX_PIXELS
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.sampling import choose_frames
from data_pipeline.inspection import fingerprints
from data_pipeline.inspection.store import KnownFingerprints
from data_pipeline.layouts import annotations
from data_pipeline.layouts.listing import TrainingRow
from data_pipeline.layouts.names import has_control_characters
from data_pipeline.layouts.own_folder import read_table
from data_pipeline.system.paths import parse_path
from rice_jax.weights import archives
from tests import torch_files
from tests.lpr_layouts import FRAMES, SHOP_IMAGES, TRAIN, training_row

EXAMPLES = 500  # of hypothesis at a time
SEED_ROWS = [training_row(clip, paths=paths).encode() for clip in TRAIN[:3] for paths in (True, False)]

# --- targets: for any bytes or values they raise the expected error or read something that makes sense ----------------


def check_row(line: bytes) -> None:
    """A line of a training list (docs/official.md 8.3, 8.4)."""
    with contextlib.suppress(BadInputError):
        row = annotations.parse_row(line)
        assert isinstance(row, TrainingRow) and row.frames and not has_control_characters("".join(row.frames))
        assert row.boxes is None or len(row.boxes) == len(row.frames)
        for box in (box for of_frame in row.boxes or () for box in of_frame):
            assert len(box) == 4 and np.isfinite(box).all() and any(box)
        assert (
            row.clip_id == line.split(b"\t")[0].decode() and 0 < len(row.clip_id.encode()) <= annotations.MAX_ID_BYTES
        )


def check_record(data: bytes) -> None:
    """The data of a record with a checksum that agrees."""
    for decode in (schema.decode_clip, schema.decode_image):
        with contextlib.suppress(ValueError):
            record = decode(data)
            if isinstance(record, schema.ClipRecord):
                assert len({frame.boxes is None for frame in record.frames}) <= 1


def check_framing(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert frame_record(unframe_record(data)) == data


class OneShard:
    """A shard of two shop images, read by whatever index is given."""

    def __init__(self, folder: Path) -> None:
        image = ShopImage("a", "a.jpg")
        framed = [frame_record(schema.encode_image(image, b"picture", ordinal=k, product_index=0)) for k in range(2)]
        self.path = folder / shard_name("test", "images", 0, 1)
        self.path.write_bytes(b"".join(framed))
        self.folder = folder
        counts = {"records": 2, "shards": [2]}
        none = {"records": 0, "shards": []}
        self.manifest = {"splits": {"test": {"clips": none, "images": counts, "truth": 0}}}

    def check(self, data: bytes) -> None:
        index_path(self.path).write_bytes(data)
        split = Split(self.folder, self.manifest, "test")
        split.__dict__["image_columns"] = {"ordinal": np.arange(2, dtype=np.int32)}
        for row in range(2):
            with contextlib.suppress(ValueError):
                assert split.image(row).ordinal == row


def check_manifest(data: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(data)
    with contextlib.suppress(ValueError):
        open_dataset(folder, verify=False)


def check_lists(data: bytes, folder: Path) -> None:
    """The JSON files and small lists of the test split: any content gives faults or BadInputError."""
    path = folder / "annotations" / "list.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    faults: list[Fault] = []
    with contextlib.suppress(BadInputError):
        for ids in annotations.load_id_lists(path, faults).values():
            assert all(each and not has_control_characters(each) for each in ids)
    with contextlib.suppress(BadInputError):
        for boxes in annotations.load_boxes(path, faults).values():
            assert all(len(box) == 4 and np.isfinite(box).all() for box in boxes)
    annotations.load_texts(path, faults)
    list(read_table(data, "clips.csv", faults))
    assert all(str(fault) for fault in faults)


def check_lines(data: bytes, folder: Path, cut: int) -> None:
    """The two parts of a list have its lines, each once, wherever it is cut."""
    path = folder / "lines.txt"
    path.write_bytes(data)
    whole = [(offset, line) for _, offset, line in annotations.read_lines(path)]
    parts = [*annotations.read_lines(path, 0, cut), *annotations.read_lines(path, cut, len(data))]
    assert [(offset, line) for _, offset, line in parts] == whole


def check_picture(data: bytes) -> None:
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "a.ppm"):
        with contextlib.suppress(BadInputError):
            found = fingerprints.inspect_picture(data, name).fingerprint
            assert 0 < int(found["width"]) * int(found["height"]) <= MAX_PIXELS
    with contextlib.suppress(ValueError):
        assert decode_module.decode(data).shape[2] == 3


def check_store(data: bytes, folder: Path) -> None:
    path = folder / "looks.bin"
    path.write_bytes(data)
    count, size = KnownFingerprints(path).count, path.stat().st_size
    again = KnownFingerprints(path)
    assert (again.count, path.stat().st_size) == (count, size)  # the damaged end was cut off
    keys = np.load(path.with_suffix(".keys.npy"))
    assert len(keys) == count and all(int(again.find(int(key))["key"]) == int(key) for key in keys)


def check_options(values: dict[str, Any], count: int, word: int, train: bool) -> None:
    """A clip shows at least one frame and at most as many as it has slots, each once, in order."""
    try:
        options = FrameOptions(**values)
    except ValueError:
        return
    words = augment_words(word, 1, 2, WHOLE_CLIP, 2 + options.num_frames)
    chosen = choose_frames(count, options, words, train=train)
    assert 1 <= len(chosen) <= min(count, options.num_frames)
    assert (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < count


def check_clip(given_clip: tuple[Clip, list[bytes]], place: int, change: int) -> None:
    """A clip comes back from its record. A record with a changed byte gives ValueError or a clip."""
    clip, pictures = given_clip
    data = schema.encode_clip(clip, pictures, ordinal=1, image_index=2, product_index=-1)
    record = schema.decode_clip(data)
    frames = record.frames
    assert [frame.encoded for frame in frames] == pictures and record.id == clip.id and record.speech == clip.speech
    assert record.image_ids == list(clip.image_ids) and [frame.position for frame in frames] == list(clip.positions)
    sides = lambda boxes: [[tuple(np.float32(box).tolist()) for box in of_frame] for of_frame in boxes]
    assert [frame.boxes for frame in frames] == (sides(clip.boxes) if clip.boxes else len(frames) * [None])
    changed = bytearray(data)
    changed[place % len(data)] ^= change
    check_record(bytes(changed))


def check_archive(pickle: bytes, folder: Path, script: bool) -> None:
    """An archive with this pickle: refused, or its tensors are read in the shapes that it states."""
    torch_files.write_archive(folder / "archive.pt", pickle, [np.arange(6, dtype=np.float32)] * 2, script=script)
    with contextlib.suppress(ValueError):
        for tensor in archives.read(folder / "archive.pt").tensors.values():
            assert tensor.read().shape == tensor.shape


# --- hypothesis -------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)
BOX = st.lists(st.floats(width=32) | st.integers(-9, 10**10), min_size=3, max_size=5)
CELLS = st.one_of(
    TEXTS,
    JSON.map(json.dumps),
    st.lists(TEXTS, max_size=3).map(repr),
    st.lists(TEXTS, max_size=3).map(json.dumps),
    st.lists(BOX | st.lists(BOX, max_size=2), max_size=4).map(json.dumps),
    st.sampled_from(["[", "[" * 10_000, "['a'", "['\\", "__import__('os')", "[1e999]", "[[NaN,0,0,0]]", "a.jpg", ""]),
)
FINITE = st.floats(-1e6, 1e6, width=32)


@st.composite
def rows(draw: st.DrawFn) -> bytes:
    """A row of a list with some of its cells replaced, and perhaps bytes of it."""
    cells = draw(st.sampled_from(SEED_ROWS)).decode().split("\t")
    for column in draw(st.lists(st.integers(0, len(cells) - 1), max_size=4)):
        cells[column] = draw(CELLS)
    line = bytearray("\t".join(cells).encode())
    for place in draw(st.lists(st.integers(0, len(line) - 1), max_size=2)) if line else ():
        line[place] = draw(st.integers(0, 255))
    return bytes(line)


@st.composite
def clips(draw: st.DrawFn) -> tuple[Clip, list[bytes]]:
    pictures = draw(st.lists(st.binary(max_size=20), min_size=1, max_size=4))
    boxes = st.lists(st.lists(st.tuples(FINITE, FINITE, FINITE, FINITE), max_size=2).map(tuple),
                     min_size=len(pictures), max_size=len(pictures)).map(tuple)  # fmt: skip
    clip = Clip(
        id=draw(TEXTS), livestream=draw(TEXTS), speech=draw(TEXTS), title=draw(TEXTS),
        frames=tuple(Picture(draw(TEXTS), "") for _ in pictures), positions=tuple(range(len(pictures))),
        original_frames=draw(st.integers(-(2**63), 2**63 - 1)), image_ids=tuple(draw(st.lists(TEXTS, max_size=2))),
        boxes=draw(st.none() | boxes),
    )  # fmt: skip
    return clip, pictures


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A real picture of some format, cut, and with some bytes changed."""
    data = bytearray(draw(st.sampled_from(picture_seeds())))
    for place in draw(st.lists(st.integers(0, min(len(data), 2000) - 1), max_size=6)):
        data[place] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


def opcodes(pickle: bytes) -> list[bytes]:
    places = [place for _, _, place in pickletools.genops(pickle)] + [len(pickle)]
    return [pickle[begin:end] for begin, end in itertools.pairwise(places)]


SIX = torch_files.pickled(np.arange(6, dtype=np.float32).reshape(2, 3), [])
A, B = torch_files.text("a"), torch_files.text("b")
SEED = opcodes(b"\x80\x02}q\0(" + A + b"q\1" + SIX + b"q\2" + B + b"c__torch__\nX\n)\x81}h\1h\2sbu.")
OTHERS = opcodes(b"\x85\x86\x87(t]aeNh\0\x94j\2\0\0\0\x9302\x8a\5\0\0\0\0\x7f\x95" + bytes(8) + b"ctorch\nSize\n.")


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """A state dict's pickle with some of its opcodes removed, replaced or followed by others."""
    found, several = list(SEED), st.lists(st.sampled_from(SEED + OTHERS), max_size=3)
    for place in draw(st.lists(st.integers(0, len(SEED) - 1), max_size=5)):
        found[place : place + draw(st.integers(0, 3))] = draw(several)
    return b"".join(found)


def picture_seeds() -> list[bytes]:
    seeds = [path.read_bytes() for path in (FRAMES[0], SHOP_IMAGES[0])]
    with Image.open(FRAMES[0]) as image:
        small = image.convert("RGB").resize((24, 18))
    for form, mode in (("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB"),
                       ("PPM", "RGB"), ("JPEG", "CMYK"), ("GIF", "P")):  # fmt: skip
        file = io.BytesIO()
        (small.convert("L").convert("I;16") if mode == "I;16" else small.convert(mode)).save(file, form)
        seeds.append(file.getvalue())
    return seeds


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "image_size": st.integers(-1, 64),
        "resize": st.integers(-1, 64),
        "num_frames": st.integers(-1, 20),
        "frame_sampling": st.sampled_from(["uniform", "random", "none"]),
        "tail_cut": st.booleans(),
        "test_tail_cut": st.booleans(),
        "min_scale": st.floats(),
        "max_aspect": st.floats(),
        "colour_jitter": st.floats(),
        "white_balance": st.floats(),
        "erase": st.floats(),
        "shrink_to": st.integers(-1, 99),
    },
)


def hypothesis_targets(folder: Path) -> dict[str, tuple[Any, Callable[..., None]]]:
    """By name: a strategy of arguments, and the check for them."""
    lists = st.dictionaries(TEXTS, JSON, max_size=4).map(lambda value: json.dumps(value).encode())
    texts = st.lists(st.binary(max_size=6)).map(b"\n".join)
    return {
        "rows": (st.tuples(rows()), check_row),
        "boxes": (st.tuples(JSON), _boxes),
        "lists": (st.tuples(lists | st.binary(max_size=60)), lambda data: check_lists(data, folder)),
        "lines": (st.tuples(texts, st.integers(0, 40)), lambda data, cut: check_lines(data, folder, cut)),
        "records": (st.tuples(clips(), st.integers(0, 10**6), st.integers(1, 255)), check_clip),
        "options": (st.tuples(OPTIONS, st.integers(1, 40), st.integers(0, 2**64 - 1), st.booleans()), check_options),
        "pictures": (st.tuples(pictures()), check_picture),
        "archives": (st.tuples(pickles(), st.booleans()), lambda data, script: check_archive(data, folder, script)),
    }


def _boxes(value: Any) -> None:
    with contextlib.suppress(BadInputError):
        assert all(len(box) == 4 and np.isfinite(box).all() for box in annotations.parse_frame_boxes(value))


@dataclasses.dataclass
class Result:
    """The result of a target."""

    target: str
    executions: int = 0
    seconds: float = 0.0
    finding: str = ""


def run_hypothesis(name: str, strategy: Any, check: Callable[..., None], seconds: float, *, first_seed: int) -> Result:
    """Runs a target with seeds from the first one on, until the time is up or something is found."""
    result, begin = Result(f"hypothesis: {name}"), time.monotonic()
    quiet = settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip

    def counted(arguments: tuple[Any, ...]) -> None:
        result.executions += 1
        check(*arguments)

    number = first_seed - 1
    while time.monotonic() < begin + seconds and not result.finding:
        number += 1
        try:
            seed(number)(quiet(given(strategy)(counted)))()
        except Exception as err:  # any error is a finding
            result.finding = f"seed {number}: {err!r} {' '.join(getattr(err, '__notes__', []))}"[:4000]
    result.seconds = round(time.monotonic() - begin, 1)
    return result


# --- atheris ----------------------------------------------------------------------------------------------------------


def atheris_targets(folder: Path) -> dict[str, Callable[[bytes], None]]:
    return {
        "record": check_record,
        "framing": check_framing,
        "index": OneShard(folder).check,
        "manifest": lambda data: check_manifest(data, folder),
        "row": check_row,
        "lists": lambda data: check_lists(data, folder),
        "store": lambda data: check_store(data, folder),
    }


def atheris_seeds() -> dict[str, list[bytes]]:
    clip = Clip("a", "b", (Picture("f", ""),), (0,), 1, ("i",), boxes=(((0.0, 1.0, 2.0, 3.0),),))
    record = schema.encode_clip(clip, [b"x"], ordinal=0, image_index=0, product_index=0)
    image = schema.encode_image(ShopImage("a", "a.jpg"), b"picture", ordinal=0, product_index=0)
    size = len(frame_record(image))
    manifest = {"schema_version": 1, "files": {"a": [1, 2]}, "splits": {}, "identity": {}}
    manifest["content_hash"] = content_hash(manifest)
    return {
        "record": [record, image],
        "framing": [frame_record(b"data"), frame_record(b"")],
        "index": [np.array([0, size, 2 * size], "<u8").tobytes()],
        "manifest": [json.dumps(manifest).encode()],
        "row": SEED_ROWS,
        "lists": [b'{"a": ["b"], "c": [[0, 1, 2, 3]]}', b"a\tb\n", b"product,clip,split\na,b,train\n"],
        "store": [frame_record(np.ones(2, fingerprints.FINGERPRINT).tobytes())],
    }


def run_atheris(name: str, seconds: float, output: Path) -> Result:
    """Runs a target in a process of its own, which libFuzzer ends."""
    result, begin = Result(f"atheris: {name}"), time.monotonic()
    corpus = output / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(atheris_seeds()[name]):
        (corpus / f"seed{number}").write_bytes(data)
    command = [sys.executable, "-m", "tests.fuzzing", "--atheris-target", name, "--", str(corpus),
               f"-max_total_time={max(1, int(seconds))}", "-max_len=2048", "-rss_limit_mb=4096", "-timeout=20",
               f"-artifact_prefix={output / name}-", "-print_final_stats=1"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    done = re.search(r"stat::number_of_executed_units:\s*(\d+)", ended.stderr)
    result.executions = int(done[1]) if done else 0
    result.seconds = round(time.monotonic() - begin, 1)
    if ended.returncode:
        result.finding = f"exit status {ended.returncode}: {ended.stdout[-1000:]} {ended.stderr[-3000:]}"
    return result


def be_target(name: str, arguments: list[str]) -> None:
    """Becomes the process of a target: instruments the modules under test and starts libFuzzer."""
    import atheris

    for module in (annotations, example, schema, records, fingerprints):
        for key, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"):
                setattr(module, key, atheris.instrument_func(value))
    with tempfile.TemporaryDirectory() as folder:
        target = atheris_targets(Path(folder))[name]
        atheris.Setup([sys.argv[0], *arguments], lambda data: target(bytes(data)))
        atheris.Fuzz()


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzzing", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of each engine, shared by its targets (10)")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="targets whose name holds one of these")
    parser.add_argument("--output", type=parse_path, default=Path("build/fuzz"), metavar="DIR")
    parser.add_argument("--atheris-target", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.atheris_target:
        be_target(options.atheris_target, options.rest)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # Pillow's, of metadata that is broken on purpose
    wanted = lambda name: not options.only or any(word in name for word in options.only)
    results: list[Result] = []

    def take(result: Result) -> None:
        results.append(result)
        shown = result.finding or "nothing found"
        print(f"{result.target:<24} {result.executions:>10,} executions {result.seconds:>7} s  {shown}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        ours = {name: each for name, each in hypothesis_targets(Path(folder)).items() if wanted(f"hypothesis: {name}")}
        for name, (strategy, check) in ours.items():
            take(run_hypothesis(name, strategy, check, 60 * options.minutes / len(ours), first_seed=int(time.time())))
    if importlib.util.find_spec("atheris"):
        names = [name for name in atheris_seeds() if wanted(f"atheris: {name}")]
        for name in names:
            take(run_atheris(name, 60 * options.minutes / len(names), options.output))
    else:
        print("atheris is not installed (it has wheels for some Pythons only): its targets are left out.")
    report = {"results": [dataclasses.asdict(result) for result in results]}
    write_file(options.output / "report.json", json.dumps(report, indent=1).encode() + b"\n")
    return 1 if any(result.finding for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
