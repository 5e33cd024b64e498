"""The Example codec against a plain encoder, recorded bytes, and the official messages in protobuf's default pool."""

import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.internal import api_implementation
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.format.example import decode_example, encode_example

VALUES = st.one_of(
    st.lists(st.binary(max_size=20), max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4),
)
FEATURES = st.dictionaries(st.text(max_size=5), VALUES, max_size=5)
RECORDED = {"ab": [b"", b"x"], "a": [], "": [-1, 300], "ä": [0.5]}
# RECORDED by version 1 of this package, which encoded by hand.
RECORDED_BYTES = bytes.fromhex(
    "0a3c"
    "0a14 0a00 1210 1a0e 0a0c ffffffffffffffffff01 ac02"
    "0a05 0a0161 1200"
    "0a0d 0a026162 1207 0a05 0a00 0a0178"
    "0a0e 0a02c3a4 1208 1206 0a04 0000003f"
)
# tensorflow/core/example/example.proto and feature.proto.
OFFICIAL = """
name: "example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: "BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: "FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: "Int64List" oneof_index: 0 }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "FeatureEntry" }
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" }
  }
}
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""


def varint(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + varint(number >> 7)


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, text, a message or packed numbers."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def plain_encoding(features: dict[str, Sequence[Any]]) -> bytes:
    """A tf.train.Example by the definition of protobuf's encoding, sorted by key."""
    entries = b""
    for key, values in sorted(features.items()):
        feature = b""
        if values and isinstance(values[0], bytes):
            feature = field(1, b"".join(field(1, value) for value in values))
        elif values and isinstance(values[0], float):
            feature = field(2, field(1, b"".join(struct.pack("<f", value) for value in values)))
        elif values:
            feature = field(3, field(1, b"".join(varint(value % 2**64) for value in values)))
        entries += field(1, field(1, key.encode()) + field(2, feature))
    return field(1, entries)


@given(FEATURES)
@example({})
@example({"a": [1], "ab": [2], "abc": [3], "": [4]})  # protobuf's map puts "ab" before "a"
@example({"\uffff": [], "\U0001f600": [b""], "ä": [-(2**63), 2**63 - 1], "z": [True]})
def test_the_bytes_equal_a_plain_encoders_and_the_features_come_back(features: dict) -> None:
    data = encode_example(features)
    assert data == plain_encoding(features)
    assert decode_example(data) == features


def test_the_bytes_are_those_of_version_1() -> None:
    assert encode_example(RECORDED) == RECORDED_BYTES  # type: ignore[arg-type]
    assert encode_example({}) == b"\x0a\x00"


@pytest.mark.parametrize("implementation", ["upb", "python"])
def test_the_official_messages_agree_in_the_same_process(implementation: str) -> None:
    code = f"from tests.format import test_example; test_example.compare_with_official({implementation!r})"
    environment = os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def compare_with_official(implementation: str) -> None:
    """Registers the official messages in the default pool, as TensorFlow does, and reads and writes with both."""
    assert api_implementation.Type() == implementation
    assert not {"jax", "grain", "tensorflow"} & set(sys.modules)
    pool = descriptor_pool.Default()
    with contextlib.suppress(KeyError):
        pytest.fail(f"data_pipeline registered {pool.FindMessageTypeByName('tensorflow.Example').full_name}")
    pool.Add(text_format.Parse(OFFICIAL, descriptor_pb2.FileDescriptorProto()))
    official = message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
    assert encode_example(RECORDED) == RECORDED_BYTES  # type: ignore[arg-type]
    message = official.FromString(RECORDED_BYTES)
    assert list(message.features.feature["ab"].bytes_list.value) == [b"", b"x"]
    assert list(message.features.feature[""].int64_list.value) == [-1, 300]
    assert list(message.features.feature["ä"].float_list.value) == [0.5]
    assert message.features.feature["a"].WhichOneof("kind") is None
    assert decode_example(message.SerializeToString()) == RECORDED
    for _, _, data in REFUSED:
        with pytest.raises(ValueError, match="found"):
            decode_example(data)


@given(st.binary(max_size=60))
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")  # a length without an end
@example(b"\x0a\x02\x0a\x00")
def test_bytes_that_are_not_an_example_raise_value_error_and_no_other(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode_example(data)


def of_feature(feature: bytes) -> bytes:
    return field(1, field(1, field(1, b"a") + field(2, feature)))


REFUSED = [
    ("cut short", "4 bytes that cannot be parsed", b"\x0a\x05\x0a\x00"),
    ("field number 0", "cannot be parsed", b"\x02\x00"),
    ("a number without an end", "cannot be parsed", b"\x08" + b"\xff" * 11),
    ("floats of five bytes", "cannot be parsed", of_feature(field(2, field(1, b"12345")))),
    ("a number as features", "field 1 of wire type 0 in 'Example'", b"\x08\x01"),
    ("feature_lists of a SequenceExample", "field 2 of wire type 2 in 'Example'", field(2, b"")),
    ("a group", "field 3 of wire type 3 in 'Features'", field(1, b"\x1b\x1c")),
    ("a number as key", "field 1 of wire type 0 in ''", field(1, field(1, b"\x08\x05"))),
    ("a number as a list", "field 1 of wire type 0 in 'a'", of_feature(b"\x08\x05")),
    ("a fourth kind", "field 4 of wire type 2 in 'a'", of_feature(field(4, b""))),
    ("a number in a list of bytes", "field 1 of wire type 0 in 'a'", of_feature(field(1, b"\x08\x05"))),
    ("doubles in a list of floats", "field 1 of wire type 1 in 'a'", of_feature(field(2, b"\x09" + b"0" * 8))),
]


@pytest.mark.parametrize(("name", "message", "data"), REFUSED, ids=[each[0] for each in REFUSED])
def test_damaged_bytes_are_refused_with_the_place(name: str, message: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=message):
        decode_example(data)


def test_a_key_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        decode_example(field(1, field(1, field(1, b"\xff") + field(2, b""))))


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        (field(3, b"\x08\x01\x08\x02"), [1, 2]),  # numbers that are not packed
        (field(2, b"\x0d\x00\x00\x00\x3f"), [0.5]),
        (field(1, b""), []),
        (b"", []),
        (field(1, field(1, b"x")) + field(3, field(1, b"\x05")), [5]),  # of two kinds the last
    ],
)
def test_other_encodings_of_a_feature_are_read(feature: bytes, values: list) -> None:
    assert decode_example(of_feature(feature)) == {"a": values}


def test_of_two_entries_with_a_key_the_last_is_read() -> None:
    first, last = (field(1, field(1, b"a") + field(2, field(3, field(1, value)))) for value in (b"\x01", b"\x02"))
    assert decode_example(field(1, first + last)) == {"a": [2]}
    assert decode_example(field(1, first) + field(1, last)) == {"a": [2]}


@pytest.mark.parametrize("values", [[1, b"x"], [1.5, 1], ["text"], [None]])
def test_a_feature_of_mixed_or_other_kinds_is_refused_with_its_name(values: list) -> None:
    with pytest.raises(TypeError, match=r"feature a: found .* needs only bytes, only ints or only floats"):
        encode_example({"a": values})


@pytest.mark.parametrize("values", [[2**63], [-(2**63) - 1], [1e39], [0.0, -1e300]])
def test_a_number_out_of_range_is_refused_with_its_feature(values: list) -> None:
    with pytest.raises(ValueError, match=r"feature a: found"):
        encode_example({"a": values})
    assert decode_example(encode_example({"a": [float("inf")]})) == {"a": [float("inf")]}
