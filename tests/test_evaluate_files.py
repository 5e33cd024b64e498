"""Files of the evaluation command: lists of ids as people have them, and folders for results that differ."""

import codecs
import json
from pathlib import Path

import pytest

from data_pipeline.format.reader import open_dataset
from rice_jax import evaluate, show, train
from tests.test_train import smoke_config


@pytest.fixture(scope="module")
def run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(smoke_config(converted, num_updates=3), workdir)
    return workdir


def call(run: Path, data: Path, *more: object) -> None:
    evaluate.evaluate(evaluate.parse(["--workdir", str(run), "--data", str(data), *map(str, more)]))


BOM = "\ufeff"


@pytest.mark.parametrize(
    "text",
    [
        "one\ntwo\n",
        f"{BOM}one\ntwo",
        f"{BOM}one\r\ntwo\r\n",
        "one \t\r\n\r\n  two\r\n \r\n",
        f"one\n{BOM}two\n",
        "one\rtwo\r",
        f"{BOM}\n{BOM}one\n\n\n\ttwo \n\n",
    ],
)
def test_a_list_of_ids_is_read_as_any_editor_writes_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids.txt").write_bytes(text.encode())
    assert evaluate.read_ids(tmp_path / "ids.txt") == ["one", "two"]


def test_an_id_keeps_its_own_spaces_and_separators(tmp_path: Path) -> None:
    ids = ["Cola/clip 3", "a\u2028b", "a\x85b", "Caf\u00e9\u202f3"]
    (tmp_path / "ids.txt").write_bytes("\n".join(ids).encode())
    assert evaluate.read_ids(tmp_path / "ids.txt") == ids


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("one\n".encode("utf-16"), r"ids.txt: byte 0 is not UTF-8; save it as UTF-8"),
        ("one\n".encode("utf-16-le"), r"ids.txt: has characters of 0, as UTF-16 has, and is not UTF-8; save it as"),
        (codecs.BOM_UTF32_LE + "one\n".encode("utf-32-le"), "ids.txt: byte 0 is not UTF-8; save it as UTF-8"),
        ("caf\u00e9\n".encode("latin-1"), r"ids.txt: byte 3 is not UTF-8; save it as UTF-8"),
        (f"{BOM}\r\n \t\r\n".encode(), r"ids.txt: found no clip id; give a text file with one a line"),
    ],
)
def test_a_list_of_another_encoding_is_refused_with_advice(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "ids.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        evaluate.read_ids(tmp_path / "ids.txt")


def test_a_subset_of_an_unknown_clip_names_one_that_the_split_has(run: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("nobody\n")
    known = next(iter(open_dataset(converted).split("test").truth_by_clip))
    with pytest.raises(ValueError, match=f"such as nobody; list clips of that split, such as {known}, or"):
        call(run, converted, "--subset", tmp_path / "ids.txt")


def test_results_of_different_settings_have_different_folders(run: Path, converted: Path, tmp_path: Path) -> None:
    clips = open_dataset(converted).split("test").clip_ids
    lists = []
    for number in range(2):
        lists.append(tmp_path / str(number) / "first.txt")
        lists[-1].parent.mkdir()
        lists[-1].write_text(clips[number])
    commands: list[tuple[object, ...]] = [
        (),
        ("--step", 3),
        ("--config.eval_flip=true",),
        ("--config.eval_flip=true", "--config.data.eval_num_frames=2"),
        ("--score", "matching"),
        ("--score", "raw-matching"),
        ("--subset", lists[0]),
        ("--subset", lists[1]),
        ("--on-error", "miss"),
        ("--split", "val"),
        ("--split", "val", "--config.eval_flip=true", "--step", 3),
    ]
    found: dict[str, tuple[object, ...]] = {}
    for command in commands:
        before = {path.name for path in run.glob("evaluation-*")}
        call(run, converted, *command)
        (name,) = {path.name for path in run.glob("evaluation-*")} - before
        found[name] = command
    names = list(found)
    assert names[:6] == [
        "evaluation-test", "evaluation-test-step=3", "evaluation-test-eval_flip=true",
        "evaluation-test-data.eval_num_frames=2-eval_flip=true", "evaluation-test-matching",
        "evaluation-test-raw-matching",
    ]  # fmt: skip
    assert names[6].startswith("evaluation-test-first-") and names[8:10] == ["evaluation-test-miss", "evaluation-val"]
    metrics = {name: json.loads((run / name / "metrics.json").read_text()) for name in names}
    for name, command in found.items():
        figures = metrics[name]
        assert figures["step"] == 3 and figures["data"] == open_dataset(converted).content_hash
        assert figures["split"] == ("val" if "val" in command else "test")
        assert figures["subset"] == ("first.txt" if "--subset" in command else None)
        assert figures["score"] == (command[1] if "--score" in command else "embedding")
        assert figures["overrides"].get("eval_flip", False) == ("--config.eval_flip=true" in command)
    before = {path.name for path in run.glob("evaluation-*")}
    call(run, converted, "--config.data.threads=1")  # changes no figure
    assert {path.name for path in run.glob("evaluation-*")} == before


def test_results_on_another_data_set_have_a_folder_of_their_own(run: Path, converted: Path, tmp_path: Path) -> None:
    from data_pipeline.convert import Options, convert
    from tests.lpr_layouts import make_lpr750k

    source = make_lpr750k(tmp_path / "lpr750k")
    convert(Options(layout="lpr750k", source=source, output=tmp_path / "records", workers=1))
    other = open_dataset(tmp_path / "records").content_hash
    call(run, converted)
    before = (run / "evaluation-test" / "metrics.json").read_text()
    call(run, tmp_path / "records")
    assert (run / "evaluation-test" / "metrics.json").read_text() == before
    figures = json.loads((run / f"evaluation-test-data={other[:8]}" / "metrics.json").read_text())
    assert figures["data"] == other


def test_damaged_results_are_not_shown(run: Path, converted: Path, tmp_path: Path) -> None:
    call(run, converted, "--output", tmp_path)
    rankings, metrics = tmp_path / "rankings.jsonl", tmp_path / "metrics.json"
    sound, lines = rankings.read_bytes(), show.read_rankings(tmp_path)
    assert len(lines) == 3
    for damaged in (sound[: sound.index(b"\n") + 1], b"", sound.replace(b'"rank": ', b'"rank": 1', 1)):
        rankings.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not the file that metrics\.json beside it belongs to"):
            show.read_rankings(tmp_path)
    for damaged in (b"\xff", sound[:40]):
        rankings.write_bytes(damaged)
        with pytest.raises(ValueError, match="line 1: is no ranking"):
            show.read_rankings(tmp_path)
    call(run, converted, "--output", tmp_path)  # as the message says
    assert show.read_rankings(tmp_path) == lines
    for damaged in (b"", b"[]", metrics.read_bytes()[:30]):
        metrics.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"metrics.json: is damaged .*run the same rice_jax.evaluate again"):
            show.read_rankings(tmp_path)


def test_a_picture_of_another_kind_is_refused_before_it_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        show.parse(["--evaluation", "a", "--data", "b", "--output", "queries.xyz"])
    assert end.value.code == 2 and "needs a name that ends in .png, .jpg, .jpeg, .webp" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["水" * 80, "a" * 200, "é" * 100])
@pytest.mark.parametrize("more", [{}, {f"data.option_{k}": "水" * 9 for k in range(9)}])
def test_the_folder_of_results_has_a_name_that_any_file_system_takes(
    name: str, more: dict[str, str], tmp_path: Path
) -> None:
    words = ["--workdir", "run", "--data", "data", "--subset", f"{name}.txt"]
    folder = lambda changed: evaluate.folder_name(evaluate.parse(words), ["one"], more | changed, data=None)
    (tmp_path / folder({})).mkdir()
    assert len(folder({}).encode()) <= 240 and folder({}) == folder({}) != folder({"z": "1"})
