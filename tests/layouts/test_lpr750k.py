"""LPR750K: parsing of rows, choice of lists, search for pictures, and conversion."""

import contextlib
import json
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.convert import Options, convert
from data_pipeline.faults import BadInputError, WrongUseError
from data_pipeline.format.reader import open_dataset
from data_pipeline.layouts import annotations
from data_pipeline.layouts.annotations import parse_boxes, parse_frames, parse_row, read_lines, training_lists
from data_pipeline.layouts.detect import open_source
from data_pipeline.layouts.lpr750k import Lpr750k
from data_pipeline.layouts.names import has_control_characters
from data_pipeline.layouts.pictures import PictureReader, decode_picture
from tests.lpr_layouts import (
    FRAMES,
    IMAGE_IDS,
    LIVES,
    SHOP_IMAGES,
    SIZE,
    TEST,
    TITLES,
    TRAIN,
    VAL,
    edit_json,
    edit_lines,
    make_lpr750k,
    ten_of,
    training_row,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lpr750k(tmp_path_factory.mktemp("lpr750k") / "source")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_read_by_its_columns() -> None:
    row = parse_row(training_row(TRAIN[1], paths=True).encode())
    assert (row.clip_id, row.image_id, row.product) == (TRAIN[1].id, IMAGE_IDS[1], "spu1")
    assert (row.image_title, row.category, row.category_name, row.speech) == (TITLES[1], "1", "C1", "")
    assert (row.scale, row.duration, row.number) == ("large", "short", "single")
    assert [Path(frame).stem for frame in row.frames] == TRAIN[1].frame_ids
    assert row.boxes == ((), ((1.0, 0.0, 64.0, 32.0),), ((2.0, 0.0, 64.0, 32.0),), ((3.0, 0.0, 64.0, 32.0),))


def test_ten_columns_are_enough_and_an_empty_last_cell_counts() -> None:
    cells = training_row(TRAIN[0], paths=True).split("\t")
    row = parse_row("\t".join(cells[:10]).encode())
    assert (row.speech, row.scale) == ("", "")
    with pytest.raises(BadInputError, match=r"found 9 columns"):
        parse_row("\t".join(cells[:10]).strip().encode())


def test_a_row_without_box_column_content_has_no_boxes() -> None:
    assert parse_boxes("", 3) is None
    assert parse_boxes("[]", 3) is None


def test_several_boxes_a_frame_and_none_are_distinguished() -> None:
    assert parse_boxes("[[[1, 2, 3, 4], [5, 6, 7, 8.5]], [], [0, 0, 0, 0]]", 3) == (
        ((1, 2, 3, 4), (5, 6, 7, 8.5)), (), (),
    )  # fmt: skip


@pytest.mark.parametrize(
    "cell", ["[[1, 2, 3]]", "[[1, 2, 3, NaN]]", "[1e999]", '[["a", 0, 0, 0]]', "[[true, 0, 0, 0]]"]
)
def test_a_box_is_four_numbers(cell: str) -> None:
    with pytest.raises(BadInputError, match=r"needs four numbers"):
        parse_boxes(cell, 1)


@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Zs"])), min_size=1))
def test_frame_lists_are_read_as_python_and_json_write_them(frames: list[str]) -> None:
    names = tuple(frame for frame in frames if not has_control_characters(frame)) or ("x",)
    for written in (str(list(names)), json.dumps(names), json.dumps(names, ensure_ascii=False)):
        assert parse_frames(written) == tuple(name.replace("\\", "/") for name in names)


@given(st.text(), st.text("[]'\",\\( )ab0", max_size=12))
def test_any_cell_is_a_list_or_a_fault(text: str, brackets: str) -> None:
    for cell in (text, brackets, f"[{text}]"):
        for parse in (parse_frames, lambda cell: parse_boxes(cell, 1)):
            with contextlib.suppress(BadInputError):
                parse(cell)


@given(st.binary(max_size=100))
def test_any_line_is_a_row_or_a_fault(line: bytes) -> None:
    for content in (line, training_row(TRAIN[0], paths=True).encode().replace(b"spu0", line)):
        with contextlib.suppress(BadInputError):
            parse_row(content)


@pytest.mark.parametrize(
    "cell",
    [
        "__import__('os').system('touch owned')",
        "['a', open('owned', 'w')]",
        "['a' 'b']",
        "('a',)",
        "{'a'}",
        "['a'",
        "[b'a']",
    ],
)
def test_a_list_cell_is_never_evaluated(cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match=r"found .* in the frame column, needs a list of strings"):
        parse_frames(cell)
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_cell_takes_no_time() -> None:
    for cell in (
        "[" * 200_000,
        "['a'" + "  " * 100_000 + "x",
        "[" + "'a', " * 100_000 + "(",
        "['" + "\\" * 200_001 + "']",
    ):
        with pytest.raises(BadInputError):
            parse_frames(cell)


def test_lines_are_the_same_in_parts_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"one\r\ntwo\n\nfour\nfive")
    whole = [line for _, _, line in read_lines(path)]
    assert whole == [b"one", b"two", b"", b"four", b"five"]
    for size in range(1, 20):
        parts = [line for begin in range(0, 20, size) for _, _, line in read_lines(path, begin, begin + size)]
        assert parts == whole


# --- which list -------------------------------------------------------------------------------------------------------


def test_the_training_list_is_the_one_that_is_not_validation(source: Path) -> None:
    assert [path.name for path in training_lists(source, None)] == ["training_videoinfo_7.txt"]


def test_several_lists_of_a_kind_say_to_keep_one(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    for name in ("test_videoid_asr_3.txt", "test_videoid_asr_4.txt"):
        (source / "annotations" / name).write_text("")
    with pytest.raises(WrongUseError, match=r"found test_videoid_asr_3.txt, test_videoid_asr_4.txt, .*; keep one of"):
        open_source("lpr750k", source, None)[0].listed_clips("test")


def test_several_training_lists_need_a_choice(tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    folder.mkdir()
    for name in ("750k.txt", "641821.txt", "val.txt", "full_part_00.txt", "full_part_01.txt"):
        (folder / f"training_videoinfo_{name}").touch()
    with pytest.raises(WrongUseError, match=r"training_videoinfo_641821, .*choose with --train-annotation NAME"):
        training_lists(tmp_path, None)
    for chosen, expected in {
        "training_videoinfo_750k.txt": 1, "training_videoinfo_750k": 1, "training_videoinfo_full": 2,
        "training_videoinfo_full_part_01.txt": 1,
    }.items():  # fmt: skip
        assert len(training_lists(tmp_path, chosen)) == expected
    with pytest.raises(WrongUseError, match=r"needs nonsense; correct --train-annotation"):
        training_lists(tmp_path, "nonsense")


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_found_by_the_first_suffix_that_exists(tmp_path: Path) -> None:
    folder = PictureReader(tmp_path)
    for name in ("a.png", "a.jpeg", "b.JPG", "c.png"):
        (tmp_path / name).touch()
    found = {path: folder.find(path, missing="").path for path in ("a.png", "a.jpg", "a", "b.JPG", "c.jpg")}
    assert found == {"a.png": "a.jpeg", "a.jpg": "a.jpeg", "a": "a.jpeg", "b.JPG": "b.JPG", "c.jpg": "c.png"}


@pytest.mark.parametrize("path", ["/etc/hostname", "../x.jpg", "a/../../x.jpg", "a\\..\\..\\x.jpg", "a\0.jpg"])
def test_a_path_that_leaves_is_refused_before_the_disk_is_asked(path: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"needs one below the source folder"):
        PictureReader(tmp_path).find(path, missing="")


@pytest.mark.parametrize("of_folder", [False, True])
def test_a_link_below_the_top_level_that_leaves_is_refused(of_folder: bool, tmp_path: Path) -> None:
    outside, source = tmp_path / "outside", tmp_path / "source"
    outside.mkdir()
    (source / "in").mkdir(parents=True)
    (outside / "x.jpg").write_bytes(FRAMES[0].read_bytes())
    if of_folder:
        (source / "in/deep").symlink_to(outside)
    else:
        (source / "in/deep").mkdir()
        (source / "in/deep/x.jpg").symlink_to(outside / "x.jpg")
    folder = PictureReader(source)
    with pytest.raises(BadInputError, match=r"found a link to .*outside/x.jpg, needs a file below the source folder"):
        folder.read(folder.find("in/deep/x.jpg", missing=""))


def test_a_link_at_the_top_level_is_followed_and_those_on_its_disk_that_leave_it_are_not(tmp_path: Path) -> None:
    disk, source = tmp_path / "disk" / "training_video_00", tmp_path / "source"
    disk.mkdir(parents=True)
    source.mkdir()
    for path in (disk / "x.jpg", tmp_path / "disk" / "secret.jpg", tmp_path / "one.jpg"):
        path.write_bytes(FRAMES[0].read_bytes())
    (disk / "y.jpg").symlink_to(tmp_path / "disk" / "secret.jpg")
    (source / "training_video_00").symlink_to(disk)
    (source / "one.jpg").symlink_to(tmp_path / "one.jpg")
    folder = PictureReader(source)
    for path in ("training_video_00/x.jpg", "one.jpg"):
        assert folder.read(folder.find(path, missing="")) == FRAMES[0].read_bytes()
    with pytest.raises(BadInputError, match=r"found a link to .*secret.jpg, needs a file below the source folder"):
        folder.read(folder.find("training_video_00/y.jpg", missing=""))


def test_a_link_that_stays_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(FRAMES[0].read_bytes())
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    folder = PictureReader(tmp_path)
    assert folder.read(folder.find("b.jpg", missing="")) == FRAMES[0].read_bytes()


def test_a_picture_that_declares_too_many_pixels_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.layouts.pictures.MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(BadInputError, match=r"declares more than 14399 pixels"):
        decode_picture(FRAMES[0].read_bytes(), "x.jpg")


@given(st.data())
def test_a_damaged_picture_is_a_fault_or_a_picture(data: st.DataObject) -> None:
    picture = bytearray(FRAMES[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        picture[data.draw(st.integers(0, len(picture) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadInputError):
        decode_picture(bytes(picture[: data.draw(st.integers(0, len(picture)))]), "x.jpg")


# --- conversion -------------------------------------------------------------------------------------------------------


def test_the_clips_hold_the_sources_own_bytes(source: Path, tmp_path: Path) -> None:
    convert(Options("lpr750k", source, tmp_path / "records"))
    dataset = open_dataset(tmp_path / "records")
    for name, clips in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        split = dataset.split(name)
        assert list(split.clip_ids) == sorted(clip.id for clip in clips)
        for row in range(split.num_clips):
            record = split.clip(row)
            clip = next(each for each in clips if each.id == record.id)
            numbers = ten_of(clip.length)
            assert [frame.encoded for frame in record.frames] == [clip.picture(each).read_bytes() for each in numbers]
            assert [frame.id for frame in record.frames] == [clip.frame_ids[each] for each in numbers]
            in_list = list(range(len(numbers))) if name == "test" else numbers  # a query lists only ten frames
            assert [frame.position for frame in record.frames] == in_list
            assert split.image(record.image_index).encoded == SHOP_IMAGES[clip.product].read_bytes()
            boxes = [frame.boxes for frame in record.frames]
            assert boxes == [[(each, 0, 64, 32)] if each else [] for each in numbers]


def test_all_frames_are_stored_when_asked(source: Path, tmp_path: Path) -> None:
    convert(Options("lpr750k", source, tmp_path / "records", frames="all", splits=("train",)))
    dataset = open_dataset(tmp_path / "records")
    assert sorted(dataset.split("train").columns["frames"]) == sorted(clip.length for clip in TRAIN)
    assert dataset.manifest["stored_frames"] is None


@pytest.mark.parametrize("form", ["{}-0.jpg", "{}.jpg", "{}"])
def test_a_gallery_name_gives_the_image_id_in_each_of_its_forms(form: str, tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    for picture in source.glob("gallery/*/*.jpg"):
        picture.rename(
            picture.with_name(form.format(picture.name.removesuffix("-0.jpg")) if form != "{}" else picture.name)
        )
    if form == "{}":
        for picture in source.glob("gallery/*/*.jpg"):
            picture.rename(picture.with_name(picture.name.replace("-0.jpg", ".jpg")))

    def rename(rows: list[bytes]) -> None:
        rows[:] = [row.replace(b"-0.jpg", form.format("").encode()) for row in rows]

    edit_lines(source / "annotations/gallery_main.txt", rename)
    convert(Options("lpr750k", source, tmp_path / "records", splits=("test",)))
    test = open_dataset(tmp_path / "records").split("test")
    assert [test.image_ids[row] for row in test.galleries[LIVES[2]]] == [IMAGE_IDS[i] for i in (3, 0, 1)]


def test_a_shared_gallery_picture_is_stored_once_and_another_of_its_name_apart(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    convert(Options("lpr750k", source, tmp_path / "once", splits=("test",)))
    assert open_dataset(tmp_path / "once").split("test").num_images == 4
    (source / "gallery" / LIVES[3] / f"{IMAGE_IDS[1]}-0.jpg").write_bytes(SHOP_IMAGES[0].read_bytes())
    convert(Options("lpr750k", source, tmp_path / "apart", splits=("test",)))
    test = open_dataset(tmp_path / "apart").split("test")
    assert test.num_images == 5
    row = test.galleries[LIVES[3]][0]
    assert (test.image_ids[row], test.image(row).encoded) == (IMAGE_IDS[1], SHOP_IMAGES[0].read_bytes())


def test_a_row_that_is_doubled_in_a_gallery_keeps_both_places(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    edit_lines(source / "annotations/gallery_main.txt", lambda rows: rows.insert(2, rows[0]))
    convert(Options("lpr750k", source, tmp_path / "records", splits=("test",)))
    test = open_dataset(tmp_path / "records").split("test")
    assert [test.image_ids[row] for row in test.galleries[LIVES[2]]] == [IMAGE_IDS[i] for i in (3, 0, 3, 1)]


def test_a_truth_entry_without_frames_counts_in_the_denominator(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    edit_json(source / "annotations/query_tenframes.json", lambda queries: queries.pop(TEST[0].id))
    report = convert(Options("lpr750k", source, tmp_path / "records", splits=("test",)))
    test = open_dataset(tmp_path / "records").split("test")
    assert (test.num_clips, test.num_truth) == (2, 3)
    assert report["splits"]["test"]["queries_without_frames"] == 1


def test_unseen_test_products_are_unknown(source: Path, tmp_path: Path) -> None:
    convert(Options("lpr750k", source, tmp_path / "records"))
    dataset = open_dataset(tmp_path / "records")
    test = dataset.split("test")
    products = {test.image_ids[row]: test.image_columns["product"][row] for row in range(test.num_images)}
    assert products[IMAGE_IDS[3]] == -1
    assert dataset.tables["product"][products[IMAGE_IDS[0]]] == "spu0"


def test_layouts_are_small_enough_to_send_to_every_worker(source: Path) -> None:
    assert len(pickle.dumps(Lpr750k(source, None, 10))) < 1000


def test_ids_have_limits() -> None:
    for text in ("", "a\tb", "x" * 201, "\ud800"):
        with pytest.raises(BadInputError, match=re.escape("needs 1 to 200 bytes without control")):
            annotations.checked_id(text, "clip")
