"""A small gallery made at run time from photos that ship inside scikit-image; needs no network.

Five things are cut out along outlines that we traced and set in pairs on simple grounds. Every
ordered pair occurs in exactly one photo, so "the cat left of the coffee cup" has one right answer
and its box is known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from skimage import data

WIDTH_PX, HEIGHT_PX = 640, 480
HORIZON = 0.42
FEATHER_PX = 1.5
ANNOTATIONS = "annotations.json"

Outline = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class DemoExpression:
    """One sentence and the truth: photo, its size and the box, in pixels of that photo."""

    text: str
    file_name: str
    box_xyxy_px: tuple[float, float, float, float]
    size_px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX)


@dataclass(frozen=True)
class DemoGallery:
    """A built gallery: folder of the photos, REIRCOCO-style annotations, the sentences."""

    photos_dir: Path
    annotations: Path
    expressions: tuple[DemoExpression, ...]


@dataclass(frozen=True)
class Piece:
    """One thing to cut out.

    Attributes:
        name: as a sentence calls it.
        source: function of `skimage.data`.
        outline: polygon as shares of the source's width and height.
        height: of the cut-out, as share of the photo's height.
    """

    name: str
    source: str
    outline: Outline
    height: float


def _shares(width: float, height: float, points: Sequence[tuple[int, int]]) -> Outline:
    """Outline traced on a view of `width` x `height` -> shares of the sides."""
    return [(x / width, y / height) for x, y in points]


def _ellipse(cx: float, cy: float, rx: float, ry: float) -> Outline:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return [(cx + rx * float(np.cos(a)), cy + ry * float(np.sin(a))) for a in angles]


WOMAN = _shares(439, 439, [
    (132, 65), (150, 25), (195, 13), (240, 25), (258, 60), (258, 105), (240, 132), (258, 170),
    (264, 200), (300, 228), (305, 300), (275, 305), (247, 330), (240, 370), (240, 439), (20, 439),
    (20, 300), (45, 240), (100, 198), (98, 160), (125, 130), (150, 125), (148, 112), (132, 90),
])  # fmt: skip
MAN = _shares(422, 422, [
    (135, 75), (160, 52), (200, 60), (222, 85), (220, 110), (205, 152), (230, 168), (255, 150),
    (270, 150), (265, 170), (240, 215), (225, 250), (180, 300), (125, 320), (125, 422), (0, 422),
    (0, 205), (30, 150), (80, 105), (130, 88),
])  # fmt: skip
CUP = _shares(517, 345, [
    (150, 75), (160, 45), (195, 22), (250, 14), (305, 22), (340, 50), (352, 75), (363, 58),
    (368, 70), (358, 105), (395, 140), (412, 185), (408, 235), (380, 285), (330, 320), (270, 335),
    (205, 328), (145, 300), (95, 255), (70, 210), (66, 175), (80, 135), (110, 98),
])  # fmt: skip
MOTORCYCLE = _shares(600, 405, [
    (75, 165), (120, 118), (135, 130), (185, 140), (240, 155), (290, 130), (300, 95), (340, 105),
    (385, 95), (400, 65), (440, 78), (460, 95), (472, 105), (455, 130), (440, 160), (470, 210),
    (520, 235), (553, 300), (550, 345), (515, 367), (470, 355), (430, 310), (412, 260), (385, 240),
    (370, 290), (330, 308), (275, 310), (275, 350), (262, 350), (262, 305), (215, 300), (190, 325),
    (150, 320), (110, 285), (98, 240), (100, 210), (120, 195), (80, 190),
])  # fmt: skip
CAT = _ellipse(0.46, 0.5, 0.4, 0.49)

PIECES = (
    Piece("woman in an orange suit", "astronaut", WOMAN, 0.72),
    Piece("man in a black coat", "camera", MAN, 0.72),
    Piece("cat", "chelsea", CAT, 0.46),
    Piece("coffee cup", "coffee", CUP, 0.42),
    Piece("red motorcycle", "stereo_motorcycle", MOTORCYCLE, 0.5),
)
# (sky top, sky bottom, ground texture, ground dark, ground light)
GROUNDS = (
    ((92, 148, 214), (206, 226, 244), "grass", (38, 70, 22), (140, 178, 84)),
    ((150, 160, 172), (220, 222, 224), "gravel", (70, 66, 62), (196, 188, 176)),
    ((226, 168, 110), (246, 222, 186), "brick", (84, 40, 30), (190, 120, 96)),
    ((214, 206, 192), (236, 230, 220), "gravel", (96, 74, 50), (206, 170, 128)),
)


def build_demo_gallery(folder: Path, seed: int = 7) -> DemoGallery:
    """Compose the gallery; the same seed gives the same photos.

    Args:
        folder: gets `photos/` and the annotations; files there are replaced.
        seed: of sizes and places.
    """
    photos_dir = folder / "photos"
    photos_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cut = {piece.name: _cut_out(piece) for piece in PIECES}
    expressions = []
    for number, (left, right) in enumerate(permutations(PIECES, 2)):
        photo = _ground(GROUNDS[number % len(GROUNDS)])
        boxes = [
            _place(photo, cut[piece.name], piece.height, centre, rng)
            for piece, centre in ((left, 0.27), (right, 0.74))
        ]
        name = f"pair_{number:02d}.jpg"
        photo.save(photos_dir / name, quality=92)
        if number % 2 == 0:
            expressions.append(
                DemoExpression(f"the {left.name} left of the {right.name}", name, boxes[0])
            )
        else:
            expressions.append(
                DemoExpression(f"the {right.name} right of the {left.name}", name, boxes[1])
            )
    annotations = folder / ANNOTATIONS
    annotations.write_text(json.dumps(_reircoco(expressions), indent=1))
    return DemoGallery(photos_dir, annotations, tuple(expressions))


def _cut_out(piece: Piece) -> Image.Image:
    """RGBA cut-out of a piece, cropped to what is opaque."""
    pixels = getattr(data, piece.source)()
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels
    photo = Image.fromarray(pixels).convert("RGB")
    mask = Image.new("L", photo.size)
    corners = [(x * photo.width, y * photo.height) for x, y in piece.outline]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    photo.putalpha(mask.filter(ImageFilter.GaussianBlur(FEATHER_PX)))
    return photo.crop(mask.getbbox())


def _ground(
    kind: tuple[tuple[int, ...], tuple[int, ...], str, tuple[int, ...], tuple[int, ...]],
) -> Image.Image:
    """Sky above, textured ground below."""
    top, bottom, texture, dark, light = kind
    horizon = int(HEIGHT_PX * HORIZON)
    down = np.linspace(0, 1, horizon)[:, None, None]
    sky = np.array(top) * (1 - down) + np.array(bottom) * down
    canvas = np.empty((HEIGHT_PX, WIDTH_PX, 3), dtype=np.float32)
    canvas[:horizon] = sky
    canvas[horizon:] = _textured(texture, HEIGHT_PX - horizon, dark, light)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _textured(
    name: str, height_px: int, dark: tuple[int, ...], light: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """(height_px, WIDTH_PX, 3) grey texture between two colours."""
    grey = Image.fromarray(getattr(data, name)()).convert("L").resize((WIDTH_PX, WIDTH_PX))
    share = np.asarray(grey, dtype=np.float32)[:height_px, :, None] / 255
    return np.asarray(np.array(dark) * (1 - share) + np.array(light) * share, dtype=np.float32)


def _place(
    photo: Image.Image, piece: Image.Image, height: float, centre: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Paste a cut-out; returns its box in pixels."""
    tall = HEIGHT_PX * height * float(rng.uniform(0.9, 1.05))
    wide = tall * piece.width / piece.height
    shrink = min(1.0, 0.45 * WIDTH_PX / wide)
    size = (round(wide * shrink), round(tall * shrink))
    x = round(WIDTH_PX * (centre + float(rng.uniform(-0.02, 0.02))) - size[0] / 2)
    y = HEIGHT_PX - size[1] - round(float(rng.uniform(4, 24)))
    x = min(max(x, 0), WIDTH_PX - size[0])
    small = piece.resize(size, Image.Resampling.LANCZOS)
    photo.paste(small, (x, y), small)
    return (float(x), float(y), float(x + size[0]), float(y + size[1]))


def _reircoco(expressions: Sequence[DemoExpression]) -> dict[str, object]:
    """Annotations in REIRCOCO's published form."""
    images = [
        {
            "id": i,
            "file_name": e.file_name,
            "width": e.size_px[0],
            "height": e.size_px[1],
            "expressions": [e.text],
        }
        for i, e in enumerate(expressions)
    ]
    annotations = []
    for i, e in enumerate(expressions):
        x1, y1, x2, y2 = e.box_xyxy_px
        box = [x1, y1, x2 - x1, y2 - y1]
        annotations.append(
            {
                "id": i,
                "image_id": i,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "category_id": 1,
            }
        )
    categories = [{"id": 1, "name": "object", "supercategory": "object"}]
    return {"images": images, "annotations": annotations, "categories": categories}
