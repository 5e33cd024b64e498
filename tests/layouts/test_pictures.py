"""Conversion, doctor, training and evaluation agree on what a picture is, and oddities are counted."""

import errno
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import FrameOptions, Plan, clip_batches, doctor, image_batches, open_dataset, train_batches
from data_pipeline.convert import Options, main
from data_pipeline.convert import convert as convert_source
from data_pipeline.format.schema import Picture
from data_pipeline.input.decode import MAX_PIXELS, decode
from data_pipeline.layouts import pictures
from data_pipeline.layouts.pictures import PictureReader
from tests.input.pictures import encoded, picture
from tests.input.test_damage import overwritten
from tests.input.test_kinds import tiff, wide_profile
from tests.lpr_layouts import FRAMES, make_lpr4m

OPTIONS = FrameOptions(image_size=16, resize=20, num_frames=2, apply_exif=True)


def make_folder(root: Path, **replaced: tuple[str, bytes]) -> Path:
    """Makes two products of two clips. replaced: (name, bytes) of a frame of A's first clip, or of the shop image B."""
    for product in "AB":
        for clip in range(2):
            folder = root / "clips" / product / f"{clip}"
            folder.mkdir(parents=True)
            for frame in range(2):
                seed = 10 * clip + frame + ord(product)
                (folder / f"{frame}.jpg").write_bytes(encoded(picture(60, 40, seed=seed), "JPEG"))
    (root / "shop").mkdir()
    for product in "AB":
        (root / "shop" / f"{product}.jpg").write_bytes(encoded(picture(50, 50, seed=ord(product)), "JPEG"))
    for kind, (name, data) in replaced.items():
        old = root / ("clips/A/0/0.jpg" if kind == "frame" else "shop/B.jpg")
        old.unlink()
        (old.parent / name).write_bytes(data)
    return root


def convert(source: Path, *options: str) -> int:
    output = source.parent / "records"
    return main(["--layout=folder", f"--source={source}", f"--output={output}", "--workers=1", *options])


def inspect(path: Path) -> tuple[int, dict]:
    output = path.parent / "checked"
    status = doctor.main([str(path), f"--output={output}", "--workers=1"])
    return status, json.loads((output / "report.json").read_text())


DEEP = np.linspace(0, 65535, 50 * 50).reshape(50, 50).astype(np.uint16)
HOLE = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
HOLE.paste((0, 0, 0, 255), (10, 10, 40, 30))
LONG_PROFILE = np.random.default_rng(0).bytes(1 << 21)
SOUND = {  # name and bytes of a shop image: the oddity that is counted
    "16 bits": ("B.png", encoded(Image.fromarray(DEEP), "PNG"), None),
    "on transparent ground": ("B.png", encoded(HOLE, "PNG"), "transparent"),
    "WebP called jpg": ("B.jpg", encoded(picture(50, 50), "WEBP"), "misnamed"),
    "GIF called png": ("B.PNG", encoded(picture(50, 50).convert("P"), "GIF"), "misnamed"),
    "jfif": ("B.jfif", encoded(picture(50, 50), "JPEG"), None),
    "Display P3": ("B.jpg", encoded(picture(50, 50), "JPEG", icc_profile=wide_profile()), "other colours"),
    "odd EXIF": ("B.jpg", encoded(picture(50, 50), "JPEG", exif=tiff([(0x0001, 3, 2, b"\1\0\2\0")])), None),
    "long profile": ("B.png", encoded(picture(50, 50), "PNG", icc_profile=LONG_PROFILE), None),
    "tif": ("B.TIF", encoded(picture(50, 50), "TIFF"), None),
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_picture_passes_everywhere(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, data, oddity = SOUND[kind]
    source = make_folder(tmp_path / "source", image=(name, data), frame=(name.replace("B", "0"), data))
    status, report = inspect(source)
    assert status == 0 and "uniform picture" not in report["counts"]
    assert convert(source) == 0
    shown = capsys.readouterr().out
    counts = json.loads((tmp_path / "records/report.json").read_text())["splits"]
    expected = {oddity: 2} if oddity else {}  # the frame and the shop image, which is in each split
    assert counts["train"]["odd_pictures"] == expected
    assert bool(re.search(r"train: 2 pictures (are|have)", shown)) == bool(oddity)
    dataset = open_dataset(tmp_path / "records")
    assert inspect(tmp_path / "records")[0] == 0
    train = dataset.split("train")
    stored = train.image(list(train.image_ids).index("B")).encoded
    assert stored == data
    with train_batches(train, Plan(train.num_clips, batch_size=2, seed=0), range(2), OPTIONS, threads=0) as batches:
        assert next(batches)["image"].any()
    with image_batches(train, range(train.num_images), OPTIONS, 1) as batches:
        assert [batch["image"].shape for batch in batches] == [(1, 16, 16, 3)] * 2


@pytest.mark.parametrize("size", [(60_000, 2), (2, 60_000)], ids=str)
def test_an_extreme_shape_trains_and_is_evaluated(size: tuple[int, int], tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", frame=("0.png", encoded(picture(*size), "PNG")))
    assert convert(source) == 0
    options = FrameOptions(image_size=224, resize=256, resize_mode="keep_ratio", num_frames=2)
    train = open_dataset(tmp_path / "records").split("train")
    with train_batches(train, Plan(train.num_clips, batch_size=2, seed=0), range(2), options, threads=0) as batches:
        assert next(batches)["frames"].shape == (2, 2, 224, 224, 3)
    with clip_batches(train, range(train.num_clips), options, 2) as batches:
        assert next(batches)["frames"].shape == (2, 2, 224, 224, 3)


def damaged() -> bytes:
    """Returns a destroyed photograph that Pillow reads."""
    for seed in range(100):
        _, data = overwritten(seed)
        try:
            decode(data)
        except ValueError:
            continue
        return data
    raise AssertionError


UNSOUND = {
    "destroyed inside": ("B.jpg", damaged(), "damaged|truncated", "has lost pixels"),
    "cut off": ("B.jpg", encoded(picture(200, 150), "JPEG")[:3000], "truncated", "Premature end of JPEG"),
    "HEIC called jpg": ("B.jpg", b"\0\0\0\x18ftypheic" + bytes(99), "unknown", "is a HEIC picture.*convert it to JPEG"),
    "text": ("B.png", b"text", "not a picture", "is not a picture"),
    "too many pixels": ("B.bmp", encoded(Image.new("1", (8193, 8192)), "BMP"), "oversized", f"more than {MAX_PIXELS}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_unsound_picture_is_a_fault_everywhere(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data, reason, message = UNSOUND[kind]
    source = make_folder(tmp_path / "source", image=(name, data))
    status, report = inspect(source)
    assert status == 1 and any(re.search(reason, kind) for kind in report["counts"])
    capsys.readouterr()
    assert convert(source) == 1
    error = capsys.readouterr().err
    assert re.search(rf"shop/{name} .*({message})", error), error
    assert convert(source, "--on-error=skip", "--max-skip-rate=1") == 0


def test_a_picture_of_another_format_in_a_tar_is_taken_by_its_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_lpr4m(tmp_path / "source", tars=True)
    path = source / "test_frame/00000.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    webp = encoded(Image.new("RGB", (24, 24), (200, 100, 50)), "WEBP", quality=10)
    data = bytearray(path.read_bytes())
    data[512 : 512 + member.size] = webp.ljust(member.size, b"\0")
    path.write_bytes(data)
    report = convert_source(Options("lpr4m", source, tmp_path / "records", splits=("test",)))
    assert report["splits"]["test"]["odd_pictures"] == {"misnamed": 1}
    assert "test: 1 pictures have another format than their suffix names" in capsys.readouterr().out
    test = open_dataset(tmp_path / "records").split("test")
    stored = [frame.encoded for row in range(test.num_clips) for frame in test.clip(row).frames]
    assert sum(each.startswith(b"RIFF") for each in stored) == 1


def test_heic_files_are_left_out_with_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder(tmp_path / "source")
    (source / "clips/A/0/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert convert(source) == 0
    assert "left out 1 HEIC pictures, which are not read; convert them to JPEG: `magick" in capsys.readouterr().err


def test_a_file_servers_short_absence_costs_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(FRAMES[0].read_bytes())
    absences = [errno.ESTALE, errno.EIO]
    real = pictures._read_part

    def flaky(path: str, picture: Picture) -> tuple[int, bytes]:
        if absences:
            raise OSError(absences.pop(), "server away")
        return real(path, picture)

    monkeypatch.setattr(pictures, "_read_part", flaky)
    assert PictureReader(tmp_path).read(Picture("a", "a.jpg")) == FRAMES[0].read_bytes() and not absences
