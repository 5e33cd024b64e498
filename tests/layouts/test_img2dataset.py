"""Downloads as people have them: packed again, cut short, half written, of other options and versions."""

import gzip
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import doctor
from data_pipeline.conversion.shards import scale_boxes
from data_pipeline.convert import Options, convert, main
from data_pipeline.format.reader import Dataset, open_dataset
from data_pipeline.format.schema import Picture
from data_pipeline.layouts.download_index import Index
from data_pipeline.layouts.img2dataset import FAILED, STORED, find_download, hash_names, name_of
from data_pipeline.layouts.lpr4m import Lpr4m
from data_pipeline.system.workers import Workers
from tests.lpr_layouts import ORIGINAL, SIZE, TRAIN, edit_json, make_lpr4m

KINDS = ("training_frame", "training_image", "test_frame", "test_image")


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.rglob("*.tfrecord"))}


def run(source: Path, output: Path, *more: str) -> int:
    return main(["--layout=lpr4m", f"--source={source}", f"--output={output}", "--workers=1", *more])


def faults_of(output: Path) -> list[str]:
    return (output / "faults.txt").read_text().splitlines()


def frames_of(dataset: Dataset) -> dict[str, list[str]]:
    train = dataset.split("train")
    return {train.clip_ids[row]: [frame.id for frame in train.clip(row).frames] for row in range(train.num_clips)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The records of a download as img2dataset leaves it."""
    folder = tmp_path_factory.mktemp("sound")
    convert(Options("lpr4m", make_lpr4m(folder / "source", tars=True), folder / "records"))
    return files_of(folder / "records")


def repack(source: Path, change: Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], object], **options: int) -> None:
    """Writes each tar of the download anew: change(new tar, member, data) adds a member in its way."""
    for path in source.glob("*/*.tar"):
        with tarfile.open(path) as old:
            members = [(member, old.extractfile(member).read()) for member in old]
        with tarfile.open(path, "w", **options) as new:
            for member, data in members:
                change(new, member, data)


def renamed(name: Callable[[str], str]) -> Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], None]:
    def change(tar: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
        member.name = name(member.name)
        tar.addfile(member, io.BytesIO(data))

    return change


def as_link(kind: bytes) -> Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], None]:
    """Returns a change that adds a member's data under another name, and a link to it under the member's own."""

    def change(tar: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
        link = tarfile.TarInfo(f"x/{member.name}")
        link.type, link.linkname = kind, f"x/data-{member.name}" if kind == tarfile.LNKTYPE else f"data-{member.name}"
        member.name = f"x/data-{member.name}"
        tar.addfile(member, io.BytesIO(data))
        tar.addfile(link)

    return change


REPACKED = {
    "by the folder's name": (renamed(lambda name: f"./{name}"), {}),
    "with a folder": (renamed(lambda name: f"some/where/{name}"), {}),
    "with an absolute path": (renamed(lambda name: f"/data/{name}"), {}),
    "with long names of GNU": (renamed(lambda name: f"{150 * 'x'}/{name}"), {"format": tarfile.GNU_FORMAT}),
    "with long names of pax": (renamed(lambda name: f"{150 * 'ä'}/{name}"), {"format": tarfile.PAX_FORMAT}),
    "with hard links": (as_link(tarfile.LNKTYPE), {}),
    "with symbolic links": (as_link(tarfile.SYMTYPE), {}),
}


@pytest.mark.parametrize("how", REPACKED)
@pytest.mark.parametrize("tables", [False, True])
def test_tars_that_were_packed_again_give_the_same_records(
    how: str, tables: bool, expected: dict[str, bytes], tmp_path: Path
) -> None:
    change, options = REPACKED[how]
    source = make_lpr4m(tmp_path / "source", tars=True, tables=tables)
    repack(source, change, **options)
    assert run(source, tmp_path / "records") == 0
    assert files_of(tmp_path / "records") == expected


def and_a_copy(
    folder: str, change: Callable[[bytes], bytes], first: bool, suffix: str
) -> Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], None]:
    """Returns a change that puts members into images/, and before or after each of a suffix its changed copy."""

    def add(tar: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
        name, copied = member.name, change(data)
        copies = [(f"{folder}/{name}", copied)] * name.endswith(suffix)
        original = [(f"images/{name}", data)]
        for member.name, content in [*copies, *original] if first else [*original, *copies]:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    return add


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("folder", ["thumbnails", "backup/old", "."])
def test_pictures_of_one_key_in_two_folders_are_a_fault_and_never_stored(
    folder: str, first: bool, tmp_path: Path
) -> None:
    source = make_lpr4m(tmp_path / "source", tars=True)
    repack(source, and_a_copy(folder, lambda data: data[:50], first, "103.jpg"))
    assert run(source, tmp_path / "records", "--splits=train") == 1
    (fault,) = faults_of(tmp_path / "records")
    names = ["images/0000103.jpg", f"{folder}/0000103.jpg".removeprefix("./")]
    names = " and ".join(reversed(names) if first else names)
    assert fault.startswith(f"training_frame/00001: found {names}, which differ, needs one picture and one sidecar")
    assert run(source, tmp_path / "records", "--splits=train", "--on-error=skip") == 0
    train = open_dataset(tmp_path / "records").split("train")
    stored = sum(int(train.columns["original_frames"][row]) for row in range(train.num_clips))
    assert stored == sum(clip.length for clip in TRAIN) - 1
    repack(source, lambda tar, member, data: member.name.startswith("images/") and renamed(str)(tar, member, data))
    assert run(source, tmp_path / "mended", "--splits=train") == 0  # as the message says


def test_all_keys_that_two_folders_have_are_one_fault(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", tars=True, tables=False)
    repack(source, and_a_copy("old", lambda data: data + b" ", False, ""))
    assert run(source, tmp_path / "records", "--splits=train") == 1
    faults = [fault for fault in faults_of(tmp_path / "records") if "which differ" in fault]
    assert len(faults) == len(list(source.glob("training_*/*.tar"))) and "and 15 more such pairs" in faults[0]


@pytest.mark.parametrize("folder", ["backup", "images"])
def test_equal_members_and_a_path_that_was_added_again_are_read(
    folder: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A tar's later member replaces that of the same path."""
    source = make_lpr4m(tmp_path / "source", tars=True, tables=False)
    change = (lambda data: data) if folder == "backup" else lambda data: data[:50]
    repack(source, and_a_copy(folder, change, True, ""))
    assert run(source, tmp_path / "records") == 0
    assert files_of(tmp_path / "records") == expected


def test_two_pictures_of_one_key_in_a_folder_are_a_fault(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source")
    picture = source / "training_frame/00001/0000103.jpg"
    shutil.copy(picture, picture.with_suffix(".jpeg"))
    assert run(source, tmp_path / "equal", "--splits=train") == 0
    picture.with_suffix(".png").write_bytes(b"another")
    assert run(source, tmp_path / "records", "--splits=train") == 1
    (fault,) = faults_of(tmp_path / "records")
    assert fault.startswith("training_frame/00001: found 0000103.jpg and 0000103.png, which differ, needs one picture")


BAD_SIDECARS = {
    "empty": b"", "cut short": b'{"url": "http://x', "a list": b"[]", "a number": b"3", "null": b"null",
    "no status": b'{"url": "http://x/y.jpg"}', "no url": b'{"status": "success"}',
    "url of a wrong type": b'{"url": 3, "status": "success"}', "not UTF-8": b'{"url": "\xff"}',
    "nested too deep": 100_000 * b"[",
}  # fmt: skip


@pytest.mark.parametrize("content", BAD_SIDECARS)
@pytest.mark.parametrize("tars", [False, True])
def test_a_sidecar_that_cannot_be_read_costs_one_frame_and_is_named_once(
    content: str, tars: bool, tmp_path: Path
) -> None:
    source = make_lpr4m(tmp_path / "source", tars=tars, tables=False)
    data = BAD_SIDECARS[content]
    shard, key = "training_frame/00001", "0000103"  # a frame of the clip of twelve
    if tars:
        only = lambda tar, member, old: renamed(str)(tar, member, old)

        def change(tar: tarfile.TarFile, member: tarfile.TarInfo, old: bytes) -> None:
            new = data if member.name == f"{key}.json" else old
            member.size = len(new)
            only(tar, member, new)

        repack(source, change)
    else:
        (source / shard / f"{key}.json").write_bytes(data)
    assert run(source, tmp_path / "records", "--splits=train") == 1
    (fault,) = faults_of(tmp_path / "records")
    assert re.match(rf"{shard}: {key}.json cannot be read \(.*\); download the shard again", fault)
    assert run(source, tmp_path / "records", "--splits=train", "--on-error=skip") == 0
    dataset = open_dataset(tmp_path / "records")
    assert dataset.split("train").num_clips == len(TRAIN)
    lost = sum(int(dataset.split("train").columns["original_frames"][row]) for row in range(len(TRAIN)))
    assert lost == sum(clip.length for clip in TRAIN) - 1


def test_many_bad_sidecars_of_a_shard_are_one_fault(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", tables=False)
    for path in (source / "training_frame/00001").glob("*.json"):
        path.write_bytes(b"")
    assert run(source, tmp_path / "records", "--splits=train") == 1
    assert [fault for fault in faults_of(tmp_path / "records") if "nor can 7 more of this shard" in fault]


def test_the_end_of_a_tar_that_was_cut_short_is_lost_and_no_more(tmp_path: Path) -> None:
    """Where it ends within a member, and where it ends between two members."""
    for number, tables in enumerate((False, True, False)):
        source = make_lpr4m(tmp_path / f"source{number}", tars=True, tables=tables)
        tar = source / "training_frame/00001.tar"
        with tarfile.open(tar) as archive:
            members = list(archive)
        cut = members[-2].offset_data + 100 if number < 2 else members[-2].offset
        tar.write_bytes(tar.read_bytes()[:cut])
        output = tmp_path / f"records{number}"
        assert run(source, output, "--splits=train") == 1
        (fault,) = faults_of(output)
        assert re.match(
            r"training_frame/00001: cannot be read as a tar \(it is cut short.*\); download the shard", fault
        )
        assert run(source, output, "--splits=train", "--on-error=skip") == 0
        frames = frames_of(open_dataset(output))
        assert frames.keys() == {clip.id for clip in TRAIN}


def test_a_tar_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", tars=True, tables=False)
    tar = source / "training_frame/00001.tar"
    with tarfile.open(tar) as archive:
        offset = list(archive)[4].offset
    data = bytearray(tar.read_bytes())
    data[offset : offset + 512] = 512 * b"x"
    tar.write_bytes(data)
    assert run(source, tmp_path / "records", "--splits=train") == 1
    assert any(f"cut short or damaged at byte {offset:,}" in fault for fault in faults_of(tmp_path / "records"))


def test_a_compressed_tar_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_lpr4m(tmp_path / "source", tars=True)
    tar = source / "training_frame/00001.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    assert run(source, tmp_path / "records") == 1
    assert (
        "00001: cannot be read as a tar, as it is compressed; decompress it: gzip -dc < FILE > NEW."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("00000.parquet", "00000_stats.json"),
            "output_format parquet (00000.parquet), but no pictures; download again",
        ),
        (("00000.tfrecord", "00000.parquet"), "output_format tfrecord (00000.tfrecord), needs webdataset or files;"),
        (
            ("00000_stats.json",),
            "output_format dummy (00000_stats.json), but no pictures; download again with --output_",
        ),
        (("00000.tar.gz",), "found compressed tars (00000.tar.gz), needs them plain; decompress them"),
        (
            ("part-0.tar",),
            "found part-0.tar, needs img2dataset's numbered shards (00000.tar or 00000/); move or rename",
        ),
        ((), "found nothing, needs img2dataset's numbered shards"),
    ],
)
def test_other_outputs_of_img2dataset_are_named(
    names: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_lpr4m(tmp_path / "source")
    shutil.rmtree(source / "training_frame")
    (source / "training_frame").mkdir()
    for name in names:
        (source / "training_frame" / name).touch()
    assert run(source, tmp_path / "records") == 2
    error = capsys.readouterr().err
    assert "source/training_frame: found " in error and message in error, error


def change_rows(source: Path, change: Callable[[dict], object]) -> None:
    """Changes the rows of all tables (as Python values) and sidecars."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for path in source.glob("*/*.parquet"):
        rows = parquet.read_table(path).to_pylist()
        for row in rows:
            change(row)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for path in source.glob("*/*/*.json"):
        edit_json(path, change)


VERSIONS: dict[str, Callable[[dict], object]] = {
    "keys as integers": lambda row: row.update(key=int(row["key"])),
    "keys as floats": lambda row: row.update(key=float(row["key"])),
    "sizes as floats": lambda row: row.update(original_width=float(row["original_width"] or "nan")),
    "options of a server in urls": lambda row: row.update(url=row["url"] + "!w300"),
    "a query in urls": lambda row: row.update(url=row["url"] + "?imageView2/2/w/300"),
    "a thumbnail's suffix in urls": lambda row: row.update(url=row["url"] + "_300x300.jpg"),
    "a path after the suffix": lambda row: row.update(url=row["url"] + "/thumbnail/w300"),
    "more columns": lambda row: row.update(caption="x", exif="{}", sha256="0"),
}


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_tables_and_sidecars_of_other_versions_are_read(
    version: str, tables: bool, expected: dict[str, bytes], tmp_path: Path
) -> None:
    source = make_lpr4m(tmp_path / "source", tables=tables)
    change_rows(source, VERSIONS[version])
    assert run(source, tmp_path / "records") == 0
    assert files_of(tmp_path / "records") == expected


@pytest.mark.parametrize("tables", [False, True])
def test_without_the_originals_size_pictures_are_read_and_boxes_left_out(
    tables: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_lpr4m(tmp_path / "source", tables=tables)
    change_rows(source, lambda row: [row.pop(name) for name in ("original_width", "original_height")])
    assert run(source, tmp_path / "records") == 0
    train = open_dataset(tmp_path / "records").split("train")
    assert not any(frame.boxes for row in range(train.num_clips) for frame in train.clip(row).frames)
    assert capsys.readouterr().out.count("train: left out the boxes of ") == 1


def test_one_bad_row_of_a_table_costs_one_frame(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", sidecars=False)
    lost = f"{TRAIN[2].id}-0003"
    change_rows(source, lambda row: row.update(url=None) if lost in row["url"] else None)
    assert run(source, tmp_path / "records", "--splits=train") == 1
    faults = faults_of(tmp_path / "records")
    assert "parquet cannot be read" in faults[0]


def test_boxes_of_pictures_that_were_padded_or_cropped_are_left_out_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """img2dataset's default, --resize_mode border, pads a picture to a square."""
    source = make_lpr4m(tmp_path / "source")
    for path in source.glob("training_frame/*/*.jpg"):
        square = Image.new("RGB", (160, 160), "white")
        square.paste(Image.open(path), (0, 35))
        square.save(path)
    assert run(source, tmp_path / "records") == 0
    output = capsys.readouterr().out
    boxed = sum(bool(any(clip.box(number))) for clip in TRAIN for number in range(clip.length)) - 2  # two not sampled
    assert output.count(f"train: left out the boxes of {boxed} frames, since the picture of each has not the") == 1
    dataset = open_dataset(tmp_path / "records")
    for name, boxes in (("train", False), ("test", True)):
        split = dataset.split(name)
        assert any(frame.boxes for row in range(split.num_clips) for frame in split.clip(row).frames) == boxes
    report = json.loads((tmp_path / "records/report.json").read_text())
    assert report["splits"]["train"]["lost_boxes"] == boxed and report["splits"]["test"]["lost_boxes"] == 0

    doctor.main([str(source), f"--output={tmp_path / 'doctor'}", "--workers=1"])
    counts = json.loads((tmp_path / "doctor/report.json").read_text())["counts"]
    assert counts["frame of another shape"] == {"severity": "warning", "count": 2, "cases": 2}  # one a split
    assert "box outside the frame" not in counts


@pytest.mark.parametrize(
    ("size", "original", "box"),
    [
        (SIZE, ORIGINAL, (5, 10, 20, 25)),
        ((5, 2), (10, 5), (5, 8, 20, 20)),  # a height of 2.5 pixels was rounded
        ((90, 160), (180, 320), (5, 10, 20, 25)),
    ],
)
def test_boxes_are_scaled_by_width_and_height(
    size: tuple[int, int], original: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    x, y = size[0] / original[0], size[1] / original[1]
    expected = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    assert scale_boxes([box], Picture("", "", original_size=original), size) == (pytest.approx(expected),)


@pytest.mark.parametrize(
    ("size", "original"),
    [((256, 256), (720, 1280)), ((256, 256), (1280, 720)), ((256, 144), (720, 1280)), ((256, 256), (0, 0))],
)
def test_boxes_of_another_shape_have_no_place(size: tuple[int, int], original: tuple[int, int]) -> None:
    picture = Picture("", "", original_size=original)
    assert scale_boxes([(0, 0, 9, 9)], picture, size) is None
    assert scale_boxes([], picture, size) == ()


@pytest.mark.parametrize("order", [(True, False), (False, True)])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_name_that_was_downloaded_twice_is_stored_if_either_succeeded(
    order: tuple[bool, bool], shards: int, tmp_path: Path
) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "training_frame"
    for shard in range(shards):
        (folder / f"{shard:05d}").mkdir(parents=True)
        rows = [
            {"url": "http://x/twice.jpg", "key": f"{shard}{number}", "status": "success" if good else "failed",
             "original_width": 1, "original_height": 1}
            for number, good in (enumerate(order) if shards == 1 else [(0, order[shard])])
        ]  # fmt: skip
        for row in rows:
            if row["status"] == "success":
                (folder / f"{shard:05d}" / f"{row['key']}.jpg").touch()
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    layout = Lpr4m(tmp_path, None, None) if (tmp_path / "annotations").mkdir() is None else None
    index = Index(find_download(tmp_path, "training_frame"), tmp_path)
    with Workers(1, layout) as workers:
        index.add(np.sort(hash_names(["twice", "never"])), workers.run)
    assert index.find(hash_names(["twice"]))["state"] == STORED != FAILED
    assert not index.faults


def test_names_are_read_from_urls_of_image_servers() -> None:
    for text in (
        "http://a.b/c/x-0001.jpg!w300", "http://a.b/x-0001.JPG@300w_1l", "https://a.b/x-0001.jpeg_300x300.jpg",
        "http://a.b/x-0001.webp/resize/300", "http://a.b/c/x-0001.tiff", "http://a.b/c/x-0001",
    ):  # fmt: skip
        assert name_of(text) == "x-0001"
