"""Lists as other programs write them: Windows' paths and line ends, byte order marks, UTF-16, old Macs."""

import codecs
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.conversion.survey import list_splits
from data_pipeline.convert import main
from data_pipeline.faults import BadInputError
from data_pipeline.format.reader import open_dataset
from data_pipeline.layouts import annotations
from data_pipeline.layouts.annotations import MAX_LINE_BYTES, load_texts, parse_row, read_lines
from data_pipeline.layouts.lpr750k import Lpr750k
from data_pipeline.system.workers import Workers
from tests.lpr_layouts import FRAMES, IMAGE_IDS, SHOP_IMAGES, TITLES, TRAIN, VAL, edit_cell, make_lpr4m, make_lpr750k

LAYOUTS: dict[str, Callable[[Path], Path]] = {"lpr750k": make_lpr750k, "lpr4m": make_lpr4m}


def run(layout: str, source: Path, output: Path) -> int:
    return main([f"--layout={layout}", f"--source={source}", f"--output={output}", "--workers=1"])


def files_of(output: Path) -> dict[str, bytes]:
    """Records and columns; the manifest's identity has the lists' checksums."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def lists_of(source: Path) -> list[Path]:
    return [path for pattern in ("annotations/*", "*.txt") for path in sorted(source.glob(pattern))]


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a byte order mark": lambda data: codecs.BOM_UTF8 + data,
    "line ends of Windows": lambda data: data.replace(b"\n", b"\r\n"),
    "line ends of old Macs": lambda data: data.replace(b"\n", b"\r"),
    "line ends of old Macs but the last": lambda data: data.rstrip(b"\n").replace(b"\n", b"\r") + b"\n",
    "line ends of all kinds": lambda data: b"".join(
        line + (b"\r", b"\r\n", b"\n")[number % 3] for number, line in enumerate(data.splitlines())
    ),
    "a byte order mark at each line": lambda data: b"".join(
        (1 + number % 2) * codecs.BOM_UTF8 + line for number, line in enumerate(data.splitlines(keepends=True))
    ),
    "both": lambda data: codecs.BOM_UTF8 + data.replace(b"\n", b"\r\n"),
    "blank lines": lambda data: b"\n" + data + b"\n  \n\r\n\t\n",
    "no last line end": lambda data: data.rstrip(b"\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", CHANGES)
def test_lists_of_other_programs_are_read_alike(layout: str, change: str, tmp_path: Path) -> None:
    source = LAYOUTS[layout](tmp_path / "source")
    assert run(layout, source, tmp_path / "before") == 0
    for path in lists_of(source):
        path.write_bytes(CHANGES[change](path.read_bytes()))
    assert run(layout, source, tmp_path / "after") == 0
    assert files_of(tmp_path / "after") == files_of(tmp_path / "before")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_list_in_another_encoding_is_one_clear_error(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = LAYOUTS[layout](tmp_path / "source")
    for number, path in enumerate(lists_of(source)):
        data = path.read_bytes()
        encodings = {"utf-16": "UTF-16", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32"}
        for encoding, name in encodings.items():
            path.write_bytes(data.decode().encode(encoding))
            output = tmp_path / f"{number}-{encoding}"
            assert run(layout, source, output) == 1
            error = capsys.readouterr().err
            remedy = f"needs UTF-8; convert it: iconv -f {name} -t UTF-8 FILE > NEW."
            assert error == f"{path.relative_to(source)}: found {name}, {remedy}\n"
            assert path.read_bytes().decode(name).encode() == data  # what iconv does of this name
        path.write_bytes(data)


def test_paths_with_backslashes_are_read(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    assert run("lpr750k", source, tmp_path / "before") == 0
    for name in ("training_videoinfo_7.txt", "training_videoinfo_val.txt", "query_tenframes.json"):
        path = source / "annotations" / name
        path.write_text(path.read_text().replace("/", "\\\\"))  # as a list of Python or JSON writes one backslash
        for number, clip in enumerate({"_7": TRAIN, "_v": VAL}.get(name[18:20], ())):
            edit_cell(path, number, 4, f"training_image\\{IMAGE_IDS[clip.product]}.jpg")
    gallery = source / "annotations/gallery_main.txt"
    gallery.write_text(gallery.read_text().replace("/", "\\"))
    assert run("lpr750k", source, tmp_path / "after") == 0
    assert files_of(tmp_path / "after") == files_of(tmp_path / "before")


def test_backslashes_that_are_not_doubled_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"a path's backslashes are doubled, or slashes"):
        annotations.parse_frames(r"['a\frame.jpg']")


def test_the_first_title_stays(tmp_path: Path) -> None:
    path = tmp_path / "titles.txt"
    path.write_bytes(codecs.BOM_UTF8 + "".join(f"{i}\t{title}\n" for i, title in enumerate(TITLES)).encode())
    faults: list = []
    assert load_texts(path, faults) == {str(i): title for i, title in enumerate(TITLES)}
    assert not faults


def test_lines_of_a_list_with_a_mark_are_the_same_in_parts_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo\n\n  \rfive\r" + codecs.BOM_UTF8 + b"six\r\n\r\n\r")
    whole = [(offset, line) for _, offset, line in read_lines(path)]
    assert [line for _, line in whole] == [b"one", b"two", b"", b"", b"five", b"six", b"", b""]
    assert all(path.read_bytes()[offset:].startswith(line) for offset, line in whole)
    for size in range(1, 35):
        parts = [(at, line) for begin in range(0, 40, size) for _, at, line in read_lines(path, begin, begin + size)]
        assert parts == whole


def test_a_line_without_end_is_one_fault_and_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.txt"
    monkeypatch.setattr(annotations, "MAX_LINE_BYTES", 100)
    for line_end in (b"\n", b"\r"):
        path.write_bytes(line_end.join([b"first", 1000 * b"x", b"last", b""]))
        assert [(number, len(line)) for number, _, line in read_lines(path)] == [(1, 5), (2, 100), (3, 4)]
        for begin in (7, 500, 1006):
            assert [line for _, _, line in read_lines(path, begin)] == [b"last"]
    with pytest.raises(BadInputError, match="found over 100 bytes in a line"):
        parse_row(100 * b"x")
    assert MAX_LINE_BYTES == 1 << 24


def test_a_category_with_an_id_only_is_not_the_one_with_that_name_only(tmp_path: Path) -> None:
    source = make_lpr750k(tmp_path / "source")
    path = source / "annotations/training_videoinfo_7.txt"
    for line, (number, name) in enumerate((("7", ""), ("", "7"), ("7", "7"), ("", ""))):
        edit_cell(path, line, 6, number)
        edit_cell(path, line, 7, name)
    layout = Lpr750k(source, None, None)
    with Workers(1, layout) as workers:
        (listing,), texts = list_splits(layout, ("train",), workers.run)
    column = dict(zip([name.decode() for name in listing.clip_ids], listing.columns["category"].tolist(), strict=True))
    found = [texts["category"][column[clip.id]] if column[clip.id] >= 0 else None for clip in TRAIN[:4]]
    assert found == ["7\t", "\t7", "7\t7", None]


# --- tables of an own folder ------------------------------------------------------------------------------------------


def make_shop(source: Path) -> Path:
    for number, product in enumerate(("A", "B")):
        for clip in ("one", "two"):
            (source / "clips" / product / clip).mkdir(parents=True)
            shutil.copyfile(FRAMES[number], source / "clips" / product / clip / "1.jpg")
        (source / "shop").mkdir(exist_ok=True)
        shutil.copyfile(SHOP_IMAGES[number], source / "shop" / f"{product}.jpg")
    return source


TABLE = "product,title,livestream\nA,Ä,monday\nB,b,tuesday\n"


@pytest.mark.parametrize(
    "data",
    [
        codecs.BOM_UTF8 + TABLE.encode(), TABLE.replace("\n", "\r\n").encode(), TABLE.replace("\n", "\r").encode(),
        TABLE.replace("\n", "\n\ufeff").encode(), TABLE.replace("\n", '\r\ufeff"', 1).replace("A,", 'A",').encode(),
        f"{TABLE}\n,,\n  \n".encode(), TABLE.replace("A,Ä", '"A","Ä"').encode(),
    ],
    ids=["mark", "Windows", "old Mac", "marks", "mark and quote", "blank lines", "quotes"],
)  # fmt: skip
def test_tables_of_other_programs_are_read_alike(data: bytes, tmp_path: Path) -> None:
    source = make_shop(tmp_path / "source")
    (source / "products.csv").write_bytes(data)
    assert run("folder", source, tmp_path / "records") == 0
    dataset = open_dataset(tmp_path / "records")
    assert list(dataset.tables["livestream"]) == ["monday", "tuesday"]
    assert dataset.split("train").clip(0).title == "Ä"


def test_a_table_in_utf_16_says_how_to_save_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_shop(tmp_path / "source")
    (source / "products.csv").write_bytes(TABLE.encode("utf-16"))
    assert run("folder", source, tmp_path / "records") == 1
    assert 'products.csv line 1: found UTF-16, needs UTF-8; save it again as "CSV UTF-8".' in capsys.readouterr().err
