"""The data doctor: every fault is found and named, sound data raise no alarm, a killed run goes on, pages are safe."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from data_pipeline import convert, doctor
from data_pipeline.faults import BadInputError
from data_pipeline.input.decode import DecodedPicture
from data_pipeline.input.metadata import ORIENTATION
from data_pipeline.inspection import fingerprints
from data_pipeline.inspection.store import KnownFingerprints
from tests.lpr_layouts import (
    FRAMES,
    IMAGE_IDS,
    LIVES,
    SHOP_IMAGES,
    TEST,
    TRAIN,
    edit_cell,
    edit_json,
    edit_lines,
    folder_of,
    make_lpr4m,
    make_lpr750k,
)  # fmt: skip

LIST, VAL_LIST = "annotations/training_videoinfo_7.txt", "annotations/training_videoinfo_val.txt"
QUERIES, TRUTH = "annotations/query_tenframes.json", "annotations/test_videoid_to_gtimage_3.json"
GALLERY, BOXES = "annotations/gallery_main.txt", "annotations/test_frameid2gtbox_3_17.json"
TITLES = "annotations/test_image_title_4.txt"
CLIP, QUERY = TRAIN[1], TEST[0]
FRAME = f"{folder_of(CLIP)}/{CLIP.id}/{CLIP.frame_ids[1]}.jpg"
QUERY_FRAME = f"query/{QUERY.id}/{QUERY.frame_ids[1]}.jpg"
REPO = Path(__file__).parents[1]


def make_own_frames(picture: Path) -> None:
    """Makes a picture unlike the others: the layouts' clips share photographs, which the doctor would report."""
    shift = int.from_bytes(picture.name.encode(), "little") % 97 * 7
    pixels = np.roll(np.asarray(Image.open(picture)), (shift % 31, shift % 101), (0, 1))
    drawn = Image.fromarray(pixels)
    ImageDraw.Draw(drawn).rectangle((shift % 60, shift % 50, 70, 64), fill=(shift % 255, shift * 7 % 255, 99))
    drawn.save(picture, "JPEG", quality=90)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source in which no two clips share a frame, and its conversion with two clips a shard."""
    folder = tmp_path_factory.mktemp("sound")
    source = make_lpr750k(folder / "source")
    for picture in sorted([*source.glob("training_video_*/*/*.jpg"), *source.glob("query/*/*.jpg")]):
        make_own_frames(picture)
    convert.convert(convert.Options("lpr750k", source, folder / "records", clips_per_shard=2))
    return folder


@pytest.fixture
def source(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(sound / "source", tmp_path / "source")


@pytest.fixture
def records(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound / "records", tmp_path / "records")


def inspect(path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report.json of the command."""
    output = path.parent / "checked"
    status = doctor.main([str(path), f"--output={output}", "--workers=1", *more])
    return status, json.loads((output / "report.json").read_text())


def kinds(report: dict[str, Any]) -> dict[str, int]:
    return {kind: each["count"] for kind, each in report["counts"].items()}


# --- sound data -------------------------------------------------------------------------------------------------------


def test_a_sound_source_raises_no_alarm(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = inspect(sound / "source")
    assert (status, report["safe"], report["counts"], report["faults"]) == (0, True, {}, [])
    assert report["layout"] == "lpr750k"
    assert "train: 7 clips, 27 of 27 frames and 3 of 3 shop images sound" in capsys.readouterr().out


def test_a_sound_conversion_raises_no_alarm(sound: Path) -> None:
    status, report = inspect(sound / "records")
    assert (status, report["safe"], report["counts"], report["layout"]) == (0, True, {}, "converted")
    assert report["distributions"]["train"]["sound_frames"] == 25


@pytest.mark.parametrize("tars", [False, True])
def test_a_sound_download_raises_no_alarm_but_that_its_clips_share_photographs(tmp_path: Path, tars: bool) -> None:
    status, report = inspect(make_lpr4m(tmp_path / "source", tars=tars, failed=[CLIP.frame_ids[1]]))
    assert report["layout"] == "lpr4m"
    assert set(kinds(report)) == {
        "frame in train and val", "frame in train and test", "frame in val and test", "frame of two products",
    }  # fmt: skip
    assert status == 1
    assert "training_frame: 1 of 30 downloads failed (training_frame)" in report["remarks"]


def test_an_own_folder_is_recognised_by_its_folders(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    status, report = inspect(source)
    assert (status, report["layout"], report["counts"]) == (0, "folder", {})


def make_folder(source: Path) -> Path:
    for product in range(3):
        (source / "shop").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SHOP_IMAGES[product], source / "shop" / f"{product}.jpg")
        for clip in range(3):
            folder = source / "clips" / str(product) / f"take {clip}"
            folder.mkdir(parents=True)
            shutil.copyfile(FRAMES[3 * product + clip], folder / f"{product}{clip}.jpg")
    return source


def test_distributions_say_what_there_is(sound: Path) -> None:
    _, report = inspect(sound / "source")
    train = report["distributions"]["train"]
    assert train["clips"] == len(TRAIN)
    assert train["frames_a_clip"] == {"1": 1, "2": 2, "3": 2, "4": 1, "12": 1}
    assert train["clips_by"]["product"] == {
        "values": 3, "without": 0, "once": 0, "median": 2.0, "share_of_the_first_tenth": 0.4286,
        "first": {"spu0": 3, "spu1": 2, "spu2": 2}, "ranked": [3, 2, 2],
    }  # fmt: skip
    assert train["clips_by"]["duration"]["first"] == {"short": 6, "long": 1}
    assert report["distributions"]["test"]["galleries"] == {"count": 2, "smallest": 2, "largest": 3}


# --- planted faults ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planted:
    """A fault: its kind, how to make it, and the text of its file, subject and detail."""

    kind: str
    plant: Callable[[Path], object]
    named: str  # a regular expression over "file line N (subject): detail"
    severity: str = "error"
    also: tuple[str, ...] = ()  # further kinds that it causes


def write(path: str, data: bytes) -> Callable[[Path], object]:
    return lambda source: (source / path).write_bytes(data)


def picture(path: str, draw: Callable[[Image.Image], Image.Image], form: str = "JPEG", **more: Any) -> Callable:
    def plant(source: Path) -> None:
        with Image.open(source / path) as opened:
            drawn = draw(opened.convert("RGB"))
        drawn.save(source / path, form, **more)

    return plant


def cell(column: int, value: str, line: int = 1) -> Callable[[Path], object]:
    return lambda source: edit_cell(source / LIST, line, column, value)


def lines(path: str, change: Callable[[list[bytes]], None]) -> Callable[[Path], object]:
    return lambda source: edit_lines(source / path, change)


def entry(path: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda source: edit_json(source / path, change)


def bomb(data: bytes) -> bytes:
    """A JPEG that declares 60,000 x 60,000 pixels."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", 60_000, 60_000) + data[at + 9 :]


def replace_line(old: bytes, new: bytes) -> Callable[[list[bytes]], None]:
    return lambda rows: rows.__setitem__(1, rows[1].replace(old, new))


def link(path: str, target: str) -> Callable[[Path], object]:
    def plant(source: Path) -> None:
        (source.parent / "outside.jpg").write_bytes(FRAMES[0].read_bytes())
        (source / path).unlink()
        (source / path).symlink_to(target)

    return plant


def copy(one: str, other: str) -> Callable[[Path], object]:
    return lambda source: shutil.copyfile(source / one, source / other)


def recode(one: str, other: str) -> Callable[[Path], object]:
    """Encodes the picture anew, smaller."""

    def plant(source: Path) -> None:
        with Image.open(source / one) as opened:
            opened.convert("RGB").resize((100, 100)).save(source / other, "JPEG", quality=70)

    return plant


def half_grey(source: Path) -> None:
    """Truncates a frame and appends an end mark."""
    data = (source / FRAME).read_bytes()
    (source / FRAME).write_bytes(data[: len(data) // 2] + b"\xff\xd9")


def dotted(image: Image.Image) -> Image.Image:
    """A black picture with one white pixel."""
    black = Image.new("RGB", image.size)
    black.putpixel((5, 5), (255, 255, 255))
    return black


def columns_less(rows: list[bytes]) -> None:
    cells = rows[1].split(b"\t")
    rows[1] = b"\t".join(cells[:6] + cells[7:])


def without(live: str) -> Callable[[list[bytes]], None]:
    return lambda rows: rows.__setitem__(slice(None), [each for each in rows if live.encode() not in each])


def shop(number: int) -> str:
    return f"training_image/{IMAGE_IDS[number]}.jpg"


ONE_BOX = "[[0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9], {}]"
LINE = rf"^{re.escape(LIST)} line 2 \(clip {CLIP.id}\): "
TURNED = Image.Exif()
TURNED[ORIENTATION] = 6
HTML = b"<!DOCTYPE html><title>404</title>"
PLANTED = [
    Planted("truncated picture", lambda s: (s / FRAME).write_bytes((s / FRAME).read_bytes()[:-600]), FRAME),
    Planted("truncated picture", lambda s: (s / QUERY_FRAME).write_bytes((s / QUERY_FRAME).read_bytes()[:900]),
            QUERY_FRAME),
    Planted("truncated picture", half_grey, rf"{FRAME} .*premature end"),
    Planted("empty list", write(VAL_LIST, b""), rf"^{VAL_LIST}: found no line", also=("split without clips",)),
    Planted("empty picture", write(FRAME, b""), FRAME),
    Planted("empty picture", write(f"gallery/{LIVES[2]}/{IMAGE_IDS[3]}-0.jpg", b""), rf"image {IMAGE_IDS[3]}\)"),
    Planted("not a picture", write(QUERY_FRAME, bytes(500)), QUERY_FRAME),
    Planted("not a picture", write(FRAME, HTML), rf"{FRAME} \(clip {CLIP.id}\): is not a picture .*b'<!DOCTYP'"),
    Planted("unknown format", picture(FRAME, lambda image: image, "JPEG2000"), rf"{FRAME} .*is a JPEG 2000 picture"),
    Planted("wrong suffix", picture(FRAME, lambda image: image, "PNG"), rf"{FRAME} .*found PNG data", "warning"),
    Planted("wrong suffix", picture(FRAME, lambda image: image, "WEBP"), rf"{FRAME} .*found WEBP", "warning"),
    Planted("uniform picture", picture(FRAME, lambda image: Image.new("RGB", image.size)), rf"{FRAME} .*all black"),
    Planted("uniform picture", picture(shop(0), lambda image: Image.new("RGB", image.size, "white")), shop(0),
            also=("two shop images under one id",)),
    Planted("uniform picture", picture(FRAME, dotted), rf"{FRAME} .*all black"),
    Planted("tiny picture", picture(FRAME, lambda image: image.resize((1, 1))), rf"{FRAME} .*found 1 x 1 pixels",
            also=("box outside the frame",)),
    Planted("oversized picture", lambda s: (s / FRAME).write_bytes(bomb((s / FRAME).read_bytes())), FRAME),
    Planted("missing frame", lambda s: (s / FRAME).unlink(), FRAME),
    Planted("missing frame", lambda s: (s / QUERY_FRAME).unlink(), QUERY_FRAME),
    Planted("missing frame", lambda s: ((s / FRAME).unlink(), os.mkfifo(s / FRAME)), FRAME,
            also=("unreadable picture",)),  # a pipe: nobody waits for what never comes
    Planted("missing frame", link(FRAME, "/nowhere/at/all.jpg"), FRAME,
            also=("path leaves the source",)),
    Planted("image id without an image", lambda s: (s / shop(0)).unlink(), shop(0)),
    Planted("image id without an image", lambda s: (s / f"gallery/{LIVES[2]}/{IMAGE_IDS[1]}-0.jpg").unlink(),
            rf"gallery/{LIVES[2]}/{IMAGE_IDS[1]}-0.jpg"),
    Planted("path leaves the source", link(FRAME, "../../../outside.jpg"), rf"{FRAME} .*found a link to"),
    Planted("path leaves the source", cell(1, str(["../x.jpg", *3 * [FRAME]])), LINE, also=("frame listed twice",)),
    Planted("path leaves the source", cell(1, str(4 * ["/etc/hostname"])), LINE),
    Planted("duplicate clip id", lines(LIST, lambda rows: rows.append(rows[1])), rf"{LIST} line 8 \(clip {CLIP.id}"),
    Planted("clip in two splits", lambda s: lines(VAL_LIST, lambda rows: rows.append(
        (s / LIST).read_bytes().split(b"\n")[1]))(s), rf"\(clip {CLIP.id}\): found the clip in train and in val"),
    Planted("frames and boxes differ", cell(2, "[[0, 0, 1, 1]]"), LINE + "found 4 frames and 1 box,"),
    Planted("box outside the frame", cell(2, ONE_BOX.format([0, 0, 500, 9])), LINE + r"found the box \[0.0, 0.0, 500"),
    Planted("box outside the frame", cell(2, ONE_BOX.format([-3, 0, 9, 9])), LINE + r"found the box \[-3.0"),
    Planted("box outside the frame", entry(BOXES, lambda d: d.update({QUERY.frame_ids[0]: [[0, 0, 1, 9999]]})),
            rf"\(clip {QUERY.id}\): found the box"),
    Planted("box inside out", cell(2, ONE_BOX.format([9, 0, 3, 9])), LINE + r"found the box \[9.0, 0.0, 3.0, 9.0\]"),
    Planted("box inside out", entry(BOXES, lambda d: d.update({QUERY.frame_ids[0]: [[5, 9, 8, 2]]})), QUERY.id),
    Planted("bad box", cell(2, ONE_BOX.format("[NaN, 0, 1, 1]")), LINE + "found the box"),
    Planted("bad box", cell(2, ONE_BOX.format("[1e300, 0, 1, 1]")), LINE + "found the box"),
    Planted("bad box", entry(BOXES, lambda d: d.update({QUERY.frame_ids[0]: ["x"]})), rf"frame {QUERY.frame_ids[0]}"),
    Planted("not a list", cell(1, "__import__('os').system('touch pwned')"), LINE + "found .* in the frame column"),
    Planted("not a list", cell(2, "[[0, 0, 1, 1]] * 4"), LINE + "found .* in the box column"),
    Planted("clip without frames", cell(1, "[]"), LINE),
    Planted("not UTF-8", lines(LIST, replace_line(b"large", b"lar\xffe")), LINE + "found byte 0xff"),
    Planted("not UTF-8", lines(TITLES, replace_line(b"\t", b"\t\xfe")), TITLES),
    Planted("not JSON", write(BOXES, b'{"a": '), BOXES),
    Planted("duplicate id", lambda s: (s / TRUTH).write_bytes(
        (s / TRUTH).read_bytes().replace(b"{", f'{{"{QUERY.id}": ["{IMAGE_IDS[0]}"], '.encode(), 1)), TRUTH),
    Planted("wrong number of columns", lines(LIST, columns_less), LINE + "found 12 columns"),
    Planted("bad gallery row", lines(GALLERY, lambda rows: rows.append(b"no slash")), rf"{GALLERY} line 6"),
    Planted("bad id", lambda s: (s / LIST).write_bytes(b"\x07" + (s / LIST).read_bytes()), rf"{LIST} line 1"),
    Planted("frame in train and test", copy(FRAME, QUERY_FRAME), rf"{FRAME} .*found the same bytes as {QUERY_FRAME}"),
    Planted("frame in train and test", recode(QUERY_FRAME, FRAME),
            rf"{FRAME} .*found the same picture as {QUERY_FRAME}"),
    Planted("frame in train and test", lambda s: picture(FRAME, lambda _: ImageOps.mirror(
        Image.open(s / QUERY_FRAME).convert("RGB")), quality=80)(s), rf"{FRAME} .*the same picture as"),
    Planted("frame of two products", copy(FRAME, f"{folder_of(TRAIN[0])}/{TRAIN[0].id}/{TRAIN[0].frame_ids[0]}.jpg"),
            "of another product; check", "warning"),
    Planted("frame listed twice", cell(1, str(4 * [FRAME])), LINE + "found the frame", "warning"),
    Planted("shop image under two products", copy(shop(1), shop(0)), rf"{IMAGE_IDS[0]}.*{IMAGE_IDS[1]}|"
            rf"{IMAGE_IDS[1]}.*{IMAGE_IDS[0]}", also=("two shop images under one id",)),
    Planted("shop image under two products", recode(shop(1), shop(2)), "found the same picture as",
            also=("two shop images under one id",)),
    Planted("true image not in its gallery", entry(TRUTH, lambda d: d.update({QUERY.id: [IMAGE_IDS[2]]})), QUERY.id),
    Planted("query without truth", entry(TRUTH, lambda d: d.pop(QUERY.id)), rf"{QUERIES} \(clip {QUERY.id}"),
    Planted("truth without query", entry(TRUTH, lambda d: d.update(ghost=[IMAGE_IDS[2]])), r"clip ghost", "warning"),
    Planted("livestream without gallery", lines(GALLERY, without(LIVES[3])), TEST[2].id),
    Planted("image twice in a gallery", lines(GALLERY, lambda rows: rows.append(rows[0])), IMAGE_IDS[3], "warning"),
    Planted("control characters", cell(5, "a\0title"), LINE + r"found 'a\\x00title' as image_title", "warning"),
    Planted("ids alike", cell(8, "SPU2"), "the product ids 'SPU2', 'spu2'", "warning"),
    Planted("turned by EXIF", picture(FRAME, lambda image: image, exif=TURNED), FRAME, "warning"),
    Planted("unusual colours", picture(FRAME, lambda image: image.convert("CMYK")), rf"{FRAME} .*CMYK", "warning"),
    Planted("not a picture", write("query/stray.jpg", b"text"), r"query/stray.jpg \(named by no list\)", "warning"),
    Planted("split cannot be read", lambda s: (s / TRUTH).unlink(), "split test"),
]  # fmt: skip


def named(report: dict[str, Any], kind: str) -> list[str]:
    shown = []
    for fault in report["faults"]:
        if fault["kind"] == kind:
            line = f" line {fault['line']}" if fault["line"] else ""
            subject = f" ({fault['subject']})" if fault["subject"] else ""
            shown.append(f"{fault['file']}{line}{subject}: {fault['detail']}")
    return shown


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.kind)
def test_a_planted_fault_is_found_and_nothing_else(fault: Planted, source: Path) -> None:
    fault.plant(source)
    status, report = inspect(source)
    shown = named(report, fault.kind)
    assert any(re.search(fault.named, each) for each in shown), (shown, kinds(report))
    assert set(kinds(report)) <= {fault.kind, *fault.also}
    assert report["counts"][fault.kind]["severity"] == fault.severity
    assert status == (0 if report["safe"] else 1)
    assert report["safe"] == (fault.severity == "warning" and not fault.also)
    assert not (REPO / "pwned").exists()


def test_all_faults_of_a_source_are_reported_together(source: Path) -> None:
    (source / FRAME).unlink()
    (source / QUERY_FRAME).write_bytes(b"")
    edit_cell(source / LIST, 4, 1, "nonsense")
    edit_cell(source / LIST, 5, 2, "nonsense")
    edit_json(source / TRUTH, lambda truth: truth.pop(TEST[2].id))
    (source / BOXES).write_bytes(b"[")
    assert kinds(inspect(source)[1]) == {
        "missing frame": 1, "not a list": 2, "not JSON": 1, "empty picture": 1,
    }  # fmt: skip
    (source / BOXES).unlink()
    assert kinds(inspect(source)[1]) == {
        "missing frame": 1, "empty picture": 1, "not a list": 2, "query without truth": 1,
    }  # fmt: skip


def test_each_kind_is_on_the_screen(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in source.glob("training_video_*/*/*.jpg"):
        path.unlink()
    (source / QUERY_FRAME).write_bytes(b"")
    _, report = inspect(source)
    shown = capsys.readouterr().out
    missing = kinds(report)["missing frame"]
    assert missing > 20 and shown.count("error: training_video_") == doctor.SHOWN
    assert f"error: {QUERY_FRAME}" in shown and f"... and {missing - doctor.SHOWN} more" in shown


def test_the_advice_names_options_that_the_doctor_has_or_says_whose_they_are(source: Path) -> None:
    (source / FRAME).unlink()
    _, report = inspect(source)
    (shown,) = named(report, "missing frame")
    assert "or convert with --on-error=skip, which leaves the clip out." in shown


def test_a_known_kind_may_be_accepted(source: Path) -> None:
    picture(FRAME, lambda image: Image.new("RGB", image.size))(source)
    assert inspect(source)[0] == 1
    status, report = inspect(source, "--accept=uniform picture,other kind")
    assert (status, report["safe"], kinds(report)) == (0, True, {"uniform picture": 1})


def test_a_folder_that_links_into_itself_ends(source: Path) -> None:
    (source / "training_video_00" / "again").symlink_to(source, target_is_directory=True)
    assert inspect(source)[0] == 0


def test_a_picture_that_may_not_be_read_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is imitated: tests may run as a superuser, who may read every file."""
    whole = fingerprints.PictureReader.read

    def read(self: fingerprints.PictureReader, found: Any) -> bytes:
        if found.path == FRAME:
            raise BadInputError("unreadable picture", "cannot be read (Permission denied)", found.path)
        return whole(self, found)

    monkeypatch.setattr(fingerprints.PictureReader, "read", read)
    assert kinds(inspect(source)[1]) == {"unreadable picture": 1}


def test_faults_of_a_download_are_found_in_folders_and_in_tars(tmp_path: Path) -> None:
    for tars in (False, True):
        source = make_lpr4m(tmp_path / f"source{tars}", tars=tars)
        shard = source / "training_frame" / ("00000.tar" if tars else "00000/0000007.jpg")
        data = bytearray(shard.read_bytes())
        at = data.index(b"\xff\xd8\xff") if tars else 0
        data[at : at + 3] = b"abc"
        shard.write_bytes(data)
        edit_cell(source / "annotations/training_videoinfo_full_part_00.txt", 1, 2, ONE_BOX.format([0, 0, 999, 9]))
        status, report = inspect(source)
        assert status == 1
        assert kinds(report)["not a picture"] == 1
        (shown,) = named(report, "not a picture")
        assert "training_frame/00000" in shown
        # A member of a tar cannot be replaced.
        assert ("download the shard again (delete its _stats.json" in shown) == tars
        assert ("replace the file" in shown) != tars
        assert f"(clip {CLIP.id}): found the box" in named(report, "box outside the frame")[0]
        (source / "training_frame" / ("00001.tar" if tars else "00001/0000100.jpg")).write_bytes(b"nonsense")
        assert kinds(inspect(source)[1]).keys() >= ({"unreadable archive"} if tars else {"not a picture"})


def test_a_sidecar_that_disagrees_with_its_table_is_named(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source")
    sidecar = source / "training_frame/00000/0000002.json"
    sidecar.write_text(sidecar.read_text().replace("-0002.jpg", "-0001.jpg"))
    (source / "test_image/00000/0000001.json").write_text("{}")
    _, report = inspect(source)
    assert re.search(
        r"training_frame/00000/0000002.json: found \S+-0001 .*-0002 in the table", named(report, DIFFER)[0]
    )
    assert "0000001.json cannot be read" in named(report, "unreadable sidecar")[0]


DIFFER = "table and sidecar differ"


def test_faults_of_an_own_folder_are_reported_together(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    (source / "products.csv").write_text("product,title\nnobody,x\n0,Lime\n")
    (source / "clips/1/take 0/10.jpg").write_bytes(b"")
    (source / "shop/2.jpg").unlink()
    (source / "clips/0/take 9 ").mkdir()
    status, report = inspect(source)
    assert status == 1
    assert kinds(report) == {
        "unknown product": 1, "bad name": 1, "empty picture": 1, "product without shop image": 1,
    }  # fmt: skip
    assert named(report, "unknown product")[0].startswith("products.csv line 2: ")


# --- a converted set --------------------------------------------------------------------------------------------------

SHARD = "train-clips-00001-of-00004.tfrecord"


def flip(path: str, place: int) -> Callable[[Path], object]:
    def plant(folder: Path) -> None:
        data = bytearray((folder / path).read_bytes())
        data[place] ^= 4
        (folder / path).write_bytes(data)

    return plant


def swap(folder: Path) -> None:
    for suffix in ("", ".idx"):
        one, other = (folder / f"train-clips-0000{number}-of-00004.tfrecord{suffix}" for number in (0, 1))
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)


DAMAGED = [
    Planted("damaged record", flip(SHARD, -1000), rf"{SHARD} record 1 \(clip .*checksum", also=("damaged file",)),
    Planted("damaged file", flip(f"{SHARD}.idx", 8), rf"{SHARD}.idx: found a checksum", also=("damaged record",)),
    Planted("damaged file", lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]), rf"{SHARD}: found \d+"),
    Planted("damaged file", lambda f: (f / SHARD).unlink(), rf"{SHARD}: found no such file"),
    Planted("damaged file", swap, r"train-clips-00000-of-00004.tfrecord", also=("damaged record",)),
    Planted("damaged file", flip("columns/train-clips-image.npy", -2), "train-clips-image.npy: found a checksum"),
    Planted("damaged file", flip("columns/products.txt", 1), "columns/products.txt: found a checksum"),
    Planted("bad manifest", entry("manifest.json", lambda m: m["identity"].update(frames="all")), "found a hash that"),
    Planted("bad manifest", lambda f: (f / "manifest.json").unlink(), "found no manifest, needs a finished conversion"),
    Planted("file of no manifest", write("train-clips-00009-of-00010.tfrecord", b""), "does not name", "warning"),
]  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED, ids=lambda fault: fault.kind)
def test_damage_of_a_converted_set_is_named(fault: Planted, records: Path) -> None:
    fault.plant(records)
    status, report = inspect(records)
    shown = named(report, fault.kind)
    assert any(re.search(fault.named, each) for each in shown), (shown, kinds(report))
    assert set(kinds(report)) <= {fault.kind, *fault.also}
    assert status == (0 if fault.severity == "warning" else 1)


def test_what_only_the_source_can_mend_says_so_for_a_converted_set(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(FRAME, QUERY_FRAME)(source)
    kind = "frame in train and test"
    assert "of one split, or, if the picture" in named(inspect(source)[1], kind)[0]
    assert convert.main([f"--source={source}", f"--output={tmp_path / 'set'}", "--layout=lpr750k", "--workers=1"]) == 0
    (shown,) = named(inspect(tmp_path / "set")[1], kind)
    assert "out of one split, in the source, and convert again into another folder, or, if the picture" in shown


def test_fingerprints_of_a_shard_are_not_used_when_the_shard_changes(records: Path) -> None:
    assert inspect(records)[0] == 0
    flip(SHARD, -1000)(records)
    assert kinds(inspect(records)[1]) == {"damaged record": 1, "damaged file": 1}


# --- again and again --------------------------------------------------------------------------------------------------


def test_a_second_run_decodes_only_what_changed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = inspect(source)
    decoded: list[str] = []
    whole = fingerprints.decode_picture

    def decode(data: bytes, path: str) -> DecodedPicture:
        decoded.append(path)
        return whole(data, path)

    monkeypatch.setattr(fingerprints, "decode_picture", decode)
    time.sleep(0.01)
    (source / FRAME).write_bytes(b"changed")
    status, second = inspect(source)
    assert decoded == [FRAME]
    assert (status, kinds(second)) == (1, {"not a picture": 1})
    assert second["distributions"]["test"] == first["distributions"]["test"]


def test_a_killed_run_goes_on_where_it_stopped(source: Path) -> None:
    output = source.parent / "checked"
    arguments = [sys.executable, "-m", "data_pipeline.doctor", str(source), f"--output={output}", "--workers=1"]
    process = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.DEVNULL)
    store = output / ".work/fingerprints.bin"
    while process.poll() is None and not (store.exists() and store.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert KnownFingerprints(store).count
    status, report = inspect(source)
    assert (status, report["counts"]) == (0, {})


def test_any_number_of_workers_gives_the_same_report(source: Path) -> None:
    (source / FRAME).write_bytes(b"")
    reports = []
    for workers in (1, 2):
        shutil.rmtree(source.parent / "checked", ignore_errors=True)
        reports.append(inspect(source, f"--workers={workers}")[1] | {"seconds": 0})
    assert reports[0] == reports[1]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_page_escapes_the_texts_of_the_data(source: Path) -> None:
    attack = "<script>alert(1)</script>\"'<img src=x onerror=alert(2)>"
    edit_cell(source / LIST, 1, 7, attack)
    edit_cell(source / LIST, 2, 1, attack)
    edit_lines(source / GALLERY, lambda rows: rows.append(attack.encode()))
    inspect(source)
    page = (source.parent / "checked/report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("<img ") == page.count('src="data:image/jpeg;base64,') == 3
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", page)
    assert len(page) < 2_000_000


def test_names_that_are_not_utf8_are_reported(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        (source / os.fsdecode(b"query/\xff.jpg")).write_bytes(b"text")
    except OSError:
        pytest.skip("this file system takes names of UTF-8 only")
    edit_json(source / QUERIES, lambda queries: queries.update({"\ud800": {"frames": ["a/b.jpg"]}}))
    status, report = inspect(source)
    assert (status, kinds(report)) == (1, {"bad id": 1, "not a picture": 1})
    assert [fault["file"] for fault in report["faults"] if fault["kind"] == "not a picture"] == ["query/\udcff.jpg"]
    assert r"query/\udcff.jpg (named by no list): is not a picture" in capsys.readouterr().out


def test_json_alone_is_on_the_output(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(sound / "source"), f"--output={tmp_path / 'out'}", "--workers=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["safe"] is True
    assert report == json.loads((tmp_path / "out/report.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere: found no folder"),
        (["EMPTY"], "found neither manifest.json nor annotations/"),
        (["SOURCE", "--output=SOURCE/out"], "found the output inside the data to inspect"),
        (["SOURCE", "--layout=folder"], "found no folder clips/ and shop/"),
        (["SOURCE", "--workers=0"], "found 0, needs at least 1"),
    ],
)
def test_wrong_use_is_exit_status_2(
    arguments: Sequence[str], message: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"SOURCE": str(sound / "source"), "EMPTY": str(tmp_path / "empty")}
    given = [re.sub("SOURCE|EMPTY", lambda found: places[found[0]], each) for each in arguments]
    output = [] if any(each.startswith("--output") for each in given) else [f"--output={tmp_path / 'out'}"]
    try:
        status = doctor.main([*given, *output])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


# --- odd pictures -----------------------------------------------------------------------------------------------------


def test_sixteen_bits_and_animation_are_reported() -> None:
    deep = io.BytesIO()
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(deep, "PNG")
    moving = io.BytesIO()
    frames = [Image.open(path).convert("RGB") for path in FRAMES[:2]]
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:])
    for data, name, reason in ((deep, "a.png", "unusual colours"), (moving, "a.webp", "several pictures in a file")):
        assert [err.reason for err in fingerprints.inspect_picture(data.getvalue(), name).problems] == [reason]
