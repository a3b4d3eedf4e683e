"""Builds a small gallery from photos that ship with scikit-image; needs no network.

Cutouts of a few subjects are placed on textured grounds: alone, in pairs and in threes. The
sentences come from the same list of scenes. Each describes exactly one subject, whose box is known.
For example, "the brown cat left of the coffee cup" has one correct answer.
"""

# Shapes: H x W pixels

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from reir.images.decode import read_image
from reir_ingestion.demo.cutouts import cut_out
from reir_ingestion.demo.scenes import GROUNDS, Scene, describe, make_scenes

WIDTH_PX, HEIGHT_PX = 640, 480
HORIZON_PX = 190
ANNOTATIONS = "annotations.json"

BoxPx = tuple[float, float, float, float]
Color = tuple[int, int, int]

_DATA = Path(skimage.data.__file__).parent
# Photos that no sentence describes, as distractors.
_OTHER_PHOTOS = (
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "moon.png",
    "coins.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "page.png",
)
# Height of each kind as a fraction of the photo height, if there is room.
_HEIGHTS = {"woman": 0.78, "man": 0.8, "cat": 0.6, "cup": 0.5, "motorcycle": 0.55, "horse": 0.6}
# Their source photos cut them off at the bottom, so they stand on the lower edge.
_CUT_OFF = frozenset({"woman", "man", "cat"})
# They look to the right; on the right side of a scene they are mirrored, to look into it.
_LOOKS_RIGHT = frozenset({"man", "cat", "horse", "motorcycle"})
# The part of the cutout that the sentence names, xyxy as fractions: without helmet, tripod, saucer.
_NAMED_PART = {
    "woman": (0.0, 0.0, 0.70, 1.0),
    "man": (0.0, 0.0, 0.81, 1.0),
    "cup": (0.23, 0.0, 0.82, 0.78),
}


@dataclass(frozen=True)
class DemoExpression:
    """A sentence and its correct answer: photo, box in pixels, and size of the photo."""

    text: str
    file_name: str
    box_xyxy_px: BoxPx
    size_px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX)


@dataclass(frozen=True)
class DemoGallery:
    """The built gallery: the photos, annotations in the format of REIRCOCO, and the sentences."""

    photos_dir: Path
    annotations: Path
    expressions: tuple[DemoExpression, ...]


@dataclass(frozen=True)
class _Ground:
    """A background: a sky gradient, and below the horizon a texture between two colors."""

    sky: tuple[Color, Color]
    texture: str
    dark: Color
    light: Color


_GROUNDS = {
    "field": _Ground(((88, 146, 214), (208, 228, 244)), "grass.png", (24, 52, 10), (150, 190, 88)),
    "gravel": _Ground(
        ((150, 160, 172), (222, 224, 226)), "gravel.png", (48, 46, 44), (196, 190, 182)
    ),
    "bricks": _Ground(
        ((172, 196, 216), (232, 234, 230)), "brick.png", (70, 32, 24), (214, 150, 124)
    ),
    "sunset": _Ground(((70, 66, 120), (252, 170, 92)), "grass.png", (52, 42, 20), (190, 150, 84)),
    "sand": _Ground(
        ((120, 178, 222), (236, 238, 228)), "gravel.png", (164, 126, 80), (244, 218, 168)
    ),
}


def build_demo_gallery(folder: Path, seed: int = 7) -> DemoGallery:
    """Build the gallery; the same seed gives the same photos.

    Args:
        folder: receives `photos/` and the annotations, which are replaced if they exist.
        seed: seed of the sizes and positions.
    """
    photos_dir = folder / "photos"
    photos_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    scenes = make_scenes()
    others = {f"other_{Path(name).stem}.jpg": name for name in _OTHER_PHOTOS}
    names = [_file_name(number, scene) for number, scene in enumerate(scenes)]
    # Photos of the gallery of an earlier release would be indexed too, and have no annotations.
    for stale in set(photos_dir.glob("*.jpg")) - {photos_dir / name for name in (*names, *others)}:
        stale.unlink()
    for name, source in others.items():
        _fitted(_DATA / source).save(photos_dir / name, quality=92)
    boxes = []
    for scene, name in zip(scenes, names, strict=True):
        photo, found = _compose(scene, rng)
        photo.save(photos_dir / name, quality=92)
        boxes.append(found)
    expressions = tuple(
        DemoExpression(text, names[number], boxes[number][place])
        for text, number, place in describe(scenes)
    )
    annotations = folder / ANNOTATIONS
    annotations.write_text(
        json.dumps(_reircoco(names, boxes, expressions, list(others)), indent=1) + "\n"
    )
    return DemoGallery(photos_dir, annotations, expressions)


def _fitted(path: Path) -> Image.Image:
    """Return the center of a photo at the size of the gallery."""
    return ImageOps.fit(Image.fromarray(read_image(path)), (WIDTH_PX, HEIGHT_PX))


def _file_name(number: int, scene: Scene) -> str:
    words = [word for one in scene.subjects for word in (one.color, one.kind) if word]
    return f"{number:02d}_{'_'.join(words)}_{scene.ground}.jpg"


def _compose(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, list[BoxPx]]:
    """Return the photo of a scene and the boxes of its subjects, from left to right."""
    photo = _background(scene.ground).copy()
    number = len(scene.subjects)
    boxes = []
    for place, subject in enumerate(scene.subjects):
        piece = cut_out(subject.kind, subject.color)
        middle = (place + 0.5) / number
        mirrored = subject.kind in _LOOKS_RIGHT and middle > 0.3 + 0.4 * float(rng.random())
        if mirrored:
            piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        height = HEIGHT_PX * _HEIGHTS[subject.kind] * float(rng.uniform(0.94, 1.06))
        room = WIDTH_PX * (0.62 if number == 1 else 0.96 / number)
        scale = min(height / piece.height, room / piece.width)
        size = (round(piece.width * scale), round(piece.height * scale))
        left = WIDTH_PX * middle - size[0] / 2 + float(rng.uniform(-8, 8))
        x = round(min(max(left, 0), WIDTH_PX - size[0]))
        y = HEIGHT_PX - size[1]
        # A subject that its own photo cuts off has to be cut off here as well.
        if subject.kind not in _CUT_OFF:
            y -= round(float(rng.uniform(16, 48)))
            _cast_shadow(photo, (x, y, x + size[0], y + size[1]))
        small = piece.resize(size, Image.Resampling.LANCZOS)
        photo.paste(small, (x, y), small)
        boxes.append(_named_box(subject.kind, (x, y), size, mirrored=mirrored))
    return photo, boxes


def _named_box(
    kind: str, corner: tuple[int, int], size: tuple[int, int], *, mirrored: bool
) -> BoxPx:
    """Return the box of the named part of a pasted subject."""
    x1, y1, x2, y2 = _NAMED_PART.get(kind, (0.0, 0.0, 1.0, 1.0))
    if mirrored:
        x1, x2 = 1 - x2, 1 - x1
    left, top = corner
    return (
        left + x1 * size[0],
        top + y1 * size[1],
        left + x2 * size[0],
        top + y2 * size[1],
    )


def _cast_shadow(photo: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Darken the ground under a subject."""
    left, _, right, bottom = box
    width, depth = right - left, max(8, (right - left) // 14)
    mask = Image.new("L", photo.size)
    ellipse = (left + width // 16, bottom - depth, right - width // 16, bottom + depth // 2)
    ImageDraw.Draw(mask).ellipse(ellipse, fill=150)
    photo.paste((12, 12, 14), mask=mask.filter(ImageFilter.GaussianBlur(depth / 3)))


@cache
def _background(name: str) -> Image.Image:
    """Return an empty background: a sky with faint clouds above a receding ground."""
    ground = _GROUNDS[name]
    canvas = np.empty((HEIGHT_PX, WIDTH_PX, 3))
    down = np.linspace(0, 1, HORIZON_PX)[:, None, None]
    canvas[:HORIZON_PX] = np.array(ground.sky[0]) * (1 - down) + np.array(ground.sky[1]) * down
    canvas[:HORIZON_PX] += _clouds(list(GROUNDS).index(name))[..., None]
    share = _receding(ground.texture)[..., None]
    canvas[HORIZON_PX:] = np.array(ground.dark) * (1 - share) + np.array(ground.light) * share
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _clouds(seed: int) -> npt.NDArray[np.float64]:
    """Return (HORIZON_PX, WIDTH_PX) values of 0 to 40 gray levels to add: stretched noise."""
    rng = np.random.default_rng(seed)
    total = np.zeros((HORIZON_PX, WIDTH_PX))
    for cells, weight in ((4, 1.0), (8, 0.6), (16, 0.3)):
        noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        total += weight * np.asarray(noise.resize((WIDTH_PX, HORIZON_PX), Image.Resampling.BICUBIC))
    return np.asarray(40 * np.clip((total / 1.9 - 0.5) * 4, 0, 1))


def _receding(file_name: str) -> npt.NDArray[np.float64]:
    """Return a (ground height, WIDTH_PX) texture in [0, 1] that gets finer toward the horizon."""
    texture = read_image(_DATA / file_name)[..., 0]
    rows = HEIGHT_PX - HORIZON_PX
    depth = 1 / np.linspace(0.35, 1, rows)  # 1 at the lower edge
    across = (np.arange(WIDTH_PX) - WIDTH_PX / 2)[None] * depth[:, None] * 0.8 + 256
    along = np.broadcast_to((np.cumsum(depth[::-1])[::-1] * 0.8)[:, None], across.shape)
    period = 2 * (len(texture) - 1)  # mirrored at the end, so that no seam shows
    x, y = (np.abs((side + period / 2) % period - period / 2) for side in (across, along))
    return np.asarray(texture[y.astype(int), x.astype(int)] / 255.0)


def _reircoco(
    names: Sequence[str],
    boxes: Sequence[Sequence[BoxPx]],
    expressions: Sequence[DemoExpression],
    others: Sequence[str],
) -> dict[str, object]:
    """Return annotations in the published format of REIRCOCO: one image entry per sentence.

    Photos without a sentence get an entry too, since they belong to the gallery.
    """
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    asked = {(one.file_name, one.box_xyxy_px): one.text for one in expressions}

    def add_image(name: str, sentences: list[str]) -> int:
        size = {"width": WIDTH_PX, "height": HEIGHT_PX}
        images.append({"id": len(images), "file_name": name, **size, "expressions": sentences})
        return len(images) - 1

    for name, found in zip(names, boxes, strict=True):
        entries = [(box, [asked[name, box]]) for box in found if (name, box) in asked]
        for (x1, y1, x2, y2), sentences in entries or [(found[0], [])]:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": add_image(name, sentences),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "category_id": 1,
                }
            )
    for name in others:
        add_image(name, [])
    categories = [{"id": 1, "name": "object", "supercategory": "object"}]
    return {"images": images, "annotations": annotations, "categories": categories}
