"""The statistics page: one HTML file with tables and samples drawn on photos, without scripts.

All text that comes from photos, annotations and models is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from PIL import Image

from reir.errors import ImageError
from reir.images.drawing import draw_boxes
from reir_ingestion.build_dataset.outcomes import JudgedExpression, Outcome
from reir_ingestion.build_dataset.statistics import Statistics

NUM_SAMPLES = 40
_SAMPLE_PX = 320
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #16181d; background: #fff }
h2 { margin-top: 2.5rem } table { border-collapse: collapse }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: middle }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #00a6fb; height: .8rem; min-width: 1px }
.columns { display: flex; flex-wrap: wrap; gap: 3rem }
.samples { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 20rem } figcaption { font-size: 14px } img { max-width: 100% }
"""
# The page runs no scripts and loads nothing, whatever a text in it contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def statistics_page(counts: Statistics, outcomes: Sequence[Outcome]) -> str:
    """Return the page as HTML."""
    photos = ", ".join(f"{number:,} {status}" for status, number in counts.photos.items())
    summary = (
        f"{counts.expressions:,} expressions about {counts.described:,} of {counts.instances:,} "
        f"instances. Photos: {photos}. The split val has {counts.val_photos:,} photos with "
        f"expressions."
    )
    tables = [
        ("Words per expression", "words", counts.lengths),
        ("Size of the box, as a share of the photo", "share", counts.sizes),
        ("Most frequent words", "word", counts.words),
        ("Most frequent classes", "class", counts.classes),
    ]
    refusals = [
        ("Photos without expressions", "reason", counts.photo_reasons),
        ("Instances that the writer refused", "reason", counts.writer_refusals),
        ("Expressions that were not kept", "reason", counts.not_kept),
    ]
    kept, refused = ("".join(_table(*each) for each in group) for group in (tables, refusals))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">'
        f"<title>Built dataset</title><style>{_STYLE}</style></head><body>"
        f"<h1>Built dataset</h1><p>{escape(summary)}</p>"
        f"<h2>Samples</h2><div class=samples>{''.join(_figures(outcomes))}</div>"
        f"<h2>What was kept</h2><div class=columns>{kept}</div>"
        f"<h2>What was not kept</h2><div class=columns>{refused}</div></body></html>\n"
    )


def _table(title: str, what: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return f"<div><h3>{escape(title)}</h3><p>none</p></div>"
    most = max(1, *counts.values())
    rows = "".join(
        f"<tr><td>{_shown(name)}</td><td class=n>{number:,}</td>"
        f'<td><div class=bar style="width:{120 * number / most:.0f}px"></div></td></tr>'
        for name, number in counts.items()
    )
    head = f"<tr><th>{escape(what)}</th><th>number</th><th></th></tr>"
    return f"<div><h3>{escape(title)}</h3><table>{head}{rows}</table></div>"


def _figures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for outcome, expression in samples(outcomes):
        try:
            picture = base64.b64encode(sample_picture(outcome, expression)).decode()
        except ImageError:  # the photo was deleted in the meantime
            continue
        yield (
            f'<figure><img alt="" src="data:image/jpeg;base64,{picture}">'
            f"<figcaption>{_shown(expression.text)}</figcaption></figure>"
        )


def samples(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, JudgedExpression]]:
    """Return up to `NUM_SAMPLES` kept expressions of different photos, the same ones every time."""
    written = [each for each in outcomes if each.kept]
    # By a hash, so that the samples come from the whole set and not only from its first photos.
    written.sort(key=lambda each: hashlib.sha256(each.task.scene.content_hash.encode()).digest())
    return [
        # Not always the first expression: the template writer puts captions there.
        (each, each.kept[number % len(each.kept)])
        for number, each in enumerate(written[:NUM_SAMPLES])
    ]


def sample_picture(outcome: Outcome, expression: JudgedExpression) -> bytes:
    """Return a small JPEG of a photo with the box of an expression.

    Raises:
        ImageError: the photo cannot be read.
    """
    photo = Image.fromarray(outcome.task.pixels())
    photo.thumbnail((_SAMPLE_PX, _SAMPLE_PX))
    drawn = draw_boxes(photo, [outcome.task.instance(expression.number).box], [""])
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=80)
    return file.getvalue()


def _shown(text: str) -> str:
    """Return text as HTML; what UTF-8 cannot express, such as parts of file names, is replaced."""
    return escape(text.encode("utf-8", "replace").decode("utf-8"))
