"""A folder of one's own clips and shop images, with two optional tables; docs/own_clips.md says how to fill it.

    clips/<product>/<clip>/     its pictures are the clip's frames, in natural order (frame2 before frame10)
    shop/<product>.*            the product's shop image
    products.csv, clips.csv     titles and livestreams; splits

A product's name is the id of its shop image, and <product>/<clip> the id of a clip. What is wrong with a clip or a shop
image is a fault that --on-error=skip leaves out. What is wrong with a table or a name is never skipped: nobody could
say which clips it costs.
"""

import collections
import csv
import dataclasses
import hashlib
import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import ClassVar

import google_crc32c

from data_pipeline.faults import BadInputError, Fault, WrongUseError
from data_pipeline.format.schema import Clip, Picture, ShopImage
from data_pipeline.layouts.annotations import checked_id, stored_positions
from data_pipeline.layouts.listing import ClipListing, FoundFrame, Listing, Row, RowLocation, Run
from data_pipeline.layouts.pictures import PictureFolder

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
KEYS = {"products.csv": ("product",), "clips.csv": ("product", "clip")}  # columns that say of what a row is
VALUES = {"products.csv": {"title", "livestream"}, "clips.csv": {"split"}}  # columns of which one at least is there
LIVESTREAM = "shop"  # of products that no table gives one
SHOWN = 20  # faults and files on the screen


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A visible file or folder of the source."""

    name: str  # in Unicode's form C: a Mac writes é as two characters where a table has one
    path: str  # relative to the source, as the disk has it
    is_folder: bool
    size: int

    @property
    def is_picture(self) -> bool:
        return not self.is_folder and self.name.lower().endswith(SUFFIXES)

    @property
    def stem(self) -> str:
        """A picture's name without its suffix, with which "IMG_1 (2).jpg" would come before "IMG_1.jpg"."""
        return os.path.splitext(self.name)[0] if self.is_picture else self.name


@dataclasses.dataclass(slots=True)
class ClipFolder:
    """A folder of frames."""

    id: str
    path: str
    product: str
    frames: tuple[str, ...]
    others: tuple[str, ...]  # names of what is no picture
    split: str = ""


class Folder:
    """The source folder with clips/, shop/ and perhaps the tables."""

    FOLDERS: ClassVar[tuple[str, ...]] = ("clips", "shop")

    def __init__(self, source: Path, train_annotation: str | None, stored_frames: int | None) -> None:
        """Reads names and tables, no picture; what is wrong with them is in `faults`."""
        if train_annotation:
            raise WrongUseError(
                "--train-annotation: found a training list's name, but a folder has none; put splits into clips.csv."
            )
        self.source = source
        self.stored_frames = stored_frames  # None: all
        self.folder = PictureFolder(source)
        self.pictures: dict[str, int] = {}  # path -> size
        self.left_out: list[str] = []  # paths of what is neither a picture nor a folder where one belongs
        self.titles: dict[str, str] = {}
        self.livestreams: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.copies: list[str] = []
        self.clips = self._read_clips(self.faults)
        self.shop = self._read_shop(self.faults)
        if not self.clips and not self.faults:
            raise WrongUseError(
                f"{source}/clips: found no clip, needs clips/<product>/<clip>/ with pictures; correct --source."
            )
        self._read_products(self.faults)
        self._read_splits(self.faults)

    # --- names --------------------------------------------------------------------------------------------------------

    def _entries(self, folder: str, faults: list[Fault]) -> list[Entry]:
        """What a folder holds, in natural order; a name that cannot be part of an id is a fault."""
        entries: dict[str, Entry] = {}
        with os.scandir(self.source / folder) as found:
            for each in sorted(found, key=lambda each: each.name):
                name = unicodedata.normalize("NFC", each.name)
                size = each.stat().st_size if each.is_file() else -1  # a link to nowhere is found out when it is read
                entry = Entry(name, f"{folder}/{each.name}", each.is_dir(), size)
                if name.startswith("._") or (name.startswith(".") and not (entry.is_folder or entry.is_picture)):
                    continue  # a file manager's own, such as .DS_Store
                if name.startswith(".") or not name.isprintable() or entry.stem != entry.stem.strip():
                    detail = f"found the name {name!r}, needs printable characters, no dot in front, no space at "
                    detail += "either end; rename it."
                    faults.append(Fault("bad name", _shown(entry.path), detail))
                elif name in entries:
                    detail = f"found the name {name!r} twice, written differently in Unicode; rename one."
                    faults.append(Fault("bad name", _shown(entry.path), detail))
                else:
                    entries[name] = entry
        return sorted(entries.values(), key=lambda entry: natural(entry.stem))

    def _read_clips(self, faults: list[Fault]) -> dict[str, ClipFolder]:
        """Clips by id, in natural order of product and clip."""
        clips: dict[str, ClipFolder] = {}
        for product in self._entries("clips", faults):
            if not product.is_folder:
                self.left_out.append(product.path)
                continue
            before = len(clips)
            for entry in self._entries(product.path, faults):
                if not entry.is_folder:
                    self.left_out.append(entry.path)
                    continue
                clip_id = f"{product.name}/{entry.name}"
                try:
                    checked_id(clip_id, "clip")
                except BadInputError as err:
                    faults.append(err.at(entry.path))
                content = self._entries(entry.path, faults)
                frames = tuple(picture.path for picture in self._pictures(content))
                others = tuple(each.name for each in content if not each.is_picture)
                clips[clip_id] = ClipFolder(clip_id, entry.path, product.name, frames, others)
            if len(clips) == before:
                detail = "found no folder of a clip, needs clips/<product>/<clip>/ with pictures; "
                detail += "give each clip a folder, or remove the product's."
                faults.append(Fault("product without clips", _shown(product.path), detail))
        return clips

    def _read_shop(self, faults: list[Fault]) -> dict[str, tuple[str, ...]]:
        """Paths of the pictures of each product, in natural order; one is right."""
        images: dict[str, tuple[str, ...]] = {}
        for entry in self._pictures(self._entries("shop", faults)):
            try:
                images[checked_id(entry.stem, "image")] = (*images.get(entry.stem, ()), entry.path)
            except BadInputError as err:
                faults.append(err.at(entry.path))
        return images

    def _pictures(self, content: Sequence[Entry]) -> list[Entry]:
        """The pictures among a folder's content; the rest is remembered as left out."""
        pictures = [entry for entry in content if entry.is_picture]
        self.pictures |= {entry.path: entry.size for entry in pictures}
        self.left_out += [entry.path for entry in content if not entry.is_picture]
        return pictures

    # --- tables -------------------------------------------------------------------------------------------------------

    def _read_products(self, faults: list[Fault]) -> None:
        known = {clip.product for clip in self.clips.values()} | self.shop.keys()
        for line, product, row in self._rows("products.csv", known, faults):
            self.titles[product] = row.get("title", "")
            try:
                self.livestreams[product] = checked_id(row.get("livestream") or LIVESTREAM, "livestream")
            except BadInputError as err:
                faults.append(err.at("products.csv", line))

    def _read_splits(self, faults: list[Fault]) -> None:
        """From the table, where what it does not name is for training; without one by `default_splits`."""
        if not (self.source / "clips.csv").exists():
            of_product = collections.defaultdict(list)
            for clip in self.clips.values():
                clip.split = "train"  # a clip without pictures, which skipping leaves out: it is no product's test
                if clip.frames:
                    of_product[clip.product].append(clip)
            for clips in of_product.values():
                for clip, split in zip(clips, default_splits(len(clips)), strict=True):
                    clip.split = split
            return
        for clip in self.clips.values():
            clip.split = "train"
        for line, clip_id, row in self._rows("clips.csv", self.clips.keys(), faults):
            self.clips[clip_id].split = row["split"]
            if row["split"] not in SPLITS:
                detail = f"found the split {row['split']!r}, needs one of {', '.join(SPLITS)}; correct it."
                faults.append(Fault("unknown split", "clips.csv", detail, line))

    def _rows(self, file: str, known: Set[str], faults: list[Fault]) -> Iterator[tuple[int, str, dict[str, str]]]:
        """Line, id and cells of each row of a table, if there is one, whose product or clip is known and comes once."""
        if not (self.source / file).exists():
            return
        first: dict[str, int] = {}
        key = KEYS[file]
        for line, row in read_table(self.folder.read(Picture(file, file)), file, faults):
            name = unicodedata.normalize("NFC", "/".join(row[column] for column in key))
            if name not in known:
                detail = f"found the {key[-1]} {name!r}, which is not in the folder; correct it, or remove the row."
                faults.append(Fault(f"unknown {key[-1]}", file, detail, line))
            elif name in first:
                detail = f"found the {key[-1]} {name!r} of line {first[name]} again, needs each once; remove a row."
                faults.append(Fault(f"duplicate {key[-1]}", file, detail, line))
            else:
                first[name] = line
                yield line, name, row

    # --- what a layout says -------------------------------------------------------------------------------------------

    def splits(self) -> tuple[str, ...]:
        there = {clip.split for clip in self.clips.values()}
        return tuple(split for split in SPLITS if split in there)

    def checksums(self, splits: Sequence[str]) -> dict[str, list[int]]:
        tables = {name: self.folder.read(Picture(name, name)) for name in KEYS if (self.source / name).exists()}
        listing = "".join(f"{path}\t{size}\n" for path, size in self.pictures.items()).encode()
        contents = {"pictures": listing, **tables}
        return {name: [len(data), google_crc32c.value(data)] for name, data in contents.items()}

    def frames_to_locate(self, listed: Row | ClipListing) -> Sequence[str]:
        return ()

    def listed_clips(self, split: str) -> tuple[list[ClipListing], list[Fault]]:
        clips = [
            ClipListing(
                clip_id=clip.id,
                livestream=self._livestream(clip.product),
                frames=clip.frames,
                truth=(clip.product,),
                file=clip.path,
                fault=self._fault(clip),
            )
            for clip in self.clips.values()
            if clip.split == split
        ]
        return clips, []

    def _fault(self, clip: ClipFolder) -> BadInputError | None:
        if not clip.frames:
            other = f" (but {', '.join(clip.others[:3])})" if clip.others else ""
            detail = f"found no picture{other}, needs jpg, jpeg, png or webp; add them, or remove the folder."
            return BadInputError("clip without pictures", detail)
        images = self.shop.get(clip.product, ())
        if not images:
            name = f"shop/{clip.product}.jpg (or .jpeg, .png, .webp)"
            return BadInputError(
                "product without shop image", f"found no {name}, needs one; add it, or remove the clip."
            )
        return _two_images(images) if len(images) > 1 else None

    def galleries(self, split: str) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        """All shop images of each livestream, of products without clips too; for training those of its products."""
        wanted = self.shop.keys() if split != "train" else {c.product for c in self.clips.values() if c.split == split}
        shelves: dict[str, list[ShopImage]] = {}
        faults = []
        for product, images in self.shop.items():
            if product in wanted and len(images) == 1:
                image = ShopImage(product, images[0], self.titles.get(product, ""), product)
                shelves.setdefault(self._livestream(product), []).append(image)
            elif product in wanted:
                faults.append(_two_images(images).at(images[0], 0, f"image {product}"))
        return shelves, faults

    def truth(self) -> dict[str, tuple[str, ...]]:
        return {clip.id: (clip.product,) for clip in self.clips.values() if clip.split == "test"}

    def locate(self, listings: Sequence[Listing], run: Run, work: Path) -> list[str]:
        """Paths say where the pictures are; what is odd about the folder is said here, once, before they are read."""
        remarks = [
            f"{' and '.join(paths)} are the same picture: nobody can tell which of these products a clip shows."
            for paths in self._same_pictures(listings)
        ]
        if self.left_out:
            more = f" and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
            shown = ", ".join(map(_shown, self.left_out[:SHOWN]))
            remarks.append(f"left out, as no jpg, jpeg, png or webp in its place: {shown}{more}")
        for remark in remarks:
            print(f"warning: {remark}", file=sys.stderr)
        return remarks

    def _same_pictures(self, listings: Sequence[Listing]) -> list[list[str]]:
        """Groups of shop images of several products with the same bytes."""
        references = {image.reference for listing in listings for image in listing.images}
        by_size = collections.defaultdict(list)
        for path in sorted(references, key=natural):
            by_size[self.pictures[path]].append(path)
        same = collections.defaultdict(list)
        for path in (path for paths in by_size.values() if len(paths) > 1 for path in paths):
            try:
                data = self.folder.read(self._picture(path))
            except BadInputError:
                continue  # whoever stores it reads it again, and says what is wrong
            same[hashlib.sha256(data).digest()].append(path)
        return [paths for paths in same.values() if len(paths) > 1]

    def read_clip(self, source: RowLocation | ClipListing, split: str) -> Clip:
        assert isinstance(source, ClipListing)
        positions = stored_positions(len(source.frames), self.stored_frames)
        return Clip(
            id=source.clip_id,
            livestream=source.livestream,
            frames=tuple(self._picture(source.frames[position]) for position in positions),
            positions=positions,
            original_frames=len(source.frames),
            image_ids=source.truth,
            title=self.titles.get(source.truth[0], ""),
        )

    def find_frames(self, source: RowLocation | ClipListing, split: str) -> tuple[Row | ClipListing, list[FoundFrame]]:
        assert isinstance(source, ClipListing)
        positions = stored_positions(len(source.frames), self.stored_frames)
        return source, [FoundFrame(position, self._picture(source.frames[position])) for position in positions]

    def read_image(self, image: ShopImage, split: str) -> Picture:
        return self._picture(image.reference)

    def _picture(self, path: str) -> Picture:
        return Picture(os.path.splitext(os.path.basename(path))[0], path)

    def _livestream(self, product: str) -> str:
        return self.livestreams.get(product, LIVESTREAM)


def natural(name: str) -> tuple[list[str | int], str]:
    """Sorts frame2 before frame10, whatever the case of the letters."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part.casefold() for place, part in enumerate(parts)], name


def default_splits(count: int) -> list[str]:
    """Splits of a product's clips in order: the last is test; of four or more, the one before it is validation."""
    held_out = ["val", "test"] if count >= 4 else ["test"]
    return ["train"] * (count - len(held_out)) + held_out


def read_table(data: bytes, file: str, faults: list[Fault]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line and cells by column of each row of a CSV file whose first line names its columns; what is wrong: faults."""
    try:
        text = data.decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as err:
        detail = f'found byte {data[err.start]:#04x}, needs UTF-8; save it again as "CSV UTF-8".'
        faults.append(Fault("not UTF-8", file, detail, data.count(b"\n", 0, err.start) + 1))
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    needed, optional = KEYS[file], VALUES[file]
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not {*needed} < {*header} <= {*needed, *optional}:
            detail = f"found the columns {','.join(header)!r:.200}, needs {','.join(needed)} and "
            detail += f"{' or '.join(sorted(optional))}, separated by commas; correct the first line."
            faults.append(Fault("wrong columns", file, detail, line))
            return
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                detail = f"found {len(row)} cells, needs {len(header)} as in the first line; quote cells with commas."
                faults.append(Fault("wrong number of cells", file, detail, line))
            elif row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as err:
        faults.append(Fault("not a table", file, f"cannot be read ({err}), needs CSV; correct the quotes.", line))


def _two_images(images: Sequence[str]) -> BadInputError:
    return BadInputError(
        "several shop images", f"found {' and '.join(images)}, needs one shop image a product; remove the others."
    )


def _shown(path: str) -> str:
    """A path on one line of any terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in path)
