"""The drawn shop: it converts, it is the same with any number of workers, and its labels are true."""

import ast
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from data_pipeline import synthetic
from data_pipeline.convert import Options, convert
from data_pipeline.format.reader import open_dataset
from data_pipeline.input.decode import decode
from data_pipeline.synthetic_shop import patterns
from data_pipeline.synthetic_shop.catalogue import Clip, plan_shop
from data_pipeline.synthetic_shop.categories import CATEGORIES
from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.shots import HEIGHT, WIDTH, Sprite
from rice_jax.retrieval.histogram import histogram

SIZES = ["--products=16", "--clips=40", "--seed=7"]
SHOP = plan_shop(products=16, clips=40, seed=7)


def draw(output: Path, *, workers: int = 1) -> int:
    return synthetic.main([f"--output={output}", f"--workers={workers}", *SIZES])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synthetic") / "shop"
    assert draw(output) == 0
    return output


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def training_rows(source: Path) -> dict[str, list[str]]:
    lists = sorted((source / "annotations").glob("training_videoinfo_*.txt"))
    rows = [line.split("\t") for path in lists for line in path.read_text().splitlines()]
    return {row[0]: row for row in rows}


def shares(boxes: list[list[int]]) -> list[float]:
    return [(x2 - x1) * (y2 - y1) / (WIDTH * HEIGHT) for x1, y1, x2, y2 in boxes if x2]


# --- the layout -------------------------------------------------------------------------------------------------------


def test_it_converts_without_a_word_of_warning(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = convert(Options(layout="lpr750k", source=drawn, output=tmp_path / "records", frames="all"))
    assert capsys.readouterr().err == ""
    assert not report["remarks"]
    for split in ("train", "val", "test"):
        clips, counts = SHOP.clips_of(split), report["splits"][split]
        listed = [min(10, clip.length) if split == "test" else clip.length for clip in clips]  # docs/official.md 8.8
        assert (counts["clips"], counts["frames"]) == (len(clips), sum(listed))
        assert not counts["skipped"]
    test = open_dataset(tmp_path / "records").split("test")
    for row, clip_id in enumerate(test.clip_ids):
        product = SHOP.products[next(clip for clip in SHOP.clips if clip.id == clip_id).product]
        assert test.truth(row) == (product.image_id,)
        assert product.image_id in {test.image_ids[image] for image in test.gallery_of(row)}


def test_the_files_are_the_same_for_any_number_of_workers(drawn: Path, tmp_path: Path) -> None:
    assert draw(tmp_path / "shop", workers=2) == 0
    assert digests(tmp_path / "shop") == digests(drawn)


def test_a_run_that_was_stopped_goes_on_and_draws_nothing_twice(drawn: Path, tmp_path: Path) -> None:
    output, painted = tmp_path / "shop", []

    def stopping_at(limit: int) -> mock._patch:
        frame = synthetic.Scene.frame

        def counted(scene: synthetic.Scene, second: int) -> Image.Image:
            if len(painted) == limit:
                raise KeyboardInterrupt
            painted.append(second)
            return frame(scene, second)

        return mock.patch.object(synthetic.Scene, "frame", counted)

    with stopping_at(100):
        assert draw(output) == 1
    assert not (output / "annotations").exists()  # the converter must not take it for a complete set
    lengths = [clip.length for clips in SHOP.clips_by_livestream for clip in clips]  # in the order of the drawing
    whole = max(frames for frames in itertools.accumulate(lengths) if frames <= 100)
    assert 50 < whole < 100
    painted.clear()
    with stopping_at(10**6):
        assert draw(output) == 0
    assert len(painted) == sum(clip.length for clip in SHOP.clips) - whole
    assert digests(output) == digests(drawn)


def test_a_finished_set_is_left_alone(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*") if path.is_file()}
    assert draw(drawn) == 0
    assert "already drawn" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in drawn.rglob("*") if path.is_file()}


# --- what is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("products", "clips"), [(6, 12), (10, 60), (33, 100), (102, 714), (500, 2000)])
def test_a_shop_of_any_size_has_the_products_splits_and_shelves_it_should(products: int, clips: int) -> None:
    shop = plan_shop(products=products, clips=clips, seed=3)
    assert (len(shop.products), len(shop.clips)) == (products, clips)
    assert len({clip.id for clip in shop.clips}) == clips
    assert len({product.image_id for product in shop.products}) == products
    assert len({product.category for product in shop.products}) == min(len(CATEGORIES), products // 3)
    assert len({(product.category, product.palette, product.pattern) for product in shop.products}) == products

    seen = {product.index for product in shop.products if product.seen}
    assert {clip.product for clip in shop.clips_of("train")} == seen
    assert {clip.product for clip in shop.clips_of("val")} <= seen
    assert {clip.product for clip in shop.clips_of("test")} == set(range(products)) > seen

    for clip in shop.clips:
        live = shop.livestreams[clip.livestream]
        siblings = {each.index for each in shop.products if each.group == shop.products[clip.product].group}
        assert len(siblings) >= 3
        assert siblings <= set(live.shelf)
        assert clip.id.startswith(live.id)
        assert set(clip.others) <= set(live.shelf) - {clip.product}
        assert int(clip.id.split("-")[6]) - int(clip.id.split("-")[5]) == 1000 * clip.length
    assert all(len(live.shelf) >= min(20, products) for live in shop.galleries)


def test_few_products_have_many_training_clips() -> None:
    shop = plan_shop(products=102, clips=714, seed=0)
    counts = sorted(Counter(clip.product for clip in shop.clips_of("train")).values())
    assert counts[0] >= 2
    assert counts[-1] >= 4 * counts[len(counts) // 2]


def test_unseen_products_are_in_no_training_file(drawn: Path) -> None:
    unseen = {product.image_id for product in SHOP.products if not product.seen}
    assert unseen
    assert not unseen & {row[3] for row in training_rows(drawn).values()}
    assert not unseen & {path.stem for path in (drawn / "training_image").iterdir()}
    truth = json.loads(next((drawn / "annotations").glob("test_videoid_to_gtimage_*")).read_text())
    for name, expected in (("seen", False), ("unseen", True)):
        listed = (drawn / "annotations" / f"test_videoid_{name}.txt").read_text().split()
        assert listed == [clip.id for clip in SHOP.clips_of("test") if (truth[clip.id][0] in unseen) is expected]


def test_siblings_share_their_colour_histogram_and_strangers_do_not(drawn: Path) -> None:
    pictures = {path.name[:36]: path for path in drawn.glob("gallery/*/*.jpg")}
    counts = [histogram(decode(pictures[product.image_id].read_bytes())) for product in SHOP.products]
    shared = np.array([[np.minimum(one, other).sum() for other in counts] for one in counts])
    groups = np.array([product.group for product in SHOP.products])
    siblings = groups[:, None] == groups
    assert shared[siblings].min() > 0.85
    assert np.median(shared[siblings & ~np.eye(16, dtype=bool)]) > 0.93
    assert np.median(shared[~siblings]) < 0.75


@pytest.mark.parametrize("name", patterns.PATTERNS)
def test_every_pattern_gives_each_colour_its_share(name: str) -> None:
    y, x = np.mgrid[-1.4:1.4:200j, -1:1:150j].astype(np.float32)
    body = np.hypot(x, y / 1.4) < 1
    field = patterns.PATTERNS[name](x, y, Dice(0, "pattern", 1))
    levels = patterns.levels(field, body)
    found = np.bincount(levels[body], minlength=3) / body.sum()
    np.testing.assert_allclose(found, patterns.SHARES, atol=0.02)
    others = [patterns.PATTERNS[other](x, y, Dice(0, "pattern", 1)) for other in patterns.PATTERNS if other != name]
    differs = [np.mean((patterns.levels(other, body) != levels)[body]) for other in others]
    assert min(differs) > 0.1


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Studio:
    """A studio with all sprites, which a finished set does not keep."""
    output = tmp_path_factory.mktemp("studio")
    (output / ".work" / "sprites").mkdir(parents=True)
    studio = synthetic.Studio(SHOP, output)
    for product in SHOP.products:
        studio.draw_product(product.index)
    return studio


@pytest.mark.parametrize("clip", SHOP.clips[:8], ids=lambda clip: clip.index)
def test_a_box_holds_the_products_pixels_and_no_margin(studio: synthetic.Studio, clip: Clip) -> None:
    scene = studio.scene(clip)
    plain = [dataclasses.replace(shot, hands=(), passing=None, streak=-1, defocus=0.0) for shot in scene.shots]
    blank = Image.new("RGBA", (WIDTH, HEIGHT))
    dark, light = (_tinted(scene.product, level) for level in (0, 255))
    for second in range(clip.length):
        box = scene.box(second)
        one, other = (
            np.asarray(dataclasses.replace(scene, product=each, shots=plain, overlay=blank).frame(second), np.int64)
            for each in (dark, light)
        )
        rows, columns = np.nonzero(np.abs(one - other).max(axis=2) > 100)
        if box is None:
            assert not len(rows)
        else:
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert box[0] <= found[0] and box[1] <= found[1] and found[2] <= box[2] and found[3] <= box[3]
            np.testing.assert_allclose(found, box, atol=3)


def _tinted(sprite: Sprite, level: int) -> Sprite:
    """The same silhouette in one grey."""
    picture = Image.new("L", sprite.picture.size, level)
    return Sprite(Image.merge("RGBA", (picture, picture, picture, sprite.picture.getchannel("A"))))


def test_types_of_clips_agree_with_their_boxes_and_frames(drawn: Path) -> None:
    rows = training_rows(drawn)
    clips = [clip for clip in SHOP.clips if clip.split != "test"]
    assert list(rows) == [clip.id for split in ("train", "val") for clip in SHOP.clips_of(split)]
    for clip in clips:
        _, frames, boxes, *_, scale, duration, number = rows[clip.id]
        assert all((drawn / frame).is_file() for frame in ast.literal_eval(frames))
        of_shown = shares(ast.literal_eval(boxes))
        limits = {"small": (0, 0.1), "medium": (0.1, 0.25), "large": (0.25, 1)}[scale]
        assert limits[0] <= np.mean(of_shown) <= limits[1]
        seconds = {"short": (1, 4), "medium": (5, 7), "long": (8, 99)}[duration]
        assert seconds[0] <= len(of_shown) <= seconds[1]
        assert number == ("multiple" if clip.others else "single")
    for column in (-3, -2, -1):
        assert len({row[column] for row in rows.values()}) == (2 if column == -1 else 3)


def test_a_clip_is_multiple_where_its_pictures_show_other_products(studio: synthetic.Studio) -> None:
    for clip in SHOP.clips[:12]:
        second = sum(clip.shown) // 2
        there, bare = studio.scene(clip), studio.scene(dataclasses.replace(clip, others=()))
        bare = dataclasses.replace(there, backdrop=bare.backdrop, passing=None)
        pictures = [np.asarray(scene.frame(second), np.int64) for scene in (there, bare)]
        pixels = np.count_nonzero(np.abs(pictures[0] - pictures[1]).max(axis=2) > 20)
        assert (pixels > 0.01 * WIDTH * HEIGHT) == bool(clip.others), clip.id


def test_light_is_the_livestreams_and_differs_between_them(studio: synthetic.Studio) -> None:
    warmth = {
        live.index: {round(shot.gains[0] / shot.gains[2], 6) for clip in clips for shot in studio.scene(clip).shots}
        for live, clips in zip(SHOP.livestreams, SHOP.clips_by_livestream, strict=True)
        if clips
    }
    assert all(len(each) == 1 for each in warmth.values())
    assert len({ratio for each in warmth.values() for ratio in each}) == len(warmth) > 1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--products=5"], "--products: found 5, needs 6 (two groups"),
        (["--products=-1"], "--products: found -1, needs 6 (two groups"),
        (["--products=10000000000"], "to 100000"),
        (["--products=16", "--clips=29"], "--clips: found 29, needs at least 30 for 16 products"),
        (["--products=16", "--clips=0"], "--clips: found 0, needs at least 30"),
        (["--seed=-1"], "--seed: found -1, needs 0 to"),
        (["--seed=18446744073709551616"], "--seed: found 18446744073709551616, needs 0 to"),
    ],
)
def test_a_shop_that_cannot_be_drawn_is_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synthetic.main([f"--output={tmp_path / 'shop'}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "shop").exists()


def test_the_smallest_number_of_clips_can_be_drawn() -> None:
    shop = plan_shop(products=16, clips=30, seed=0)
    assert {split: len(shop.clips_of(split)) for split in ("train", "val", "test")} == {
        "train": 13,
        "val": 1,
        "test": 16,
    }


@pytest.mark.parametrize("arguments", [["--products=few"], ["--workers=0"], ["--clip=9"], []])
def test_wrong_use_ends_with_status_2(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        synthetic.main([*([f"--output={tmp_path}"] if arguments else []), *arguments])


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert draw(tmp_path) == 2
    assert "found thesis.txt, needs an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_shop_in_the_folder_is_refused(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(drawn)
    assert synthetic.main([f"--output={drawn}", "--products=16", "--clips=40", "--seed=8"]) == 2
    assert "seed 7, needs 8" in capsys.readouterr().err
    assert digests(drawn) == before
