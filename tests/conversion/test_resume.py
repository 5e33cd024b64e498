"""Pictures that change between two runs: a resumed conversion equals a fresh one, a finished one says so."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.convert import main
from tests.lpr_layouts import FRAMES, IMAGE_IDS, SHOP_IMAGES, TRAIN, make_lpr4m, make_lpr750k


def make_folder(source: Path) -> Path:
    for product in "AB":
        for clip in ("one", "two"):
            folder = source / "clips" / product / clip
            folder.mkdir(parents=True)
            for number in range(3):
                shutil.copyfile(FRAMES[number], folder / f"{number}.jpg")
        (source / "shop").mkdir(exist_ok=True)
        shutil.copyfile(SHOP_IMAGES["AB".index(product)], source / "shop" / f"{product}.jpg")
    return source


def run(layout: str, source: Path, output: Path) -> int:
    return main(
        [f"--layout={layout}", f"--source={source}", f"--output={output}", "--workers=1", "--clips-per-shard=1"]
    )


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def replace(path: Path, data: bytes) -> None:
    """Writes other bytes of the same size where a JPEG allows it: what follows its end is not read."""
    size = path.stat().st_size
    path.write_bytes(data + bytes(max(0, size - len(data))))


def change_member(tar: Path, data: bytes) -> None:
    """Writes another picture over the first that is large enough, so that offsets and sizes in the tar stay."""
    with tarfile.open(tar) as archive:
        member = next(each for each in archive if each.name.endswith(".jpg") and each.size >= len(data))
    with tar.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(data + bytes(member.size - len(data)))


SMALL = min((path.read_bytes() for path in FRAMES), key=len)
SOURCES: dict[str, tuple[str, Callable[[Path], Path], str, Callable[[Path], object]]] = {
    # what: layout, source, picture at fault in the first run, replacement of a sound one
    "a frame of a folder": (
        "folder", make_folder, "clips/A/one/0.jpg", lambda source: replace(source / "clips/B/two/1.jpg", SMALL)),
    "a shop image": (
        "folder", make_folder, "clips/A/one/0.jpg", lambda source: replace(source / "shop/B.jpg", SMALL)),
    "a frame of a list": (
        "lpr750k", make_lpr750k, f"training_image/{IMAGE_IDS[2]}.jpg",
        lambda source: replace(source / f"training_video_00/{TRAIN[1].id}/{TRAIN[1].frame_ids[1]}.jpg", SMALL)),
    "a member of a tar": (
        "lpr4m", lambda source: make_lpr4m(source, tars=True), "annotations/test_videoid_to_gtimage_3.json",
        lambda source: change_member(source / "training_frame/00001.tar", SMALL)),
    "a file of a download": (
        "lpr4m", make_lpr4m, "annotations/test_videoid_to_gtimage_3.json",
        lambda source: replace(source / "training_frame/00001/0000103.jpg", SMALL)),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_picture_replaced_between_a_failed_and_a_finished_run_is_stored_as_it_is_now(
    name: str, tmp_path: Path
) -> None:
    layout, make, bad, change = SOURCES[name]
    source = make(tmp_path / "source")
    sound = (source / bad).read_bytes()
    (source / bad).write_bytes(b"{}")  # no picture, and a truth without an entry
    assert run(layout, source, tmp_path / "records") == 1
    assert list((tmp_path / "records").glob("train-clips-*.tfrecord"))
    (source / bad).write_bytes(sound)
    change(source)
    assert run(layout, source, tmp_path / "records") == 0
    assert run(layout, source, tmp_path / "fresh") == 0
    assert files_of(tmp_path / "records") == files_of(tmp_path / "fresh")


def test_finished_shards_stay_if_no_picture_of_theirs_changed(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    sound = (source / "shop/A.jpg").read_bytes()
    (source / "shop/A.jpg").write_bytes(b"text")
    assert run("folder", source, tmp_path / "records") == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").glob("*-clips-*.tfrecord")}
    (source / "shop/A.jpg").write_bytes(sound)
    assert run("folder", source, tmp_path / "records") == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("layout", "make", "picture"),
    [
        ("folder", make_folder, "clips/A/one/0.jpg"),
        ("lpr4m", lambda source: make_lpr4m(source, tars=True), "training_frame/00001.tar"),
    ],
)
def test_a_finished_set_warns_of_pictures_that_were_replaced_since(
    layout: str, make: Callable[[Path], Path], picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "source")
    assert run(layout, source, tmp_path / "records") == run(layout, source, tmp_path / "records") == 0
    assert "warning" not in capsys.readouterr().err
    later = (tmp_path / "records" / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(source / picture, ns=(later, later))
    assert run(layout, source, tmp_path / "records") == 0
    told = capsys.readouterr()
    assert "already converted" in told.out
    assert f"found 1 file with pictures, written after the conversion (first {picture})" in told.err
    assert "convert to another --output" in told.err
    if layout == "lpr4m":
        shutil.rmtree(source / "training_frame")
        assert run(layout, source, tmp_path / "records") == 0
        assert "already converted" in capsys.readouterr().out
