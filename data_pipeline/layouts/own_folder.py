"""The layout of a user's own clips and shop images, with two optional tables; docs/own_clips.md says how to make it.

    clips/<product>/<clip>/     its pictures are the clip's frames, in natural order (frame2 before frame10)
    shop/<product>.*            the product's shop image
    products.csv, clips.csv     titles and livestreams; splits

A product's name is the id of its shop image, and <product>/<clip> the id of a clip. Faults of tables and names cannot
be skipped, since nobody knows which clips they affect.
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
from typing import Any, ClassVar

import google_crc32c

from data_pipeline.faults import BadInputError, Fault, WrongUseError, counted
from data_pipeline.format.manifest import SPLITS
from data_pipeline.format.schema import Picture, ShopImage
from data_pipeline.layouts.annotations import checked_id, wide_encoding, without_marks
from data_pipeline.layouts.listing import ClipEntry, ClipListing, ClipSource, FoundFrame, Layout, Listing, RunTasks
from data_pipeline.layouts.names import has_control_characters, is_known_leftover, is_leftover
from data_pipeline.layouts.pictures import SUFFIXES, PictureReader

PICTURE_SUFFIXES = tuple(SUFFIXES)
HEIC = (".heic", ".heif")
KEYS = {"products.csv": ("product",), "clips.csv": ("product", "clip")}  # columns with the id of a row's subject
VALUES = {"products.csv": {"title", "livestream"}, "clips.csv": {"split"}}  # other columns, at least one is needed
LIVESTREAM = "shop"  # of products without one in the table
FILMS = (
    ".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".3gp", ".wmv", ".flv",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class FolderEntry:
    """A file or folder of the source."""

    name: str  # in Unicode's form C, since a Mac writes é as two characters where a table has one
    path: str  # relative to the source folder, as the disk has it
    is_folder: bool
    size: int
    time: int = 0  # of its last change, in ns

    @property
    def is_picture(self) -> bool:
        return not self.is_folder and self.name.lower().endswith(PICTURE_SUFFIXES)

    @property
    def stem(self) -> str:
        """The name, for a picture without its suffix. With it "IMG_1 (2).jpg" would come before "IMG_1.jpg"."""
        return os.path.splitext(self.name)[0] if self.is_picture else self.name


@dataclasses.dataclass(slots=True)
class ClipFolder:
    id: str
    path: str
    product: str
    frames: tuple[str, ...]
    others: tuple[str, ...]  # names of its entries that are no pictures, and paths of those `passed_over`
    split: str = "train"


class OwnFolder(Layout):
    """The source folder with clips/, shop/ and perhaps the tables."""

    FOLDERS: ClassVar[tuple[str, ...]] = ("clips", "shop")

    def __init__(self, source: Path, train_annotation: str | None, stored_frames: int | None) -> None:
        """Reads names and tables, but no picture; their faults are in `faults`.

        Raises WrongUseError for a train_annotation, or if there is no clip and no fault; BadInputError for a bad table.
        """
        if train_annotation:
            raise WrongUseError(
                "--train-annotation: found a training list's name, but a folder has none; leave it out (clips.csv may "
                "name splits)."
            )
        super().__init__(source, stored_frames)
        self.reader = PictureReader(source)
        self.picture_sizes: dict[str, int] = {}  # bytes by path
        self.picture_times: dict[str, int] = {}  # of the last change, in ns, by path
        self.passed_over: list[str] = []  # paths of hidden and temporary entries
        self.left_out: list[str] = []  # paths of entries that are not the picture or folder needed in their place
        self.titles: dict[str, str] = {}  # by product
        self.livestreams: dict[str, str] = {}  # by product
        self.clips = self._read_clips()
        self.shop = self._read_shop()
        if not self.clips and not self.faults:
            raise WrongUseError(
                f"{source}/clips: found no clip, needs clips/<product>/<clip>/ with pictures; correct the path."
                f"{_films_advice(self.left_out)}"
            )
        self._read_products()
        self._read_splits()

    # --- names --------------------------------------------------------------------------------------------------------

    def _entries(self, folder: str) -> list[FolderEntry]:
        """Returns a folder's entries in natural order, without leftovers; those to mention become `passed_over`.

        Names that cannot be a part of an id, and names twice, become faults. A frame's name is part of none.
        """
        entries: dict[str, FolderEntry] = {}
        of_clip = folder.count("/") == 2
        with os.scandir(self.source / folder) as found:
            for each in sorted(found, key=lambda each: each.name):
                if is_leftover(each.name, each.is_dir()):
                    if not is_known_leftover(each.name):
                        self.passed_over.append(f"{folder}/{each.name}")
                    continue
                name = unicodedata.normalize("NFC", each.name)
                size, time = -1, 0  # of a folder or a broken link; reading that will be a fault
                if each.is_file():
                    size, time = each.stat().st_size, each.stat().st_mtime_ns
                entry = FolderEntry(name, f"{folder}/{each.name}", each.is_dir(), size, time)
                stem = "" if of_clip else entry.stem
                if has_control_characters(stem) or stem != stem.strip():
                    detail = f"found the name {name!r}, needs no control character and no space at either end; "
                    detail += "rename it."
                    self.faults.append(Fault("bad name", _printable(entry.path), detail))
                elif name in entries:
                    detail = f"found the name {name!r} twice, written differently in Unicode; rename one."
                    self.faults.append(Fault("bad name", _printable(entry.path), detail))
                else:
                    entries[name] = entry
        return sorted(entries.values(), key=lambda entry: natural(entry.stem))

    def _read_clips(self) -> dict[str, ClipFolder]:
        """Returns the clips by id, in natural order. Bad ids, products without clips are faults; files `left_out`."""
        clips: dict[str, ClipFolder] = {}
        for product in self._entries("clips"):
            if not product.is_folder:
                self.left_out.append(product.path)
                continue
            before = len(clips)
            for entry in self._entries(product.path):
                if not entry.is_folder:
                    self.left_out.append(entry.path)
                    continue
                clip_id = f"{product.name}/{entry.name}"
                try:
                    checked_id(clip_id, "clip")
                except BadInputError as err:
                    self.faults.append(err.at(entry.path))
                hidden = len(self.passed_over)
                content = self._entries(entry.path)
                frames = tuple(picture.path for picture in self._pictures(content))
                others = tuple(each.name for each in content if not each.is_picture) + tuple(self.passed_over[hidden:])
                clips[clip_id] = ClipFolder(clip_id, entry.path, product.name, frames, others)
            if len(clips) == before:
                unread = (*self.left_out, *self.passed_over)
                files = [path for path in unread if path.startswith(f"{product.path}/")]
                detail = f"found no folder of a clip{_but(files)}, needs clips/<product>/<clip>/ with pictures; "
                detail += f"give each clip a folder, or remove the product's.{_films_advice(files)}"
                self.faults.append(Fault("product without clips", _printable(product.path), detail))
        return clips

    def _read_shop(self) -> dict[str, tuple[str, ...]]:
        """Returns the shop images' paths by product, in natural order, perhaps several. Bad ids become faults."""
        images: dict[str, tuple[str, ...]] = {}
        for entry in self._pictures(self._entries("shop")):
            try:
                images[checked_id(entry.stem, "image")] = (*images.get(entry.stem, ()), entry.path)
            except BadInputError as err:
                self.faults.append(err.at(entry.path))
        return images

    def _pictures(self, content: Sequence[FolderEntry]) -> list[FolderEntry]:
        """Returns the pictures among a folder's content, notes their sizes, and adds other entries to `left_out`."""
        pictures = [entry for entry in content if entry.is_picture]
        self.picture_sizes |= {entry.path: entry.size for entry in pictures}
        self.picture_times |= {entry.path: entry.time for entry in pictures}
        self.left_out += [entry.path for entry in content if not entry.is_picture]
        return pictures

    # --- tables -------------------------------------------------------------------------------------------------------

    def _read_products(self) -> None:
        known = {clip.product for clip in self.clips.values()} | self.shop.keys()
        for line, product, cells in self._rows("products.csv", known):
            self.titles[product] = cells.get("title", "")
            try:
                self.livestreams[product] = checked_id(cells.get("livestream") or LIVESTREAM, "livestream")
            except BadInputError as err:
                self.faults.append(err.at("products.csv", line))

    def _read_splits(self) -> None:
        """Sets each clip's split as clips.csv names it (others: training). Raises BadInputError if it is unreadable.

        Without clips.csv `default_splits` decides. A clip without pictures does not count as its product's last clip.
        """
        for line, clip_id, cells in self._rows("clips.csv", self.clips.keys()):
            self.clips[clip_id].split = cells["split"]
            if cells["split"] not in SPLITS:
                detail = f"found the split {cells['split']!r}, needs one of {', '.join(SPLITS)}; correct it."
                self.faults.append(Fault("unknown split", "clips.csv", detail, line))
        if not (self.source / "clips.csv").exists():
            of_product = collections.defaultdict(list)
            for clip in self.clips.values():
                if clip.frames:
                    of_product[clip.product].append(clip)
            for clips in of_product.values():
                for clip, split in zip(clips, default_splits(len(clips)), strict=True):
                    clip.split = split

    def _rows(self, file: str, known: Set[str]) -> Iterator[tuple[int, str, dict[str, str]]]:
        """Yields (line, id, cells) of rows with a new `known` id, else adds faults. Raises BadInputError on reading."""
        if not (self.source / file).exists():
            return
        first: dict[str, int] = {}
        key = KEYS[file]
        for line, cells in read_table(self.reader.read(_picture(file)), file, self.faults):
            name = unicodedata.normalize("NFC", "/".join(cells[column] for column in key))
            if name not in known:
                detail = f"found the {key[-1]} {name!r}, which is not in the folder; correct it, or remove the row."
                self.faults.append(Fault(f"unknown {key[-1]}", file, detail, line))
            elif name in first:
                detail = f"found the {key[-1]} {name!r} of line {first[name]} again, needs each once; remove a row."
                self.faults.append(Fault(f"duplicate {key[-1]}", file, detail, line))
            else:
                first[name] = line
                yield line, name, cells

    # --- the layout ---------------------------------------------------------------------------------------------------

    def splits(self) -> tuple[str, ...]:
        there = {clip.split for clip in self.clips.values()}
        return tuple(split for split in SPLITS if split in there)

    def checksums(self, splits: Sequence[str]) -> dict[str, list[int]]:
        tables = {name: self.reader.read(_picture(name)) for name in KEYS if (self.source / name).exists()}
        listing = "".join(f"{path}\t{size}\n" for path, size in self.picture_sizes.items()).encode(
            "utf-8", "surrogateescape"
        )
        contents = {"pictures": listing, **tables}
        return {name: [len(data), google_crc32c.value(data)] for name, data in contents.items()}

    def listed_clips(self, split: str) -> tuple[list[ClipListing], list[Fault]]:
        clips = [
            ClipListing(
                clip_id=clip.id,
                livestream=self._livestream(clip.product),
                frames=clip.frames,
                truth=(clip.product,),
                file=clip.path,
                title=self.titles.get(clip.product, ""),
                fault=self._fault(clip),
            )
            for clip in self.clips.values()
            if clip.split == split
        ]
        return clips, []

    def _fault(self, clip: ClipFolder) -> BadInputError | None:
        if not clip.frames:
            detail = (
                f"found no picture{_but(clip.others)}, needs jpg, jpeg, png or webp; add them, or remove the folder."
            )
            if any((self.source / clip.path / other).is_dir() for other in clip.others):
                detail += " Folders inside a clip's are not read: put their pictures into the clip's, or move them up."
            return BadInputError("clip without pictures", detail + _films_advice(clip.others))
        images = self.shop.get(clip.product, ())
        if not images:
            near = [paths[0] for name, paths in self.shop.items() if name.casefold() == clip.product.casefold()]
            but = f" but {near[0]}, which differs in capitals" if near else ""
            detail = f"found no shop/{clip.product}.jpg (or .jpeg, .png, .webp){but}, needs one; "
            detail += "rename it." if near else "add it, or remove the clip."
            return BadInputError("product without shop image", detail)
        return _two_images(images) if len(images) > 1 else None

    def galleries(self, split: str) -> tuple[dict[str, list[ShopImage]], list[Fault]]:
        """Returns the shop images of each livestream, in natural order, and faults of products with several.

        The products are those of the training clips for "train", else all, also those without clips.
        """
        wanted = self.shop.keys() if split != "train" else {c.product for c in self.clips.values() if c.split == split}
        galleries: dict[str, list[ShopImage]] = {}
        faults = []
        for product, images in self.shop.items():
            if product in wanted and len(images) == 1:
                image = ShopImage(product, images[0], self.titles.get(product, ""), product)
                galleries.setdefault(self._livestream(product), []).append(image)
            elif product in wanted:
                faults.append(_two_images(images).at(images[0], 0, f"image {product}"))
        return galleries, faults

    @property
    def truth(self) -> dict[str, tuple[str, ...]]:
        return {clip.id: (clip.product,) for clip in self.clips.values() if clip.split == "test"}

    def locate(self, listings: Sequence[Listing], run: RunTasks, work: Path) -> list[str]:
        """Returns remarks on equal shop images and entries that are not read, [] for none; warns of them on stderr."""
        same = "found the same picture for several products, needs one that tells them apart; replace one."
        remarks = [f"{' and '.join(paths)}: {same}" for paths in self._same_pictures(listings)]
        if self.left_out:
            what = f"left out, since no clip, frame ({', '.join(suffix[1:] for suffix in SUFFIXES)}) or shop image"
            remarks.append(f"{what}: {_shown(self.left_out, 20)}{_films_advice(self.left_out)}")
        if heic := [path for path in self.left_out if path.lower().endswith(HEIC)]:
            suffix = os.path.splitext(heic[0])[1]  # of a phone often in capitals, which the shell tells apart
            what = f"left out {counted(len(heic), 'HEIC picture')}, since HEIC is not read; make JPEGs in each folder"
            remarks.append(f"{what}: `magick mogrify -format jpg *{suffix}`")
        if self.passed_over:
            detail = f"{_shown(self.passed_over, 3)}; rename what is yours."
            count = counted(len(self.passed_over), "file or folder", "files and folders")
            remarks.append(f"passed over {count}, hidden or temporary: {detail}")
        for remark in remarks:
            print(f"warning: {remark}", file=sys.stderr)
        return remarks

    def _same_pictures(self, listings: Sequence[Listing]) -> list[list[str]]:
        references = {image.reference for listing in listings for image in listing.images}
        by_size = collections.defaultdict(list)
        for path in sorted(references, key=natural):
            by_size[self.picture_sizes[path]].append(path)
        same = collections.defaultdict(list)
        for path in (path for paths in by_size.values() if len(paths) > 1 for path in paths):
            try:
                data = self.reader.read(_picture(path))
            except BadInputError:
                continue  # it becomes a fault when it is stored
            same[hashlib.sha256(data).digest()].append(path)
        return [paths for paths in same.values() if len(paths) > 1]

    def find_frames(self, source: ClipSource, split: str) -> tuple[ClipEntry, list[FoundFrame]]:
        assert isinstance(source, ClipListing)
        positions = self.stored_positions(len(source.frames))
        return source, [FoundFrame(position, _picture(source.frames[position])) for position in positions]

    def find_image(self, image: ShopImage, split: str) -> Picture:
        return _picture(image.reference)

    def changed_since(self, time: int) -> list[str]:
        return [path for path, changed in self.picture_times.items() if changed > time]

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a worker needs: each task brings its clips, so names and tables of a million files stay here."""
        return {name: self.__dict__[name] for name in ("source", "stored_frames", "reader")} | {
            "faults": [],
            "copies": [],
        }

    def _livestream(self, product: str) -> str:
        return self.livestreams.get(product, LIVESTREAM)


def _picture(path: str) -> Picture:
    stem = os.path.splitext(os.path.basename(path))[0]
    return Picture(stem.encode("utf-8", "backslashreplace").decode(), path)  # a frame's name may be any bytes


def natural(name: str) -> tuple[list[str | int], str]:
    """Returns a key that sorts frame2 before frame10 and ignores the case of letters, unless names are else equal."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part.casefold() for place, part in enumerate(parts)], name


def list_pictures(folder: Path) -> list[Path]:
    """Returns the pictures of a clip's folder, or of shop/, as a conversion takes them: natural order, no leftovers."""
    paths = [path for path in folder.iterdir() if not is_leftover(path.name, path.is_dir())]
    pictures = [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()]
    return sorted(pictures, key=lambda path: natural(path.stem))


def default_splits(count: int) -> list[str]:
    """Returns the splits of a product's `count` > 0 clips, in order: train, one val if there are 4 or more, a test."""
    held_out = ["val", "test"] if count >= 4 else ["test"]
    return ["train"] * (count - len(held_out)) + held_out


def read_table(data: bytes, file: str, faults: list[Fault]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line, cells by column) of the rows below a CSV file's first, but empty ones. Others become `faults`."""
    if wide := wide_encoding(data):
        detail = f'found {wide}, needs UTF-8; save it again as "CSV UTF-8".'
        faults.append(Fault("not UTF-8", file, detail, 1))
        return
    data = without_marks(data)  # spreadsheets put one in front
    try:
        text = data.decode("utf-8")
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
            filled = any(cell.strip() for cell in row)  # spreadsheets save blank rows as commas
            if filled and len(row) != len(header):
                detail = f"found {counted(len(row), 'cell')}, needs {len(header)} as in the first line; put quotes "
                detail += "around cells with commas."
                faults.append(Fault("wrong number of cells", file, detail, line))
            elif filled:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as err:
        faults.append(Fault("not a table", file, f"cannot be read ({err}), needs CSV; correct the quotes.", line))


def _two_images(images: Sequence[str]) -> BadInputError:
    return BadInputError(
        "several shop images", f"found {' and '.join(images)}, needs one shop image a product; keep one of them."
    )


def _shown(paths: Sequence[str], most: int) -> str:
    """Returns the first `most` paths, joined, and the number of the others."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(_printable, paths[:most])) + more


def _but(names: Sequence[str]) -> str:
    return f" (but {', '.join(map(_printable, names[:3]))})" if names else ""


def _films_advice(names: Sequence[str]) -> str:
    """Returns a sentence on how to make frames of the first film among `names`, "" if there is none."""
    film = next((name for name in names if name.lower().endswith(FILMS)), None)
    if film is None:
        return ""
    example = 'ffmpeg -i film.mp4 -vf fps=2 "my_shop/clips/Cola/clip 1/%03d.jpg"'
    what = f" Films such as {_printable(film)} are not read: make a clip's folder for each"
    return f"{what}, and then its frames, as with {example}."


def _printable(path: str) -> str:
    # Unprintable characters become escapes.
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in path)
