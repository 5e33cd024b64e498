"""Draws rankings of an evaluation: python -m rice_jax.show --evaluation DIR --data DIR --output FILE.png

The picture shows clips and the shop images ranked first, true ones in a green frame and others in a red one.
--evaluation is the folder that rice_jax.evaluate wrote, --data the converted set that it evaluated.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.format.reader import Split, open_dataset
from data_pipeline.input.decode import decode
from data_pipeline.system.paths import parse_path
from rice_jax.errors import run

SIDE, GAP, TEXT = 104, 10, 18  # px: a picture, between pictures, a line of text
FRAMES = 3  # drawn of each clip
INK, PAPER, RIGHT, WRONG = "#30343b", "#ffffff", "#1a9850", "#d73027"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def draw_rankings(split: Split, rankings: list[dict[str, Any]], *, queries: int = 8, top: int = 3) -> Image.Image:
    """Returns an RGB picture of some queries, two a row: frames, shop images ranked first, and a missed true image.

    Draws at most `queries`, evenly spaced from best to worst ranked, with `top` shop images each. A clip or shop image
    that cannot be read is drawn as a grey square that says so. rankings: lines of rankings.jsonl. Raises ValueError if
    there are none, or the split lacks one that is drawn.
    """
    if not rankings:
        raise ValueError(
            "rankings.jsonl has no query: no clip of that evaluation has pictures; give the folder of another one."
        )
    by_rank = sorted(rankings, key=lambda line: np.inf if line["rank"] is None else line["rank"])
    chosen = [by_rank[i] for i in np.unique(np.linspace(0, len(by_rank) - 1, queries).astype(int))]
    clips = {name: row for row, name in enumerate(split.clip_ids)}
    images = {name: row for row, name in enumerate(split.image_ids)}
    if not all(line["clip"] in clips and all(image in images for image, _ in line["top"]) for line in chosen):
        raise ValueError(
            f"split {split.name} of {split.path} lacks a clip or shop image of rankings.jsonl; give the --data and "
            "--split that were evaluated."
        )
    width, height = (FRAMES + top + 1) * (SIDE + GAP) + 4 * GAP, SIDE + TEXT + 2 * GAP
    sheet = Image.new("RGB", (2 * width, TEXT + 2 * GAP + height * -(-len(chosen) // 2)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for side in range(2):
        for column, title in ((0, "clip"), (FRAMES, "ranked first"), (FRAMES + top, "the right one")):
            x = side * width + 2 * GAP + column * (SIDE + GAP) + (2 * GAP if column >= FRAMES else 0)
            pen.text((x, GAP), title, INK, ImageFont.load_default(13))
    for i, line in enumerate(chosen):
        x, y = i % 2 * width + 2 * GAP, TEXT + 2 * GAP + i // 2 * height
        _draw_query(sheet, x, y, split, clips[line["clip"]], line, images, top)
    return sheet


def _draw_query(
    sheet: Image.Image, x: int, y: int, split: Split, row: int, line: dict[str, Any], images: dict[str, int], top: int
) -> None:
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    frames, truth = _pictures(split, "clip", row), set(split.truth(row))
    pen.text((x, y + SIDE + 2), line["clip"][:46], INK, ImageFont.load_default(11))
    for k in np.linspace(0, len(frames) - 1, FRAMES).astype(int):
        sheet.paste(_thumbnail(frames[k]), (x, y))
        x += SIDE + GAP
    x += 2 * GAP
    for image, score in line["top"][:top]:
        colour, mark = (RIGHT, "right") if image in truth else (WRONG, "wrong")
        sheet.paste(_thumbnail(*_pictures(split, "image", images[image])), (x, y))
        pen.rectangle((x - 3, y - 3, x + SIDE + 2, y + SIDE + 2), outline=colour, width=3)
        pen.text((x, y + SIDE + 4), f"{mark}  {score:.2f}", colour, font)
        x += SIDE + GAP
    if not truth & {image for image, _ in line["top"][:top]}:
        missed = next((image for image in sorted(truth) if image in images), None)
        if missed is not None:
            sheet.paste(_thumbnail(*_pictures(split, "image", images[missed])), (x, y))
        rank = "not in the gallery" if line["rank"] is None else f"ranked {line['rank']}"
        pen.text((x, y + SIDE + 4), rank, INK, font)


def _pictures(split: Split, kind: str, row: int) -> list[bytes]:
    """Returns the encoded pictures of a clip, or the one of a shop image; [b""] if the record cannot be read."""
    try:
        pictures = split.clip(row).frames if kind == "clip" else [split.image(row)]
    except ValueError:
        return [b""]
    return [picture.encoded for picture in pictures] or [b""]


def _thumbnail(encoded: bytes) -> Image.Image:
    square = Image.new("RGB", (SIDE, SIDE), "#eceef1")
    try:
        picture = Image.fromarray(decode(encoded))
    except ValueError:
        ImageDraw.Draw(square).text((GAP, SIDE // 2), "cannot be read", INK, ImageFont.load_default(11))
        return square
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return square


def read_rankings(evaluation: Path) -> list[dict[str, Any]]:
    """Returns the lines of rankings.jsonl: clip, rank, top. Raises FileNotFoundError if there is no such file.

    Raises ValueError for a bad line, or a file whose SHA-256 differs from that in metrics.json, if that has one.
    """
    path, lines = evaluation / "rankings.jsonl", []
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run rice_jax.evaluate --output {evaluation} first.")
    data, metrics = path.read_bytes(), evaluation / "metrics.json"
    for number, text in enumerate(data.split(b"\n"), 1):
        try:
            if text:
                line = json.loads(text)
                lines.append({name: line[name] for name in ("clip", "rank", "top")})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number}: is no ranking ({error!r}); run the same rice_jax.evaluate again."
            ) from error
    try:
        expected = json.loads(metrics.read_bytes()).get("rankings") if metrics.exists() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{metrics}: is damaged ({error}); run the same rice_jax.evaluate again.") from error
    if expected not in (None, hashlib.sha256(data).hexdigest()):
        raise ValueError(
            f"{path}: is not the file that metrics.json beside it belongs to; run the same rice_jax.evaluate again."
        )
    return lines


def show(arguments: argparse.Namespace) -> None:
    rankings = read_rankings(arguments.evaluation)
    split = open_dataset(arguments.data).split(arguments.split)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw_rankings(split, rankings, queries=arguments.queries, top=arguments.top).save(arguments.output)
    print(f"written to {arguments.output}")


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.show") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", type=parse_path, required=True, help="folder that rice_jax.evaluate wrote")
    parser.add_argument("--data", type=parse_path, required=True, help="the converted set that was evaluated")
    parser.add_argument("--split", default="test", help="the split that was evaluated (default: test)")
    parser.add_argument("--output", type=parse_path, required=True, help=f"the picture: {', '.join(SUFFIXES)}")
    queries = "queries, from the best ranked to the worst (default: 8)"
    parser.add_argument("--queries", type=int, default=8, help=queries)
    parser.add_argument("--top", type=int, default=3, help="shop images a query (default: 3)")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix.lower() not in SUFFIXES:
        parser.exit(2, f"error: --output: found {arguments.output}, needs a name that ends in {', '.join(SUFFIXES)}.\n")
    if arguments.queries < 1 or arguments.top < 1:
        parser.exit(2, "error: --queries and --top need at least 1.\n")
    return arguments


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.show") -> None:
    run(show, parse(argv, prog))


if __name__ == "__main__":
    command()
