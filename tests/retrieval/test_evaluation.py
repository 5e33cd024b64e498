"""Evaluation of a split: sampled galleries, and pictures that cannot be read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import pod
from data_pipeline.format.reader import Split, open_dataset
from rice_jax import evaluate, show, train
from rice_jax.retrieval import evaluation
from rice_jax.retrieval.evaluation import evaluate_split
from rice_jax.retrieval.model import Model
from rice_jax.training.logs import Log
from tests import official
from tests.retrieval.test_matching import random_model, save_run
from tests.test_train import smoke_config


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(official.mesh_of(1, 1), batch_size=8)


@pytest.fixture(scope="module")
def split(converted: Path) -> Split:
    return open_dataset(converted).split("test")


# --- Sampled galleries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["embedding", "matching"])
def test_a_sampled_gallery_has_the_queries_own_images_and_some_others(model: Model, split: Split, score: str) -> None:
    query = [split.clip_ids[0]]  # its gallery has three images, one of them true
    whole = evaluate_split(model, split, subset=query, score=score)
    sampled = evaluate_split(model, split, subset=query, score=score, gallery=1)
    assert "gallery" not in whole.figures and whole.ranking.gallery_size == [3]
    assert (sampled.figures["gallery"], sampled.figures["whole_gallery"]) == (2, 3)
    assert sampled.ranking.gallery_size == [2] and sampled.ranking.true_entries == [1]
    kept = sampled.ranking.top_images[0][:2].tolist()
    assert kept == [image for image in whole.ranking.top_images[0].tolist() if image in kept]
    again = evaluate_split(model, split, subset=query, score=score, gallery=1)
    np.testing.assert_array_equal(again.ranking.top_images, sampled.ranking.top_images)
    assert evaluate_split(model, split, subset=query, score=score, gallery=2).figures == whole.figures
    assert "2 of 3 shop images" in evaluation.one_line(sampled.figures)


def test_the_seed_decides_the_sample(split: Split) -> None:
    truth = {split.clip_ids[0]: split.truth(0)}
    sample = lambda seed: tuple(evaluation._sample(split, np.arange(split.num_images), truth, 1, seed=seed))
    assert sample(7) == sample(7) and len({sample(seed) for seed in range(20)}) == split.num_images - 1


def test_training_says_how_large_the_gallery_is_and_the_command_takes_all(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = smoke_config(converted, num_updates=3)
    config.data.eval_gallery = 1
    train.train_and_evaluate(config, tmp_path)
    assert "2 of 3 shop images" in capsys.readouterr().out
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["val/gallery"], line["val/whole_gallery"], line["val/mean_gallery_size"]) == (2, 3, 2)
    words = ["--workdir", str(tmp_path), "--data", str(converted), "--split", "val"]
    evaluate.evaluate(evaluate.parse(words))
    figures = json.loads((tmp_path / "evaluation-val" / "metrics.json").read_text())
    assert figures["mean_gallery_size"] == 3 and "gallery" not in figures
    with pytest.raises(SystemExit) as end:
        evaluate.parse([*words, "--config.data.eval_gallery=1"])
    assert end.value.code == 2 and "whole galleries always; leave it out" in capsys.readouterr().err


def test_only_figures_of_galleries_of_one_size_are_compared(tmp_path: Path) -> None:
    with Log(tmp_path, step=0) as log:
        for step, figures in ((1, {}), (2, {"gallery": 9}), (3, {"gallery": 9})):
            log.write_evaluation(step, "val", {"queries": 1, "recall@1": 10.0 * step} | figures)
        assert log.recalls("val") == {2: 20.0, 3: 30.0}
        log.write_evaluation(4, "val", {"queries": 1, "recall@1": 40.0})
        assert log.recalls("val") == {1: 10.0, 4: 40.0}


def test_official_configs_evaluate_in_whole_galleries_and_pod_in_sampled_ones(converted: Path) -> None:
    assert smoke_config(converted).data.eval_gallery == 0 and pod.get_config().data.eval_gallery > 0


# --- Pictures that cannot be read -------------------------------------------------------------------------------------


def damage(data: Path, kind: str, row: int, *, split: str = "test") -> None:
    """Changes a byte of a record, as a bad disk does."""
    path, record = open_dataset(data, verify=False).split(split).where(kind, row).rsplit(" record ", 1)
    offsets = np.fromfile(f"{path}.idx", "<u8").astype(int)
    middle = (offsets[int(record)] + offsets[int(record) + 1]) // 2
    shard = bytearray(Path(path).read_bytes())
    shard[middle] ^= 1
    Path(path).write_bytes(shard)


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "data")


@pytest.fixture(scope="module")
def run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(official.mesh_of(8, 1), **{"data.path": str(converted)})
    return save_run(model, tmp_path_factory.mktemp("run"))


def figures_of(run: Path, data: Path, output: Path, *more: str) -> dict[str, object]:
    words = ["--workdir", str(run), "--data", str(data), "--output", str(output), *more]
    evaluate.evaluate(evaluate.parse(words))
    figures: dict[str, object] = json.loads((output / "metrics.json").read_text())
    return figures


@pytest.mark.parametrize("score", ["embedding", "matching"])
def test_the_advice_for_an_unreadable_clip_helps(
    run: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], score: str
) -> None:
    output, how = tmp_path / "out", ("--score", score)
    whole = figures_of(run, copied, tmp_path / "whole", *how)
    sound = {path: path.read_bytes() for path in copied.rglob("test-clips*.tfrecord")}
    clip = open_dataset(copied).split("test").clip_ids[1]
    damage(copied, "clip", 1)
    with pytest.raises(ValueError, match=f"{clip}.*checksum.*evaluate with --on-error miss, which counts the clip as"):
        figures_of(run, copied, output, *how)
    capsys.readouterr()
    found = figures_of(run, copied, output, *how, "--on-error", "miss")
    text = capsys.readouterr().err
    assert "split test: 1 clip cannot be read and counts as a miss:\n" in text and clip in text
    assert "--on-error" not in text  # which the command has already
    assert found["queries"] == 3 and found["unreadable"] == {"clip": [clip], "image": []}
    assert (found["unreadable_clips"], found["unreadable_images"]) == (1, 0)
    lines = show.read_rankings(output)
    others = [line for line in show.read_rankings(tmp_path / "whole") if line["clip"] != clip]
    assert lines == others
    assert found["recall@1"] == pytest.approx(100 * sum(line["rank"] == 1 for line in others) / 3)
    assert found["recall@10"] == pytest.approx(200 / 3)
    if score == "matching":
        assert found["matching_recall@10"] == found["sum_recall@10"] == pytest.approx(200 / 3)
    drawing = ["--evaluation", str(output), "--data", str(copied), "--output", str(tmp_path / "drawn.png")]
    show.show(show.parse(drawing))
    for path, data in sound.items():  # restored from a backup: nothing of the fault was kept
        path.write_bytes(data)
    restored = figures_of(run, copied, output, *how, "--on-error", "miss")
    assert restored == whole


@pytest.mark.parametrize("score", ["embedding", "matching"])
def test_an_unreadable_shop_image_leaves_its_galleries(
    run: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], score: str
) -> None:
    """Images 0 and 3 are true for a clip each, and image 1 for the third clip. The galleries are 3 0 1 and 1 2."""
    split, how = open_dataset(copied).split("test"), ("--score", score)
    (image,) = {split.image_ids[row] for row in split.gallery_of(0)} & set(split.truth(0))
    damage(copied, "image", split.image_ids.index(image))
    advice = r"evaluate with --on-error miss, which leaves the image out of its galleries"
    with pytest.raises(ValueError, match=f"image {image}.*{advice}"):
        figures_of(run, copied, tmp_path / "out", *how)
    whole = figures_of(run, copied, tmp_path / "out", *how, "--on-error", "miss")
    assert whole["unreadable"] == {"clip": [], "image": [image]} and image in capsys.readouterr().err
    assert whole["queries"] == 3 and whole["mean_gallery_size"] == pytest.approx((2 + 2 + 2) / 3)
    lines = {line["clip"]: line for line in show.read_rankings(tmp_path / "out")}
    missed = lines[split.clip_ids[0]]
    assert missed["rank"] is None and len(missed["top"]) == 2
    assert all(image not in [name for name, _ in line["top"]] for line in lines.values())
    assert whole["recall@10"] == pytest.approx(200 / 3)


def test_if_no_clip_can_be_read_there_is_no_figure(run: Path, copied: Path, tmp_path: Path) -> None:
    for row in range(3):
        damage(copied, "clip", row)
    with pytest.raises(ValueError, match="no clip of split test can be read; "):
        figures_of(run, copied, tmp_path / "out", "--on-error", "miss")


def test_training_goes_on_without_a_shop_image_that_cannot_be_read(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = open_dataset(copied).split("val")
    damage(copied, "image", int(split.gallery_of(0)[0]), split="val")
    figures = train.train_and_evaluate(smoke_config(copied, num_updates=3), tmp_path / "run")
    assert figures["unreadable_images"] == 1 and figures["mean_gallery_size"] == 2
    assert "1 shop image cannot be read and is left out of" in capsys.readouterr().err


def test_workers_report_what_they_cannot_read(run: Path, copied: Path, tmp_path: Path) -> None:
    damage(copied, "clip", 0)
    damage(copied, "image", 0)
    found = figures_of(run, copied, tmp_path, "--on-error", "miss", "--config.data.workers=1")
    assert (found["unreadable_clips"], found["unreadable_images"]) == (1, 1)
