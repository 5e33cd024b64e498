"""The report as one HTML file: numbers, bars, faults, and sheets of pictures. No script, nothing loaded from elsewhere.

Every text of the data is escaped; pictures are drawn anew at the size of a thumb, so that none of their bytes is shown.
"""

import base64
import contextlib
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.faults import Fault
from data_pipeline.input.decode import decode
from data_pipeline.inspection.summary import Inspectable, SplitSummary
from data_pipeline.layouts.listing import NONE

SIDE, GAP = 72, 2  # px: a thumb, and what lies between two
SHEET_CLIPS, SHEET_FRAMES = 24, 6  # of each split
SHOWN_FAULTS = 200  # of a kind
SHOWN_PICTURES = 24  # at fault, of a kind
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#24292f}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.15rem .8rem .15rem 0;text-align:left;
vertical-align:top;overflow-wrap:anywhere}td.n{text-align:right;white-space:nowrap}.error{color:#b42318}
.warning{color:#8a6100}.safe{color:#1a7f37}.bar{background:#5b8def;height:.8rem;display:inline-block}
img{max-width:100%;image-rendering:auto}details{margin:.3rem 0}code{font-size:90%}"""


def make_page(title: str, report: dict[str, Any], patient: Inspectable) -> str:
    verdict = (
        '<p class="safe">Nothing that makes training unsafe was found.</p>'
        if report["safe"]
        else '<p class="error">Training on this is not safe: mend what is marked as an error.</p>'
    )
    body = [
        f"<h1>{_text(title)}</h1>{verdict}",
        *(f"<p>{_text(remark)}</p>" for remark in report["remarks"]),
        "<h2>What was found</h2>" + _counts(report),
        *_faults(report, patient),
    ]
    for split, numbers in report["distributions"].items():
        body += [f"<h2>{_text(split)}</h2>", *_numbers(numbers)]
    for chart in patient.charts:
        body.append(f"<h3>{_text(chart.split)}: some clips, each behind its shop image</h3>{_sheet(patient, chart)}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"><title>{_text(title)}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _text(value: object) -> str:
    printable = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(value))
    return html.escape(printable, quote=True)


def _counts(report: dict[str, Any]) -> str:
    if not report["counts"]:
        return "<p>Nothing.</p>"
    rows = (
        f'<tr><td class="{each["severity"]}">{each["severity"]}</td><td>{_text(kind)}</td>'
        f'<td class="n">{each["count"]:,}</td></tr>'
        for kind, each in report["counts"].items()
    )
    return f"<table>{''.join(rows)}</table>"


def _faults(report: dict[str, Any], patient: Inspectable) -> Iterator[str]:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for fault in report["faults"]:
        by_kind.setdefault(fault["kind"], []).append(fault)
    for kind, faults in by_kind.items():
        rows = "".join(
            f"<tr><td><code>{_text(fault['file'])}</code>{_line(fault['line'])}</td><td>{_text(fault['subject'] or '')}"
            f"</td><td>{_text(fault['detail'])}</td></tr>"
            for fault in faults[:SHOWN_FAULTS]
        )
        more = report["counts"][kind]["count"] - SHOWN_FAULTS
        rest = f"<p>... and {more:,} more, in report.json</p>" if more > 0 else ""
        shown = f"<table>{rows}</table>{rest}{_thumbs(patient, faults)}"
        yield f"<details open><summary>{_text(kind)}</summary>{shown}</details>"


def _line(line: int | None) -> str:
    return f" line {line}" if line else ""


def _numbers(numbers: dict[str, Any]) -> Iterator[str]:
    plain = ("clips", "frames", "sound_frames", "shop_images", "sound_shop_images")
    yield (
        "<table>"
        + "".join(f'<tr><td>{name.replace("_", " ")}</td><td class="n">{numbers[name]:,}</td></tr>' for name in plain)
        + "</table>"
    )
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
    return (
        "<table>"
        + "".join(
            f'<tr><td>{_text(name)}</td><td class="n">{count:,}</td><td><span class="bar" '
            f'style="width:{20 * count / longest:.2f}rem"></span></td></tr>'
            for name, count in pairs
        )
        + "</table>"
    )


def _thumbs(patient: Inspectable, faults: Sequence[dict[str, Any]]) -> str:
    """The pictures that faults are about, in their order, as far as they can be shown at all."""
    shown = []
    for fault in faults[:SHOWN_PICTURES]:
        data = patient.picture(Fault(fault["kind"], fault["file"], ""))
        if data is not None:
            with contextlib.suppress(ValueError):
                shown.append(f'<img alt="" title="{_text(fault["file"])}" src="{_source(_thumb(data))}">')
    return "".join(shown)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _sheet(patient: Inspectable, chart: SplitSummary) -> str:
    """Clips evenly spaced over the split, two a row: the shop image, then frames from the first to the last."""
    if not len(chart.counts):
        return "<p>None.</p>"
    clips = np.unique(np.linspace(0, len(chart.counts) - 1, SHEET_CLIPS).astype(int)).tolist()
    width = SHEET_FRAMES + 1
    sheet = Image.new("RGB", (2 * width * (SIDE + GAP) + 8 * GAP, -(-len(clips) // 2) * (SIDE + GAP)), "white")
    for place, clip in enumerate(clips):
        x, y = (place % 2) * (width * (SIDE + GAP) + 8 * GAP), place // 2 * (SIDE + GAP)
        for slot, data in enumerate(_pictures(patient, chart, clip)):
            if data is not None:
                sheet.paste(_thumb(data), (x + slot * (SIDE + GAP) + (GAP if slot else 0), y))
    return f'<img alt="{_text(chart.split)}" src="{_source(sheet)}">'


def _pictures(patient: Inspectable, chart: SplitSummary, clip: int) -> Iterator[bytes | None]:
    image, count = int(chart.images_of[clip]), int(chart.counts[clip])
    yield patient.image(chart, image) if image != NONE and chart.image_looks["key"][image] else None
    begin = int(chart.ends[clip]) - count
    for frame in np.unique(np.linspace(0, count - 1, SHEET_FRAMES).astype(int)).tolist() if count else ():
        yield patient.frame(chart, clip, frame) if chart.looks["key"][begin + frame] else None


def _thumb(data: bytes) -> Image.Image:
    picture = Image.fromarray(decode(data))
    picture.thumbnail((SIDE, SIDE))
    return picture


def _source(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
