"""An own folder with pictures as phones write them: conversion, training, evaluation, and refusal of faults."""

import dataclasses
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from configs import folder
from data_pipeline.convert import main
from data_pipeline.format.reader import open_dataset
from data_pipeline.input.decode import decode, load_picture
from data_pipeline.input.options import FrameOptions
from data_pipeline.layouts.own_folder import default_splits, natural
from data_pipeline.layouts.pictures import SUFFIXES
from rice_jax import evaluate, train
from rice_jax.config import from_json

DOCS = Path(__file__).parents[2] / "docs"
PRODUCTS = (
    "Cola", "Cola light", "Café crème", "it's \"good\"", "牛乳 1L", "50% off, 2;3", "Ünïcode-a-b-c-d-e", "v1.5",
    "10", "9", "#1 & co", "Zucker",
)  # fmt: skip
SIZES = ((40, 30), (30, 40), (64, 64), (25, 50))
UPRIGHT, TURNED = 1, 6  # EXIF: 6 is a picture to be turned by 90 degrees, as a phone held upright writes it


def draw(product: int, frame: int, size: tuple[int, int]) -> Image.Image:
    """Returns a disc on a ground: the product decides the colours, the frame the position."""
    colours = np.random.default_rng(product).integers(0, 256, (2, 3)).tolist()
    picture = Image.new("RGB", size, tuple(colours[0]))
    centre, radius = (size[0] // 2 + frame, size[1] // 2), min(size) // 3
    ImageDraw.Draw(picture).circle(centre, radius, fill=tuple(colours[1]))
    return picture


def save(picture: Image.Image, path: Path, kind: int) -> None:
    """Writes the picture as one of seven kinds of files that phones, shops and editors write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind % 7:
        case 0:
            exif = Image.Exif()
            exif[0x0112] = TURNED
            picture.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), "JPEG", exif=exif)
        case 1:
            picture.convert("L").save(path.with_suffix(".JPEG"), "JPEG")
        case 2:
            picture.convert("CMYK").save(path.with_suffix(".jpg"), "JPEG")
        case 3:
            picture.convert("RGBA").save(path.with_suffix(".PNG"), "PNG")
        case 4:
            picture.quantize(8).save(path.with_suffix(".png"), "PNG", transparency=0)
        case 5:
            picture.save(path.with_suffix(".WebP"), "WEBP")
        case _:
            picture.save(path.with_suffix(".Jpg"), "JPEG")


def make_folder(root: Path, products: tuple[str, ...] = PRODUCTS, clips: int = 4) -> Path:
    """Makes clips `take 1` to `take 10` of one to twelve frames, and a shop image a product."""
    for number, product in enumerate(products):
        name = f"{product}.x"  # with_suffix replaces the last suffix
        save(draw(number, 0, (48, 48)), root / "shop" / name, number)
        for take in range(clips):
            clip = root / "clips" / product / f"take {1 + 9 * take // max(1, clips - 1)}"
            for frame in range(1 + (number + take) % 12):
                kind = number + take + frame
                save(draw(number, frame, SIZES[kind % len(SIZES)]), clip / f"IMG_{frame}.x", kind)
    return root


def run(source: Path, output: Path, *more: str) -> int:
    return main(["--layout=folder", f"--source={source}", f"--output={output}", "--workers=1", *more])


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve products with four clips each, and their records."""
    root = tmp_path_factory.mktemp("own")
    make_folder(root / "source")
    assert run(root / "source", root / "records") == 0
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three products with two clips each, to be damaged."""
    return make_folder(tmp_path / "source", ("A", "B", "C"), clips=2)


# --- from pictures to a ranking ---------------------------------------------------------------------------------------


def test_a_folder_of_phone_pictures_is_converted_trained_on_and_ranked(
    phone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folder.get_config()
    config.data.path = str(phone / "records")
    config.update({"num_updates": 3, "eval_every": 0, "eval_batch_size": 16, "log_every": 1})
    config.data.update({"image_size": 16, "resize": 16, "shrink_to": 24})
    config.model.update({"stem_channels": (8, 8, 8, 8), "width": 24, "layers": 1, "hidden": 32, "embedding": 16})
    config.optimizer.warmup_updates = 1
    figures = train.train_and_evaluate(config, tmp_path / "run")
    assert figures["queries"] == 12 and figures["mean_gallery_size"] == 12  # of val, which this set has
    assert config.batch_size == 0  # the caller's config is not changed
    saved = from_json((tmp_path / "run" / "config.json").read_text())
    assert saved.batch_size == 24 and saved.data.eval_split == "val"

    arguments = ["--workdir", str(tmp_path / "run"), "--data", str(phone / "records"), "--output", str(tmp_path)]
    evaluate.evaluate(evaluate.parse(arguments))
    assert json.loads((tmp_path / "metrics.json").read_text())["queries"] == 12
    text = (tmp_path / "rankings.jsonl").read_text(encoding="utf-8")
    assert '"clip": "牛乳 1L/take 10"' in text  # readable, not escaped
    lines = [json.loads(line) for line in text.splitlines()]
    assert sorted(line["clip"] for line in lines) == sorted(f"{product}/take 10" for product in PRODUCTS)
    assert all({image for image, _ in line["top"]} <= set(PRODUCTS) and len(line["top"]) == 10 for line in lines)

    # The Python of docs/own_clips.md, on the same clip.
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "own_clips.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_shop").symlink_to(phone / "source")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my_shop").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code.replace("clip 3", "take 10"), {})
    (top,) = (line["top"][:3] for line in lines if line["clip"] == "Cola/take 10")
    assert capsys.readouterr().out.splitlines() == [f"{image}: {score:.2f}" for image, score in top]


def test_names_order_splits_and_gallery_are_as_the_folder_has_them(phone: Path) -> None:
    dataset = open_dataset(phone / "records")
    takes = {name: {clip.rpartition("/")[2] for clip in dataset.split(name).clip_ids} for name in dataset.splits}
    assert takes == {"train": {"take 1", "take 4"}, "val": {"take 7"}, "test": {"take 10"}}  # 10 comes after 7
    assert list(dataset.tables["livestream"]) == ["shop"] and sorted(dataset.tables["product"]) == sorted(PRODUCTS)
    for name in ("val", "test"):
        split = dataset.split(name)
        assert [split.image_ids[row] for row in split.galleries["shop"]] == sorted(PRODUCTS, key=natural)
        for row, clip in enumerate(split.clip_ids):
            assert split.truth(row) == (clip.partition("/")[0],)
            assert split.image_ids[split.columns["image"][row]] == clip.partition("/")[0]
    clip = dataset.split("test").clip(list(dataset.split("test").clip_ids).index("v1.5/take 10"))
    assert (clip.product, clip.livestream, clip.original_frames) == ("v1.5", "shop", 11)
    names = [f"IMG_{number}" for number in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)]  # docs/official.md 9.1
    assert [frame.id for frame in clip.frames] == names


def test_pictures_arrive_upright_and_in_colour(phone: Path) -> None:
    """Compares every stored picture with the drawn one."""
    split = open_dataset(phone / "records").split("train")
    seen = set()
    for row in range(split.num_clips):
        clip = split.clip(row)
        product, take = PRODUCTS.index(clip.product), (int(clip.id.rpartition(" ")[2]) - 1) // 3
        for frame in clip.frames:
            number = int(frame.id.removeprefix("IMG_"))
            kind = product + take + number
            drawn, stored = draw(product, number, SIZES[kind % len(SIZES)]), decode(frame.encoded, apply_exif=True)
            assert stored.shape == (drawn.height, drawn.width, 3)
            expected = np.asarray(drawn.convert("L").convert("RGB") if kind % 7 == 1 else drawn).copy()
            if kind % 7 == 4:  # its first colour is transparent
                expected[np.asarray(drawn.quantize(8)) == 0] = 255
            assert np.abs(stored.astype(int) - expected).mean() < 12  # JPEG, eight colours, inks
            seen.add(kind % 7)
    assert seen == set(range(7))


def test_the_bytes_do_not_depend_on_the_workers(phone: Path, tmp_path: Path) -> None:
    arguments = ["--layout=folder", f"--source={phone / 'source'}", f"--output={tmp_path}", "--workers=2"]
    assert main([*arguments, "--clips-per-shard=8"]) == 0
    assert run(phone / "source", tmp_path / "alone", "--clips-per-shard=8") == 0
    one, two = files_of(tmp_path / "alone"), {k: v for k, v in files_of(tmp_path).items() if not k.startswith("alone")}
    assert one == two


def test_the_last_clip_of_a_product_is_for_test_and_of_four_one_for_validation() -> None:
    assert [default_splits(count) for count in (1, 2, 3)] == [["test"], ["train", "test"], ["train", "train", "test"]]
    assert default_splits(5) == ["train", "train", "train", "val", "test"]
    names = ["b2", "B10", "b1 (2)", "b1", "a", "10", "9", "b02"]
    assert sorted(names, key=natural) == ["9", "10", "a", "b1", "b1 (2)", "b02", "b2", "B10"]


def test_large_pictures_are_shrunk_before_random_crops_only() -> None:
    options = FrameOptions(image_size=16, resize=16, min_scale=0.5, shrink_to=20)
    data = (Path(__file__).parents[1] / "data/grocery/frame00.jpg").read_bytes()
    full = decode(data)
    assert min(full.shape[:2]) > 20 and min(load_picture(data, options, train=True).shape[:2]) == 20
    assert load_picture(data, options, train=False).shape == (16, 16, 3)
    assert load_picture(data, dataclasses.replace(options, shrink_to=0), train=True).shape == full.shape
    with pytest.raises(ValueError, match="shrink_to: found 8, needs 0 or at least image_size, 16"):
        FrameOptions(image_size=16, resize=16, shrink_to=8)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_give_titles_livestreams_and_splits(source: Path, tmp_path: Path) -> None:
    text = '\ufefftitle,product,livestream\r\n"Juice, ""fresh""\r\n1 l",A,Monday\r\n\r\nÄpple,B,\r\n'
    (source / "products.csv").write_bytes(text.encode())
    (source / "clips.csv").write_text("product,clip,split\nA,take 1,test\nB,take 10,val\nC,take 1,test\n")
    assert run(source, tmp_path / "records") == 0
    dataset = open_dataset(tmp_path / "records")
    clips = {name: list(dataset.split(name).clip_ids) for name in dataset.splits}
    assert clips == {"train": ["A/take 10", "B/take 1", "C/take 10"], "val": ["B/take 10"],
                     "test": ["A/take 1", "C/take 1"]}  # fmt: skip
    test = dataset.split("test")
    shelves = {name: [test.image_ids[row] for row in rows] for name, rows in test.galleries.items()}
    assert shelves == {"Monday": ["A"], "shop": ["B", "C"]}
    assert test.clip(0).title == test.image(0).title == 'Juice, "fresh"\r\n1 l' and test.clip(0).livestream == "Monday"
    assert dataset.split("train").image(1).title == "Äpple"


def test_names_that_unicode_writes_in_two_ways_meet(tmp_path: Path) -> None:
    """The folder was copied from a Mac, the table was written elsewhere."""
    source = make_folder(tmp_path / "source", (unicodedata.normalize("NFD", "Café"), "B"), clips=2)
    composed = unicodedata.normalize("NFC", "Café")
    next((source / "shop").glob("Caf*")).rename(source / "shop" / f"{composed}.jpg")
    (source / "products.csv").write_text(f"product,title\n{composed},Coffee\n", encoding="utf-8")
    assert run(source, tmp_path / "records") == 0
    split = open_dataset(tmp_path / "records").split("test")
    assert list(split.clip_ids) == ["B/take 10", f"{composed}/take 10"] and split.clip(1).title == "Coffee"


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        (
            "products.csv",
            b"product,title\nD,x\n",
            "products.csv line 2: found the product 'D', which is not in the fol",
        ),
        ("products.csv", b"product,title\nA ,x\n", "products.csv line 2: found the product 'A ', which is not"),
        ("products.csv", b"product,title\nA,x\n\nA,y\n", "products.csv line 4: found the product 'A' of line 2 again"),
        ("products.csv", b"product;title\nA;x\n", "products.csv line 1: found the columns 'product;title', needs prod"),
        ("products.csv", b"product,title,prize\nA,x,1\n", "line 1: found the columns 'product,title,prize', needs"),
        ("products.csv", b"product,title,title\n", "line 1: found the columns"),
        ("products.csv", b"", "products.csv line 1: found the columns '', needs product and livestream or title"),
        ("products.csv", b"product,title\nA,x,y\n", "products.csv line 2: found 3 cells, needs 2 as in the first line"),
        ("products.csv", b"product,title\nA,\xe4pple\n", "products.csv line 2: found byte 0xe4, needs UTF-8; save it"),
        ("products.csv", b'product,title\nA,"x"y\n', "products.csv line 2: cannot be read (',' expected after '\"')"),
        ("products.csv", b'product,title\nA,x\nB,"y\n', "products.csv line 3: cannot be read (unexpected end of data)"),
        (
            "products.csv",
            b"product,livestream\nA,a\tb\n",
            r"line 2: found the livestream id 'a\tb', needs 1 to 200 by",
        ),
        ("clips.csv", b"product,clip,split\nA,take 2,test\n", "clips.csv line 2: found the clip 'A/take 2', which is"),
        ("clips.csv", b"product,clip,split\nA/take 1,,test\n", "clips.csv line 2: found the clip 'A/take 1/', which"),
        ("clips.csv", b"product,clip,split\nA,take 1,tset\n", "line 2: found the split 'tset', needs one of train, va"),
        ("clips.csv", b"product,clip\nA,take 1\n", "found the columns 'product,clip', needs product,clip and split, s"),
    ],
)
def test_a_wrong_table_is_named_with_its_line_and_nothing_is_written(
    file: str, data: bytes, message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / file).write_bytes(data)
    for more in ([], ["--on-error=skip"]):
        assert run(source, tmp_path / "records", *more) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_all_faults_of_both_tables_and_of_names_come_together(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "products.csv").write_text("product,title\nD,x\nE,y\n")
    (source / "clips.csv").write_text("product,clip,split\nA,take 1,no\nA,take 1,test\n")
    (source / "clips" / "A" / "take 3 ").mkdir()
    assert run(source, tmp_path / "records") == 1
    assert len(capsys.readouterr().err.splitlines()) == 5


# --- bad input --------------------------------------------------------------------------------------------------------


def shop_image(source: Path, product: str) -> Path:
    return next((source / "shop").glob(f"{product}.*"))


def first_frame(source: Path) -> Path:
    return next((source / "clips" / "B" / "take 10").iterdir())


def link_out(path: Callable[[Path], Path]) -> Callable[[Path], object]:
    """Moves a file or folder out of the source and leaves a link in its place."""

    def damage(source: Path) -> None:
        inside, outside = path(source), source.parent / "outside" / path(source).name
        outside.parent.mkdir()
        shutil.move(inside, outside)
        inside.symlink_to(outside)

    return damage


def empty(source: Path) -> None:
    first_frame(source).unlink()
    for path in (source / "clips" / "B" / "take 10").iterdir():
        path.unlink()
    (source / "clips" / "B" / "take 10" / "IMG_1.HEIC").write_bytes(b"....ftypheic")


BOTH = ("B/take 1", "B/take 10")
LAST = ("B/take 10",)
BAD_CLIPS = {  # fault: damage, message, clips that --on-error=skip leaves out
    "product without shop image": (
        lambda source: shop_image(source, "B").unlink(),
        r"^clips/B/take 1 \(clip B/take 1\): found no shop/B.jpg \(or .jpeg, .png, .webp\), needs one; add it", BOTH),
    "two shop images": (
        lambda source: shutil.copy(shop_image(source, "B"), source / "shop" / "B.png"),
        r"^clips/B/take 1 \(clip B/take 1\): found shop/B.JPEG and shop/B.png, needs one shop image a product", BOTH),
    "clip without pictures": (
        empty, r"^clips/B/take 10 \(clip B/take 10\): found no picture \(but IMG_1.HEIC\), needs jpg, jpeg, pn", LAST),
    "clip without anything": (
        lambda source: [path.unlink() for path in (source / "clips" / "B" / "take 10").iterdir()],
        r"^clips/B/take 10 \(clip B/take 10\): found no picture, needs jpg, jpeg, png or webp; add them", LAST),
    "broken picture": (
        lambda source: first_frame(source).write_bytes(b"<html>"),
        r"^clips/B/take 10/IMG_\d.\w+ \(clip B/take 10\): is not a picture .*b'<html>'.*; replace the file.$", LAST),
    "broken shop image": (
        lambda source: shop_image(source, "B").write_bytes(b""),
        r"^shop/B.JPEG \(image B\): has 0 bytes, needs a JPEG, PNG or WebP; restore the file.$", BOTH),
    "link to nowhere": (
        lambda source: (source / "clips" / "B" / "take 10" / "IMG_9.jpg").symlink_to("nowhere.jpg"),
        r"^clips/B/take 10/IMG_9.jpg \(clip B/take 10\): cannot be read \(No such file", LAST),
    "frame that links out": (
        link_out(first_frame), r"\(clip B/take 10\): found a link to .*outside/IMG.*, needs a file below", LAST),
    "clip that links out": (
        link_out(lambda source: source / "clips" / "B" / "take 10"), r"\(clip B/take 10\): found a link to ", LAST),
    "product that links out": (
        link_out(lambda source: source / "clips" / "B"), r"\(clip B/take 1\): found a link to .*outside/B/take", BOTH),
    "shop image that links out": (
        link_out(lambda source: shop_image(source, "B")), r"\(image B\): found a link to .*outside/B.JPEG", BOTH),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CLIPS)
def test_a_fault_of_a_clip_is_named_once_and_can_be_skipped(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message, skipped = BAD_CLIPS[name]
    damage(source)
    assert run(source, tmp_path / "records", "--clips-per-shard=1") == 1
    errors = capsys.readouterr().err
    assert len(re.findall(message, errors, re.MULTILINE)) == 1, errors
    assert not (tmp_path / "records" / "manifest.json").exists()

    assert run(source, tmp_path / "records", "--clips-per-shard=1", "--on-error=skip") == 1
    assert "raise --max-skip-rate" in capsys.readouterr().err
    assert run(source, tmp_path / "records", "--clips-per-shard=1", "--on-error=skip", "--max-skip-rate=1") == 0
    dataset = open_dataset(tmp_path / "records")
    kept = {clip for split in dataset.splits for clip in dataset.split(split).clip_ids}
    assert kept == {f"{product}/take {take}" for product in "ABC" for take in (1, 10)} - set(skipped)
    report = json.loads((tmp_path / "records" / "report.json").read_text())
    assert sum(split["skipped_clips"] for split in report["splits"].values()) == len(skipped)


def test_shards_stay_when_a_fault_is_corrected(source: Path, tmp_path: Path) -> None:
    image = shop_image(source, "B")
    image.rename(source / "B")
    assert run(source, tmp_path / "records", "--clips-per-shard=1") == 1
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").glob("*-clips-*.tfrecord")}
    (source / "B").rename(image)
    assert run(source, tmp_path / "records", "--clips-per-shard=1") == 0
    assert sum(path.stat().st_mtime_ns == changed for path, changed in finished.items()) >= 2


BAD_NAMES = {
    "tab": ("clips/a\tb/take 1", r"clips/a\tb: found the name 'a\tb', needs no control character and no space"),
    "newline": ("clips/A/take\n2", r"clips/A/take\n2: found the name 'take\n2', needs no control character"),
    "space": ("clips/A /take 1", "clips/A : found the name 'A ', needs no control character and no"),
    "space before the suffix": ("shop/D .jpg", "shop/D .jpg: found the name 'D .jpg', needs"),
    "bytes that are no text": (b"clips/A\xff/take 1", r"clips/A\udcff: found the name 'A\udcff', needs no control"),
    "long name": (f"clips/{100 * 'ä'}/take 1", "found the clip id 'ää"),
    "long product": (f"shop/{101 * 'ä'}.jpg", "found the image id 'ää"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_would_break_an_id_is_refused(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, message = BAD_NAMES[name]
    path = source / (path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else path)
    try:
        if path.suffix:
            shutil.copy(shop_image(source, "A"), path)
        else:
            path.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system takes shorter names, or names of UTF-8 only")
    assert run(source, tmp_path / "records") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_the_same_name_in_two_writings_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("NFC", "NFD"):
        (source / "clips" / unicodedata.normalize(form, "é") / "take 1").mkdir(parents=True, exist_ok=True)
    if len([path for path in (source / "clips").iterdir() if unicodedata.normalize("NFC", path.name) == "é"]) < 2:
        pytest.skip("this file system has one writing of a name")
    assert run(source, tmp_path / "records") == 1
    assert "found the name 'é' twice, written differently in Unicode; rename one." in capsys.readouterr().err


def test_products_with_the_same_shop_image_are_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(shop_image(source, "B"), source / "shop" / "D.jpeg")
    assert run(source, tmp_path / "records") == 0
    warning = (
        "shop/B.JPEG and shop/D.jpeg: found the same picture for several products, needs one that tells them apart; "
    )
    warning += "replace one."
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "records" / "report.json").read_text())["remarks"] == [warning]


def test_a_product_without_clips_stands_on_the_shelf(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "clips" / "B")
    assert run(source, tmp_path / "records") == 0
    dataset = open_dataset(tmp_path / "records")
    assert list(dataset.split("train").image_ids) == ["A", "C"]
    assert list(dataset.split("test").image_ids) == ["A", "B", "C"]


def test_what_is_no_picture_is_left_out_and_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (
        "clips/A/take 1/IMG_3.MOV",
        "clips/A/cover.jpg",
        "clips/notes.txt",
        "shop/Thumbs.db",
        "shop/.DS_Store",
    ):
        (source / path).write_bytes(b"...")
    (source / "clips" / "A" / "take 1" / "more").mkdir()
    assert run(source, tmp_path / "records") == 0
    named = "clips/A/cover.jpg, clips/A/take 1/IMG_3.MOV, clips/A/take 1/more, clips/notes.txt Films such as "
    suffixes = ", ".join(suffix[1:] for suffix in SUFFIXES)
    assert f"left out, since no clip, frame ({suffixes}) or shop image: {named}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "status", "message"),
    [
        (shutil.rmtree, 2, "source: found no folder clips/ and shop/, needs the layout folder of docs/data_formats.md"),
        (lambda source: shutil.rmtree(source / "shop"), 2, "source: found no folder shop/, needs the layout folder"),
        (lambda source: [shutil.rmtree(path) for path in (source / "clips").iterdir()], 2,
         "source/clips: found no clip, needs clips/<product>/<clip>/ with pictures; correct the path."),
        (lambda source: [shutil.rmtree(path) for path in (source / "clips" / "A").iterdir()], 1,
         "clips/A: found no folder of a clip, needs clips/<product>/<clip>/ with pictures; give each clip a folder"),
    ],
)  # fmt: skip
def test_an_empty_source_is_refused(
    damage: Callable[[Path], object], status: int, message: str, source: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(source)
    assert run(source, tmp_path / "records") == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_a_training_list_is_no_option_of_a_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "records", "--train-annotation=x") == 2
    assert "leave it out (clips.csv may name splits)" in capsys.readouterr().err
    assert run(source, tmp_path / "records", "--splits=val") == 2
    assert "found nothing for val (only for train, test), needs it in clips/" in capsys.readouterr().err


def test_a_folder_that_has_changed_is_another_conversion(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "records") == run(source, tmp_path / "records") == 0
    assert "already converted, nothing to do" in capsys.readouterr().out
    (source / "clips.csv").write_text("product,clip,split\nA,take 1,test\n")
    shutil.copy(first_frame(source), source / "clips" / "A" / "take 1" / "IMG_7.jpg")
    assert run(source, tmp_path / "records") == 2
    assert "found other work, which differs in lists" in capsys.readouterr().err


def test_a_last_clip_without_pictures_does_not_cost_its_product_the_test_clip(source: Path, tmp_path: Path) -> None:
    (source / "clips" / "A" / "take 99").mkdir()
    options = ["--on-error=skip", "--max-skip-rate=1"]
    assert run(source, tmp_path / "records", *options) == 0
    assert "A/take 10" in open_dataset(tmp_path / "records").split("test").clip_ids
