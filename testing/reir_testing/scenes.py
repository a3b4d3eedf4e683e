"""Scenes: drawn pictures of colored shapes with exact annotations.

A scene needs neither a download nor annotators: boxes, colors, sizes and positions are known by
construction. So a model can be trained and evaluated on as many pictures as a test needs.
`reir_testing.scene_expressions` generates the expressions. The module uses no model.
"""

# Shapes: H x W pixels of a scene (both are side_px), S side of one shape in pixels

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import cos, pi, sin
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageOps

from reir.datasets.dataset import (
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
)
from reir.images.rle import encode
from reir.records import MaskRle, RgbImage
from reir_testing.fakes import PALETTE, BoxPx, Color
from reir_testing.scene_expressions import SceneExpression, SceneShape, Scope, expressions

Texture = Literal["plain", "grain", "stripes", "slope"]
Point = tuple[float, float]

MIN_SIDE_PX = 48
NUM_SHAPES = (2, 6)
SIZES: Mapping[str, tuple[float, float]] = {
    "small": (0.10, 0.135),
    "medium": (0.17, 0.215),
    "large": (0.27, 0.33),
}
"""Range of a shape's side, as a share of the scene's side; gaps between them keep words clear."""
FORMS = ("circle", "square", "triangle", "star", "ring", "cross")

_GROUNDS: Sequence[Color] = (
    (236, 234, 228),
    (200, 204, 206),
    (150, 148, 142),
    (96, 98, 104),
    (34, 34, 38),
)
# Minimum distance of two shapes, as a share of the scene's side.
_GAP = 0.015
# Share of shapes that have the form or the color of an earlier shape. Without such rivals, a single
# word would often identify a shape, and relations would not be needed.
_REPEAT = 0.4
_COLOR_SHIFT = 10
_TRIES = 40
_OVERSAMPLING = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The description of one picture: its shapes and its background.

    Attributes:
        image_id: id that contains the seed and is unique among the scenes of that seed.
        side_px: width and height of the picture.
        shapes: 2 to 6 shapes, whose boxes do not touch.
        ground: RGB of the background.
        texture: pattern of the background, much fainter than any shape.
        texture_seed: seed of the random part of the texture.
    """

    image_id: str
    side_px: int
    shapes: tuple[SceneShape, ...]
    ground: Color = (200, 204, 206)
    texture: Texture = "plain"
    texture_seed: int = 0

    @property
    def file_name(self) -> str:
        """The file name under which `save_scenes` writes the picture."""
        return f"{self.image_id}.png"

    def box_px(self, shape: SceneShape) -> BoxPx:
        """Return the exact box of one of its shapes: xyxy in whole pixels."""
        x1, y1, x2, y2 = (round(edge * self.side_px) for edge in shape.box)
        return x1, y1, x2, y2

    def mask(self, shape: SceneShape) -> MaskRle:
        """Return the pixels that one of its shapes covers by half or more."""
        x1, y1, x2, y2 = self.box_px(shape)
        whole = np.zeros((self.side_px, self.side_px), dtype=bool)
        whole[y1:y2, x1:x2] = _mask(shape.form, x2 - x1) >= 128
        return encode(whole)


def make_scenes(count: int, seed: int, side_px: int = 128) -> tuple[Scene, ...]:
    """Generate scenes. The first n scenes of a seed are the same for any `count`.

    Args:
        count: number of scenes.
        seed: random seed, not negative; other seeds give other scenes and other image ids.
        side_px: width and height of each scene.

    Raises:
        ValueError: `side_px` is too small to distinguish the forms, or `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    if side_px < MIN_SIDE_PX:
        raise ValueError(f"side_px must be {MIN_SIDE_PX} or more to show the forms, got {side_px}")
    return tuple(_make_scene(seed, number, side_px) for number in range(count))


def render(scene: Scene) -> RgbImage:
    """Draw a scene with anti-aliased shapes.

    Returns:
        (H, W, 3) uint8.
    """
    canvas = draw_ground(scene)
    for shape in scene.shapes:
        x1, y1, x2, y2 = scene.box_px(shape)
        cover_SS1 = _mask(shape.form, x2 - x1)[..., None] / np.float32(255)
        under = canvas[y1:y2, x1:x2]
        under += (np.array(shape.rgb, dtype=np.float32) - under) * cover_SS1
    return np.rint(canvas).astype(np.uint8)


def to_dataset(
    scenes: Sequence[Scene], *, scope: Scope = "gallery", per_instance: int = 3, seed: int = 0
) -> ReferringDataset:
    """Return scenes in the form that every annotation reader returns; the category is the form.

    Args:
        scenes: scenes of the gallery.
        scope: "photo" or "gallery", in which each expression is true of only one instance.
        per_instance: maximum number of expressions per instance. All kinds are equally likely. An
            instance has none if no expression is true of it alone.
        seed: random seed for the choice of expressions.
    """
    instances: list[ReferringInstance] = []
    drawn: list[tuple[ReferringInstance, SceneExpression]] = []
    for number, (scene, said) in enumerate(
        zip(scenes, expressions([scene.shapes for scene in scenes], scope), strict=True)
    ):
        # A generator for each scene, so that its expressions do not depend on the other scenes.
        rng = np.random.default_rng([seed, number])
        for index, shape in enumerate(scene.shapes):
            instance = ReferringInstance(
                instance_id=f"{scene.image_id}#{index}",
                image_id=scene.image_id,
                box_xyxy_px=scene.box_px(shape),
                category=shape.form,
                mask=scene.mask(shape),
            )
            instances.append(instance)
            mine = [each for each in said if each.index == index]
            drawn += [(instance, each) for each in _draw(mine, per_instance, rng)]
    return ReferringDataset(
        source=f"{len(scenes)} scenes",
        images=tuple(
            ReferringImage(
                image_id=scene.image_id,
                file_name=scene.file_name,
                width_px=scene.side_px,
                height_px=scene.side_px,
            )
            for scene in scenes
        ),
        instances=tuple(instances),
        expressions=tuple(
            Expression(
                expression_id=str(number),
                image_id=instance.image_id,
                instance_id=instance.instance_id,
                text=each.text,
                kind=each.kind,
            )
            for number, (instance, each) in enumerate(drawn)
        ),
    )


def save_scenes(
    folder: str | Path,
    splits: Mapping[str, Sequence[Scene]],
    *,
    scope: Scope = "gallery",
    per_instance: int = 3,
    seed: int = 0,
) -> None:
    """Write scenes as a folder that `reir.datasets.read_photos` and `reir train` can read.

    Args:
        folder: folder for `images/`, `instances.json` and `expressions.json`.
        splits: name of each split -> its scenes; for `scope`, each split is a gallery of its own.
        scope, per_instance, seed: as in `to_dataset`.
    """
    root = Path(folder)
    (root / "images").mkdir(parents=True, exist_ok=True)
    document: dict[str, list[Any]] = {"images": [], "annotations": [], "expressions": []}
    for scenes in splits.values():
        for scene in scenes:
            Image.fromarray(render(scene)).save(root / "images" / scene.file_name)
        dataset = to_dataset(scenes, scope=scope, per_instance=per_instance, seed=seed)
        _append(document, dataset)
    categories = [{"id": number, "name": form} for number, form in enumerate(FORMS, start=1)]
    instances = {key: document[key] for key in ("images", "annotations")}
    (root / "instances.json").write_text(json.dumps({**instances, "categories": categories}))
    members = {name: [scene.image_id for scene in scenes] for name, scenes in splits.items()}
    texts = {"splits": members, "expressions": document["expressions"]}
    (root / "expressions.json").write_text(json.dumps(texts))


def _append(document: dict[str, list[Any]], dataset: ReferringDataset) -> None:
    """Append a dataset to the lists of a document in COCO's layout."""
    for image in dataset.images:
        size = {"width": image.width_px, "height": image.height_px}
        document["images"].append({"id": image.image_id, "file_name": image.file_name, **size})
    boxes = {}
    for instance in dataset.instances:
        x1, y1, x2, y2 = instance.box_xyxy_px
        boxes[instance.instance_id] = [x1, y1, x2 - x1, y2 - y1]
        document["annotations"].append(
            {
                "id": instance.instance_id,
                "image_id": instance.image_id,
                "category_id": 1 + FORMS.index(str(instance.category)),
                "bbox": boxes[instance.instance_id],
                "segmentation": asdict(instance.mask) if instance.mask else [],
            }
        )
    for text in dataset.expressions:
        document["expressions"].append(
            {
                "id": len(document["expressions"]),
                "image_id": text.image_id,
                "ann_id": text.instance_id,
                "bbox": boxes[str(text.instance_id)],
                "kind": text.kind,
                "expression": text.text,
            }
        )


def _draw(
    said: Sequence[SceneExpression], most: int, rng: np.random.Generator
) -> list[SceneExpression]:
    """Draw expressions without repetition: first a kind, then an expression of that kind.

    There are far more relations than other kinds, and they would otherwise be drawn almost always.
    """
    by_kind: dict[str, list[SceneExpression]] = defaultdict(list)
    for each in said:
        by_kind[each.kind].append(each)
    drawn: list[SceneExpression] = []
    while by_kind and len(drawn) < most:
        kind = list(by_kind)[int(rng.integers(len(by_kind)))]
        rest = by_kind[kind]
        drawn.append(rest.pop(int(rng.integers(len(rest)))))
        if not rest:
            del by_kind[kind]
    return drawn


def _make_scene(seed: int, number: int, side_px: int) -> Scene:
    rng = np.random.default_rng([seed, number])
    wanted = int(rng.integers(NUM_SHAPES[0], NUM_SHAPES[1] + 1))
    # Large shapes may leave no room for the last one. Then start again with new sizes; dropping the
    # shape would make scenes with many shapes rare.
    while len(places := _place(rng, wanted, side_px)) < wanted:
        pass
    shapes: list[SceneShape] = []
    for size, (x1, y1, x2, y2) in places:
        form, color = _look(rng, shapes)
        shapes.append(
            SceneShape(
                form=form,
                color=color,
                size=size,
                box=(x1 / side_px, y1 / side_px, x2 / side_px, y2 / side_px),
                rgb=_near(PALETTE[color], rng),
            )
        )
    textures = get_args(Texture)
    return Scene(
        image_id=f"scene-{seed}-{number:06d}",
        side_px=side_px,
        shapes=tuple(shapes),
        ground=_GROUNDS[int(rng.integers(len(_GROUNDS)))],
        texture=textures[int(rng.integers(len(textures)))],
        texture_seed=int(rng.integers(2**31)),
    )


def _place(rng: np.random.Generator, wanted: int, side_px: int) -> list[tuple[str, BoxPx]]:
    """Choose size words and boxes one after the other; stop if there is no room for a shape."""
    places: list[tuple[str, BoxPx]] = []
    for _ in range(wanted):
        size = str(rng.choice(list(SIZES)))
        shape_px = round(float(rng.uniform(*SIZES[size])) * side_px)
        box = _free_box(rng, shape_px, side_px, [taken for _, taken in places])
        if box is None:
            break
        places.append((size, box))
    return places


def _free_box(
    rng: np.random.Generator, shape_px: int, side_px: int, taken: Sequence[BoxPx]
) -> BoxPx | None:
    """Return a random box with enough distance from all others; None if many tries fail."""
    gap_px = max(round(_GAP * side_px), 1)
    starts = rng.integers(gap_px, side_px - gap_px - shape_px + 1, size=(_TRIES, 2))
    for x, y in starts.tolist():
        box = (x, y, x + shape_px, y + shape_px)
        if all(_apart(box, other, gap_px) for other in taken):
            return box
    return None


def _apart(a: BoxPx, b: BoxPx, gap_px: int) -> bool:
    across = a[2] + gap_px <= b[0] or b[2] + gap_px <= a[0]
    return across or a[3] + gap_px <= b[1] or b[3] + gap_px <= a[1]


def _look(rng: np.random.Generator, shapes: Sequence[SceneShape]) -> tuple[str, str]:
    """Choose a form and a color; often, one of them is that of an earlier shape."""
    form, color = str(rng.choice(FORMS)), str(rng.choice(list(PALETTE)))
    if shapes and rng.random() < _REPEAT:
        rival = shapes[int(rng.integers(len(shapes)))]
        return (rival.form, color) if rng.random() < 0.5 else (form, rival.color)
    return form, color


def _near(color: Color, rng: np.random.Generator) -> Color:
    """Return a similar color, for which people would still use the same word."""
    shift = rng.integers(-_COLOR_SHIFT, _COLOR_SHIFT + 1, size=3)
    red, green, blue = np.clip(np.array(color) + shift, 0, 255).tolist()
    return red, green, blue


def draw_ground(scene: Scene) -> npt.NDArray[np.float32]:
    """Draw the (H, W, 3) float32 background."""
    side, rng = scene.side_px, np.random.default_rng(scene.texture_seed)
    relief = np.zeros((side, side), dtype=np.float32)
    along = np.arange(side, dtype=np.float32) / side
    if scene.texture == "grain":
        relief += rng.normal(0, 3, size=relief.shape).clip(-8, 8).astype(np.float32)
    elif scene.texture == "stripes":
        relief += 5 * np.sign(np.sin(2 * pi * rng.uniform(4, 12) * along))[:, None]
    elif scene.texture == "slope":
        relief += (16 * (along - 0.5))[None, :] * rng.choice([-1, 1])
    ground = np.array(scene.ground, dtype=np.float32) + relief[..., None]
    return ground.clip(0, 255)


@lru_cache(maxsize=1024)
def _mask(form: str, shape_px: int) -> npt.NDArray[np.uint8]:
    """Return the (S, S) uint8 coverage of each pixel by a form.

    The coverage is symmetric, and the form touches all four sides, so that its box is exact.
    """
    fine_px = shape_px * _OVERSAMPLING
    image = Image.new("L", (fine_px, fine_px))
    _DRAW[form](ImageDraw.Draw(image), fine_px - 1)
    # Pillow fills slanted edges unevenly by a pixel. With equal halves, mirrored scenes are exact.
    image = ImageChops.lighter(image, ImageOps.mirror(image))
    return np.asarray(image.reduce(_OVERSAMPLING))


def _circle(draw: ImageDraw.ImageDraw, last: int) -> None:
    draw.ellipse((0, 0, last, last), fill=255)


def _ring(draw: ImageDraw.ImageDraw, last: int) -> None:
    _circle(draw, last)
    draw.ellipse((0.28 * last, 0.28 * last, 0.72 * last, 0.72 * last), fill=0)


def _polygon(points: Sequence[Point]) -> Callable[[ImageDraw.ImageDraw, int], None]:
    """Return a function that draws a polygon, stretched so that it touches all four sides."""
    low_2, high_2 = np.min(points, axis=0), np.max(points, axis=0)
    unit = ((np.array(points) - low_2) / (high_2 - low_2)).tolist()

    def fill(draw: ImageDraw.ImageDraw, last: int) -> None:
        draw.polygon([(x * last, y * last) for x, y in unit], fill=255)

    return fill


def _star_points() -> list[Point]:
    radii = (1.0, 0.45)
    return [
        (radii[corner % 2] * sin(corner * pi / 5), -radii[corner % 2] * cos(corner * pi / 5))
        for corner in range(10)
    ]


_CROSS: Sequence[Point] = (
    (1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1),
)  # fmt: skip
_DRAW: Mapping[str, Callable[[ImageDraw.ImageDraw, int], None]] = {
    "circle": _circle,
    "square": _polygon([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": _polygon([(0, 1), (1, 1), (0.5, 0)]),
    "star": _polygon(_star_points()),
    "ring": _ring,
    "cross": _polygon(_CROSS),
}
