"""Small sets of drawn photos with expressions, some of which `FakeEncoder` answers wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reir.datasets import Expression, ReferringDataset, ReferringImage, ReferringInstance
from reir_testing.fakes import PALETTE, BoxPx, draw_scene

SIZE_PX = (160, 120)
Scene = Sequence[tuple[str, BoxPx, str]]
"""The shapes of one photo: color, box, and an expression about the shape ("" for none)."""


def draw_photo_set(folder: Path, scenes: Sequence[Scene]) -> ReferringDataset:
    """Draw one photo for each scene: `0.png`, `1.png`, ...; each shape is an annotated instance."""
    images, instances, expressions = [], [], []
    for at, scene in enumerate(scenes):
        name = f"{at}.png"
        Image.fromarray(draw_scene(SIZE_PX, [(c, b) for c, b, _ in scene])).save(folder / name)
        images.append(
            ReferringImage(image_id=name, file_name=name, width_px=SIZE_PX[0], height_px=SIZE_PX[1])
        )
        for number, (_, box, text) in enumerate(scene):
            key = f"{at}/{number}"
            instances.append(ReferringInstance(instance_id=key, image_id=name, box_xyxy_px=box))
            if text:
                expressions.append(
                    Expression(expression_id=key, image_id=name, instance_id=key, text=text)
                )
    return ReferringDataset(
        source="drawn",
        images=tuple(images),
        instances=tuple(instances),
        expressions=tuple(expressions),
    )


def three_photos(folder: Path) -> ReferringDataset:
    """Draw three photos with four expressions; the fake encoder answers three of them correctly."""
    return draw_photo_set(
        folder,
        [
            [
                ("red", (10, 40, 50, 80), "the red one on the left"),
                ("blue", (110, 40, 150, 80), "blue"),
            ],
            # The encoder takes colors literally, so "orange" does not find the yellow shape.
            [("green", (60, 20, 90, 100), "green"), ("yellow", (100, 20, 120, 40), "orange")],
            [],
        ],
    )


def random_scenes(seed: int, num_photos: int) -> list[list[tuple[str, BoxPx, str]]]:
    """Return random scenes with up to three shapes, in columns.

    Many expressions name only a color, so equal scores are common.
    """
    rng = np.random.default_rng(seed)
    words = list(PALETTE)[:3]
    scenes = []
    for _ in range(num_photos):
        scene = []
        # In columns, because the fake encoder would join shapes of one color that overlap in x.
        for column in range(int(rng.integers(0, 4))):
            x, y = 55 * column + int(rng.integers(0, 10)), int(rng.integers(0, 60))
            box = (x, y, x + int(rng.integers(10, 40)), y + int(rng.integers(10, 50)))
            side = rng.choice(["", " on the left", " on the right"])
            scene.append((str(rng.choice(words)), box, str(rng.choice(words)) + side))
        scenes.append(scene)
    return scenes
