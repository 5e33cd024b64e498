"""The report as one HTML file: numbers, bars, faults and sheets of pictures. It has no script and loads nothing.

Every text of the data is escaped. Pictures are encoded anew as thumbnails, so that none of their bytes is copied.
"""

import base64
import contextlib
import html
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.input.decode import decode
from data_pipeline.inspection.summary import InspectedData, SplitSummary
from data_pipeline.layouts.listing import NONE

SIDE, GAP = 72, 2  # pixels: a thumbnail, and the space between two
SHEET_CLIPS, SHEET_FRAMES = 24, 6  # of each split
SHOWN_FAULTS = 200  # of a kind
SHOWN_PICTURES = 24  # of the faults of a kind
SHOWN_BARS = 60
MAX_TEXT = 1_000  # characters: a cell of a list may have millions
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#24292f}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.15rem .8rem .15rem 0;text-align:left;
vertical-align:top;overflow-wrap:anywhere}td.n{text-align:right;white-space:nowrap}.error{color:#b42318}
.warning{color:#8a6100}.safe{color:#1a7f37}.bar{background:#5b8def;height:.8rem;display:inline-block}
img{max-width:100%;image-rendering:auto}details{margin:.3rem 0}code{font-size:90%}"""


def make_page(title: str, report: dict[str, Any], data: InspectedData) -> str:
    """Returns the HTML of report.json with pictures of the data. Raises ValueError if a sound one is unreadable now."""
    verdict = (
        '<p class="safe">Nothing that makes training unsafe was found.</p>'
        if report["safe"]
        else '<p class="error">Training on this data is not safe: repair what is marked as an error.</p>'
    )
    body = [
        f"<h1>{_text(title)}</h1>{verdict}",
        *(f"<p>{_text(remark)}</p>" for remark in report["remarks"][:SHOWN_FAULTS]),
        "<h2>What was found</h2>" + _counts(report),
        *_faults(report, data),
    ]
    for split, numbers in report["distributions"].items():
        body += [f"<h2>{_text(split)}</h2>", *_numbers(numbers)]
    for summary in data.summaries:
        body.append(f"<h3>{_text(summary.split)}: some clips, each after its shop image</h3>{_sheet(data, summary)}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"><title>{_text(title)}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _text(value: object) -> str:
    text = str(value)
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ... ({len(text):,} characters)"
    printable = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    return html.escape(printable, quote=True)


def _counts(report: dict[str, Any]) -> str:
    if not report["counts"]:
        return "<p>Nothing.</p>"
    return _table(
        f'<tr><td class="{each["severity"]}">{each["severity"]}</td><td>{_text(kind)}</td>'
        f'<td class="n">{each["count"]:,}</td><td>{_cases(each)}</td></tr>'
        for kind, each in report["counts"].items()
    )


def _cases(counted: dict[str, Any]) -> str:
    return f"(in {counted['cases']:,} places)" if counted["cases"] > counted["count"] else ""


def _table(rows: Iterable[str]) -> str:
    return f"<table>{''.join(rows)}</table>"


def _faults(report: dict[str, Any], data: InspectedData) -> Iterator[str]:
    for kind, group in itertools.groupby(report["faults"], key=lambda fault: fault["kind"]):
        faults = list(group)
        table = _table(
            f"<tr><td><code>{_text(fault['file'])}</code>{' line ' + str(fault['line']) if fault['line'] else ''}</td>"
            f"<td>{_text(fault['subject'] or '')}</td><td>{_text(fault['detail'])}</td></tr>"
            for fault in faults[:SHOWN_FAULTS]
        )
        more = report["counts"][kind]["count"] - SHOWN_FAULTS
        rest = f"<p>... and {more:,} more, in report.json</p>" if more > 0 else ""
        yield f"<details open><summary>{_text(kind)}</summary>{table}{rest}{_thumbs(data, faults)}</details>"


def _numbers(numbers: dict[str, Any]) -> Iterator[str]:
    plain = ("clips", "frames", "sound_frames", "shop_images", "sound_shop_images")
    yield _table(f'<tr><td>{name.replace("_", " ")}</td><td class="n">{numbers[name]:,}</td></tr>' for name in plain)
    for name in ("frames_a_clip", "frame_sizes", "shop_image_sizes"):
        yield f"<details><summary>{name.replace('_', ' ')}</summary>{_bars(numbers[name].items())}</details>"
    for name, spread in numbers["clips_by"].items():
        tail = (
            f"{spread['values']:,} values, {spread['once']:,} of them once, median {spread['median']:g}; the most "
            f"frequent tenth has {spread['share_of_the_first_tenth']:.0%} of the clips"
        )
        ranked = _bars((f"{count:,}", count) for count in spread["ranked"])
        yield (
            f"<details><summary>clips by {_text(name)}: {tail}</summary>{_bars(spread['first'].items())}"
            f"<p>from the most frequent to the rarest:</p>{ranked}</details>"
        )


def _bars(items: Iterable[tuple[str, int]]) -> str:
    pairs = list(items)
    longest = max((count for _, count in pairs), default=1)
    table = _table(
        f'<tr><td>{_text(name)}</td><td class="n">{count:,}</td><td><span class="bar" '
        f'style="width:{20 * count / longest:.2f}rem"></span></td></tr>'
        for name, count in pairs[:SHOWN_BARS]
    )
    return table + (f"<p>... and {more:,} more, in report.json</p>" if (more := len(pairs) - SHOWN_BARS) > 0 else "")


def _thumbs(data: InspectedData, faults: Sequence[dict[str, Any]]) -> str:
    shown = []
    for fault in faults[:SHOWN_PICTURES]:
        if (encoded := data.faulty_picture(fault["file"])) is not None:
            with contextlib.suppress(ValueError):
                shown.append(f'<img alt="" title="{_text(fault["file"])}" src="{_source(_thumb(encoded))}">')
    return "".join(shown)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _sheet(data: InspectedData, summary: SplitSummary) -> str:
    """Returns an <img> of some clips' shop images and frames; a <p> for no clip. Raises ValueError if unreadable."""
    if not len(summary.frame_counts):
        return "<p>None.</p>"
    clips = np.unique(np.linspace(0, len(summary.frame_counts) - 1, SHEET_CLIPS).astype(int)).tolist()
    width = SHEET_FRAMES + 1
    sheet = Image.new("RGB", (2 * width * (SIDE + GAP) + 8 * GAP, -(-len(clips) // 2) * (SIDE + GAP)), "white")
    for place, clip in enumerate(clips):
        x, y = (place % 2) * (width * (SIDE + GAP) + 8 * GAP), place // 2 * (SIDE + GAP)
        for slot, encoded in enumerate(_pictures(data, summary, clip)):
            if encoded is not None:
                sheet.paste(_thumb(encoded), (x + slot * (SIDE + GAP) + (GAP if slot else 0), y))
    return f'<img alt="{_text(summary.split)}" src="{_source(sheet)}">'


def _pictures(data: InspectedData, summary: SplitSummary, clip: int) -> Iterator[bytes | None]:
    """Yields a clip's encoded shop image, then some frames; None: not sound. Raises ValueError if one is unreadable."""
    image, count = int(summary.clip_images[clip]), int(summary.frame_counts[clip])
    yield data.image(summary, image) if image != NONE and summary.image_fingerprints["key"][image] else None
    begin = int(summary.ends[clip]) - count
    for frame in np.unique(np.linspace(0, count - 1, SHEET_FRAMES).astype(int)).tolist() if count else ():
        yield data.frame(summary, clip, frame) if summary.frame_fingerprints["key"][begin + frame] else None


def _thumb(encoded: bytes) -> Image.Image:
    picture = Image.fromarray(decode(encoded))
    picture.thumbnail((SIDE, SIDE))
    return picture


def _source(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
