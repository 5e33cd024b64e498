"""Pictures of rankings: the queries that are drawn, the marks of true images, and refused input."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.format.reader import open_dataset
from rice_jax import show

GREEN, RED = (26, 152, 80), (215, 48, 39)


def lines(converted: Path) -> list[dict[str, object]]:
    """Returns a line of rankings.jsonl for each test clip; its gallery is ranked in file order."""
    split = open_dataset(converted).split("test")
    out = []
    for row in range(split.num_clips):
        top = [split.image_ids[image] for image in split.gallery_of(row)]
        rank = next((position for position, image in enumerate(top, 1) if image in split.truth(row)), None)
        out.append({"clip": split.clip_ids[row], "rank": rank, "top": [(image, 0.5) for image in top]})
    return out


def frames_of(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    """Returns the number of shop images in a frame of this colour; a frame has two sides, 110 pixels high, 3 wide."""
    pixels = np.asarray(sheet)
    alike = (pixels == np.array(colour)).all(axis=2)
    columns = alike.sum(axis=0)
    return round(columns[columns >= show.SIDE].sum() / (show.SIDE + 6) / 6)


def test_right_and_wrong_are_marked_as_the_truth_says(converted: Path) -> None:
    split, rankings = open_dataset(converted).split("test"), lines(converted)
    sheet = show.draw_rankings(split, rankings, queries=8, top=1)
    right = sum(line["rank"] == 1 for line in rankings)
    assert (frames_of(sheet, GREEN), frames_of(sheet, RED)) == (right, len(rankings) - right)


def test_queries_are_drawn_from_the_best_ranked_to_the_worst(converted: Path) -> None:
    split, (line, *_) = open_dataset(converted).split("test"), lines(converted)
    one = show.draw_rankings(split, [line], queries=1)
    several = [line | {"rank": 7}, line | {"rank": None}, line | {"rank": 1}]
    two = show.draw_rankings(split, several, queries=2)
    assert one.size == two.size  # two queries a row
    assert not np.array_equal(np.asarray(one), np.asarray(two))


def test_another_data_set_and_a_file_that_is_no_ranking_are_refused(converted: Path, tmp_path: Path) -> None:
    split = open_dataset(converted).split("test")
    with pytest.raises(ValueError, match="lacks a clip or shop image of rankings"):
        show.draw_rankings(split, [{"clip": "nobody", "rank": 1, "top": []}])
    with pytest.raises(ValueError, match="has no query"):
        show.draw_rankings(split, [])
    with pytest.raises(FileNotFoundError, match="evaluate --output"):
        show.read_rankings(tmp_path)
    (tmp_path / "rankings.jsonl").write_text(json.dumps(lines(converted)[0]) + "\n{}\n")
    with pytest.raises(ValueError, match="line 2: is no ranking"):
        show.read_rankings(tmp_path)


def test_the_command_writes_the_picture(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rankings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(converted)))
    output = tmp_path / "new" / "queries.png"
    arguments = ["--evaluation", str(tmp_path), "--data", str(converted), "--output", str(output)]
    show.show(show.parse(arguments))
    with Image.open(output) as sheet:
        assert sheet.width > 1000 and sheet.format == "PNG"
    assert str(output) in capsys.readouterr().out
