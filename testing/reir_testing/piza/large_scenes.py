"""Large scenes: drawn photos with many small shapes, annotated as SOREC is.

A scene has some large shapes, each of which looks like no other, and groups of small shapes around
them. Small shapes of different groups look alike, so an expression identifies one of them only by
the large shape next to it, for example "the red star next to the blue ring". A small shape covers
.07 to .1 % of the photo, which is within the range of SOREC's targets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from reir_testing.fakes import PALETTE
from reir_testing.scene_expressions import (
    SceneExpression,
    SceneShape,
    is_next_to_one,
)
from reir_testing.scenes import FORMS, Scene, render

PHOTOS = "photos"
"""Folder of the photos, beside the annotations."""
SIDE_PX = 2048
SMALL_AREA = (0.0007, 0.001)
"""Range of the area of a small shape, as a share of the photo."""
LARGE_SIDE = (0.15, 0.2)
"""Range of the side of a large shape, as a share of the photo's side."""
CELLS = 3
"""The large shapes are in cells of a grid with so many rows and columns."""
GROUPS = (3, 4)
LOOKS = 3
"""Number of different small shapes in a scene; each group has at most one of each."""
PER_GROUP = (2, 3)
JPEG_QUALITY = 92
_GAP = (0.012, 0.025)
_GROUNDS = ((236, 234, 228), (200, 204, 206), (150, 148, 142), (96, 98, 104), (34, 34, 38))
_COLOR_SHIFT = 10


@dataclass(frozen=True)
class LargeScene:
    """A scene and the expressions of its small shapes.

    Attributes:
        scene: large shapes, each followed by the small shapes around it.
        said: at most one expression for each small shape, true of no other shape.
    """

    scene: Scene
    said: tuple[SceneExpression, ...]

    @property
    def file_name(self) -> str:
        """The file name under which `save_large_scenes` writes the photo."""
        return f"{self.scene.image_id}.jpg"


def make_large_scenes(count: int, seed: int, side_px: int = SIDE_PX) -> tuple[LargeScene, ...]:
    """Generate scenes. The first n scenes of a seed are the same for any `count`.

    Args:
        count: number of scenes.
        seed: random seed, not negative.
        side_px: width and height of each scene.
    """
    return tuple(_make(seed, number, side_px) for number in range(count))


def save_large_scenes(folder: Path, splits: Mapping[str, Iterable[LargeScene]]) -> None:
    """Write `<split>.json` for each split, in SOREC's format, and all photos.

    Raises:
        ValueError: a split has no expression.
    """
    (folder / PHOTOS).mkdir(parents=True, exist_ok=True)
    for split, scenes in splits.items():
        entries = []
        for large in scenes:
            photo = Image.fromarray(render(large.scene))
            photo.save(folder / PHOTOS / large.file_name, quality=JPEG_QUALITY, subsampling=0)
            entries += _entries(large)
        if not entries:
            raise ValueError(f"split {split!r} has no expression; use more scenes")
        numbered = [{**entry, "id": number} for number, entry in enumerate(entries, start=1)]
        (folder / f"{split}.json").write_text(json.dumps(numbered))


def _entries(large: LargeScene) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for each in large.said:
        x1, y1, x2, y2 = large.scene.box_px(large.scene.shapes[each.index])
        box = [x1, y1, x2 - x1, y2 - y1]
        entries.append({"image": large.file_name, "bbox": box, "ref": each.text})
    return entries


def _make(seed: int, number: int, side_px: int) -> LargeScene:
    rng = np.random.default_rng([seed, number])
    num_groups = int(rng.integers(GROUPS[0], GROUPS[1] + 1))
    # Half of the forms and colors are for the large shapes, and half for the small ones. So what is
    # visible in the whole photo is not mistaken for a small shape.
    forms, colors = rng.permutation(FORMS).tolist(), rng.permutation([*PALETTE]).tolist()
    large_looks = _looks(rng, forms[: len(forms) // 2], colors[: len(colors) // 2], num_groups)
    looks = _looks(rng, forms[len(forms) // 2 :], colors[len(colors) // 2 :], LOOKS)
    shapes: list[SceneShape] = []
    large_of: dict[int, SceneShape] = {}
    for cell, look in zip(rng.permutation(CELLS**2), large_looks, strict=False):
        large = _large(rng, int(cell), look, side_px)
        shapes.append(large)
        num_small = int(rng.integers(PER_GROUP[0], PER_GROUP[1] + 1))
        sides = rng.permutation(4)
        for which, side in zip(rng.permutation(LOOKS)[:num_small], sides, strict=False):
            large_of[len(shapes)] = large
            shapes.append(_small(rng, large, int(side), looks[which], side_px))
    scene = Scene(
        image_id=f"large-{seed}-{number:06d}",
        side_px=side_px,
        shapes=tuple(shapes),
        ground=_GROUNDS[int(rng.integers(len(_GROUNDS)))],
        texture="slope",
        texture_seed=int(rng.integers(2**31)),
    )
    return LargeScene(scene, tuple(_say(shapes, large_of)))


def _looks(
    rng: np.random.Generator, forms: Sequence[str], colors: Sequence[str], count: int
) -> list[tuple[str, str]]:
    """Return different pairs of form and color."""
    every = [(form, color) for form in forms for color in colors]
    return [every[i] for i in rng.permutation(len(every))[:count]]


def _large(rng: np.random.Generator, cell: int, look: tuple[str, str], side_px: int) -> SceneShape:
    """Return a large shape near the middle of a cell, with room for a group around it."""
    side = float(rng.uniform(*LARGE_SIDE))
    row, column = divmod(cell, CELLS)
    room = 1 / CELLS - side - 2 * (_GAP[1] + SMALL_AREA[1] ** 0.5)
    center = [(place + 0.5) / CELLS + rng.uniform(-0.5, 0.5) * room for place in (column, row)]
    return _shape(rng, look, "large", center, side, side_px)


def _small(
    rng: np.random.Generator, large: SceneShape, side: int, look: tuple[str, str], side_px: int
) -> SceneShape:
    """Return a small shape left of, right of, above or below a large one (side 0 to 3)."""
    own = float(rng.uniform(*SMALL_AREA) ** 0.5)
    away = large.side / 2 + own / 2 + float(rng.uniform(*_GAP))
    along = float(rng.uniform(-0.25, 0.25)) * large.side
    axis, sign = divmod(side, 2)
    center = list(large.center)
    center[axis] += away if sign else -away
    center[1 - axis] += along
    return _shape(rng, look, "small", center, own, side_px)


def _shape(  # noqa: PLR0913 - a shape has that many independent properties
    rng: np.random.Generator,
    look: tuple[str, str],
    size: str,
    center: Sequence[float],
    side: float,
    side_px: int,
) -> SceneShape:
    """Return a shape whose box is a square of whole pixels."""
    form, color = look
    own_px = round(side * side_px)
    x, y = (round(each * side_px - own_px / 2) for each in center)
    shift = rng.integers(-_COLOR_SHIFT, _COLOR_SHIFT + 1, size=3)
    red, green, blue = np.clip(np.array(PALETTE[color]) + shift, 0, 255).tolist()
    box = (x / side_px, y / side_px, (x + own_px) / side_px, (y + own_px) / side_px)
    return SceneShape(form=form, color=color, size=size, box=box, rgb=(red, green, blue))


def _say(shapes: Sequence[SceneShape], large_of: Mapping[int, SceneShape]) -> list[SceneExpression]:
    """Return an expression for each small shape that others look like, by its large shape."""
    return [
        SceneExpression(
            f"the {shape.color} {shape.form} next to the {large.color} {large.form}",
            index,
            "relation",
        )
        for index, large in large_of.items()
        for shape in [shapes[index]]
        if (rivals := _rivals(shape, shapes)) and is_next_to_one(shape, rivals, large)
    ]


def _rivals(shape: SceneShape, shapes: Sequence[SceneShape]) -> list[SceneShape]:
    """Return the other shapes that look like this one."""
    look = (shape.form, shape.color)
    return [each for each in shapes if each is not shape and (each.form, each.color) == look]
