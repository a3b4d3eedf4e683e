"""The forms of toys: silhouettes with faces, in patterned colors, as pictures with transparency."""

# Shapes: S side of a toy in pixels

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from reir_testing.fakes import Color

Ink = ImageDraw.ImageDraw

_CANVAS = 512
_OUTLINE = 19
# Marks are darker than a bright color, and lighter than a dark one.
_BRIGHT, _DARK, _LIGHT = 110, 0.55, 0.6
_POSTER_LEVELS = 6


@lru_cache(maxsize=1024)
def draw_toy(form: str, pattern: str, rgb: Color, side_px: int) -> npt.NDArray[np.uint8]:
    """Draw a toy that touches all four sides of its picture.

    Args:
        form: a key of `FORMS`.
        pattern: a key of `PATTERNS`.
        rgb: color of the body.
        side_px: S.

    Returns:
        (S, S, 4) uint8 RGBA.
    """
    body, inner = silhouette(form), np.asarray(_without_rim(form))
    ink = inner[..., None] < 128
    picture = Image.fromarray(np.where(ink, 25, _patterned(pattern, rgb)).astype(np.uint8))
    _face(ImageDraw.Draw(picture), *EYES[form])
    picture.putalpha(body)
    box = body.getbbox()
    assert box is not None
    return np.asarray(picture.crop(box).resize((side_px, side_px), Image.Resampling.BOX))


@lru_cache(maxsize=64)
def _patterned(pattern: str, rgb: Color) -> npt.NDArray[np.float32]:
    """Return the whole canvas in a color and a pattern, lit from above, in few levels of color."""
    mark = Image.new("L", (_CANVAS, _CANVAS))
    PATTERNS[pattern](ImageDraw.Draw(mark))
    plain = np.array(rgb, dtype=np.float32)
    marked = plain * _DARK if plain.mean() > _BRIGHT else plain + (255 - plain) * _LIGHT
    light = np.linspace(1.1, 0.85, _CANVAS, dtype=np.float32)[:, None, None]
    fill = np.where(np.asarray(mark)[..., None] > 127, marked, plain) * light
    levels = (fill.clip(0, 255) / 255 * (_POSTER_LEVELS - 1)).round()
    return np.asarray(levels / (_POSTER_LEVELS - 1) * 255, dtype=np.float32)


@lru_cache(maxsize=64)
def silhouette(form: str) -> Image.Image:
    """Return the outline of a form, filled with white, on a black square of fixed size."""
    image = Image.new("L", (_CANVAS, _CANVAS))
    FORMS[form](ImageDraw.Draw(image))
    return image


@lru_cache(maxsize=64)
def _without_rim(form: str) -> Image.Image:
    """Return the silhouette of a form without the rim, where the outline is drawn."""
    return silhouette(form).filter(ImageFilter.MinFilter(_OUTLINE))


def _face(ink: Ink, x: float, y: float, apart: float) -> None:
    """Draw two eyes around a point, in parts of the canvas."""
    for side in (-1, 1):
        center = ((x + side * apart) * _CANVAS, y * _CANVAS)
        for radius, color in ((34, (25, 25, 25)), (27, (250, 250, 245)), (12, (25, 25, 25))):
            ink.ellipse(_around(center, radius), fill=color)


def _around(center: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    x, y = center
    return x - radius, y - radius, x + radius, y + radius


def _zorp(ink: Ink) -> None:
    ink.ellipse((60, 160, 452, 500), fill=255)
    for x, tip in ((180, 90), (332, 422)):
        ink.line((x, 220, tip, 60), fill=255, width=36)
        ink.ellipse(_around((tip, 60), 46), fill=255)


def _glim(ink: Ink) -> None:
    ink.polygon(((150, 20), (362, 20), (490, 270), (22, 270)), fill=255)
    ink.rectangle((220, 260, 292, 440), fill=255)
    ink.ellipse((110, 410, 402, 500), fill=255)


def _plonk(ink: Ink) -> None:
    ink.rounded_rectangle((20, 130, 492, 390), 50, fill=255)
    ink.rectangle((120, 30, 360, 150), fill=255)
    for x in (130, 382):
        ink.ellipse(_around((x, 400), 92), fill=255)


def _fribble(ink: Ink) -> None:
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radii = np.where(np.arange(14) % 2, 130, 245)
    ink.polygon(
        [(256 + r * np.sin(a), 256 - r * np.cos(a)) for a, r in zip(angles, radii, strict=True)],
        fill=255,
    )


def _wug(ink: Ink) -> None:
    ink.ellipse((20, 200, 380, 470), fill=255)
    ink.ellipse((240, 60, 450, 270), fill=255)
    ink.polygon(((430, 120), (506, 165), (430, 210)), fill=255)
    for x in (150, 250):
        ink.rectangle((x, 440, x + 34, 506), fill=255)


def _dax(ink: Ink) -> None:
    ink.pieslice((16, 20, 496, 500), 180, 360, fill=255)
    ink.rounded_rectangle((170, 240, 342, 500), 50, fill=255)


def _tove(ink: Ink) -> None:
    ink.ellipse((120, 110, 500, 400), fill=255)
    ink.polygon(((190, 255), (16, 90), (16, 420)), fill=255)
    ink.polygon(((230, 140), (330, 20), (380, 150)), fill=255)


def _blicket(ink: Ink) -> None:
    ink.polygon(
        ((20, 110), (140, 270), (256, 40), (372, 270), (492, 110), (440, 480), (72, 480)), fill=255
    )
    for x, y in ((36, 96), (256, 46), (476, 96)):
        ink.ellipse(_around((x, y), 34), fill=255)


def _snark(ink: Ink) -> None:
    ink.pieslice((70, 16, 442, 388), 180, 360, fill=255)
    ink.rectangle((70, 200, 442, 420), fill=255)
    for x in (70, 194, 318):
        ink.pieslice((x, 340, x + 124, 500), 0, 180, fill=255)


def _mome(ink: Ink) -> None:
    ink.rectangle((196, 16, 316, 190), fill=255)
    ink.ellipse((170, 10, 342, 70), fill=255)
    ink.rounded_rectangle((90, 170, 422, 500), 90, fill=255)


def _plain(ink: Ink) -> None:
    """Leave the body as it is."""


def _stripes(ink: Ink) -> None:
    for y in range(20, _CANVAS, 92):
        ink.rectangle((0, y, _CANVAS, y + 42), fill=255)


def _dots(ink: Ink) -> None:
    for row, y in enumerate(range(30, _CANVAS, 88)):
        for x in range(30 + 44 * (row % 2), _CANVAS, 88):
            ink.ellipse(_around((x, y), 25), fill=255)


def _checks(ink: Ink) -> None:
    for row in range(0, _CANVAS, 74):
        for column in range(0, _CANVAS, 74):
            if (row + column) // 74 % 2:
                ink.rectangle((column, row, column + 73, row + 73), fill=255)


FORMS: Mapping[str, Callable[[Ink], None]] = {
    "zorp": _zorp,
    "glim": _glim,
    "plonk": _plonk,
    "fribble": _fribble,
    "wug": _wug,
    "dax": _dax,
    "tove": _tove,
    "blicket": _blicket,
    "snark": _snark,
    "mome": _mome,
}
EYES: Mapping[str, tuple[float, float, float]] = {
    "zorp": (0.5, 0.6, 0.13),
    "glim": (0.5, 0.36, 0.12),
    "plonk": (0.5, 0.5, 0.13),
    "fribble": (0.5, 0.47, 0.1),
    "wug": (0.68, 0.3, 0.09),
    "dax": (0.5, 0.32, 0.14),
    "tove": (0.72, 0.45, 0.1),
    "blicket": (0.5, 0.72, 0.13),
    "snark": (0.5, 0.4, 0.13),
    "mome": (0.5, 0.6, 0.13),
}
"""Place of the eyes: the point (x, y) between them, and half of the distance between them, both
as shares of the canvas."""
PATTERNS: Mapping[str, Callable[[Ink], None]] = {
    "plain": _plain,
    "striped": _stripes,
    "dotted": _dots,
    "checkered": _checks,
}
