"""Records of clips and shop images: they come back whole, keep their bytes, and are refused when damaged."""

import contextlib
import dataclasses
import hashlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.format import schema
from data_pipeline.format.example import decode_example, encode_example
from data_pipeline.format.schema import Clip, Frame, Picture, ShopImage

CLIP = Clip(
    id="live-1-2",
    livestream="live",
    frames=(Picture("live-1-2-0000", "a.jpg"), Picture("live-1-2-0003", "b.jpg")),
    positions=(0, 3),
    original_frames=4,
    image_ids=("image",),
    boxes=((), ((1.0, 2.0, 3.0, 4.5), (0.0, 0.0, 8.0, 8.0))),
    product="spu",
    category="7",
    category_name="Äpple",
    title="titel",
    speech="",
    scale="large",
    duration="short",
    number="single",
)
IMAGE = ShopImage("image", "gallery/live/image-0.jpg", "titel", "spu")


@given(st.binary(max_size=60))
@example(encode_example({"schema_version": [schema.SCHEMA_VERSION]}))
def test_bytes_that_are_not_a_record_raise_value_error_and_no_other(data: bytes) -> None:
    for decode in (schema.decode_clip, schema.decode_image):
        with contextlib.suppress(ValueError):
            decode(data)


@given(st.data())
def test_a_damaged_record_raises_value_error_or_reads(data: st.DataObject) -> None:
    record = bytearray(schema.encode_clip(CLIP, [b"first", b"second"], ordinal=3, image_index=1, product_index=2))
    for _ in range(data.draw(st.integers(1, 3))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(record)))
    for damaged in (bytes(record), bytes(record[:cut])):
        with contextlib.suppress(ValueError):
            schema.decode_clip(damaged)


def test_a_clip_comes_back_whole() -> None:
    data = schema.encode_clip(CLIP, [b"first", b"second"], ordinal=3, image_index=1, product_index=2)
    record = schema.decode_clip(data)
    assert (record.ordinal, record.image_index, record.product_index) == (3, 1, 2)
    assert record.frames == [
        Frame(b"first", "live-1-2-0000", 0, []),
        Frame(b"second", "live-1-2-0003", 3, [(1.0, 2.0, 3.0, 4.5), (0.0, 0.0, 8.0, 8.0)]),
    ]
    assert [frame.seconds for frame in record.frames] == [None, None]
    assert record.image_ids == ["image"]
    assert record.texts == {"title": "titel", "speech": "", "category_name": "Äpple"}
    for field in ("id", "livestream", "original_frames", *schema.CLIP_TEXTS.values()):
        assert getattr(record, field) == getattr(CLIP, field)


def test_the_bytes_of_records_are_those_of_version_1() -> None:
    clip = schema.encode_clip(CLIP, [b"first", b"second"], ordinal=3, image_index=1, product_index=2)
    image = schema.encode_image(IMAGE, b"jpeg", ordinal=5, product_index=-1)
    assert [hashlib.sha256(data).hexdigest() for data in (clip, image)] == [
        "b28267e746df91a0e1d00d68b920b7e1d3ca500c2b65d68f497f68f324533ba3",
        "1823c96c2ba59ba0c95ba4f9ea16c68ee368fcfdf65a50ee8b93492ff86ea53a",
    ]


def test_a_clip_without_boxes_differs_from_one_with_empty_boxes() -> None:
    bare = dataclasses.replace(CLIP, boxes=None)
    empty = dataclasses.replace(CLIP, boxes=((), ()))
    read = [
        schema.decode_clip(schema.encode_clip(clip, [b"1", b"2"], ordinal=0, image_index=0, product_index=0)).frames
        for clip in (bare, empty)
    ]
    assert [[frame.boxes for frame in frames] for frames in read] == [[None, None], [[], []]]


def test_an_image_comes_back_whole() -> None:
    record = schema.decode_image(schema.encode_image(IMAGE, b"jpeg", ordinal=5, product_index=-1))
    assert dataclasses.asdict(record) == {
        "id": "image", "ordinal": 5, "encoded": b"jpeg", "name": "gallery/live/image-0.jpg", "title": "titel",
        "product_index": -1, "product": "spu",
    }  # fmt: skip


def test_another_schema_version_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 7)
    data = schema.encode_clip(CLIP, [b"1", b"2"], ordinal=0, image_index=0, product_index=0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"found schema version 7, needs 1"):
        schema.decode_clip(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames/positions": [0]}, "found 2 frames, 2 names, 1 positions"),
        ({"frames/box_counts": [0, 1]}, "needs four per box"),
        ({"ordinal": [1, 2]}, "2 values in feature ordinal, needs one"),
        ({"clip/id": [1]}, "found int values in feature clip/id, needs bytes"),
        ({"frames/encoded": []}, "found 0 frames"),
    ],
)
def test_a_clip_whose_lists_disagree_is_refused(changes: dict, message: str) -> None:
    features = decode_example(schema.encode_clip(CLIP, [b"1", b"2"], ordinal=0, image_index=0, product_index=0))
    with pytest.raises(ValueError, match=message):
        schema.decode_clip(encode_example(features | changes))
