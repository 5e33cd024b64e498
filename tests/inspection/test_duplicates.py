"""Pictures that show the same are found, in one group each; pictures that share a ground, a frame or a layout are not
taken for one, and their number does not square the work."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from data_pipeline.inspection import neighbours
from data_pipeline.inspection.duplicates import equal_rows
from tests.inspection.pictures import (
    SIDE,
    encoded,
    fingerprints_of,
    fixed_camera,
    groups_across,
    groups_within,
    smooth,
)  # fmt: skip
from tests.lpr_layouts import FRAMES, SHOP_IMAGES


def photographs() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in (*SHOP_IMAGES, *FRAMES)]


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
@pytest.mark.parametrize("side", [96, 100, 128, 150, 224, 333])
def test_every_photograph_encoded_anew_is_found_and_no_other(quality: int, side: int) -> None:
    pictures = [encoded(each, 90) for each in photographs()]
    again = [encoded(each, quality, (side, side)) for each in photographs()]
    found = groups_across(pictures, again)
    assert [(group.rows, group.other_rows, group.same_bytes) for group in found] == [
        ([row], [row], False) for row in range(len(pictures))
    ]


def test_every_mirrored_photograph_is_found_and_no_other() -> None:
    pictures = [encoded(each, 90) for each in photographs()]
    mirrored = [encoded(ImageOps.mirror(each), 70, (150, 150)) for each in photographs()]
    assert [(each.rows, each.other_rows) for each in groups_across(pictures, mirrored)] == [
        ([row], [row]) for row in range(len(pictures))
    ]
    assert groups_within([*pictures, *mirrored]) == [[row, row + len(pictures)] for row in range(len(pictures))]


def test_photographs_are_no_duplicates_of_one_another() -> None:
    assert groups_within([path.read_bytes() for path in (*SHOP_IMAGES, *FRAMES)]) == []


def test_equal_bytes_are_a_group_on_both_sides() -> None:
    a, b, c = (encoded(smooth(seed)) for seed in range(3))
    groups = groups_across([a, b, a, c], [b, a, a])
    assert [(each.rows, each.other_rows, each.same_bytes) for each in groups] == [
        ([0, 2], [1, 2], True),
        ([1], [0], True),
    ]


@pytest.mark.parametrize("share", [0.014, 0.005])
def test_a_still_background_is_no_duplicate(share: float) -> None:
    frames = fixed_camera(150, share)
    rng = np.random.default_rng(1)
    pictures = [encoded(frame, int(rng.integers(60, 96))) for frame in frames]
    assert groups_within(pictures) == []
    assert groups_across(pictures[:75], pictures[75:]) == []


def test_a_duplicate_before_a_still_background_is_found_with_its_copies_as_one_group() -> None:
    frames = fixed_camera(150, 0.014)
    train = [encoded(frame, 85) for frame in frames[:100]]
    test = [encoded(frame, 70) for frame in frames[100:]]
    test += [encoded(frames[7], quality, size) for quality, size in ((50, None), (80, (128, 128)), (90, (200, 160)))]
    test.append(encoded(frames[7][:, ::-1], 80))
    (group,) = groups_across(train, test)
    assert (group.rows, group.other_rows) == ([7], [50, 51, 52, 53])


def test_the_same_product_at_another_place_is_another_picture() -> None:
    background, package = smooth(1), smooth(2, 30, 4)
    pictures = []
    for x in range(0, 220, 20):
        frame = background.copy()
        frame[100:130, x : x + 30] = package
        pictures.append(encoded(frame))
    assert groups_within(pictures) == []


def rows_compared(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many pairs of rows are compared in the search for duplicates among `count` frames of one camera."""
    compared, whole = [0], {name: getattr(neighbours, name) for name in ("_all_pairs", "_neighbours")}

    def counted(name: str) -> Callable:
        def pairs(*given: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for ones, twos in whole[name](*given):
                compared[0] += len(ones)
                yield ones, twos

        return pairs

    pictures = [encoded(frame, 80) for frame in fixed_camera(count, 0.014)]
    with monkeypatch.context() as patch:
        for name in whole:
            patch.setattr(neighbours, name, counted(name))
        assert groups_across(pictures[: count // 2], pictures[count // 2 :]) == []
    return compared[0]


def test_the_comparisons_grow_with_the_number_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [rows_compared(count, monkeypatch) for count in (200, 400, 800)]
    assert work[1] <= 2.5 * work[0] and work[2] <= 2.5 * work[1]


def test_a_title_card_in_many_clips_is_one_group() -> None:
    card = Image.new("RGB", (SIDE, SIDE), "navy")
    ImageDraw.Draw(card).text((40, 110), "SALE STARTS NOW", fill="white", font_size=20)
    cards = [encoded(card, quality) for quality in range(40, 96)]
    (group,) = groups_across(cards[:30], cards[30:])
    assert (len(group.rows), len(group.other_rows)) == (30, 26)


def test_black_frames_are_not_the_same_frame() -> None:
    black = [encoded(Image.new("RGB", (64, 64), (shade, 0, 0)), 90) for shade in (0, 0, 3)]
    assert groups_within(black) == []


def test_a_split_screen_with_different_right_halves_is_no_duplicate() -> None:
    left = smooth(1)[:, : SIDE // 2]
    screens = [np.concatenate([left, smooth(seed)[:, : SIDE // 2]], axis=1) for seed in range(2, 60)]
    assert groups_within([encoded(screen) for screen in screens]) == []


def test_a_frame_drawn_around_different_products_is_no_duplicate() -> None:
    pictures = []
    for seed in range(60):
        framed = smooth(9)
        framed[96:160, 96:160] = smooth(100 + seed, 64, 3)
        pictures.append(encoded(framed))
    assert groups_within(pictures) == []


def packshot(label: str, colour: tuple[int, int, int] = (180, 30, 40)) -> Image.Image:
    picture = Image.new("RGB", (300, 300), "white")
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((100, 40, 200, 270), 20, fill=colour)
    draw.rectangle((110, 120, 190, 190), fill=(240, 230, 200))
    draw.text((116, 140), label, fill=(20, 20, 20), font_size=22)
    return picture


def test_packages_that_differ_in_print_or_colour_are_no_duplicates() -> None:
    labels = ["Cherry", "Vanilla", "Mango", "Peach", "Lemon", "Plum"]
    colours = [(180, 30, 40), (180, 60, 40), (150, 30, 70), (180, 30, 90), (200, 80, 30)]
    pictures = [encoded(packshot(label), 85) for label in labels]
    pictures += [encoded(packshot("Cherry", colour), 85) for colour in colours[1:]]
    assert groups_within(pictures) == []
    again = [encoded(packshot(label), 75) for label in labels]
    assert [(each.rows, each.other_rows) for each in groups_across(pictures, again)] == [
        ([row], [row]) for row in range(len(labels))
    ]


def test_near_pairs_link_what_all_pairs_link() -> None:
    rng = np.random.default_rng(0)
    centres = rng.integers(10, 245, (120, 12))
    values = np.clip(centres[rng.integers(0, 120, 900)] + rng.integers(-3, 4, (900, 12)), 0, 255).astype(np.uint8)
    apart = np.abs(values[:, None].astype(int) - values[None]).max(axis=2) <= 6
    found, expected = neighbours.Groups(), neighbours.Groups()
    for ones, twos in neighbours.near_pairs(values, 6):
        found.join_all(ones, twos)
    expected.join_all(*np.nonzero(np.triu(apart, 1)))
    assert found.sorted() == expected.sorted()


def test_equal_rows_are_found_by_their_bytes(tmp_path: Path) -> None:
    a, b, black = encoded(smooth(0)), encoded(smooth(1)), encoded(np.zeros((64, 64, 3), np.uint8))
    assert list(equal_rows(fingerprints_of([a, b, black, a, black, b, a]), tmp_path / "scratch")) == [[0, 3, 6], [1, 5]]
