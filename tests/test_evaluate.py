"""The evaluation command: figures, subset, resumption, bad input."""

import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from data_pipeline.format.reader import open_dataset
from rice_jax import evaluate, train
from rice_jax.retrieval import embeddings, evaluation
from rice_jax.retrieval.embeddings import EmbeddingStore
from rice_jax.retrieval.model import load
from rice_jax.training import step
from tests.test_train import smoke_config


@pytest.fixture(scope="module")
def run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(smoke_config(converted, num_updates=3), workdir)
    return workdir


def call(run: Path, data: Path, *more: str) -> None:
    evaluate.evaluate(evaluate.parse(["--workdir", str(run), "--data", str(data), *more]))


def test_metrics_rankings_and_table(
    run: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(run, converted, "--output", str(tmp_path))
    figures = json.loads((tmp_path / "metrics.json").read_text())
    # Two queries among three shop images, one among two: chance (1/3 + 1/3 + 1/2) / 3.
    assert figures["queries"] == 3
    assert figures["mean_gallery_size"] == pytest.approx(8 / 3)
    assert figures["chance_recall@1"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)
    assert {"recall@1", "recall@3", "recall@5", "recall@10"} <= figures.keys()
    assert figures["recall@3"] == 100
    lines = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert [len(line["top"]) for line in lines] == [3, 3, 2]
    hits = sum(line["rank"] == 1 for line in lines)
    assert figures["recall@1"] == pytest.approx(100 * hits / 3)
    truth = open_dataset(converted).split("test").truth_by_clip
    for line in lines:
        assert line["top"][line["rank"] - 1][0] in truth[line["clip"]]
    assert f"{figures['recall@1']:.2f}" in capsys.readouterr().out


def test_a_subset_restricts_both_sides(run: Path, converted: Path, tmp_path: Path) -> None:
    clip = open_dataset(converted).split("test").clip_ids[2]
    (tmp_path / "ids.txt").write_text(f"{clip}\n\n")
    call(run, converted, "--subset", str(tmp_path / "ids.txt"), "--output", str(tmp_path), "--json")
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["queries"] == 1 and figures["mean_gallery_size"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no-such-clip\n", "found 1 of 1 clip ids that split test's truth lacks, such as no-such-clip; list"),
        (b"\xff\n", "byte 0 is not UTF-8"),
        (b"\n", "found no clip id"),
    ],
)
def test_a_bad_subset_is_named(run: Path, converted: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        call(run, converted, "--subset", str(tmp_path / "ids.txt"))


def test_an_interrupted_evaluation_continues_with_the_missing_blocks(
    run: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(run, converted, "--output", str(tmp_path / "whole"))
    monkeypatch.setattr(EmbeddingStore, "BLOCK", 1)
    call(run, converted, "--output", str(tmp_path / "blocks"))
    blocks = sorted((tmp_path / "blocks" / "embeddings").glob("*/*.npy"))
    assert len(blocks) == 3 + 4
    before = {path: path.stat().st_mtime_ns for path in blocks}
    blocks[1].unlink()
    call(run, converted, "--output", str(tmp_path / "blocks"))
    after = {path: path.stat().st_mtime_ns for path in blocks}
    assert [path for path in blocks if after[path] != before[path]] == [blocks[1]]
    whole, pieces = ((tmp_path / name / "metrics.json").read_text() for name in ("whole", "blocks"))
    assert whole == pieces


def test_another_model_of_the_same_config_does_not_find_these_embeddings(
    run: Path, converted: Path, tmp_path: Path
) -> None:
    call(run, converted, "--output", str(tmp_path / "out"))
    shutil.copytree(run, tmp_path / "run")
    config = smoke_config(converted, num_updates=3)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with mock.patch.object(step, "random_key", lambda seed: jax.random.key(seed + 1, impl="threefry2x32")):
        train.train_and_evaluate(config, tmp_path / "run")
    call(tmp_path / "run", converted, "--output", str(tmp_path / "out"))
    assert len(list((tmp_path / "out" / "embeddings").iterdir())) == 2


def test_queries_without_frames_count_as_misses(run: Path, converted: Path) -> None:
    split = open_dataset(converted).split("test")
    split.truth_by_clip["never-downloaded"] = ("image",)
    result = evaluation.evaluate_split(load(run), split)
    assert result.figures["queries"] == 4 and result.figures["recall@3"] == pytest.approx(75)
    with pytest.raises(ValueError, match="subset: found no clip id"):
        evaluation.evaluate_split(load(run), split, subset=[])
    alone = evaluation.evaluate_split(load(run), split, subset=["never-downloaded"])
    assert alone.figures["queries"] == 1 and alone.figures["recall@10"] == 0


def test_a_split_without_a_query_is_refused_before_anything_is_encoded(run: Path, converted: Path) -> None:
    split = open_dataset(converted).split("test")
    split.truth_by_clip.clear()
    with pytest.raises(ValueError, match="split test has no query; evaluate another split"):
        evaluation.evaluate_split(load(run), split)


def test_each_query_counts_once_for_any_batch_size(run: Path, converted: Path) -> None:
    split = open_dataset(converted).split("test")
    rows = np.arange(split.num_clips)
    model = load(run)
    embed = lambda size: embeddings.embed(
        dataclasses.replace(model, batch_size=size), split, rows, np.arange(split.num_images),
        store=EmbeddingStore(None), show_progress=False,
    )  # fmt: skip
    for one, other in zip(embed(8), embed(16), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_split_without_galleries_is_refused_with_advice(run: Path, converted: Path) -> None:
    with pytest.raises(ValueError, match="split train has no galleries to rank in; evaluate val or test"):
        call(run, converted, "--split", "train")
    with pytest.raises(ValueError, match="nowhere"):
        call(run, converted, "--split", "nowhere")


def test_a_field_that_training_depended_on_cannot_be_overridden(run: Path, converted: Path) -> None:
    with pytest.raises(ValueError, match="was trained with it"):
        call(run, converted, "--config.data.image_size=64")
    with pytest.raises(SystemExit) as exit_:
        evaluate.parse(["--workdir", "a", "--data", "b", "--splitt", "test"])
    assert exit_.value.code == 2
