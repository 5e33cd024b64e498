"""Names in a user's folder: what machines leave is passed over, and people may name frames and products freely."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from data_pipeline import doctor
from data_pipeline.convert import main
from data_pipeline.format.reader import open_dataset
from data_pipeline.layouts.names import is_known_leftover, is_leftover
from data_pipeline.layouts.own_folder import OwnFolder
from tests.lpr_layouts import FRAMES, SHOP_IMAGES

LEFTOVER_FOLDERS = (
    "__MACOSX", ".ipynb_checkpoints", "@eaDir", "#recycle", ".git", ".svn", "lost+found", ".Trash-1000", ".Trashes",
    ".thumbnails", ".AppleDouble", ".@__thumb", "$RECYCLE.BIN", "System Volume Information", ".Spotlight-V100",
    ".fseventsd", "__pycache__", ".stversions", ".dropbox.cache", ".snapshot", "@Recycle", ".cache", "@tmp",
)  # fmt: skip
LEFTOVER_FILES = (
    "._IMG_1.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".nfs0000000001", "~$IMG_1.jpg", ".~lock.IMG_1.jpg#",
    ".fuse_hidden0001", ".trashed-1700000000-IMG_1.jpg", "Icon\r", ".nomedia", "SYNOPHOTO_THUMB_XL.jpg",
)  # fmt: skip
MENTIONED_FOLDERS = (
    ".huggingface", ".dtrash", ".zfs", ".wdmc", ".bridgecache", ".Rproj.user", ".A", "CaptureOne", "RECYCLER",
    "node_modules", "found.000",
)  # fmt: skip
MENTIONED_FILES = (
    "IMG_1.sync-conflict-20261130-120000.jpg", "IMG_1.jpg.part", "IMG_1.jpg.crdownload", "IMG_1.jpg.tmp", "IMG_1.jpg~",
    "IMG (Ann's conflicted copy 2026-11-30).jpg", ".#a.jpg", ".hidden.jpg", ".xvpics", "list.csv.bak",
)  # fmt: skip
FRAME_NAMES = (
    "Screenshot 2026-11-30 at 3.14.00\u202fPM.jpg", "\u200fعربي.jpg", "👩\u200d🔬.jpg", "soft\u00adhyphen.jpg",
    unicodedata.normalize("NFD", "é") + ".jpg", " spaces .jpg", "a\nb.jpg", "tab\t.jpg", "\u3000.jpg", "\ue000.jpg",
)  # fmt: skip
PRODUCTS = ("Cola\u202fZero", "👩\u200d🔬", "\u200fعربي", "soft\u00adhyphen", "牛乳\u30001L", "10\u00a0kg", "\ue000")


def copy(number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FRAMES[number], path)


def make_shop(source: Path, products: tuple[str, ...] = ("A", "B")) -> Path:
    for number, product in enumerate(products):
        for clip in ("one", "two"):
            copy(number, source / "clips" / product / clip / "1.jpg")
        (source / "shop").mkdir(exist_ok=True)
        shutil.copyfile(SHOP_IMAGES[number % len(SHOP_IMAGES)], source / "shop" / f"{product}.jpg")
    return source


def run(source: Path, output: Path, *more: str) -> int:
    return main(["--layout=folder", f"--source={source}", f"--output={output}", "--workers=1", *more])


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def test_what_machines_leave_changes_nothing_and_is_not_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_shop(tmp_path / "source")
    assert run(source, tmp_path / "before") == 0
    places = [source / "clips", source / "clips/A", source / "clips/A/one", source / "shop"]
    for place in places:
        for name in LEFTOVER_FOLDERS:
            copy(5, place / name / "IMG_1.jpg")
        for name in LEFTOVER_FILES:
            copy(6, place / name)
    capsys.readouterr()
    assert run(source, tmp_path / "after") == 0
    assert capsys.readouterr().err == "folder: found nothing for val; reading train, test.\n".replace(
        "folder", str(source)
    )
    assert files_of(tmp_path / "after") == files_of(tmp_path / "before")

    doctor.main([str(source), f"--output={tmp_path / 'doctor'}", "--workers=1"])
    report = json.loads((tmp_path / "doctor" / "report.json").read_text())
    named = [fault["file"] for fault in report["faults"]]
    assert not [name for name in named if any(is_known_leftover(part) for part in Path(name).parts)]
    assert not [remark for remark in report["remarks"] if "named by no list" in remark or "passed over" in remark]


def test_what_is_hidden_or_temporary_is_passed_over_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_shop(tmp_path / "source")
    assert run(source, tmp_path / "before") == 0
    places = [source / "clips", source / "clips/A", source / "clips/A/one", source / "shop"]
    for place in places:
        for name in MENTIONED_FOLDERS:
            copy(5, place / name / "IMG_1.jpg")
        for name in MENTIONED_FILES:
            copy(6, place / name)
    capsys.readouterr()
    assert run(source, tmp_path / "after") == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    count = len(places) * len(MENTIONED_FOLDERS + MENTIONED_FILES)
    assert warning == (
        f"warning: passed over {count} files and folders, hidden or temporary: clips/.#a.jpg, clips/.A, "
        f"clips/.Rproj.user and {count - 3} more; rename what is yours."
    )
    before, after = files_of(tmp_path / "before"), files_of(tmp_path / "after")
    assert json.loads(after.pop("report.json"))["remarks"] == [warning.removeprefix("warning: ")]
    assert before.pop("report.json") and after == before
    (source / "clips/A/.A").rename(source / "clips/A/A")  # as the advice says
    assert run(source, tmp_path / "renamed") == 0
    assert "A/A" in open_dataset(tmp_path / "renamed").split("train").clip_ids

    doctor.main([str(source), f"--output={tmp_path / 'doctor'}", "--workers=1"])
    report = json.loads((tmp_path / "doctor" / "report.json").read_text())
    assert not [remark for remark in report["remarks"] if "named by no list" in remark]
    assert len([remark for remark in report["remarks"] if "passed over" in remark]) == 1


def test_a_product_may_be_called_like_a_temporary_file(tmp_path: Path) -> None:
    products = ("Thermos.part", "Salt~", "x.bak", "dove.temp", "Sale (conflicted copy)", "my.tmp")
    source = make_shop(tmp_path / "source", products)
    assert run(source, tmp_path / "records") in (0, 1)  # 1: "Sale (conflicted copy).jpg" is a file
    layout = OwnFolder(source, None, 10)
    assert {clip.product for clip in layout.clips.values()} == set(products)
    assert layout.shop.keys() == set(products) - {"Sale (conflicted copy)"}
    assert layout.passed_over == ["shop/Sale (conflicted copy).jpg"]


def test_hidden_pictures_are_named_where_a_clip_has_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_shop(tmp_path / "source")
    (source / "clips/A/one/1.jpg").rename(source / "clips/A/one/.1.jpg")
    for clip in ("one", "two"):
        (source / "clips/B" / clip).rename(source / "clips/B" / f".{clip}")
    assert run(source, tmp_path / "records") == 1
    assert "clips/B: found no folder of a clip (but clips/B/.one, clips/B/.two), needs" in capsys.readouterr().err
    shutil.rmtree(source / "clips/B")
    assert run(source, tmp_path / "records") == 1
    assert "(clip A/one): found no picture (but clips/A/one/.1.jpg), needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["Cola", "IMG_1.jpg", "v1.5", "50% off", "part", "tmp", "Download", "CVS", "@home", "#1 dad"]
)
def test_a_users_names_are_no_leftovers(name: str) -> None:
    assert not is_leftover(name, True) and not is_leftover(name, False)


def test_a_frame_may_be_called_anything(tmp_path: Path) -> None:
    source = make_shop(tmp_path / "source")
    for number, name in enumerate(FRAME_NAMES):
        copy(number, source / "clips/A/one" / name)
    copy(7, source / "clips/A/one" / b"\xff.jpg".decode("utf-8", "surrogateescape"))
    assert run(source, tmp_path / "records", "--frames=all") == 0
    train = open_dataset(tmp_path / "records").split("train")
    record = train.clip(list(train.clip_ids).index("A/one"))
    assert len(record.frames) == len(FRAME_NAMES) + 2
    assert {unicodedata.normalize("NFC", frame.id) for frame in record.frames} == {
        "1", "\\udcff", *(unicodedata.normalize("NFC", name.removesuffix(".jpg")) for name in FRAME_NAMES)
    }  # fmt: skip


def test_a_bad_frame_of_an_odd_name_is_one_line_of_the_faults(tmp_path: Path) -> None:
    source = make_shop(tmp_path / "source")
    (source / "clips/A/one/a\nb.jpg").write_bytes(b"text")
    assert run(source, tmp_path / "records") == 1
    (line,) = (tmp_path / "records" / "faults.txt").read_text().splitlines()
    assert line.startswith(r"clips/A/one/a\nb.jpg (clip A/one): is not a picture (starts with b'text')")


def test_an_id_may_have_any_character_but_control_characters(tmp_path: Path) -> None:
    source = make_shop(tmp_path / "source", PRODUCTS)
    (source / "products.csv").write_text(
        "product,livestream\n" + "".join(f"{product},live\u202fone\n" for product in PRODUCTS), encoding="utf-8"
    )
    assert run(source, tmp_path / "records") == 0
    dataset = open_dataset(tmp_path / "records")
    assert sorted(dataset.split("test").image_ids) == sorted(PRODUCTS)
    assert list(dataset.tables["livestream"]) == ["live\u202fone"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "clips/C/film.MOV",
            "clips/C: found no folder of a clip (but clips/C/film.MOV), needs clips/<product>/<clip>/",
        ),
        ("clips/A/three/film.mp4", "clips/A/three (clip A/three): found no picture (but film.mp4), needs jpg"),
    ],
)
def test_films_are_named_with_the_command_that_makes_frames_of_them(
    place: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_shop(tmp_path / "source")
    copy(0, source / place)
    assert run(source, tmp_path / "records") == 1
    errors = capsys.readouterr().err
    command = 'ffmpeg -i film.mp4 -vf fps=2 "my_shop/clips/Cola/clip 1/%03d.jpg"'
    assert message in errors and command in errors
    assert command in (Path(__file__).parents[2] / "docs/own_clips.md").read_text()


def test_films_where_no_clip_is_at_all_are_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy(0, tmp_path / "source/clips/film.mp4")
    (tmp_path / "source/shop").mkdir()
    assert run(tmp_path / "source", tmp_path / "records") == 2
    assert "Films such as clips/film.mp4 are not read" in capsys.readouterr().err


def test_pictures_in_a_deeper_folder_are_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_shop(tmp_path / "source")
    copy(0, source / "clips/A/monday/one/1.jpg")
    assert run(source, tmp_path / "records") == 1
    errors = capsys.readouterr().err
    assert "(clip A/monday): found no picture (but one), needs jpg" in errors
    assert "Folders inside a clip's are not read" in errors


def test_a_shop_image_that_differs_in_capitals_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_shop(tmp_path / "source")
    (source / "shop/A.jpg").rename(source / "shop/a.jpg")
    assert run(source, tmp_path / "records") == 1
    assert "but shop/a.jpg, which differs in capitals, needs one; rename it." in capsys.readouterr().err


def test_workers_get_no_names_of_pictures(tmp_path: Path) -> None:
    import pickle

    source = make_shop(tmp_path / "source")
    small = len(pickle.dumps(OwnFolder(source, None, 10)))
    for number in range(50):
        (source / f"clips/A/one/{number:050d}.jpg").touch()
    layout = OwnFolder(source, None, 10)
    assert len(pickle.dumps(layout)) == small
    copied = pickle.loads(pickle.dumps(layout))
    clip = layout.listed_clips("train")[0][0]
    assert copied.find_frames(clip, "train") == layout.find_frames(clip, "train")
