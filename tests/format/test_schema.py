"""The Example codec against protobuf's own, and against whatever hypothesis can think of."""

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.format import schema
from data_pipeline.format.schema import Clip, Picture, ShopImage, decode_example, encode_example

FLOAT32 = st.floats(width=32, allow_nan=False)
VALUES = st.one_of(
    st.lists(st.binary(max_size=20), max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.lists(FLOAT32, max_size=4),
)
FEATURES = st.dictionaries(st.text(max_size=5), VALUES, max_size=5)
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


@given(FEATURES)
def test_features_come_back_as_they_went(features: dict) -> None:
    assert decode_example(encode_example(features)) == features


@given(st.binary(max_size=60))
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")  # a length without end
@example(b"\x0a\x02\x0a\x00")
def test_bytes_that_are_no_example_raise_value_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_example, schema.decode_clip, schema.decode_image):
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


# Keys of one length: where one begins another, protobuf's own order differs between its implementations.
@given(st.dictionaries(st.text("abcä", min_size=3, max_size=3), VALUES, max_size=5))
def test_the_bytes_are_protobufs(features: dict) -> None:
    message = _example_class()()
    for key, values in features.items():
        feature = message.features.feature[key]
        if values:
            kinds = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}
            kinds[type(values[0])].value.extend(values)
    message.features.SetInParent()
    assert encode_example(features) == message.SerializeToString(deterministic=True)


@functools.cache
def _example_class() -> Any:
    """tf.train.Example in a pool of its own (protobuf comes with tensorboardX)."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def add(name: str, *fields: tuple, within: Any = file.message_type) -> Any:
        message = within.add(name=name)
        for number, (field, label, kind, type_name) in enumerate(fields, 1):
            message.field.add(name=field, number=number, label=label, type=kind, type_name=type_name)
        return message

    one, many, of_message = 1, 3, 11
    for name, kind in (("BytesList", 12), ("FloatList", 2), ("Int64List", 3)):
        add(name, ("value", many, kind, None))
    lists = [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")]
    feature = add("Feature", *((field, one, of_message, f".tensorflow.{name}") for field, name in lists))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = add("Features", ("feature", many, of_message, ".tensorflow.Features.FeatureEntry"))
    value = ("value", one, of_message, ".tensorflow.Feature")
    add("FeatureEntry", ("key", one, 9, None), value, within=features.nested_type).options.map_entry = True
    add("Example", ("features", one, of_message, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def test_unpacked_numbers_are_read_too() -> None:
    entry = b"\x0a\x01a\x12\x06\x1a\x04\x08\x01\x08\x02"  # a: int64 values 1 and 2, a field each
    assert decode_example(b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry) == {"a": [1, 2]}


def test_a_mixed_feature_is_refused_with_its_name() -> None:
    with pytest.raises(TypeError, match=r"feature a"):
        encode_example({"a": [1, b"x"]})  # type: ignore[list-item]


def test_a_clip_comes_back_whole() -> None:
    data = schema.encode_clip(CLIP, [b"first", b"second"], ordinal=3, image_index=1, product_index=2)
    record = schema.decode_clip(data)
    assert (record.ordinal, record.image_index, record.product_index) == (3, 1, 2)
    assert record.frames == [b"first", b"second"]
    assert record.frame_names == ["live-1-2-0000", "live-1-2-0003"]
    assert record.boxes == [[], [(1.0, 2.0, 3.0, 4.5), (0.0, 0.0, 8.0, 8.0)]]
    for field in ("id", "livestream", "original_frames", *schema.CLIP_TEXTS.values()):
        assert getattr(record, field) == getattr(CLIP, field)


def test_a_clip_without_boxes_is_told_from_one_with_empty_ones() -> None:
    bare = dataclasses.replace(CLIP, boxes=None)
    empty = dataclasses.replace(CLIP, boxes=((), ()))
    read = [
        schema.decode_clip(schema.encode_clip(clip, [b"1", b"2"], ordinal=0, image_index=0, product_index=0)).boxes
        for clip in (bare, empty)
    ]
    assert read == [None, [[], []]]


def test_an_image_comes_back_whole() -> None:
    image = ShopImage("image", "gallery/live/image-0.jpg", "titel", "spu")
    record = schema.decode_image(schema.encode_image(image, b"jpeg", ordinal=5, product_index=-1))
    assert dataclasses.asdict(record) == {
        "id": "image", "ordinal": 5, "encoded": b"jpeg", "name": "gallery/live/image-0.jpg", "title": "titel",
        "product_index": -1, "product": "spu",
    }  # fmt: skip


def test_another_schema_version_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 7)
    data = schema.encode_clip(CLIP, [b"1", b"2"], ordinal=0, image_index=0, product_index=0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"found schema version 7, needs 1; convert the source again"):
        schema.decode_clip(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames/positions": [0]}, "found 2 frames, 2 names, 1 positions"),
        ({"frames/box_counts": [0, 1]}, "needs four a box"),
        ({"ordinal": [1, 2]}, "needs one in feature ordinal"),
        ({"clip/id": [1]}, "needs bytes in feature clip/id"),
        ({"frames/encoded": []}, "found 0 frames"),
    ],
)
def test_a_clip_whose_lists_disagree_is_refused(changes: dict, message: str) -> None:
    features = decode_example(schema.encode_clip(CLIP, [b"1", b"2"], ordinal=0, image_index=0, product_index=0))
    with pytest.raises(ValueError, match=message):
        schema.decode_clip(encode_example(features | changes))
