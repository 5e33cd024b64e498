"""Shards on disk: framing, atomic writing, reading by row, and refusal of every kind of damaged file."""

import contextlib
import json
import pickle
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import convert
from data_pipeline.format import schema, tfrecord
from data_pipeline.format.manifest import content_hash
from data_pipeline.format.reader import Texts, open_dataset
from data_pipeline.format.tfrecord import OVERHEAD, frame_record, index_path, new_shard, unframe_record
from tests.lpr_layouts import GALLERIES, IMAGE_IDS, LIVES, TEST, TRAIN, make_lpr750k


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    convert.convert(convert.Options("lpr750k", make_lpr750k(folder / "source"), folder / "records", clips_per_shard=3))
    return folder / "records"


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """A copy of a converted data set, to be damaged."""
    return shutil.copytree(converted, tmp_path / "copy")


# --- framing ----------------------------------------------------------------------------------------------------------


def test_the_framing_is_tfrecords() -> None:
    # As tf.io.TFRecordWriter writes it: the checksums of an empty record are known from its own tests.
    assert frame_record(b"") == bytes(8) + bytes.fromhex("29039807") + bytes.fromhex("d8ea82a2")


@given(st.binary(max_size=50))
def test_records_come_back(data: bytes) -> None:
    assert unframe_record(frame_record(data)) == data


@given(st.binary(max_size=50), st.data())
def test_one_changed_byte_is_always_noticed(data: bytes, draw: st.DataObject) -> None:
    framed = bytearray(frame_record(data))
    place = draw.draw(st.integers(0, len(framed) - 1))
    framed[place] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match=r"found"):
        unframe_record(bytes(framed))


@given(st.binary(max_size=40))
def test_any_bytes_raise_value_error_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        unframe_record(data)


def offsets_of(shard: Path) -> list[int]:
    """The offsets of a shard's records, then its size, found by reading one record after the other."""
    data, offsets = shard.read_bytes(), [0]
    while offsets[-1] < len(data):
        end = offsets[-1] + OVERHEAD + int.from_bytes(data[offsets[-1] : offsets[-1] + 8], "little")
        unframe_record(data[offsets[-1] : end])
        offsets.append(end)
    return offsets


def test_the_index_has_the_offset_of_each_record(converted: Path) -> None:
    for shard in converted.glob("*.tfrecord"):
        assert np.array(offsets_of(shard), "<u8").tobytes() == index_path(shard).read_bytes()


# --- writing ----------------------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), new_shard(path) as writer:
        writer.write("no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.tfrecord"]


def test_a_shard_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), new_shard(tmp_path / "a.tfrecord") as writer:
        writer.write(b"data")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_writer_knows_the_checksum_of_its_file(tmp_path: Path) -> None:
    with new_shard(tmp_path / "a.tfrecord") as writer:
        writer.write(b"one")
        writer.write(b"two")
    assert tfrecord.file_crc(tmp_path / "a.tfrecord") == writer.crc
    assert offsets_of(tmp_path / "a.tfrecord") == writer.offsets


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_record_is_read_by_row(converted: Path) -> None:
    dataset = open_dataset(converted)
    train = dataset.split("train")
    assert dataset.splits == ("train", "val", "test")
    assert list(train.clip_ids) == sorted(clip.id for clip in TRAIN)
    for row in range(train.num_clips):
        clip = train.clip(row)
        tiny = next(each for each in TRAIN if each.id == clip.id)
        assert clip.id == train.clip_ids[row]
        assert len(clip.frames) == min(10, tiny.length) == train.columns["frames"][row]
        assert tiny.length == train.columns["original_frames"][row] == clip.original_frames
        image = train.image(train.columns["image"][row])
        assert image.id == IMAGE_IDS[tiny.product] == train.image_ids[clip.image_index]
        assert (
            dataset.tables["product"][train.columns["product"][row]]
            == f"spu{tiny.product}"
            == clip.product
            == image.product
        )
        assert dataset.tables["livestream"][train.columns["livestream"][row]] == LIVES[tiny.live] == clip.livestream
        assert dataset.tables["category"][train.columns["category"][row]] == f"{tiny.product % 2}\tC{tiny.product % 2}"
        assert dataset.tables["duration"][train.columns["duration"][row]] == clip.duration
        assert train.truth(row) == (image.id,)
    assert not train.is_evaluation
    assert train.galleries == {}


def test_galleries_keep_the_order_of_the_file(converted: Path) -> None:
    test = open_dataset(converted).split("test")
    assert test.is_evaluation
    assert test.num_truth == 3
    for row, clip_id in enumerate(test.clip_ids):
        clip = next(each for each in TEST if each.id == clip_id)
        assert [test.image_ids[image] for image in test.gallery_of(row)] == [IMAGE_IDS[i] for i in GALLERIES[clip.live]]
        assert test.truth(row) == test.truth_by_clip[clip.id] == (IMAGE_IDS[clip.product],)
        assert test.columns["image"][row] in test.gallery_of(row)


def test_the_gallery_of_validation_is_every_shop_image_of_both_lists(converted: Path) -> None:
    val = open_dataset(converted).split("val")
    assert list(val.galleries) == [""]
    assert [val.image_ids[row] for row in val.gallery_of(0)] == IMAGE_IDS[:3]
    assert val.truth(0) == (IMAGE_IDS[1],)


def test_splits_are_pickled_small_and_read_the_same(converted: Path) -> None:
    split = open_dataset(converted).split("train")
    split.clip(0)
    pickled = pickle.dumps(split)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).clip(2) == split.clip(2)
    assert pickle.loads(pickle.dumps(split.clip_ids))[1] == split.clip_ids[1]


def test_threads_may_read_at_once(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.format.reader.MAX_OPEN_SHARDS", 1)
    split = open_dataset(converted).split("train")
    expected = [split.clip(row).id for row in range(split.num_clips)]
    wrong: list[str] = []

    def read() -> None:
        for _ in range(30):
            wrong.extend(split.clip(row).id for row in range(split.num_clips) if split.clip(row).id != expected[row])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), max_size=6))
@settings(max_examples=30)
def test_texts_are_lines(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_bytes("".join(f"{text}\n" for text in texts).encode())
    read = Texts(path)
    assert list(read) == texts == read[:]
    assert len(read) == len(texts)
    with pytest.raises(IndexError):
        read[len(texts)]


def test_columns_are_int32_and_cannot_be_changed(converted: Path) -> None:
    for column in open_dataset(converted).split("train").columns.values():
        assert column.dtype == np.int32
        assert not column.flags.writeable


# --- what is wrong with a data set ------------------------------------------------------------------------------------


def test_an_unfinished_conversion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest.*data_pipeline.convert \(again"):
        open_dataset(tmp_path)


def test_another_schema_version_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ValueError, match=r"found schema version 99, needs 1; convert again into another folder"):
        open_dataset(copy)


def test_a_record_of_another_schema_version_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of an older conversion is put among the others, with its index."""
    record = open_dataset(copy).split("train").image(0)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    data = schema.encode_image(schema.ShopImage(record.id, record.name), b"x", ordinal=0, product_index=0)
    monkeypatch.undo()
    with new_shard(copy / "train-images-00000-of-00001.tfrecord") as writer:
        for _ in range(3):
            writer.write(data)
    with pytest.raises(
        ValueError, match=r"train-images-00000-of-00001.tfrecord record 0: found schema version 2, needs 1; restore"
    ):
        open_dataset(copy, verify=False).split("train").image(0)


def test_a_manifest_that_was_edited_is_refused(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"records": 7', '"records": 6'))
    with pytest.raises(ValueError, match=r"hash that disagrees"):
        open_dataset(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version"'])
def test_a_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"found no manifest of a conversion"):
        open_dataset(copy)


def test_a_missing_split_is_refused_with_those_that_exist(converted: Path) -> None:
    with pytest.raises(ValueError, match=r"found splits train, val, test, needs tets"):
        open_dataset(converted).split("tets")


@pytest.mark.parametrize("name", ["train-clips-00001-of-00003.tfrecord", "columns/train-clips-image.npy"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: found no such file"):
        open_dataset(copy)


@pytest.mark.parametrize("name", ["test-images-00000-of-00001.tfrecord", "test-images-00000-of-00001.tfrecord.idx"])
def test_a_short_file_is_named(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{name}: found .* bytes, needs"):
        open_dataset(copy)
    with pytest.raises(ValueError, match=r"test-images-00000-of-00001.tfrecord.idx: found"):
        open_dataset(copy, verify=False).split("test").image(0)


def test_a_damaged_column_is_named(copy: Path) -> None:
    _flip(copy / "columns/train-clips-image.npy", -1)
    with pytest.raises(ValueError, match=r"train-clips-image.npy: found a checksum \(CRC32C\) that disagrees"):
        open_dataset(copy)


def test_a_flipped_bit_in_a_record_is_named(copy: Path) -> None:
    _flip(copy / "train-clips-00001-of-00003.tfrecord", -1000)
    split = open_dataset(copy).split("train")
    assert split.clip(2).id == split.clip_ids[2]
    with pytest.raises(ValueError, match=r"train-clips-00001-of-00003.tfrecord record 2: .*checksum"):
        split.clip(5)


def test_swapped_shards_are_noticed(copy: Path) -> None:
    """Two shards have the same size and sound checksums: only the ordinals in the records differ."""
    one, other = (copy / f"train-clips-0000{number}-of-00003.tfrecord" for number in (0, 1))
    for suffix in ("", ".idx"):
        paths = [Path(f"{path}{suffix}") for path in (one, other)]
        first, second = (path.read_bytes() for path in paths)
        paths[0].write_bytes(second)
        paths[1].write_bytes(first)
    with pytest.raises(ValueError, match=r"train-clips-00000-of-00003.tfrecord record 0: found ordinal 3, needs 0"):
        open_dataset(copy, verify=False).split("train").clip(0)


def test_rows_outside_the_split_are_refused(converted: Path) -> None:
    split = open_dataset(converted).split("train")
    for row in (-1, split.num_clips):
        with pytest.raises(IndexError, match=r"needs 0 to 6"):
            split.clip(row)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_offsets_that_go_back_are_refused_without_a_check_of_checksums_too(converted: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(converted, tmp_path / "records"))
    index = sorted(copied.glob("train-clips-*.idx"))[0]
    offsets = np.frombuffer(index.read_bytes(), "<u8").copy()
    offsets[[1, 2]] = offsets[[2, 1]]
    index.write_bytes(offsets.tobytes())
    with pytest.raises(ValueError, match=re.escape(index.name)):
        open_dataset(copied, verify=False).split("train").clip(0)


def test_the_content_hash_has_schema_files_and_counts() -> None:
    manifest = {"schema_version": 1, "files": {"a": [1, 2]}, "splits": {"train": {"frames": 3}}, "identity": {}}
    changes = ({}, {"schema_version": 2}, {"files": {"a": [1, 3]}}, {"splits": {"train": {"frames": 4}}})
    assert len({content_hash(manifest | change) for change in changes}) == 4
    assert content_hash(manifest | {"identity": {"layout": "folder"}}) == content_hash(manifest)
