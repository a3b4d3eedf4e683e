"""The report of the gate as a page: one HTML file that needs no other file and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape

from PIL import Image

from reir.errors import ReirError
from reir.images.decode import decode
from reir.images.drawing import draw_boxes
from reir.images.photo_files import read_photo
from reir.operations.canary import MIN_IOU, NUM_HITS
from reir.operations.gate.verdicts import CanaryChange, GateCheck, GateReport
from reir.records import Box

MAX_PICTURED = 12
"""So many changed canaries of each kind are shown with their photos."""

_TILE_PX = 240
_WORDS = {"passed": "passed", "failed": "failed", "info": ""}

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1d2430; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #dde2ea;
         vertical-align: top; }
th.number, td.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.passed { color: #14703a; } .failed { color: #b3261e; font-weight: 600; }
.note { color: #5a6575; }
figure { display: inline-block; margin: 0 .8rem .4rem 0; }
figcaption { color: #5a6575; font-size: .85rem; }
code { font-size: .9em; background: #f2f4f8; padding: .1rem .3rem; }
img { display: block; border: 1px solid #dde2ea; }
"""


def report_page(report: GateReport) -> str:
    """Return the page of a report, with the photos of canaries that changed."""
    when = datetime.fromtimestamp(report.created_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"Re-indexing of {report.gallery}: {'passed' if report.passed else 'refused'}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f"<p>Candidate version <b>{escape(report.candidate)}</b> compared with the live "
            f"version <b>{escape(report.live)}</b> on {when}. {_summary(report)}</p>",
            *_table(report),
            *_changes("only the live version gets right", report.num_lost, report.lost),
            *_changes("only the candidate gets right", report.num_won, report.won),
            "</body></html>",
        ]
    )


def format_value(check: GateCheck, value: float | None) -> str:
    """Return a value of a check as text, with its unit."""
    if value is None:
        return ""
    if check.unit == "share":
        return f"{value:.1%}"
    if check.unit == "ms":
        return f"{value:.1f} ms"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3f}"


def _summary(report: GateReport) -> str:
    if report.passed:
        return "All limits are kept."
    names = ", ".join(check.name for check in report.failed_checks)
    return (
        f"These limits are not kept: {escape(names)}. The live version is unchanged, and the "
        # The list ends the paragraph around this text, so the text ends with the start of another.
        f"candidate is kept for inspection.</p>"
        f"<ul><li>To search it: <code>reir search EXPRESSION --gallery {escape(report.gallery)} "
        f"--version {escape(report.candidate)}</code></li>"
        f"<li>To make it live nevertheless: <code>reir promote {escape(report.gallery)} "
        f"{escape(report.candidate)}</code></li>"
        f"<li>To delete it: <code>reir reindex {escape(report.gallery)} --drop</code></li></ul><p>"
    )


def _table(report: GateReport) -> Iterator[str]:
    yield '<table><thead><tr><th>what</th><th class="number">live</th>'
    yield '<th class="number">candidate</th><th>limit</th><th>verdict</th><th>note</th></tr>'
    yield "</thead><tbody>"
    for check in report.checks:
        yield (
            f"<tr><td>{escape(check.name)}</td>"
            f'<td class="number">{format_value(check, check.live)}</td>'
            f'<td class="number">{format_value(check, check.candidate)}</td>'
            f"<td>{escape(check.limit)}</td>"
            f'<td class="{check.verdict}">{_WORDS[check.verdict]}</td>'
            f'<td class="note">{escape(check.note)}</td></tr>'
        )
    yield "</tbody></table>"
    yield (
        '<p class="note">A canary is an expression whose answer is known. BR@k is the share of the '
        "canaries whose object is among the first k hits, in the right photo and with a box that "
        f"overlaps the right one by {MIN_IOU:.0%} or more. An absent canary is recognized if the "
        "search says that its object is probably not in the gallery.</p>"
    )


def _changes(what: str, number: int, changes: tuple[CanaryChange, ...]) -> Iterator[str]:
    if not number:
        return
    yield f"<h2>Canaries that {what}: {number}</h2>"
    for change in changes[:MAX_PICTURED]:
        yield (
            f'<p><b>{escape(change.expression)}</b> <span class="note">right hit: live version '
            f"{_rank(change.live_rank)}, candidate {_rank(change.candidate_rank)}</span></p>"
        )
        yield _figure(change.uri, change.box, "the known answer")
        if change.wrong_uri:
            yield _figure(change.wrong_uri, change.wrong_box, "the wrong first hit")
    if rest := changes[MAX_PICTURED:]:
        items = "".join(f"<li>{escape(change.expression)}</li>" for change in rest)
        yield f"<p>More of them:</p><ul>{items}</ul>"


def _rank(rank: int) -> str:
    return f"rank {rank}" if rank else f"not among the first {NUM_HITS}"


def _figure(uri: str, box: Box | None, caption: str) -> str:
    name = escape(uri.rpartition("/")[2])
    try:
        picture = _picture(uri, box)
    # The photo may be gone or need access that is lacking; the page is written anyway.
    except ReirError as error:
        return f"<figure><figcaption>{caption}: {name} ({escape(str(error))})</figcaption></figure>"
    return (
        f'<figure><img alt="{caption}" src="data:image/jpeg;base64,{picture}">'
        f"<figcaption>{caption}: {name}</figcaption></figure>"
    )


def _picture(uri: str, box: Box | None) -> str:
    """Return the photo with the box, as base64 of a small JPEG."""
    photo = Image.fromarray(decode(read_photo(uri), at_least_px=_TILE_PX).pixels)
    photo.thumbnail((_TILE_PX, _TILE_PX))
    if box is not None:
        photo = draw_boxes(photo, [box], [""])
    data = io.BytesIO()
    photo.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode("ascii")
