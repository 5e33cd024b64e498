"""A set that lacks frames of its clips: new runs are refused, old ones go on, and an evaluation says so beforehand."""

import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from configs import smoke
from data_pipeline.convert import Options, convert
from rice_jax import evaluate, explain, train
from tests import lpr_layouts
from tests.lpr_layouts import TinyClip

OLD = [("random", 10), ("uniform", 5), ("random_of_stored", 10)]  # what earlier versions took


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A default conversion, ten frames a clip, of clips of twelve."""
    folder = tmp_path_factory.mktemp("sampled")
    clips = [TinyClip(k % 2, 20_000 * (k + 1), 12, k % 3) for k in range(16)]
    with mock.patch.multiple(lpr_layouts, TRAIN=clips, VAL=[TinyClip(1, 900_000, 12, 1)]):
        source = lpr_layouts.make_lpr750k(folder / "lpr750k")
    convert(Options(layout="lpr750k", source=source, output=folder / "records", workers=1))
    return folder / "records"


def config_of(path: Path, sampling: str = "uniform", slots: int = 4, **changes: Any) -> Any:
    config = smoke.get_config()
    config.data.path, config.data.frame_sampling, config.data.num_frames = str(path), sampling, slots
    config.update({"loss": {"pmd": 0.0, "pfr": 0.0}} | changes)
    return config


def refusal(config: Any, workdir: Path) -> str:
    with pytest.raises(ValueError, match="stored frames of 12") as refused:
        train.train_and_evaluate(config, workdir)
    assert not (workdir / "checkpoints" / "3").exists()
    return str(refused.value)


@pytest.mark.parametrize(("sampling", "slots"), OLD)
def test_a_run_that_has_a_checkpoint_goes_on_and_says_what_it_shows(
    sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sampling: str, slots: int
) -> None:
    config = config_of(sampled, sampling, slots)
    text = refusal(config, tmp_path / "run")
    with mock.patch.object(train, "check_frames"):  # as a version without the check
        train.train_and_evaluate(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    capsys.readouterr()
    train.train_and_evaluate(config, tmp_path / "run")
    how = "evenly spaced" if sampling == "uniform" else "random"
    warning = capsys.readouterr().err
    assert f"warning: {text.split(';')[0]}; this run goes on as it began: it shows {how} ones of the stored" in warning
    assert "convert again" not in warning
    again = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [re.findall(r'"loss": [^,]+', line) for line in again] == [re.findall(r'"loss": [^,]+', x) for x in lines]
    explain.explain(explain.parse(["--workdir", str(tmp_path / "run"), "--step", "6"]))


@pytest.mark.parametrize(("sampling", "slots"), OLD)
def test_every_setting_that_the_refusal_names_is_taken(
    sampled: Path, tmp_path: Path, sampling: str, slots: int
) -> None:
    text = refusal(config_of(sampled, sampling, slots), tmp_path / "run")
    ways = [("frame_sampling", name) for name in re.findall(r'data\.frame_sampling to "(\w+)"', text)]
    numbers = re.search(r"data\.num_frames to one of \[([\d, ]+)\]", text)
    ways += [("num_frames", int(n)) for n in (numbers[1].split(", ") if numbers else [])]
    assert ways
    data = train.open_dataset(sampled).split("train")
    for name, value in ways:
        config = config_of(sampled, sampling, slots, data={name: value})
        train.check_frames(config, data, np.arange(data.num_clips), begun=False)


def test_an_evaluation_that_lacks_frames_is_refused_before_the_first_update(
    sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(sampled, data={"eval_num_frames": 3})
    text = refusal(config, tmp_path / "run")
    assert "data.eval_num_frames = 3 evenly spaced" in text
    assert "or set data.eval_num_frames to one of [1, 2, 4, 10]." in text
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    config.data.eval_num_frames = 4
    train.train_and_evaluate(config, tmp_path / "run")
    command = ["--workdir", str(tmp_path / "run"), "--data", str(sampled), "--split", "val"]
    with pytest.raises(SystemExit):
        evaluate.command([*command, "--config.data.eval_num_frames=3"])
    assert text in capsys.readouterr().err
    evaluate.command([*command, "--config.data.eval_num_frames=10"])


def test_an_old_run_goes_on_with_the_evaluation_that_the_refusal_names(sampled: Path, tmp_path: Path) -> None:
    config = config_of(sampled, data={"eval_split": ""})
    train.train_and_evaluate(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    config.data.eval_split, config.data.eval_num_frames = "val", 5
    with pytest.raises(ValueError, match=r"data.eval_num_frames to one of \[1, 2, 4, 10\]"):
        train.train_and_evaluate(config, tmp_path / "run")
    config.data.eval_num_frames = 2
    assert train.train_and_evaluate(config, tmp_path / "run")["queries"] == 1


def test_a_split_that_cannot_be_evaluated_is_refused_before_the_first_update(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this split has no galleries to rank in"):
        train.train_and_evaluate(config_of(converted, data={"eval_split": "train"}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
