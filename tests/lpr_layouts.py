"""A livestream shop of a dozen real photographs, wider than high, written in the layouts of LPR750K and LPR4M.

Seven training clips, one validation clip and three test clips of four products, in livestreams with galleries. One clip
has twelve frames, one has one. The pictures are of the Grocery Store Dataset (see data/grocery/LICENSE.txt).
"""

import atexit
import dataclasses
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from PIL import Image

SIZE = (160, 90)  # of all pictures: neither square nor as high as wide, so that no test confuses the sides
ORIGINAL = (320, 180)  # of the frames before LPR4M's download halved them
PICTURES = Path(tempfile.mkdtemp(prefix="lpr-pictures-"))
atexit.register(shutil.rmtree, PICTURES, ignore_errors=True)
for _path in sorted((Path(__file__).parent / "data" / "grocery").glob("*.jpg")):
    with Image.open(_path) as _picture:
        _picture.resize(SIZE, box=(0, 28, 128, 100)).save(PICTURES / _path.name, quality=90)  # 128 x 128, its middle
FRAMES = sorted(PICTURES.glob("frame*.jpg"))
SHOP_IMAGES = sorted(PICTURES.glob("shop*.jpg"))
IMAGE_IDS = [f"{number:08x}-0000-4000-8000-00000000000{number}" for number in range(4)]
LIVES = [f"{number:08x}-1111-4111-8111-11111111111{number}" for number in range(4)]
TITLES = ["Lime", "Äpple, röd", "Milk\u3000牛乳", 'Juice "fresh"']
URLS = "http://shop.example/ad-material-video/"


@dataclasses.dataclass(frozen=True)
class TinyClip:
    live: int
    start: int
    length: int
    product: int

    @property
    def id(self) -> str:
        return (
            f"{LIVES[self.live]}-{1_600_000_000_000 + self.start}-{1_600_000_000_000 + self.start + 1000 * self.length}"
        )

    @property
    def frame_ids(self) -> list[str]:
        return [f"{self.id}-{number:04d}" for number in range(self.length)]

    def picture(self, number: int) -> Path:
        return FRAMES[(self.start // 1000 + number) % len(FRAMES)]

    def box(self, number: int) -> list[int]:
        return [number, 0, 64, 32] if number else [0, 0, 0, 0]


TRAIN = [
    TinyClip(0, 5000, 3, 0),
    TinyClip(0, 1000, 4, 1),
    TinyClip(0, 9000, 12, 2),
    TinyClip(1, 2000, 1, 0),
    TinyClip(1, 3000, 2, 1),
    TinyClip(1, 7000, 3, 2),
    TinyClip(0, 8000, 2, 0),
]
VAL = [TinyClip(1, 11000, 3, 1)]
TEST = [TinyClip(2, 1000, 3, 0), TinyClip(2, 6000, 2, 3), TinyClip(3, 2000, 12, 1)]
GALLERIES = {2: [3, 0, 1], 3: [1, 2]}


def training_row(clip: TinyClip, *, paths: bool) -> str:
    """Returns a line of a training list: LPR750K's 13 columns with paths, or LPR4M's 11 with ids and original boxes."""
    scale = 1 if paths else 2
    boxes = [[scale * side for side in clip.box(number)] for number in range(clip.length)]
    frames = [f"{folder_of(clip)}/{clip.id}/{frame}.jpg" if paths else frame for frame in clip.frame_ids]
    image = [IMAGE_IDS[clip.product], *([f"training_image/{IMAGE_IDS[clip.product]}.jpg"] if paths else [])]
    cells = [
        clip.id,
        str(frames),
        str(boxes),
        *image,
        TITLES[clip.product],
        str(clip.product % 2),
        f"C{clip.product % 2}",
    ]
    cells += [f"spu{clip.product}"] if paths else []
    return "\t".join([*cells, "", "large", "short" if clip.length < 5 else "long", "single"])


def folder_of(clip: TinyClip) -> str:
    return f"training_video_0{clip.live}"


def make_lpr750k(source: Path) -> Path:
    annotations = _make_annotations(source, paths=True)
    _write_lines(annotations / "gallery_main.txt", [f"{LIVES[live]}/{IMAGE_IDS[i]}-0.jpg" for live, i in _gallery()])
    queries = {
        clip.id: {
            "frames": [f"{clip.id}/{clip.frame_ids[number]}.jpg" for number in ten_of(clip.length)],
            "gt": [IMAGE_IDS[clip.product]],
        }
        for clip in TEST
    }
    (annotations / "query_tenframes.json").write_text(json.dumps(queries))
    for live, image in _gallery():
        _copy(SHOP_IMAGES[image], source / "gallery" / LIVES[live] / f"{IMAGE_IDS[image]}-0.jpg")
    for image in range(3):
        _copy(SHOP_IMAGES[image], source / "training_image" / f"{IMAGE_IDS[image]}.jpg")
    for clip in (*TRAIN, *VAL, *TEST):
        folder = "query" if clip in TEST else folder_of(clip)
        for number, frame in enumerate(clip.frame_ids):
            _copy(clip.picture(number), source / folder / clip.id / f"{frame}.jpg")
    return source


def ten_of(length: int) -> list[int]:
    return [slot * (length - 1) // 9 for slot in range(10)] if length > 10 else list(range(length))


def make_lpr4m(
    source: Path, *, tars: bool = False, tables: bool = True, sidecars: bool = True, failed: Collection[str] = ()
) -> Path:
    """Writes the clips as LPR4M and returns the source. failed: ids of frames and images whose download failed."""
    annotations = _make_annotations(source, paths=False)
    galleries = {LIVES[live]: [IMAGE_IDS[image] for image in shelf] for live, shelf in GALLERIES.items()}
    (annotations / "test_liveid_to_gallery_2.json").write_text(json.dumps(galleries))
    _write_lines(source / "test_frame_url_17.txt", [f"{URLS}{frame}.jpg" for clip in TEST for frame in clip.frame_ids])
    shop = dict(zip(IMAGE_IDS, SHOP_IMAGES, strict=True))
    frames_of = lambda clips: {clip.frame_ids[k]: clip.picture(k) for clip in clips for k in range(clip.length)}
    outputs = {
        "training_frame": frames_of((*TRAIN, *VAL)),
        "training_image": {image_id: shop[image_id] for image_id in IMAGE_IDS[:3]},
        "test_frame": frames_of(TEST),
        "test_image": shop,
    }
    for name, pictures in outputs.items():
        Img2dataset(source / name, tars=tars, tables=tables, sidecars=sidecars).write(pictures, failed)
    return source


@dataclasses.dataclass
class Img2dataset:
    """Writes an output folder as img2dataset does, in shards of eight pictures, each in reverse order."""

    folder: Path
    tars: bool
    tables: bool
    sidecars: bool

    def write(self, pictures: dict[str, Path], failed: Collection[str]) -> None:
        self.folder.mkdir()
        names = list(pictures)
        for shard in range(-(-len(names) // 8)):
            self._write_shard(shard, {name: pictures[name] for name in names[8 * shard : 8 * shard + 8]}, failed)

    def _write_shard(self, shard: int, pictures: dict[str, Path], failed: Collection[str]) -> None:
        rows = []
        files: dict[str, bytes] = {}
        for index, (name, picture) in reversed(list(enumerate(pictures.items()))):
            key, good = f"{shard:05d}{index:02d}", name not in failed
            width, height = ORIGINAL if good else (None, None)
            row = {
                "url": f"{URLS}{name}.jpg", "key": key, "status": "success" if good else "failed_to_download",
                "error_message": None if good else "HTTP Error 404: Not Found", "original_width": width,
                "original_height": height,
            }  # fmt: skip
            rows.append(row)
            if good:
                files[f"{key}.jpg"] = picture.read_bytes()
                if self.sidecars:
                    files[f"{key}.json"] = json.dumps(row).encode()
        if self.tars:
            with tarfile.open(self.folder / f"{shard:05d}.tar", "w") as tar:
                for name, data in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        else:
            (self.folder / f"{shard:05d}").mkdir()
            for name, data in files.items():
                (self.folder / f"{shard:05d}" / name).write_bytes(data)
        if self.tables:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), self.folder / f"{shard:05d}.parquet")


def edit_lines(path: Path, change: Callable[[list[bytes]], None]) -> None:
    """Changes the lines (bytes, without line ends) of a file."""
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    change(lines)
    path.write_bytes(b"\n".join(lines) + b"\n")


def edit_cell(path: Path, line: int, column: int, value: str) -> None:
    """Changes one cell (line and column from 0) of a tab-separated file."""

    def change(lines: list[bytes]) -> None:
        cells = lines[line].split(b"\t")
        cells[column] = value.encode()
        lines[line] = b"\t".join(cells)

    edit_lines(path, change)


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _gallery() -> list[tuple[int, int]]:
    return [(live, image) for live, shelf in GALLERIES.items() for image in shelf]


def _make_annotations(source: Path, *, paths: bool) -> Path:
    folder = source / "annotations"
    folder.mkdir(parents=True)
    rows = [training_row(clip, paths=paths) for clip in TRAIN]
    if paths:
        _write_lines(folder / "training_videoinfo_7.txt", rows)
    else:
        _write_lines(folder / "training_videoinfo_full_part_00.txt", rows[:4])
        _write_lines(folder / "training_videoinfo_full_part_01.txt", rows[4:])
    _write_lines(folder / "training_videoinfo_val.txt", [training_row(clip, paths=paths) for clip in VAL])
    truth = {clip.id: [IMAGE_IDS[clip.product]] for clip in TEST}
    (folder / "test_videoid_to_gtimage_3.json").write_text(json.dumps(truth))
    scale = 1 if paths else 2
    boxes = {
        frame: [[scale * side for side in clip.box(number)]]
        for clip in TEST
        for number, frame in enumerate(clip.frame_ids)
    }
    (folder / "test_frameid2gtbox_3_17.json").write_text(json.dumps(boxes))
    _write_lines(folder / "test_videoid_asr_3.txt", [f"{clip.id}\tspeech {clip.product}" for clip in TEST])
    _write_lines(
        folder / "test_image_title_4.txt", [f"{i}\t{title}" for i, title in zip(IMAGE_IDS, TITLES, strict=True)]
    )
    return folder


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _copy(picture: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture, to)
