"""The command convert: it names every fault, keeps finished work, and writes the same bytes however it is run."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.convert import main
from data_pipeline.format.manifest import MANIFEST
from data_pipeline.format.reader import open_dataset
from tests.lpr_layouts import (
    FRAMES,
    IMAGE_IDS,
    LIVES,
    SHOP_IMAGES,
    TEST,
    TRAIN,
    edit_cell,
    edit_json,
    edit_lines,
    folder_of,
    make_lpr4m,
    make_lpr750k,
    training_row,
)  # fmt: skip
from tests.proc import children, until_gone

LIST, TRUTH = "annotations/training_videoinfo_7.txt", "annotations/test_videoid_to_gtimage_3.json"
CLIP, QUERY = TRAIN[1], TEST[0]
FRAME = f"{folder_of(CLIP)}/{CLIP.id}/{CLIP.frame_ids[1]}.jpg"
SHOP_IMAGE = f"training_image/{IMAGE_IDS[0]}.jpg"
REPO = Path(__file__).parents[1]


def run(source: Path, output: Path, *more: str, layout: str = "lpr750k") -> int:
    arguments = [f"--layout={layout}", f"--source={source}", f"--output={output}", "--workers=1", *more]
    return main(arguments)


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source without faults and its conversion, one clip a shard."""
    folder = tmp_path_factory.mktemp("sound")
    assert run(make_lpr750k(folder / "source"), folder / "records", "--clips-per-shard=1") == 0
    return folder


@pytest.fixture
def source(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound source, to be damaged."""
    return shutil.copytree(sound / "source", tmp_path / "source")


# --- bad input, one by one --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bad:
    """One fault: the damage, the message, and the clips that are left out when it is skipped."""

    name: str
    damage: Callable[[Path], object]
    message: str  # a regular expression
    skipped: tuple[str, ...]
    rewritten: int = 1  # number of finished shards that change when it is corrected


def write(path: str, data: bytes) -> Callable[[Path], object]:
    return lambda source: (source / path).write_bytes(data)


def row(line: int) -> str:
    return rf"^{re.escape(LIST)} line {line + 1} \(clip {TRAIN[line].id}\): "


def cell(column: int, value: str) -> Callable[[Path], object]:
    return lambda source: edit_cell(source / LIST, 1, column, value)


def drop_column(lines: list[bytes]) -> None:
    cells = lines[1].split(b"\t")
    lines[1] = b"\t".join(cells[:9])


def drop_last_column(lines: list[bytes]) -> None:
    lines[1] = lines[1].rpartition(b"\t")[0]


def replace_by_link(source: Path) -> None:
    outside = source.parent / "outside.jpg"
    outside.write_bytes(FRAMES[0].read_bytes())
    (source / FRAME).unlink()
    (source / FRAME).symlink_to(outside)


def without_gallery(source: Path) -> None:
    path = source / "annotations/gallery_main.txt"
    edit_lines(
        path, lambda rows: rows.__setitem__(slice(None), [each for each in rows if LIVES[3].encode() not in each])
    )


NAMED = rf"\(clip {CLIP.id}\): "
NAMED_BY = rf"\(named by {re.escape(LIST)} line 2\)"
USERS = tuple(clip.id for clip in TRAIN if clip.product == 0)
BAD_INPUTS = [
    Bad("missing frame", lambda source: (source / FRAME).unlink(),
        rf"^{FRAME} {NAMED}found no such picture .*; unpack the archive .*{NAMED_BY}", (CLIP.id,)),
    Bad("unreadable frame", lambda source: ((source / FRAME).unlink(), (source / FRAME).mkdir()),
        rf"^{FRAME} {NAMED}found no such picture", (CLIP.id,)),
    Bad("empty frame", write(FRAME, b""), rf"^{FRAME} {NAMED}has 0 bytes, needs .*; restore", (CLIP.id,)),
    Bad("truncated JPEG", write(FRAME, FRAMES[0].read_bytes()[:-300]),
        rf"^{FRAME} {NAMED}has lost pixels \(Premature end.*\), needs a whole picture; restore", (CLIP.id,)),
    Bad("HEIC called .jpg", write(FRAME, b"\0\0\0\x18ftypheic"),
        rf"^{FRAME} {NAMED}is a HEIC picture, needs JPEG, .*; put a JPEG of 8 bits", (CLIP.id,)),
    Bad("text file called .jpg", write(FRAME, b"<html>404"),
        rf"^{FRAME} {NAMED}is not a picture \(starts with b'<html>40'\), needs .*; replace", (CLIP.id,)),
    Bad("nine columns", lambda source: edit_lines(source / LIST, drop_column),
        row(1) + "found 9 columns between tabs, .* needs 10 or more .*; restore the line", (CLIP.id,)),
    Bad("a column less than the other lines", lambda source: edit_lines(source / LIST, drop_last_column),
        row(1) + "found 12 columns between tabs, needs 13 as the file's other lines", (CLIP.id,)),
    Bad("LPR4M's columns", lambda source: edit_lines(
        source / LIST, lambda rows: rows.__setitem__(1, training_row(CLIP, paths=False).encode())),
        row(1) + "found LPR4M's 11 columns, .*; give --layout lpr4m", (CLIP.id,)),
    Bad("a frame cell that is not a list", cell(1, "__import__('os').abort()"),
        row(1) + r"found .__import__.* in the frame column, needs a list of strings; correct", (CLIP.id,)),
    Bad("a box cell that is not a list", cell(2, "{1: 2}"),
        row(1) + "found .* in the box column, needs a list of boxes; correct", (CLIP.id,)),
    Bad("duplicate clip id", lambda source: edit_lines(source / LIST, lambda rows: rows.append(rows[1])),
        rf"^{LIST} line 8 {NAMED}found the clip id of {LIST} line 2 again, needs each once; remove", ()),
    Bad("frame and box lists of different lengths", cell(2, "[[0, 0, 1, 1]]"),
        row(1) + "found 4 frames and 1 box, needs one box a frame; correct", (CLIP.id,)),
    Bad("clip without frames", cell(1, "[]"), row(1) + "found an empty frame list, needs at least one", (CLIP.id,)),
    Bad("image id without an image", lambda source: (source / SHOP_IMAGE).unlink(),
        rf"^{SHOP_IMAGE} \(image {IMAGE_IDS[0]}\): found no such picture", USERS),
    Bad("no image id", cell(3, ""), row(1) + "found the image id '', needs 1 to 200 bytes", (CLIP.id,)),
    Bad("true image not in its gallery", lambda source: edit_json(
        source / TRUTH, lambda truth: truth.update({QUERY.id: [IMAGE_IDS[2]]})),
        rf"^annotations/query_tenframes.json \(clip {QUERY.id}\): found none of {IMAGE_IDS[2]} in the gallery of "
        rf"livestream {LIVES[2]}, needs one; correct", (QUERY.id,)),
    Bad("livestream without gallery", without_gallery,
        rf"^annotations/query_tenframes.json \(clip {TEST[2].id}\): found no shop image for livestream {LIVES[3]}, "
        "needs a gallery; add", (TEST[2].id,),
        rewritten=3),
    Bad("query without truth", lambda source: edit_json(source / TRUTH, lambda truth: truth.pop(QUERY.id)),
        rf"^annotations/query_tenframes.json \(clip {QUERY.id}\): found no true image in the truth file, .*; add",
        (QUERY.id,)),
    Bad("query without frames", lambda source: edit_json(
        source / "annotations/query_tenframes.json", lambda queries: queries[QUERY.id].update(frames=[])),
        rf"^annotations/query_tenframes.json \(clip {QUERY.id}\): found an empty frame list", (QUERY.id,)),
    Bad("non-UTF-8 bytes", lambda source: edit_lines(
        source / LIST, lambda rows: rows.__setitem__(1, rows[1].replace(b"C1", b"C\xff"))),
        row(1) + r"found byte 0xff at position \d+, needs UTF-8; convert the file's encoding", (CLIP.id,)),
    Bad("a path that leaves the source", cell(1, str([*[f"../{FRAME}"], *3 * [FRAME]])),
        row(1) + r"found the path '\.\./training.*', needs one below the source folder; correct", (CLIP.id,)),
    Bad("an absolute path", cell(1, str(4 * ["/etc/hostname"])),
        row(1) + "found the path '/etc/hostname', needs one below the source folder", (CLIP.id,)),
    Bad("a link that leaves the source", replace_by_link,
        rf"^{FRAME} {NAMED}found a link to .*outside.jpg, needs a file below the source folder; copy", (CLIP.id,)),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_a_fault_is_named_and_costs_nothing_that_is_converted(
    bad: Bad, source: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad.damage(source)
    output = tmp_path / "records"
    assert run(source, output, "--clips-per-shard=1") == 1
    errors = capsys.readouterr().err
    assert re.search(bad.message, errors, re.MULTILINE), errors
    assert re.search(bad.message, (output / "faults.txt").read_text(), re.MULTILINE)
    assert not (output / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*.tfrecord")}
    assert finished

    shutil.rmtree(source)
    shutil.copytree(sound / "source", source)
    assert run(source, output, "--clips-per-shard=1") == 0
    result, expected = files_of(output), files_of(sound / "records")
    assert result == expected
    same = [path for path, changed in finished.items() if path.exists() and path.stat().st_mtime_ns == changed]
    assert len(same) >= len(finished) - bad.rewritten


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_a_skipped_fault_drops_its_clips_and_no_others(bad: Bad, source: Path, tmp_path: Path) -> None:
    bad.damage(source)
    output = tmp_path / "records"
    assert run(source, output, "--on-error=skip", "--max-skip-rate=1") == 0
    dataset = open_dataset(output)
    for name, clips in (("train", TRAIN), ("test", TEST)):
        assert sorted(dataset.split(name).clip_ids) == sorted(clip.id for clip in clips if clip.id not in bad.skipped)
        split = dataset.split(name)
        assert [split.clip(row).id for row in range(split.num_clips)] == list(split.clip_ids)
        for each in range(split.num_clips):
            assert split.image_ids[split.clip(each).image_index] in split.truth(each)
    report = json.loads((output / "report.json").read_text())
    assert sum(split["skipped_clips"] for split in report["splits"].values()) == max(1, len(bad.skipped))
    assert sum(sum(split["skipped"].values()) for split in report["splits"].values()) >= 1
    assert (output / "faults.txt").exists()


def test_too_many_skipped_clips_fail_with_the_rate(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / FRAME).unlink()
    assert run(source, tmp_path / "records", "--on-error=skip", "--splits=train") == 1
    assert "skipped 1 of 7 train clips (missing frame 1), needs at most 1.00%" in capsys.readouterr().err
    assert run(source, tmp_path / "records", "--on-error=skip", "--splits=train", "--max-skip-rate=0.2") == 0


def test_a_picture_that_is_corrected_after_it_was_skipped_is_stored(source: Path, sound: Path, tmp_path: Path) -> None:
    arguments = ("--on-error=skip", "--clips-per-shard=1")
    (source / FRAME).write_bytes(b"text")
    assert run(source, tmp_path / "records", *arguments) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").glob("*.tfrecord")}
    assert run(source, tmp_path / "records", *arguments) == 1
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    (source / FRAME).write_bytes((sound / "source" / FRAME).read_bytes())
    assert run(source, tmp_path / "records", *arguments) == 0
    assert files_of(tmp_path / "records") == files_of(sound / "records")


def test_too_many_skipped_shop_images_fail_too(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recall would be too high in a gallery without its distractors."""
    (source / "gallery" / LIVES[3] / f"{IMAGE_IDS[2]}-0.jpg").unlink()
    assert run(source, tmp_path / "records", "--on-error=skip", "--splits=test") == 1
    errors = capsys.readouterr().err
    assert "skipped 1 of 4 test shop images (image id without an image 1), needs at most 1.00%" in errors


def test_all_faults_are_collected_before_it_stops(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / FRAME).unlink()
    (source / SHOP_IMAGE).write_bytes(b"text")
    edit_cell(source / LIST, 4, 1, "nonsense")
    edit_json(source / TRUTH, lambda truth: truth.pop(QUERY.id))
    assert run(source, tmp_path / "records") == 1
    faults = (tmp_path / "records/faults.txt").read_text().splitlines()
    errors = capsys.readouterr().err
    assert len(faults) == 4  # training and validation's gallery share the shop image, which is named once
    assert all(fault in errors for fault in faults)
    assert "found 4 faults" in errors


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("query_tenframes.json", b'{"a": ', "query_tenframes.json: cannot be read as JSON in line 1 (Expecting value)"),
        ("query_tenframes.json", b"[]", "annotations/query_tenframes.json: found a list, needs an object"),
        ("query_tenframes.json", b'{"a": 1, "a": 2}', "annotations/query_tenframes.json: found the id a twice"),
        (
            "query_tenframes.json",
            b'{"\xff": 1}',
            "annotations/query_tenframes.json: found byte 0xff in line 1, needs UTF-8; convert",
        ),
        (
            "query_tenframes.json",
            b'{"a": ' + b"1" * 5000 + b"}",
            "annotations/query_tenframes.json: cannot be read (Exc",
        ),
        (
            "query_tenframes.json",
            b'{"a":' + b"[" * 100_000,
            "annotations/query_tenframes.json: found lists nested too deep",
        ),
        ("test_image_title_4.txt", b"a\tb\n\xff\tc", "annotations/test_image_title_4.txt: found byte 0xff in line 2"),
        ("test_videoid_to_gtimage_3.json", b'{"a": 5}', "annotations/test_videoid_to_gtimage_3.json: found 5 for a"),
        (
            "test_frameid2gtbox_3_17.json",
            b'{"a": [1]}',
            "annotations/test_frameid2gtbox_3_17.json (frame a): found the box",
        ),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_named(
    name: str, data: bytes, message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "annotations" / name).write_bytes(data)
    assert run(source, tmp_path / "records", "--splits=test") == 1
    assert message in capsys.readouterr().err


def test_a_full_disk_is_reported_and_the_same_command_continues_later(sound: Path, tmp_path: Path) -> None:
    """A limit on the size of files acts as a full disk: the system's write fails in the middle of a shard."""
    output = tmp_path / "records"
    arguments = [sys.executable, "-m", "data_pipeline.convert", "--layout=lpr750k", f"--source={sound / 'source'}"]
    arguments += [f"--output={output}", "--clips-per-shard=1"]
    limit = 40_000  # bytes: the clip of twelve frames takes more
    limited = subprocess.run(
        arguments, cwd=REPO, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert limited.returncode == 1
    assert f"{output}: no space left on the device" in limited.stderr
    assert "run the same command again: finished shards are kept" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert not list(output.rglob("*.tmp"))
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*.tfrecord")}
    assert finished
    assert subprocess.run(arguments, cwd=REPO, capture_output=True, check=False).returncode == 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    assert files_of(output) == files_of(sound / "records")


# --- the output folder ------------------------------------------------------------------------------------------------


def test_a_finished_conversion_is_left_alone(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = shutil.copytree(sound / "records", tmp_path / "records")
    before = files_of(output)
    assert run(sound / "source", output, "--clips-per-shard=1") == 0
    assert "already converted, nothing to do" in capsys.readouterr().out
    assert files_of(output) == before


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda output: next(output.glob("test-clips*.tfrecord")).unlink(), "found no such file, needs"),
        (lambda output: (output / "columns/products.txt").write_bytes(b"x"), "products.txt: found 1 bytes, needs"),
        (lambda output: edit_json(output / MANIFEST, lambda m: m["splits"].pop("test")), "found a hash that disagrees"),
    ],
)
def test_a_finished_set_that_is_damaged_is_not_called_converted_and_the_advice_makes_it_anew(
    damage: Callable[[Path], object], told: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(sound / "records", tmp_path / "records")
    before = files_of(output)
    damage(output)
    assert run(sound / "source", output, "--clips-per-shard=1") == 1
    shown = capsys.readouterr()
    assert told in shown.err and "already converted" not in shown.out
    assert f"give another --output, or delete the folder {output} and run the same command again" in shown.err
    for folder in (tmp_path / "other", output):
        shutil.rmtree(folder, ignore_errors=True)
        assert run(sound / "source", folder, "--clips-per-shard=1") == 0
        assert files_of(folder) == before


def test_a_manifest_that_is_no_json_and_a_report_that_was_removed_end_without_a_traceback(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(sound / "records", tmp_path / "records")
    (output / "report.json").unlink()
    assert run(sound / "source", output, "--clips-per-shard=1") == 0
    assert "already converted, nothing to do" in capsys.readouterr().out
    (output / MANIFEST).write_bytes(b"{")
    assert run(sound / "source", output, "--clips-per-shard=1") == 2
    shown = capsys.readouterr().err
    assert f"{output / MANIFEST}: found no identity of a job" in shown and "use another --output" in shown


@pytest.mark.parametrize("option", ["--frames=all", "--splits=test", "--clips-per-shard=2"])
def test_the_output_of_another_conversion_is_refused(
    option: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(sound / "records", tmp_path / "records")
    before = files_of(output)
    assert run(sound / "source", output, "--clips-per-shard=1", option) == 2
    name = {"--frames": "frames", "--splits": "lists, splits", "--clips-per-shard": "clips_per_shard"}
    assert f"found other work, which differs in {name[option.split('=')[0]]}" in capsys.readouterr().err
    assert files_of(output) == before


def test_the_same_folder_with_other_lists_is_another_conversion(
    source: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(sound / "records", tmp_path / "records")
    edit_cell(source / LIST, 1, 5, "New title")
    assert run(source, output, "--clips-per-shard=1") == 2
    assert "differs in lists" in capsys.readouterr().err


def test_a_folder_with_other_things_in_it_is_refused(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    assert run(sound / "source", tmp_path) == 2
    assert "found thesis.tex, needs an empty folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_an_unfinished_conversion_with_other_options_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / FRAME).unlink()
    assert run(source, tmp_path / "records") == 1
    assert run(source, tmp_path / "records", "--frames=all") == 2
    assert "found other work, which differs in frames" in capsys.readouterr().err


# --- however it was done ----------------------------------------------------------------------------------------------


def test_any_number_of_workers_writes_the_same_bytes(sound: Path, tmp_path: Path) -> None:
    assert run(sound / "source", tmp_path / "records", "--clips-per-shard=1", "--workers=3") == 0
    assert files_of(tmp_path / "records") == files_of(sound / "records")


def test_the_place_of_the_source_does_not_matter(source: Path, sound: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "records", "--clips-per-shard=1") == 0
    assert files_of(tmp_path / "records") == files_of(sound / "records")


def test_the_order_of_the_lines_does_not_matter_to_the_records(source: Path, sound: Path, tmp_path: Path) -> None:
    edit_lines(source / LIST, lambda rows: rows.reverse())
    assert run(source, tmp_path / "records", "--clips-per-shard=1") == 0
    hashes = [open_dataset(path / "records").content_hash for path in (tmp_path, sound)]
    assert hashes[0] == hashes[1]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_goes_on_where_it_stopped(workers: int, sound: Path, tmp_path: Path) -> None:
    output = tmp_path / "records"
    arguments = [sys.executable, "-m", "data_pipeline.convert", "--layout=lpr750k", f"--source={sound / 'source'}"]
    arguments += [f"--output={output}", "--clips-per-shard=1", f"--workers={workers}"]
    process = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(output.glob("train-clips-*.tfrecord"))) < 2:
        time.sleep(0.001)
    at_work = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until_gone(at_work)
    finished = [output / note.stem for note in (output / ".work").glob("*.tfrecord.json")]
    written = {path: path.stat().st_mtime_ns for path in finished}
    assert written or (output / "manifest.json").exists()
    assert main([*arguments[3:]]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == written
    assert files_of(output) == files_of(sound / "records")
    assert not list(output.rglob("*.tmp"))


def test_a_finished_shard_is_verified_before_it_is_used_again(source: Path, sound: Path, tmp_path: Path) -> None:
    output = tmp_path / "records"
    (source / FRAME).unlink()
    assert run(source, output, "--clips-per-shard=1") == 1
    damaged = sorted(output.glob("train-clips-*.tfrecord"))[0]
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    (source / FRAME).write_bytes((sound / "source" / FRAME).read_bytes())
    assert run(source, output, "--clips-per-shard=1") == 0
    assert files_of(output) == files_of(sound / "records")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_workers_end_when_their_parent_is_killed(sound: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from data_pipeline.system.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2, None) as workers:\n"
        "        for pid in workers.run(tell, [(0,), (1,)], 'x', total=2):\n"
        "            print(pid, flush=True, file=sys.stderr)\n"
        "        time.sleep(60)\n"
    )
    path = tmp_path / "parent.py"
    path.write_text(
        script.replace(
            "if __name__", "def tell(context, number):\n    time.sleep(0.5)\n    return os.getpid()\nif __name__", 1
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(path)], env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    pids = {int(process.stderr.readline()) for _ in range(2)}
    process.kill()
    process.wait()
    until_gone(pids)


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=/nowhere"], "/nowhere: found no folder annotations/"),
        (["--splits=train,tests"], "needs names of train,val,test"),
        (["--workers=0"], "found 0, needs at least 1"),
        (["--max-skip-rate=2"], "found 2, needs 0 to 1"),
        (["--train-annotation=nonsense"], "needs nonsense; correct --train-annotation"),
        (["--layout=lpr"], "invalid choice: 'lpr'"),
    ],
)
def test_wrong_use_is_exit_status_2(
    arguments: list[str], message: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(sound / "source", tmp_path / "records", *arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_a_folder_with_only_the_test_part_converts(source: Path, tmp_path: Path) -> None:
    for path in (*source.glob("training_*"), *source.glob("annotations/training_*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for arguments in ([], ["--splits=test"]):
        output = tmp_path / f"records{len(arguments)}"
        assert run(source, output, *arguments) == 0
        assert open_dataset(output).splits == ("test",)


def test_a_split_that_the_source_has_not_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "annotations/training_videoinfo_val.txt").unlink()
    assert run(source, tmp_path / "records", "--splits=train,val") == 2
    assert "found nothing for val (only for train, test), needs it in annotations/" in capsys.readouterr().err


def test_an_empty_list_is_a_failure(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / LIST).write_bytes(b"\n")
    assert run(source, tmp_path / "records") == 1
    assert "found no train clip in its list" in capsys.readouterr().err


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_was_stored(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = json.loads((sound / "records/report.json").read_text())["splits"]
    shown = {key: [splits[split][key] for split in ("train", "val", "test")] for key in splits["train"]}
    assert shown.pop("bytes")[0] > sum(path.stat().st_size for path in SHOP_IMAGES[:3])
    assert shown == {
        "listed_clips": [7, 1, 3], "clips": [7, 1, 3], "frames": [25, 3, 15], "images": [3, 3, 4], "pairs": [7, 1, 3],
        "products": [3, 3, 3], "categories": [2, 1, 0], "livestreams": [2, 1, 2], "galleries": [0, 1, 2],
        "gallery_images": [0, 3, 5], "queries_without_frames": [0, 0, 0], "skipped_clips": [0, 0, 0],
        "skipped_images": [0, 0, 0],
        "failed_downloads": [0, 0, 0], "lost_boxes": [0, 0, 0], "skipped": [{}, {}, {}],
        "odd_pictures": [{}, {}, {}],
    }  # fmt: skip


def test_the_table_is_on_the_screen(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "records") == 0
    out = capsys.readouterr().out
    assert re.search(r"clips stored +7 +1 +3\n", out)
    assert "train: clips: 100%" in out


def test_lpr4m_resumes_too(tmp_path: Path) -> None:
    lost = CLIP.frame_ids
    source = make_lpr4m(tmp_path / "source", failed=lost)
    assert run(source, tmp_path / "records", "--clips-per-shard=1", layout="lpr4m") == 1
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").glob("*.tfrecord")}
    for path in make_lpr4m(tmp_path / "again").rglob("*.*"):
        before = source / path.relative_to(tmp_path / "again")
        if not before.exists() or path.read_bytes() != before.read_bytes():
            shutil.copyfile(path, before)
    assert run(source, tmp_path / "records", "--clips-per-shard=1", layout="lpr4m") == 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())


def test_converting_never_imports_jax() -> None:
    code = "import sys, data_pipeline.convert, data_pipeline.format.reader; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
