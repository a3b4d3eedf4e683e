"""Scenes with exact truth: pictures of colored shapes, drawn and described from one scene graph.

A scene needs no download and no annotator: boxes, colors, sizes and places are known by
construction, so a model can be trained and measured on as many pictures as a test needs.
`reir_testing.scene_expressions` says what is true of them. Knows no model and no training.
"""

# Shapes: H x W pixels of a scene (side_px each way), S side of one shape in pixels

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
"""Side of a shape as share of the scene's side; between two words lies a clear step."""
FORMS = ("circle", "square", "triangle", "star", "ring", "cross")

_GROUNDS: Sequence[Color] = (
    (236, 234, 228),
    (200, 204, 206),
    (150, 148, 142),
    (96, 98, 104),
    (34, 34, 38),
)
_GAP = 0.015  # least distance of two shapes, in sides
_REPEAT = 0.4  # share of shapes that take over form or color of an earlier one, as a rival
_COLOR_SHIFT = 10
_TRIES = 40
_OVERSAMPLING = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture as a graph: what stands where on which ground.

    Attributes:
        image_id: unique among the scenes of one seed, and names that seed.
        side_px: width and height.
        shapes: 2-6, boxes apart from each other.
        ground: RGB of the background.
        texture: of the background, far fainter than any shape.
        texture_seed: of its random part.
    """

    image_id: str
    side_px: int
    shapes: tuple[SceneShape, ...]
    ground: Color = (200, 204, 206)
    texture: Texture = "plain"
    texture_seed: int = 0

    @property
    def file_name(self) -> str:
        """Name under which `save_scenes` writes the picture."""
        return f"{self.image_id}.png"

    def box_px(self, shape: SceneShape) -> BoxPx:
        """xyxy of one of its shapes in whole pixels, exact."""
        x1, y1, x2, y2 = (round(edge * self.side_px) for edge in shape.box)
        return x1, y1, x2, y2

    def mask(self, shape: SceneShape) -> MaskRle:
        """Pixels that one of its shapes covers by half or more."""
        x1, y1, x2, y2 = self.box_px(shape)
        whole = np.zeros((self.side_px, self.side_px), dtype=bool)
        whole[y1:y2, x1:x2] = _mask(shape.form, x2 - x1) >= 128
        return encode(whole)


def make_scenes(count: int, seed: int, side_px: int = 128) -> tuple[Scene, ...]:
    """Make scenes; the first n of a seed are the same whatever `count` is.

    Args:
        count: number of scenes.
        seed: not negative; other seeds give other scenes and other image ids.
        side_px: width and height of each.

    Raises:
        ValueError: `side_px` is too small to tell the forms apart, or `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    if side_px < MIN_SIDE_PX:
        raise ValueError(f"side_px must be {MIN_SIDE_PX} or more to show the forms, got {side_px}")
    return tuple(_make_scene(seed, number, side_px) for number in range(count))


def render(scene: Scene) -> RgbImage:
    """Draw a scene, shapes anti-aliased.

    Returns:
        (H, W, 3) uint8.
    """
    canvas = _draw_ground(scene)
    for shape in scene.shapes:
        x1, y1, x2, y2 = scene.box_px(shape)
        cover_SS1 = _mask(shape.form, x2 - x1)[..., None] / np.float32(255)
        under = canvas[y1:y2, x1:x2]
        under += (np.array(shape.rgb, dtype=np.float32) - under) * cover_SS1
    return np.rint(canvas).astype(np.uint8)


def to_dataset(
    scenes: Sequence[Scene], *, scope: Scope = "gallery", per_instance: int = 3, seed: int = 0
) -> ReferringDataset:
    """Return scenes as what every annotation reader returns; the category is the form.

    Args:
        scenes: the gallery.
        scope: "photo" or "gallery": where each expression is true of one instance only.
        per_instance: most expressions of an instance, kinds drawn with equal chances; an instance
            of which nothing unique can be said has none.
        seed: of the draw.
    """
    instances: list[ReferringInstance] = []
    drawn: list[tuple[ReferringInstance, SceneExpression]] = []
    for number, (scene, said) in enumerate(
        zip(scenes, expressions([scene.shapes for scene in scenes], scope), strict=True)
    ):
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
    """Write scenes as a folder that `reir.datasets.read_photos` and `reir train` take.

    Args:
        folder: gets `images/`, `instances.json` and `expressions.json`.
        splits: name -> scenes; each split is a gallery of its own for `scope`.
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
    """Add a dataset to the lists of COCO's form."""
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
    """Draw without repeats, each time a kind first and then one of its expressions."""
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
    # Large shapes may leave no room for the last one; such a start is given up, not squeezed in.
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
    """Size words and boxes, one by one; stops where no room is found."""
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
    """Find a box that keeps its distance from all others; None after many tries."""
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
    """Form and color, one of them often shared with an earlier shape."""
    form, color = str(rng.choice(FORMS)), str(rng.choice(list(PALETTE)))
    if shapes and rng.random() < _REPEAT:
        rival = shapes[int(rng.integers(len(shapes)))]
        return (rival.form, color) if rng.random() < 0.5 else (form, rival.color)
    return form, color


def _near(color: Color, rng: np.random.Generator) -> Color:
    """Return a color that still goes by the same word."""
    shift = rng.integers(-_COLOR_SHIFT, _COLOR_SHIFT + 1, size=3)
    red, green, blue = np.clip(np.array(color) + shift, 0, 255).tolist()
    return red, green, blue


def _draw_ground(scene: Scene) -> npt.NDArray[np.float32]:
    """(H, W, 3) float32 background."""
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
    """(S, S) uint8 coverage of each pixel by a form, symmetric, that touches all four sides."""
    fine_px = shape_px * _OVERSAMPLING
    image = Image.new("L", (fine_px, fine_px))
    _DRAW[form](ImageDraw.Draw(image), fine_px - 1)
    # Slanted edges are filled unevenly by a pixel; both halves alike make mirrored scenes exact.
    image = ImageChops.lighter(image, ImageOps.mirror(image))
    return np.asarray(image.reduce(_OVERSAMPLING))


def _circle(draw: ImageDraw.ImageDraw, last: int) -> None:
    draw.ellipse((0, 0, last, last), fill=255)


def _ring(draw: ImageDraw.ImageDraw, last: int) -> None:
    _circle(draw, last)
    draw.ellipse((0.28 * last, 0.28 * last, 0.72 * last, 0.72 * last), fill=0)


def _polygon(points: Sequence[Point]) -> Callable[[ImageDraw.ImageDraw, int], None]:
    """Stretch points to the unit square, so that the form touches all four sides."""
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
