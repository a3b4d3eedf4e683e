"""Draws a folder of photos with COCO's annotations, whose instances `FakeEncoder` finds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from reir_testing.fakes import BoxPx, draw_scene

SIZE_PX = (160, 120)
Shape = tuple[str, str, BoxPx]
"""Class, color and box of an instance."""

SCENES: Sequence[Sequence[Shape]] = (
    [("dog", "red", (10, 20, 50, 60)), ("dog", "blue", (100, 40, 150, 100))],
    [("car", "green", (10, 10, 60, 50)), ("bus", "yellow", (90, 30, 150, 110))],
    [("cat", "orange", (20, 60, 70, 110)), ("cup", "purple", (110, 10, 140, 40))],
    [("dog", "red", (60, 30, 110, 90))],
)


def draw_photos(
    folder: Path, scenes: Sequence[Sequence[Shape]] = SCENES, *, num: int | None = None
) -> Path:
    """Draw one photo for each scene: `000.png`, `001.png`, ..., with instances and captions.

    Args:
        folder: created.
        scenes: the instances of each photo.
        num: number of photos, in which the scenes repeat on backgrounds that differ; None for one
            of each.
    """
    images_dir = folder / "images"
    images_dir.mkdir(parents=True)
    names = sorted({category for scene in scenes for category, _, _ in scene})
    images, annotations, captions = [], [], []
    for at in range(len(scenes) if num is None else num):
        scene = scenes[at % len(scenes)]
        # Gray backgrounds, which the fake encoder ignores.
        gray = 100 + at // len(scenes) % 100
        pixels = draw_scene(SIZE_PX, [(color, box) for _, color, box in scene], (gray, gray, gray))
        name = f"{at:03d}.png"
        Image.fromarray(pixels).save(images_dir / name)
        images.append({"id": at, "file_name": name, "width": SIZE_PX[0], "height": SIZE_PX[1]})
        captions.append({"id": at, "image_id": at, "caption": f"A drawing with number {at}."})
        annotations += [
            {
                "id": 100 * at + number,
                "image_id": at,
                "category_id": 1 + names.index(category),
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "iscrowd": 0,
            }
            for number, (category, _, box) in enumerate(scene)
        ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}))
    return folder
