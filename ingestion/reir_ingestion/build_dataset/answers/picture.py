"""What a vision-language model gets about a photo: numbered boxes, and a description as JSON.

Names of files are not among it. Captions, which are the user's data, are cut and stand in JSON, so
that they cannot be taken for instructions so easily.
"""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from reir.images.drawing import draw_boxes
from reir.text import without_controls
from reir_ingestion.build_dataset.tasks import Similar, WritingTask

PICTURE_PX = 1024
MAX_CAPTIONS, MAX_CAPTION_CHARS = 5, 200
MAX_LOOK_ALIKES = 3


def numbered_picture(task: WritingTask) -> bytes:
    """Return the photo as a JPEG with a numbered box for each instance.

    Raises:
        ImageError: the photo cannot be read.
    """
    photo = Image.fromarray(task.pixels())
    photo.thumbnail((PICTURE_PX, PICTURE_PX))
    instances = task.scene.instances
    labels = [str(number) for number in range(1, len(instances) + 1)]
    file = io.BytesIO()
    draw_boxes(photo, [each.box for each in instances], labels).save(file, "JPEG", quality=90)
    return file.getvalue()


def described(task: WritingTask) -> dict[str, Any]:
    """Return what is known about a photo as plain JSON values."""
    return {
        "captions": [_short(each) for each in task.scene.photo.captions[:MAX_CAPTIONS]],
        "objects": [_object(task, n) for n in range(1, len(task.scene.instances) + 1)],
        "describe": list(task.numbers),
    }


def as_json(value: Any) -> str:
    """Return plain values as JSON in one line."""
    return json.dumps(value, ensure_ascii=False)


def _object(task: WritingTask, number: int) -> dict[str, Any]:
    instance = task.instance(number)
    similar = task.look_alikes.get(number, ())[:MAX_LOOK_ALIKES]
    return {
        "number": number,
        "class": _short(instance.category),
        "color": instance.color,
        "box": [round(side, 3) for side in instance.box],
        "neighbors": task.neighbors(number),
        "look_alikes_in_other_photos": [_look_alike(each) for each in similar],
    }


def _look_alike(similar: Similar) -> dict[str, Any]:
    captions = similar.scene.photo.captions
    around = {each.category for i, each in enumerate(similar.scene.instances) if i != similar.index}
    return {
        "class": _short(similar.instance.category),
        "color": similar.instance.color,
        "photo": _short(captions[0]) if captions else ", ".join(sorted(filter(None, around))[:6]),
    }


def _short(text: str) -> str:
    return " ".join(without_controls(text).split())[:MAX_CAPTION_CHARS]
