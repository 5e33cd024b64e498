"""Encoding and decoding of `tf.train.Example` messages by protobuf, without TensorFlow.

The messages' descriptor is in a private pool, since TensorFlow registers the same names in protobuf's default pool. All
implementations of protobuf give the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

Features = Mapping[str, Sequence[bytes] | Sequence[int] | Sequence[float]]

PACKAGE = "tensorflow"
# Message: its fields as (label, type, name), numbered from 1. The official `Features` has a map<string, Feature>, which
# is encoded as these repeated entries, but in an order on which protobuf's implementations disagree.
MESSAGES = {
    "BytesList": [("repeated", "bytes", "value")],
    "FloatList": [("repeated", "float", "value")],
    "Int64List": [("repeated", "int64", "value")],
    "Feature": [
        ("oneof", "BytesList", "bytes_list"),
        ("oneof", "FloatList", "float_list"),
        ("oneof", "Int64List", "int64_list"),
    ],
    "FeatureEntry": [("optional", "bytes", "key"), ("optional", "Feature", "value")],  # key: UTF-8
    "Features": [("repeated", "FeatureEntry", "feature")],
    "Example": [("optional", "Features", "features")],
}
LISTS = {bytes: "bytes_list", int: "int64_list", float: "float_list"}


def _message_class(name: str) -> type[Message]:
    # proto2, since it writes a key that is empty, as a map does; proto3 leaves it out.
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package=PACKAGE, syntax="proto2")
    field_class = descriptor_pb2.FieldDescriptorProto
    for message_name, fields in MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for number, (label, kind, field_name) in enumerate(fields, 1):
            field = message.field.add(name=field_name, number=number)
            field.label = field_class.LABEL_REPEATED if label == "repeated" else field_class.LABEL_OPTIONAL
            if kind in MESSAGES:
                field.type, field.type_name = field_class.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                field.type = field_class.Type.Value(f"TYPE_{kind.upper()}")
                field.options.packed = kind != "bytes"
            if label == "oneof":
                field.oneof_index = 0
        if any(label == "oneof" for label, _, _ in fields):
            message.oneof_decl.add(name="kind")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


EXAMPLE: Any = _message_class("Example")


def encode_example(features: Features) -> bytes:
    """Returns the features as a serialized tf.train.Example, sorted by key: equal features give equal bytes.

    A feature is a list of bytes, of signed 64-bit ints or of floats (stored in 32 bits). Raises TypeError for other
    kinds or a mixture, and ValueError for an int beyond 64 bits or a finite float beyond 32; both name the feature.
    """
    example = EXAMPLE()
    example.features.SetInParent()
    for key in sorted(features):
        entry = example.features.feature.add(key=key.encode())
        entry.value.SetInParent()
        if features[key]:
            _fill_feature(entry.value, key, features[key])
    return example.SerializeToString(deterministic=True)


def _fill_feature(feature: Any, key: str, values: Sequence[Any]) -> None:
    kind = next((kind for kind in LISTS if all(isinstance(value, kind) for value in values)), None)
    if kind is None:
        raise TypeError(f"feature {key}: found {values!r:.80}, needs only bytes, only ints or only floats.")
    stored = getattr(feature, LISTS[kind]).value
    try:
        stored.extend(map(kind, values))  # True, which is an int, is stored as 1
    except ValueError as err:
        raise ValueError(f"feature {key}: found an int out of range ({err}), needs 64 bits with a sign.") from err
    # protobuf stores a float that does not fit as infinity.
    if kind is float and [*map(math.isinf, stored)] != [*map(math.isinf, values)]:
        raise ValueError(f"feature {key}: found {values!r:.80}, needs floats that fit in 32 bits.")


def decode_example(data: bytes) -> dict[str, list]:
    """Returns the features of a serialized tf.train.Example by key: lists of bytes, ints or floats; [] without any.

    Raises ValueError, and no other error, if the bytes are not an Example or contain an unknown field.
    """
    example = EXAMPLE()
    try:
        example.ParseFromString(data)
    except DecodeError as err:
        raise ValueError(f"found {len(data)} bytes that cannot be parsed ({err}), needs a tf.train.Example") from err
    _check_fields(example, "Example")
    _check_fields(example.features, "Features")
    features: dict[str, list] = {}
    for entry in example.features.feature:
        key = entry.key.decode()
        _check_fields(entry, key)
        _check_fields(entry.value, key)
        features[key] = []
        if name := entry.value.WhichOneof("kind"):
            stored = getattr(entry.value, name)
            _check_fields(stored, key)
            features[key] = list(stored.value)
    return features


def _check_fields(message: Any, where: str) -> None:
    for field in UnknownFieldSet(message):  # also those with the wrong wire type
        raise ValueError(
            f"found field {field.field_number} of wire type {field.wire_type} in {where!r}, needs a tf.train.Example"
        )
