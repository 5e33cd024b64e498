"""A loaded model: batches filled up no further than needed, pictures in every form that people have them in."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rice_jax.retrieval.galleries import power_of_two
from rice_jax.retrieval.model import Model, load
from tests import official
from tests.lpr_layouts import FRAMES, SHOP_IMAGES
from tests.retrieval.test_matching import random_model, save_run

SIDE, SLOTS = 32, 3  # of the smoke config


@functools.cache
def model(devices: int = 1) -> Model:
    return random_model(official.mesh_of(devices, 1), batch_size=16)


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, SIDE, SIDE, 3), np.uint8)


# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "count", "clips", "images"),
    [
        (1, 1, [1], [1]),
        (1, 5, [8], [8]),
        (1, 19, [16, 4], [32]),
        (1, 70, [16, 16, 16, 16, 8], [64, 8]),
        (8, 1, [8], [8]),
    ],
)
def test_few_pictures_fill_up_no_further_than_to_the_next_power_of_two(
    monkeypatch: pytest.MonkeyPatch, devices: int, count: int, clips: list[int], images: list[int]
) -> None:
    """A batch of images has as many pictures as one of 16 clips of four frames."""
    sizes: list[int] = []

    def spy(self: Model, function: Any, *arrays: Any, options: Any = ()) -> list[np.ndarray]:
        sizes.append(len(arrays[0]))
        return [np.zeros((len(arrays[0]), 16), np.float32)]

    monkeypatch.setattr(Model, "run", spy)
    assert model(devices).encode_clips(drawn(count, SLOTS)).shape == (count, 16)
    assert sizes == clips
    sizes.clear()
    assert model(devices).encode_images(drawn(count)).shape == (count, 16)
    assert sizes == images


def test_embeddings_are_the_same_however_far_a_batch_is_filled_up() -> None:
    frames, images = drawn(5, SLOTS), drawn(5)
    for encode, pictures in ((model().encode_clips, frames), (model().encode_images, images)):
        whole = encode(pictures)
        for count in (1, 2, 3):
            np.testing.assert_allclose(encode(pictures[:count]), whole[:count], atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 31, 33])
def test_scores_are_the_same_in_galleries_of_any_size(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    frames, images = drawn(3, SLOTS), drawn(34)
    whole = model().match(frames, None, images)
    shapes: list[tuple[int, ...]] = []
    run = Model.run

    def spy(self: Model, function: Any, *arrays: Any, options: Any = ()) -> list[Any]:
        shapes.append(arrays[2].shape if len(arrays) > 2 else ())
        return run(self, function, *arrays, options=options)

    monkeypatch.setattr(Model, "run", spy)
    some = model().match(frames, None, images[:count])
    assert some.shape == (3, count)
    np.testing.assert_allclose(some, whole[:, :count], atol=1e-6)
    assert shapes[-1][0] == power_of_two(count) + 1  # class tokens: galleries of many sizes share a program


def test_load_takes_a_batch_size(tmp_path: Path) -> None:
    run = save_run(model(8), tmp_path)
    assert load(run).batch_size == 16
    assert load(run, batch_size=3).batch_size == 8  # a multiple of the eight devices
    assert load(run, mesh=official.mesh_of(1, 1), batch_size=3).batch_size == 3
    with pytest.raises(ValueError, match="batch_size: found 0, needs at least 1"):
        load(run, batch_size=0)


def test_an_override_of_no_field_names_the_nearest_one(tmp_path: Path) -> None:
    run = save_run(model(8), tmp_path)
    with pytest.raises(ValueError, match=r"no such field; the nearest is --config.eval_flip"):
        load(run, overrides={"eval_flp": "true"})


@pytest.mark.parametrize("field", ["eval_batch_size", "data.eval_num_frames"])
def test_an_override_that_the_field_cannot_have_is_refused(tmp_path: Path, field: str) -> None:
    run = save_run(model(8), tmp_path)
    with pytest.raises(ValueError, match=rf"--config.{field}=0: needs a whole number of at least 1"):
        load(run, overrides={field: "0"})


# --- Pictures ---------------------------------------------------------------------------------------------------------


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def written_to_memory(path: Path) -> io.BytesIO:
    file = io.BytesIO()
    file.write(path.read_bytes())
    return file  # it stands at its end


class OnlyReads:
    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()

    def read(self) -> bytes:
        return self._data


FORMS: list[Callable[[Path], Any]] = [
    str,
    Path.read_bytes,
    lambda path: bytearray(path.read_bytes()),
    lambda path: memoryview(path.read_bytes()),
    written_to_memory,
    OnlyReads,
    lambda path: io.BufferedReader(io.BytesIO(path.read_bytes())),
    opened,
    lambda path: np.asarray(opened(path)),
    lambda path: np.asfortranarray(opened(path)),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_the_same_in_whatever_form_it_is_given(form: Callable[[Path], Any]) -> None:
    paths = [FRAMES[0], SHOP_IMAGES[1]]
    expected = model().prepare(paths)
    assert expected.shape == (2, SIDE, SIDE, 3) and expected.dtype == np.uint8
    np.testing.assert_array_equal(model().prepare([form(path) for path in paths]), expected)
    np.testing.assert_array_equal(model().prepare(form(path) for path in paths), expected)


def test_frames_in_one_array_and_grey_and_transparent_ones_are_taken() -> None:
    levels = np.random.default_rng(1).integers(0, 256, (2, 40, 50, 3), np.uint8)
    together = model().prepare(levels)
    np.testing.assert_array_equal(together, model().prepare(list(levels)))
    grey = levels[0, ..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(model().prepare([grey]), model().prepare([as_rgb]))
    opaque = np.concatenate([levels[0], np.full((40, 50, 1), 255, np.uint8)], axis=2)
    np.testing.assert_array_equal(model().prepare([opaque]), together[:1])
    assert model().prepare([]).shape == (0, SIDE, SIDE, 3)


def test_preparing_changes_nothing_in_a_picture_of_pillow() -> None:
    picture = Image.new("P", (40, 40), 3)
    picture.info["transparency"] = 3
    model().prepare([picture])
    assert picture.mode == "P" and picture.info == {"transparency": 3}


def test_exif_turns_a_picture_of_pillow_as_it_turns_a_file() -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    opened(FRAMES[0]).resize((48, 32)).save(file, "JPEG", exif=exif)
    turning = random_model(official.mesh_of(1, 1), **{"data.apply_exif": True})
    by_file, by_picture = turning.prepare([file]), turning.prepare([Image.open(file)])
    np.testing.assert_array_equal(by_file, by_picture)
    assert (by_file != model().prepare([file])).any()


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        (np.zeros((8, 8, 3)), r"an array of float64 \[8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint16), r"an array of uint16 \[8, 8, 3\]"),
        (np.zeros((8, 8), bool), r"an array of bool \[8, 8\]"),
        (np.zeros((3, 8, 8), np.uint8), r"an array of uint8 \[3, 8, 8\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"an array of uint8 \[1, 8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"an array of uint8 \[0, 8, 3\]"),
        (io.StringIO("text"), "a file opened as text"),
        ([1, 2], "builtins.list"),
        (None, "builtins.NoneType"),
    ],
)
def test_what_is_no_picture_is_refused_with_what_it_is_and_what_is_needed(picture: Any, found: str) -> None:
    with pytest.raises(TypeError, match=rf"^picture 1: found {found}, needs a path, bytes, .*RGBA\.$"):
        model().prepare([str(FRAMES[0]), picture])


@pytest.mark.parametrize("form", [*FORMS, lambda path: np.zeros((2, 8, 8), np.uint8)])
def test_a_single_picture_is_not_taken_apart(form: Callable[[Path], Any]) -> None:
    with pytest.raises(TypeError, match=r"several pictures; give \[picture\]"):
        model().prepare(form(FRAMES[0]))


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"text")
    cut = FRAMES[0].read_bytes()[:-300]
    with pytest.raises(ValueError, match=r"no\.jpg: is not a picture"):
        model().prepare([tmp_path / "no.jpg"])
    for picture in (b"", cut, io.BytesIO(cut), Image.open(io.BytesIO(cut))):
        with pytest.raises(ValueError, match=r"^picture 1: "):
            model().prepare([FRAMES[0], picture])
