"""The schema of a converted set: clips, shop images, and the features of their records.

A layout returns `Clip` and `ShopImage`, which name the place of each picture in the source. A reader returns
`ClipRecord` and `ImageRecord`, which contain the pictures' encoded bytes, equal to those of the source.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from data_pipeline.format.example import Features, decode_example, encode_example

SCHEMA_VERSION = 1  # of the records, the columns and the manifest; raise it when the meaning of any of them changes

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the stored picture
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """The location of one picture: a whole file, or `size` bytes from byte `offset` of a tar file."""

    name: str  # without folder and suffix: a frame id or an image id
    path: str  # relative to the source folder
    offset: int = 0
    size: int | None = None  # None: the whole file
    member: str = ""  # its name inside the tar file
    original_size: tuple[int, int] | None = None  # width, height before the download shrank it; None: not shrunk


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """A part of a livestream that presents one product, with the frames to store."""

    id: str
    livestream: str
    frames: tuple[Picture, ...]
    positions: tuple[int, ...]  # index of each stored frame among all frames of the clip
    original_frames: int  # number of frames of the clip, stored or not
    image_ids: tuple[str, ...]  # training: the image of its pair; test: its true images
    boxes: tuple[tuple[Box, ...], ...] | None = None  # of each stored frame, in pixels of the original; None: not given
    product: str = ""  # "": the layout does not give it
    category: str = ""
    category_name: str = ""
    title: str = ""
    speech: str = ""
    scale: str = ""
    duration: str = ""
    number: str = ""
    failed_downloads: int = 0  # number of frames that the annotation lists and the download failed to get


@dataclasses.dataclass(frozen=True, slots=True)
class ShopImage:
    """A shop image. Its layout finds the picture by `reference`: a path or the image id."""

    id: str
    reference: str
    title: str = ""
    product: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """A frame of a clip, read from the clip's record."""

    encoded: bytes  # the picture file, as the source has it
    id: str
    position: int  # index among all frames of the clip, stored or not
    boxes: list[Box] | None = None  # of the product; None: the source gives no boxes for this clip
    seconds: float | None = None  # time since the clip began; None: not known. Schema version 1 stores no times.


@dataclasses.dataclass(frozen=True, slots=True)
class ClipRecord:
    """A clip read from its record. A text that the source does not give is ""."""

    id: str
    ordinal: int  # index among the clips that the source lists for this split, sorted by id
    livestream: str
    frames: list[Frame]  # those that are stored, in order
    original_frames: int  # number of frames of the clip, stored or not
    image_index: int  # row of the split's images; -1: none
    image_ids: list[str]  # training: the image of its pair; test: its true images
    product_index: int  # line of the data set's products; -1: none
    product: str
    category: str
    category_name: str
    title: str  # of its shop image
    speech: str
    scale: str
    duration: str
    number: str

    @property
    def texts(self) -> dict[str, str]:
        """A dict of the texts that a text encoder can read: title, speech and category_name; "" where not given."""
        return {"title": self.title, "speech": self.speech, "category_name": self.category_name}


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRecord:
    """A shop image read from its record. `product_index` is a line of the data set's products; -1: none."""

    id: str
    ordinal: int  # index among the shop images that the source lists for this split, sorted by id
    encoded: bytes  # the picture file, as the source has it
    name: str  # `ShopImage.reference`
    title: str
    product_index: int
    product: str


# --- records ----------------------------------------------------------------------------------------------------------

CLIP_TEXTS = {  # feature: field of Clip and ClipRecord
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
    """Returns a clip's record as bytes. `clip.boxes` must be in pixels of `frames`. ValueError: a number too large."""
    boxes = clip.boxes or ()
    features: Features = {
        "schema_version": [SCHEMA_VERSION],
        "ordinal": [ordinal],
        "clip/original_frames": [clip.original_frames],
        "image/index": [image_index],
        "image/ids": [name.encode() for name in clip.image_ids],
        "product/index": [product_index],
        "frames/encoded": frames,
        "frames/names": [picture.name.encode() for picture in clip.frames],
        "frames/positions": clip.positions,
        "frames/box_counts": [len(frame_boxes) for frame_boxes in boxes],
        "frames/boxes": [float(edge) for frame_boxes in boxes for box in frame_boxes for edge in box],
        **{feature: [getattr(clip, field).encode()] for feature, field in CLIP_TEXTS.items()},
    }
    return encode_example(features)


def decode_clip(data: bytes) -> ClipRecord:
    """Returns the clip of a record's data. Raises ValueError with the reason if the data are not a clip's record."""
    features = _decode_features(data)
    encoded = _values(features, "frames/encoded", bytes)
    counts = _values(features, "frames/box_counts", int)
    edges = _values(features, "frames/boxes", float)
    names = [name.decode() for name in _values(features, "frames/names", bytes)]
    positions = _values(features, "frames/positions", int)
    if not len(encoded) == len(names) == len(positions) or (counts and len(counts) != len(encoded)):
        raise ValueError(
            f"found {len(encoded)} frames, {len(names)} names, {len(positions)} positions and {len(counts)} box "
            "counts, needs the same number of each"
        )
    if min(counts, default=0) < 0 or 4 * sum(counts) != len(edges):
        raise ValueError(f"found {len(edges)} box edges for box counts {counts}, needs four per box")
    box = iter([(a, b, c, d) for a, b, c, d in zip(*[iter(edges)] * 4, strict=True)])
    boxes = [[next(box) for _ in range(count)] for count in counts] or len(encoded) * [None]
    return ClipRecord(
        ordinal=_only_value(features, "ordinal", int),
        frames=[Frame(*frame) for frame in zip(encoded, names, positions, boxes, strict=True)],
        original_frames=_only_value(features, "clip/original_frames", int),
        image_index=_only_value(features, "image/index", int),
        image_ids=[name.decode() for name in _values(features, "image/ids", bytes)],
        product_index=_only_value(features, "product/index", int),
        **{field: _only_value(features, feature, bytes).decode() for feature, field in CLIP_TEXTS.items()},
    )


def encode_image(image: ShopImage, encoded: bytes, *, ordinal: int, product_index: int) -> bytes:
    """Returns a shop image's record as bytes. encoded: its picture file. ValueError: a number beyond 64 bits."""
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
    """Returns the shop image of a record's data. Raises ValueError with the reason if the data are not its record."""
    features = _decode_features(data)
    return ImageRecord(
        id=_only_value(features, "image/id", bytes).decode(),
        ordinal=_only_value(features, "ordinal", int),
        encoded=_only_value(features, "image/encoded", bytes),
        name=_only_value(features, "image/name", bytes).decode(),
        title=_only_value(features, "image/title", bytes).decode(),
        product_index=_only_value(features, "product/index", int),
        product=_only_value(features, "product/id", bytes).decode(),
    )


def _decode_features(data: bytes) -> dict[str, list]:
    features = decode_example(data)
    version = _only_value(features, "schema_version", int)
    if version != SCHEMA_VERSION:
        raise ValueError(f"found schema version {version}, needs {SCHEMA_VERSION}")
    return features


def _values(features: Mapping[str, list], key: str, kind: type[T]) -> list[T]:
    values = features.get(key)
    if values is None:
        raise ValueError(f"found no feature {key}, needs one of type {kind.__name__}")
    if not all(isinstance(value, kind) for value in values):
        raise ValueError(f"found {type(values[0]).__name__} values in feature {key}, needs {kind.__name__}")
    return values


def _only_value(features: Mapping[str, list], key: str, kind: type[T]) -> T:
    values = _values(features, key, kind)
    if len(values) != 1:
        raise ValueError(f"found {len(values)} values in feature {key}, needs one")
    return values[0]
