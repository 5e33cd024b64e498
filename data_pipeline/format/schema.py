"""What a data set is made of, and its bytes: clips, shop images, and their `tf.train.Example` records.

Layouts yield `Clip` and `ShopImage`, whose pictures are still where the source has them; records give back `ClipRecord`
and `ImageRecord`, which carry the pictures' bytes as the source had them. The Example codec is written by hand, so that
neither TensorFlow nor a protobuf runtime is needed; its bytes equal protobuf's deterministic ones.
"""

import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

SCHEMA_VERSION = 1  # of the records, the columns and the manifest; raise it when any of them changes its meaning

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the stored picture
T = TypeVar("T")
Features = Mapping[str, Sequence[bytes] | Sequence[int] | Sequence[float]]


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """Where one picture lies: a file of its own, or `size` bytes from `offset` of a tar."""

    name: str  # without folder and suffix: a frame id, an image id
    path: str  # relative to the source folder
    offset: int = 0
    size: int | None = None  # None: the whole file
    member: str = ""  # its name inside the tar
    original_size: tuple[int, int] | None = None  # width, height before the download shrank it; None: never shrunk


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """A span of a livestream that presents one product, with the frames to be stored."""

    id: str
    livestream: str
    frames: tuple[Picture, ...]
    positions: tuple[int, ...]  # of those frames among the clip's own
    original_frames: int  # how many the clip has, stored or not
    image_ids: tuple[str, ...]  # training: the one of its pair; test: its true images
    boxes: tuple[tuple[Box, ...], ...] | None = None  # of each stored frame, in pixels of the original; None: not given
    product: str = ""  # "": the layout does not say
    category: str = ""
    category_name: str = ""
    title: str = ""
    speech: str = ""
    scale: str = ""
    duration: str = ""
    number: str = ""
    failed_downloads: int = 0  # frames that the annotation names and the download could not get


@dataclasses.dataclass(frozen=True, slots=True)
class ShopImage:
    """A shop image; `reference` is how its layout finds the picture (a path, or the image id)."""

    id: str
    reference: str
    title: str = ""
    product: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ClipRecord:
    """A clip as it is read back. Indices are rows of the split's images and of the data set's products, -1: none."""

    id: str
    ordinal: int  # among the clips that the source lists for this split, sorted by id
    livestream: str
    frames: list[bytes]
    frame_names: list[str]
    positions: list[int]
    original_frames: int
    boxes: list[list[Box]] | None
    image_index: int
    image_ids: list[str]
    product_index: int
    product: str
    category: str
    category_name: str
    title: str
    speech: str
    scale: str
    duration: str
    number: str


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRecord:
    """A shop image as it is read back."""

    id: str
    ordinal: int  # among the shop images that the source lists for this split, sorted by id
    encoded: bytes
    name: str  # how the source refers to it
    title: str
    product_index: int
    product: str


# --- records ----------------------------------------------------------------------------------------------------------

CLIP_TEXTS = {  # feature of the Example: field of Clip and ClipRecord
    "clip/id": "id",
    "clip/livestream": "livestream",
    "clip/title": "title",
    "clip/speech": "speech",
    "clip/scale": "scale",
    "clip/duration": "duration",
    "clip/number": "number",
    "category/id": "category",
    "category/name": "category_name",
    "product/id": "product",
}


def encode_clip(clip: Clip, frames: Sequence[bytes], *, ordinal: int, image_index: int, product_index: int) -> bytes:
    """Bytes of a clip's record; `frames` are its pictures, and `clip.boxes` already in their pixels."""
    boxes = clip.boxes or ()
    features: dict[str, Sequence[bytes] | Sequence[int] | Sequence[float]] = {
        "schema_version": [SCHEMA_VERSION],
        "ordinal": [ordinal],
        "clip/original_frames": [clip.original_frames],
        "image/index": [image_index],
        "image/ids": [name.encode() for name in clip.image_ids],
        "product/index": [product_index],
        "frames/encoded": frames,
        "frames/names": [picture.name.encode() for picture in clip.frames],
        "frames/positions": clip.positions,
        "frames/box_counts": [len(of_frame) for of_frame in boxes],
        "frames/boxes": [float(side) for of_frame in boxes for box in of_frame for side in box],
    }
    features |= {feature: [getattr(clip, field).encode()] for feature, field in CLIP_TEXTS.items()}
    return encode_example(features)


def decode_clip(data: bytes) -> ClipRecord:
    """The clip of a record's bytes; ValueError says what is wrong with them."""
    features = _versioned(data)
    frames = _list(features, "frames/encoded", bytes)
    counts = _list(features, "frames/box_counts", int)
    sides = _list(features, "frames/boxes", float)
    names = [name.decode() for name in _list(features, "frames/names", bytes)]
    positions = _list(features, "frames/positions", int)
    if not len(frames) == len(names) == len(positions) or (counts and len(counts) != len(frames)):
        raise ValueError(
            f"found {len(frames)} frames, {len(names)} names, {len(positions)} positions and {len(counts)} box counts, "
            "needs as many of each"
        )
    if min(counts, default=0) < 0 or 4 * sum(counts) != len(sides):
        raise ValueError(f"found {len(sides)} box sides for box counts {counts}, needs four a box")
    boxes = None
    if counts:
        each = iter([(a, b, c, d) for a, b, c, d in zip(*[iter(sides)] * 4, strict=True)])
        boxes = [[next(each) for _ in range(count)] for count in counts]
    return ClipRecord(
        ordinal=_one(features, "ordinal", int),
        frames=frames,
        frame_names=names,
        positions=positions,
        original_frames=_one(features, "clip/original_frames", int),
        boxes=boxes,
        image_index=_one(features, "image/index", int),
        image_ids=[name.decode() for name in _list(features, "image/ids", bytes)],
        product_index=_one(features, "product/index", int),
        **{field: _one(features, feature, bytes).decode() for feature, field in CLIP_TEXTS.items()},
    )


def encode_image(image: ShopImage, encoded: bytes, *, ordinal: int, product_index: int) -> bytes:
    """Bytes of a shop image's record."""
    return encode_example(
        {
            "schema_version": [SCHEMA_VERSION],
            "ordinal": [ordinal],
            "image/id": [image.id.encode()],
            "image/name": [image.reference.encode()],
            "image/title": [image.title.encode()],
            "image/encoded": [encoded],
            "product/id": [image.product.encode()],
            "product/index": [product_index],
        }
    )


def decode_image(data: bytes) -> ImageRecord:
    """The shop image of a record's bytes; ValueError says what is wrong with them."""
    features = _versioned(data)
    return ImageRecord(
        id=_one(features, "image/id", bytes).decode(),
        ordinal=_one(features, "ordinal", int),
        encoded=_one(features, "image/encoded", bytes),
        name=_one(features, "image/name", bytes).decode(),
        title=_one(features, "image/title", bytes).decode(),
        product_index=_one(features, "product/index", int),
        product=_one(features, "product/id", bytes).decode(),
    )


def _versioned(data: bytes) -> dict[str, list]:
    features = decode_example(data)
    version = _one(features, "schema_version", int)
    if version != SCHEMA_VERSION:
        raise ValueError(f"found schema version {version}, needs {SCHEMA_VERSION}; convert the source again")
    return features


def _list(features: Mapping[str, list], key: str, kind: type[T]) -> list[T]:
    values = features.get(key)
    if values is None or any(not isinstance(value, kind) for value in values):
        raise ValueError(f"found {'no' if values is None else 'other'} values, needs {kind.__name__} in feature {key}")
    return values


def _one(features: Mapping[str, list], key: str, kind: type[T]) -> T:
    values = _list(features, key, kind)
    if len(values) != 1:
        raise ValueError(f"found {len(values)} values, needs one in feature {key}")
    return values[0]


# --- tf.train.Example -------------------------------------------------------------------------------------------------
# Example { Features features = 1 }, Features { map<string, Feature> feature = 1 }, a map entry { key = 1, value = 2 },
# Feature { one of BytesList = 1, FloatList = 2, Int64List = 3 }, each list { repeated value = 1, numbers packed }.

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3
MAX_VARINT_BYTES = 10


def encode_example(features: Features) -> bytes:
    """The features as a serialised tf.train.Example, keys sorted: protobuf's own deterministic bytes.

    A feature is a list of bytes, of ints (signed 64 bit) or of floats (stored in 32 bit); an empty one has no kind.
    """
    entries = []
    for key in sorted(features):
        feature = _encode_feature(key, features[key])
        entries.append(_field(1, _field(1, key.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def decode_example(data: bytes) -> dict[str, list]:
    """The features of a serialised tf.train.Example; ValueError, and nothing else, for bytes that are none."""
    features: dict[str, list] = {}
    for number, value in _fields(data):
        if number != 1:
            continue
        for inner, entry in _fields(_as_bytes(value)):
            if inner == 1:
                key, feature = _decode_entry(_as_bytes(entry))
                features[key] = feature
    return features


def _encode_feature(key: str, values: Sequence[bytes] | Sequence[int] | Sequence[float]) -> bytes:
    if not values:
        return b""
    if all(isinstance(value, bytes) for value in values):
        return _field(BYTES_LIST, b"".join(_field(1, value) for value in values))  # type: ignore[arg-type]
    if all(isinstance(value, int) for value in values):
        return _field(INT64_LIST, _field(1, b"".join(_varint(int(value) & 0xFFFFFFFFFFFFFFFF) for value in values)))
    if all(isinstance(value, float) for value in values):
        return _field(FLOAT_LIST, _field(1, struct.pack(f"<{len(values)}f", *values)))
    raise TypeError(f"feature {key}: found {values!r:.80}, needs only bytes, only ints or only floats.")


def _decode_entry(entry: bytes) -> tuple[str, list]:
    key, feature = "", b""
    for number, value in _fields(entry):
        if number == 1:
            key = _as_bytes(value).decode()
        elif number == 2:
            feature = _as_bytes(value)
    values: list = []
    for kind, content in _fields(feature):
        if kind in (BYTES_LIST, FLOAT_LIST, INT64_LIST):
            values = _decode_list(kind, _as_bytes(content))
    return key, values


def _decode_list(kind: int, content: bytes) -> list:
    values: list = []
    for number, value in _fields(content):
        if number != 1:
            continue
        if kind == BYTES_LIST:
            values.append(_as_bytes(value))
        elif kind == INT64_LIST:
            values += [_signed(each) for each in ([value] if isinstance(value, int) else _varints(value))]
        else:
            packed = _as_bytes(value)
            if len(packed) % 4:
                raise ValueError(f"found {len(packed)} bytes of packed floats, needs a multiple of four")
            values += struct.unpack(f"<{len(packed) // 4}f", packed)
    return values


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int for a varint, else the bytes."""
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise ValueError(f"found field number {number} at byte {position}, needs a tf.train.Example")
        if wire == VARINT:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if wire == BYTES:
            size, position = _read_varint(data, position)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"found wire type {wire} at byte {position}, needs a tf.train.Example")
        if size > len(data) - position:
            raise ValueError(f"found {len(data) - position} bytes after byte {position}, needs {size}")
        yield number, data[position : position + size]
        position += size


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[position : position + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position + index + 1
    raise ValueError(f"found no end of the number at byte {position}, needs one within {MAX_VARINT_BYTES} bytes")


def _varints(data: bytes) -> list[int]:
    values, position = [], 0
    while position < len(data):
        value, position = _read_varint(data, position)
        values.append(value)
    return values


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(len(content)) + content


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"found the number {value}, needs a message or text in its place")
    return value
