"""LPR4M as downloaded by img2dataset: it gives the same clips as LPR750K, by tables and by sidecars."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import doctor
from data_pipeline.conversion.survey import list_splits
from data_pipeline.convert import Options, convert, main
from data_pipeline.faults import FailedError
from data_pipeline.format.reader import Dataset, Split, open_dataset
from data_pipeline.layouts import img2dataset as downloads
from data_pipeline.layouts.img2dataset import name_of
from data_pipeline.layouts.lpr4m import Lpr4m
from data_pipeline.system.workers import Workers
from tests.lpr_layouts import IMAGE_IDS, ORIGINAL, TEST, TRAIN, edit_json, make_lpr4m, make_lpr750k

LONG = next(clip for clip in TRAIN if clip.length == 12)
SHORT = next(clip for clip in TRAIN if clip.length == 4)


def run(source: Path, output: Path, **options: object) -> tuple[Dataset, dict]:
    report = convert(dataclasses.replace(Options("lpr4m", source, output), **options))
    return open_dataset(output), report


@pytest.fixture(scope="module")
def lpr750k(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("lpr750k")
    convert(Options("lpr750k", make_lpr750k(folder / "source"), folder / "records"))
    return open_dataset(folder / "records")


@pytest.fixture
def no_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)


def same(one: Split, other: Split) -> None:
    """Asserts that two splits have the same ids, pairs, galleries, frames and boxes.

    Products differ, as LPR4M names none; so does a test clip's length, as LPR750K lists ten frames of each at most.
    """
    unlike = {"product": "", "product_index": 0} | ({"original_frames": 0} if one.name == "test" else {})
    assert list(one.clip_ids) == list(other.clip_ids)
    for row in range(one.num_clips):
        left, right = (dataclasses.replace(each.clip(row), **unlike) for each in (one, other))
        if one.name == "test":
            for each in (left, right):
                each.frames[:] = [dataclasses.replace(frame, position=0) for frame in each.frames]
        assert left == right
        assert one.image(left.image_index).encoded == other.image(left.image_index).encoded
        assert one.truth(row) == other.truth(row)
        if one.is_evaluation:
            shelves = [[each.image_ids[image] for image in each.gallery_of(row)] for each in (one, other)]
            assert shelves[0] == shelves[1]


@pytest.mark.parametrize(("tars", "tables", "sidecars"), [(False, True, True), (True, True, True), (True, True, False)])
def test_the_same_clips_give_the_same_records_as_lpr750k(
    tars: bool, tables: bool, sidecars: bool, lpr750k: Dataset, tmp_path: Path
) -> None:
    source = make_lpr4m(tmp_path / "source", tars=tars, tables=tables, sidecars=sidecars)
    dataset, _ = run(source, tmp_path / "records")
    for name in ("train", "val", "test"):
        same(dataset.split(name), lpr750k.split(name))


@pytest.mark.parametrize("tars", [False, True])
def test_names_come_from_the_sidecars_where_no_table_can_be_read(
    tars: bool, lpr750k: Dataset, tmp_path: Path, no_pyarrow: None
) -> None:
    dataset, report = run(make_lpr4m(tmp_path / "source", tars=tars), tmp_path / "records")
    same(dataset.split("train"), lpr750k.split("train"))
    assert any("pip install 'rice_jax[parquet]'" in remark for remark in report["remarks"])


def test_a_table_that_is_needed_and_cannot_be_read_says_what_to_install(
    tmp_path: Path, no_pyarrow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_lpr4m(tmp_path / "source", sidecars=False)
    status = main(["--layout=lpr4m", f"--source={source}", f"--output={tmp_path / 'records'}", "--workers=1"])
    assert status == 2
    assert "pip install 'rice_jax[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize("tars", [False, True])
@pytest.mark.parametrize("tables", [False, True])
def test_a_failed_frame_is_counted_and_the_clip_kept(
    tars: bool, tables: bool, lpr750k: Dataset, tmp_path: Path
) -> None:
    lost = SHORT.frame_ids[1]
    dataset, report = run(
        make_lpr4m(tmp_path / "source", tars=tars, tables=tables, failed=[lost]), tmp_path / "records"
    )
    train = dataset.split("train")
    row = list(train.clip_ids).index(SHORT.id)
    record = train.clip(row)
    assert [frame.id for frame in record.frames] == [name for name in SHORT.frame_ids if name != lost]
    assert [frame.position for frame in record.frames] == [0, 2, 3]
    assert [frame.boxes for frame in record.frames] == [[], [(2, 0, 64, 32)], [(3, 0, 64, 32)]]
    assert train.columns["original_frames"][row] == 3
    assert report["splits"]["train"]["failed_downloads"] == 1
    assert list(train.clip_ids) == list(lpr750k.split("train").clip_ids)
    if tables:
        assert (
            f"training_frame: 1 of {sum(clip.length for clip in TRAIN) + 3} downloads failed (training_frame)"
            in (report["remarks"])
        )


def test_a_long_clip_that_misses_a_sampled_frame_samples_what_is_left(tmp_path: Path) -> None:
    lost = LONG.frame_ids[0]
    dataset, _ = run(make_lpr4m(tmp_path / "source", failed=[lost]), tmp_path / "records")
    train = dataset.split("train")
    row = list(train.clip_ids).index(LONG.id)
    left = LONG.frame_ids[1:]
    assert [frame.id for frame in train.clip(row).frames] == [left[slot * 10 // 9] for slot in range(10)]
    assert (train.columns["frames"][row], train.columns["original_frames"][row]) == (10, 11)


@pytest.mark.parametrize("frames", ["sampled", "all"])
def test_the_doctor_examines_the_frames_that_a_conversion_stores(frames: str, tmp_path: Path) -> None:
    """Downloads failed of frames that are sampled first, and of frames that are sampled again."""
    lost = [LONG.frame_ids[0], LONG.frame_ids[5], SHORT.frame_ids[2], TEST[2].frame_ids[11]]
    source = make_lpr4m(tmp_path / "source", failed=lost)
    dataset, report = run(source, tmp_path / "records", frames=frames)
    doctor.main([str(source), f"--output={tmp_path / 'doctor'}", "--workers=1", f"--frames={frames}"])
    examined = json.loads((tmp_path / "doctor" / "report.json").read_text())["distributions"]
    for name in ("train", "test"):
        stored = sum(len(dataset.split(name).clip(row).frames) for row in range(dataset.split(name).num_clips))
        assert examined[name]["sound_frames"] == stored
        assert examined[name]["frames"] - stored == report["splits"][name]["failed_downloads"]
    layout = Lpr4m(source, None, 10 if frames == "sampled" else None)
    with Workers(1, layout) as workers:
        listings, _ = list_splits(layout, ("train",), workers.run)
        layout.locate(listings, workers.run, tmp_path)
    _, found = layout.find_frames(listings[0].source(list(dataset.split("train").clip_ids).index(LONG.id)), "train")
    by_position = {frame.position: frame.picture for frame in found}
    assert by_position[0] is by_position[5] is None
    stored = [position for position, picture in by_position.items() if picture is not None]
    assert stored == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_a_long_clip_that_misses_another_frame_is_as_if_it_did_not(lpr750k: Dataset, tmp_path: Path) -> None:
    unsampled = LONG.frame_ids[5]  # of the sampled 0 1 2 3 4 6 7 8 9 11
    dataset, _ = run(make_lpr4m(tmp_path / "source", failed=[unsampled]), tmp_path / "records")
    same(dataset.split("train"), lpr750k.split("train"))


def test_a_clip_all_of_whose_downloads_failed_is_a_fault(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", failed=SHORT.frame_ids)
    with pytest.raises(FailedError, match=rf"part_00.txt line 2 \(clip {SHORT.id}\): found none of its 4 frames"):
        run(source, tmp_path / "records")


def test_a_frame_that_no_shard_knows_is_a_fault(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source")
    for path in source.glob("training_frame/00001*"):
        _remove(path)
    with pytest.raises(FailedError, match=r"found no download of frame .*, .* run img2dataset again, or convert with"):
        run(source, tmp_path / "records")


def test_an_image_that_was_not_downloaded_is_a_fault(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", failed=[IMAGE_IDS[1]])
    with pytest.raises(
        FailedError, match=rf"image {IMAGE_IDS[1]}.*its download failed.*delete its shard's _stats.json"
    ):
        run(source, tmp_path / "records")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source: _cut(source / "test_frame/00000.tar"), "test_frame/00000: cannot be read as a tar"),
        (lambda source: _cut(source / "test_frame/00000.parquet"), "test_frame/00000: 00000.parquet cannot be read"),
    ],
)
def test_a_damaged_shard_of_the_download_is_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", tars=True)
    damage(source)
    with pytest.raises(FailedError, match=re.escape(message)):
        run(source, tmp_path / "records")


def test_a_damaged_sidecar_is_named(tmp_path: Path, no_pyarrow: None) -> None:
    source = make_lpr4m(tmp_path / "source")
    (source / "test_frame/00000/0000001.json").write_text('{"url": 3')
    with pytest.raises(FailedError, match=r"test_frame/00000: 0000001.json cannot be read"):
        run(source, tmp_path / "records")


@pytest.mark.parametrize(
    ("limit", "change", "message"),
    [
        ("MAX_TABLE_ROWS", {}, "bytes or 7 rows, needs fewer"),
        ("MAX_TABLE_BYTES", {}, "found over 7 bytes or"),
        ("MAX_URL_BYTES", {}, "found a text of .* bytes, needs at most 7"),
        ("", {"original_width": 2**40}, "an original of 1099511627776 x"),
        ("", {"original_height": -4}, "an original of .* x -4 pixels"),
        ("", {"key": "../../etc"}, "found the key '../../etc'"),
        ("", {"url": None}, "cannot be read"),
    ],
)
def test_a_table_beyond_any_download_is_refused(
    limit: str, change: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of a few kilobytes can claim a million rows, or contain a text of gigabytes."""
    parquet = pytest.importorskip("pyarrow.parquet")
    source = make_lpr4m(tmp_path / "source")
    path = source / "training_frame/00001.parquet"
    rows = parquet.read_table(path).to_pylist()
    parquet.write_table(pyarrow().Table.from_pylist([{**row, **change} for row in rows]), path)
    if limit:
        monkeypatch.setattr(downloads, limit, 7)
    fault = fault_of_second_shard(source)
    assert re.search(message, str(fault))


def test_a_sidecar_of_nonsense_numbers_is_refused(tmp_path: Path, no_pyarrow: None) -> None:
    source = make_lpr4m(tmp_path / "source")
    sidecar = source / "training_frame/00001/0000100.json"
    sidecar.write_text(sidecar.read_text().replace(str(ORIGINAL[0]), "1e999"))
    fault = fault_of_second_shard(source)
    assert "0000100.json cannot be read" in str(fault)


def fault_of_second_shard(source: Path) -> object:
    np.save(source / "wanted.npy", np.zeros(0, np.uint64))
    download = downloads.find_download(source, "training_frame")
    return downloads.scan_shard(Lpr4m(source, None, None), download, 1, source / "wanted.npy").faults[0]


def pyarrow() -> Any:
    return importlib.import_module("pyarrow")


def test_a_damaged_picture_in_a_tar_is_named_by_tar_and_member(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", tars=True)
    data = bytearray((source / "test_frame/00000.tar").read_bytes())
    data[512:516] = b"text"  # the first bytes of the first member, which is the last picture of the shard
    (source / "test_frame/00000.tar").write_bytes(data)
    named = r"test_frame/00000.tar/0000007.jpg \(clip .*\): is not a picture \(starts with b'text"
    with pytest.raises(FailedError, match=named):
        run(source, tmp_path / "records")


def test_test_clips_are_known_without_the_list_of_urls(lpr750k: Dataset, tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source")
    (source / "test_frame_url_17.txt").unlink()
    dataset, _ = run(source, tmp_path / "records", splits=("test",))
    same(dataset.split("test"), lpr750k.split("test"))


def test_a_validation_list_in_lpr750ks_columns_is_read_too(lpr750k: Dataset, tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source")
    other = make_lpr750k(tmp_path / "other") / "annotations/training_videoinfo_val.txt"
    (source / "annotations/training_videoinfo_val.txt").write_text(other.read_text().replace("64, 32", "128, 64"))
    dataset, _ = run(source, tmp_path / "records", splits=("val",))
    pictures = [[frame.encoded for frame in each.split("val").clip(0).frames] for each in (dataset, lpr750k)]
    assert pictures[0] == pictures[1]
    assert dataset.split("val").clip(0).product == "spu1"


def test_products_are_shop_images_where_the_list_names_none(tmp_path: Path) -> None:
    dataset, report = run(make_lpr4m(tmp_path / "source"), tmp_path / "records")
    assert list(dataset.tables["product"]) == IMAGE_IDS
    assert report["splits"]["train"]["products"] == 3


def test_numbers_in_sidecars_may_be_written_as_strings(lpr750k: Dataset, tmp_path: Path, no_pyarrow: None) -> None:
    source = make_lpr4m(tmp_path / "source")
    for path in source.glob("*/*/*.json"):
        edit_json(path, lambda row: row.update(original_width="320", original_height="180"))
    dataset, _ = run(source, tmp_path / "records")
    same(dataset.split("train"), lpr750k.split("train"))


def test_downloads_may_lie_in_a_folder_of_their_form(lpr750k: Dataset, tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source", tars=True)
    (source / "webdataset").mkdir()
    for kind in ("training_frame", "training_image", "test_frame", "test_image"):
        (source / kind).rename(source / "webdataset" / kind)
    dataset, _ = run(source, tmp_path / "records")
    same(dataset.split("test"), lpr750k.split("test"))


def test_a_missing_download_is_named_with_the_places_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_lpr4m(tmp_path / "source")
    (source / "training_frame").rename(source / "frames")
    status = main(["--layout=lpr4m", f"--source={source}", f"--output={tmp_path / 'records'}", "--workers=1"])
    assert status == 2
    assert (
        "found no folder training_frame, files/training_frame or webdataset/training_frame" in capsys.readouterr().err
    )


def test_names_are_read_from_urls_paths_and_ids() -> None:
    for text in (
        "http://a.b/c/x-0001.jpg?size=1",
        "c/x-0001.jpg",
        "x-0001.png",
        "x-0001",
        "http://a.b/c%2Fx-0001.webp",
        "http://[a/x-0001.jpg#1",
    ):
        assert name_of(text) == "x-0001"


def test_query_without_truth_is_a_fault(tmp_path: Path) -> None:
    source = make_lpr4m(tmp_path / "source")
    edit_json(source / "annotations/test_videoid_to_gtimage_3.json", lambda truth: truth.pop(TEST[0].id))
    with pytest.raises(FailedError, match=rf"test_frame_url_17.txt \(clip {TEST[0].id}\): found no true image"):
        run(source, tmp_path / "records")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_the_report_is_json(tmp_path: Path) -> None:
    _, report = run(make_lpr4m(tmp_path / "source"), tmp_path / "records")
    assert json.loads((tmp_path / "records/report.json").read_text()) == report
