"""What the bytes of a picture say beside its pixels: orientation, colour profile; and names of formats not read."""

import contextlib
import dataclasses
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # the first bytes of these files
TRANSPARENT_BYTES = {b"\0": 2, b"\2": 6}  # of one level, or three, in a PNG's tRNS, by the byte of its kind of colours
ORIENTATION, SHORT, LONG = 0x0112, 3, 4  # EXIF's tag, and the types that it may have
UPRIGHT = 1
TURNS = {  # what turns the pixels of other orientations upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PIXEL_TAGS = {
    *range(254, 260),
    262,
    266,
    *range(273, 275),
    *range(277, 280),
    284,
    317,
    *range(320, 326),
    330,
    332,
    338,
    339,
    347,
    *range(512, 522),
    *range(529, 533),
    34675,
}  # of TIFF: how its pixels are stored; 34675: ICC
EXIF, XMP, ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"  # what JPEG's segments start with
APP0, APP1, APP2, APP14, APP15, COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE  # markers of segments without pixels
START_OF_SCAN, END = 0xDA, 0xD9
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of the segments with a JPEG's size and precision
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
OTHER_FORMATS = {  # by their first bytes
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 picture",
    b"\xff\x4f\xff\x51": "a JPEG 2000 picture",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Metadata:
    orientation: int = UPRIGHT  # EXIF's, 1 to 8; UPRIGHT also if none is stated
    profile: bytes = b""  # ICC's; empty: none

    @property
    def has_other_colours(self) -> bool:
        """Whether there is a profile that does not call itself sRGB."""
        return bool(self.profile) and not any("sRGB".encode(text) in self.profile for text in ("ascii", "utf-16-be"))


def jpeg_metadata(data: bytes) -> Metadata:
    exif = xmp = b""
    profile: dict[int, bytes] = {}  # parts by number
    for marker, begin, end in jpeg_segments(data):
        if marker == APP1 and data.startswith(EXIF, begin + 4):
            exif = exif or data[begin + 4 : end]
        elif marker == APP1 and data.startswith(XMP, begin + 4):
            xmp = data[begin + 4 : end]
        elif marker == APP2 and data.startswith(ICC, begin + 4) and end - begin > 18:
            profile[data[begin + 16]] = data[begin + 18 : end]
    return Metadata(_orientation(exif, xmp), b"".join(profile[number] for number in sorted(profile)))


def metadata_of(picture: Image.Image) -> Metadata:
    """Returns the metadata of a picture that Pillow has loaded and that is no JPEG."""
    profile = picture.info.get("icc_profile") or b""
    if picture.format == "TIFF":
        return Metadata(UPRIGHT, profile)  # Pillow has turned it
    exif, xmp = picture.info.get("exif") or b"", picture.info.get("XML:com.adobe.xmp", picture.info.get("xmp")) or b""
    if raw := picture.info.get("Raw profile type exif"):  # ImageMagick's, in a PNG: three lines, then hexadecimal
        with contextlib.suppress(ValueError, AttributeError):
            exif = exif or bytes.fromhex("".join(raw.split("\n")[3:]))
    return Metadata(_orientation(exif, xmp.encode() if isinstance(xmp, str) else xmp), profile)


def _orientation(exif: bytes, xmp: bytes) -> int:
    """Returns EXIF's orientation, or XMP's if EXIF has none; 1 if it is none of 1 to 8."""
    found = exif_orientation(exif)
    if found is None and (stated := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        found = int(stated[1])
    return found if found in TURNS else UPRIGHT


def exif_orientation(exif: bytes) -> int | None:
    """Returns the value of the orientation tag, 0 if it is no single number, None without the tag.

    Reads this tag alone: the others may be odd, and may point outside the data.
    """
    tiff = exif.removeprefix(EXIF)
    for order, at in _tiff_entries(tiff):
        tag, kind, number = struct.unpack_from(f"{order}HHI", tiff, at)
        if tag == ORIENTATION:
            one = number == 1 and kind in (SHORT, LONG)
            return int(struct.unpack_from(f"{order}{'H' if kind == SHORT else 'I'}", tiff, at + 8)[0]) if one else 0
    return None


# --- parts of files ---------------------------------------------------------------------------------------------------


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, begin, end) of the segments before a JPEG's first scan; the content begins at begin + 4."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker in (START_OF_SCAN, END):
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at, end
        at = end


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int, bool]]:
    """Yields (kind, begin, end, whether its checksum is right) of a PNG's chunks; the last may be cut off: wrong."""
    at = len(PNG)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        yield kind, at, end, zlib.crc32(memoryview(data)[at + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]
        at = end if kind != b"IEND" else len(data)  # what follows is no part of the picture


def _tiff_entries(data: bytes) -> Iterator[tuple[str, int]]:
    """Yields (byte order, as of struct, and place) of the whole entries, 12 bytes each, of a TIFF's first directory."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    with contextlib.suppress(struct.error):
        if order:
            (first,) = struct.unpack_from(f"{order}I", data, 4)
            (count,) = struct.unpack_from(f"{order}H", data, first)
            for at in range(first + 2, min(first + 2 + 12 * count, len(data) - 11), 12):
                yield order, at


def is_critical(kind: bytes) -> bool:
    return not kind[0] & 0x20  # a capital letter


def damaged_chunk(data: bytes) -> str:
    """Returns the name of the first critical chunk of a PNG with a wrong checksum, "" if there is none."""
    wrong = (kind for kind, _, _, right in png_chunks(data) if not right and is_critical(kind))
    return next(wrong, b"").decode("ascii", "replace")


def essential(data: bytes) -> bytes:
    """Returns a JPEG, PNG or TIFF without what its pixels do not need, which may be odd or long; others unchanged."""
    if data.startswith(JPEG):
        metadata = {*range(APP1, APP15 + 1), COMMENT} - {APP14}  # APP0 and APP14 say how colours are stored
        parts = [(begin, end) for marker, begin, end in jpeg_segments(data) if marker in metadata]
    elif data.startswith(PNG):
        least = {b"tRNS": 12 + TRANSPARENT_BYTES.get(data[25:26], 1), b"eXIf": 12}  # a shorter one says nothing
        parts = [
            (begin, end)
            for kind, begin, end, right in png_chunks(data)
            if not is_critical(kind) and not (right and kind in least and end - begin >= least[kind])
        ]
    else:
        entries = [(order, data[at : at + 12]) for order, at in _tiff_entries(data)]
        kept = [each for order, each in entries if struct.unpack(f"{order}H", each[:2])[0] in PIXEL_TAGS]
        if not kept:
            return data
        order, end = entries[0][0], len(data) + len(data) % 2
        directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
        return (data[:4] + struct.pack(f"{order}I", end) + data[8:]).ljust(end, b"\0") + directory
    ends, begins = [0, *(end for _, end in parts)], [*(begin for begin, _ in parts), len(data)]
    return b"".join(data[end:begin] for end, begin in zip(ends, begins, strict=True))


# --- formats that are not read ----------------------------------------------------------------------------------------


def is_avif(data: bytes) -> bool:
    return data[4:12] in (b"ftypavif", b"ftypavis")


def name_format(data: bytes) -> str:
    """Returns in words the format of a picture or film that the decoders refuse, as "a HEIC picture"; "" if unknown."""
    if data[4:8] == b"ftyp":
        if is_avif(data):
            return "an AVIF picture, which this Pillow is built without"
        return "a HEIC picture" if data[8:12] in HEIC_BRANDS else "a film"
    for marker, begin, _ in jpeg_segments(data) if data.startswith(JPEG) else ():
        bits = data[begin + 4 : begin + 5]
        if marker in FRAMES and bits and bits != b"\x08":
            return f"a JPEG of {bits[0]} bits"
    return next((name for start, name in OTHER_FORMATS.items() if data.startswith(start)), "")
