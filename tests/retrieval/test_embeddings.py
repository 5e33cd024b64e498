"""Embeddings of a split: one input pipeline a kind, and blocks on disk that are checked before they are used."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.format.reader import Split, open_dataset
from rice_jax.retrieval import embeddings
from rice_jax.retrieval.embeddings import EmbeddingStore, embed, even_batch
from rice_jax.retrieval.model import Model
from tests import official
from tests.retrieval.test_matching import random_model


@pytest.fixture(scope="module")
def split(converted: Path) -> Split:
    return open_dataset(converted).split("test")


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(official.mesh_of(1, 1), batch_size=2)


def embed_all(model: Model, split: Split, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    rows = (np.arange(split.num_clips), np.arange(split.num_images))
    return embed(model, split, *rows, store=EmbeddingStore(folder), show_progress=False)


def test_the_input_pipeline_is_made_once_whatever_the_number_of_blocks(
    model: Model, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []
    for name in ("clip_batches", "image_batches"):
        original = getattr(embeddings, name)

        def counted(*arguments: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            made.append((name, arguments[3]))
            return original(*arguments, **options)

        monkeypatch.setattr(embeddings, name, counted)
    monkeypatch.setattr(EmbeddingStore, "BLOCK", 1)
    whole = embed_all(model, split, None)
    # Three clips, two at once, and four images, six at once: as many pictures as two clips of three frames.
    assert made == [("clip_batches", 2), ("image_batches", 4)]
    made.clear()
    embed_all(model, split, tmp_path / "key")
    assert len(made) == 2
    for name in ("clips-000000000.npy", "images-000000001.npy", "images-000000003.npy"):
        (tmp_path / "key" / name).unlink()
    made.clear()
    again = embed_all(model, split, tmp_path / "key")
    assert made == [("clip_batches", 2), ("image_batches", 4)]  # the sizes of an evaluation that was not interrupted
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)


def changed(path: Path) -> None:
    """Another number, written as a whole file."""
    array = np.load(path)
    array[0, 0] += 1
    np.save(path, array)


def bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[150] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "of 0 bytes": lambda path: path.write_bytes(b""),
    "of a few bytes": lambda path: path.write_bytes(b"\x93NUMPY"),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another number": changed,
    "another bit": bit_flipped,
    "another block": lambda path: shutil.copy(path.with_name("images-000000002.npy"), path),
    "a folder's": lambda path: (path.unlink(), path.symlink_to(path.parent)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_made_anew_with_one_line(
    model: Model,
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    monkeypatch.setattr(EmbeddingStore, "BLOCK", 1)
    folder = tmp_path / "key"
    expected = embed_all(model, split, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert capsys.readouterr().err == "" and len(files) == 3 + 4
    path = folder / "images-000000001.npy"
    DAMAGES[damage](path)
    for one, other in zip(expected, embed_all(model, split, folder), strict=True):
        np.testing.assert_array_equal(one, other)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: ") and line.endswith("what it held is encoded again.")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    embed_all(model, split, folder)
    assert capsys.readouterr().err == ""


def test_blocks_of_another_key_or_another_size_are_not_used(
    model: Model, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = embed_all(model, split, tmp_path / "key")
    shutil.copytree(tmp_path / "key", tmp_path / "other")
    embed_all(model, split, tmp_path / "other")
    assert capsys.readouterr().err.count("its SHA-256 differs") == 2
    monkeypatch.setattr(EmbeddingStore, "BLOCK", 2)
    for one, other in zip(expected, embed_all(model, split, tmp_path / "key"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert capsys.readouterr().err.count("found an array") == 2


@pytest.mark.parametrize(
    ("rows", "limit", "devices", "size"),
    [(0, 8, 1, 1), (1, 64, 1, 1), (1, 64, 8, 8), (64, 64, 1, 64), (65, 64, 1, 33), (65, 64, 8, 40), (700, 640, 1, 350)],
)
def test_batches_of_a_pass_are_equal_and_few(rows: int, limit: int, devices: int, size: int) -> None:
    assert even_batch(rows, limit=limit, devices=devices) == size <= limit
    assert -(-rows // size) == -(-rows // limit)
