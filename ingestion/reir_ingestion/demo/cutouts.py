"""Cutouts of the subjects of the demo gallery, from photos that ship with scikit-image.

The outlines were traced by hand. A random walker then finds the true edge within a few pixels of
the traced line.
"""

# Shapes: H x W pixels of the cut-out, RGBA

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image, ImageDraw, ImageFilter
from skimage.color import hsv2rgb, rgb2hsv
from skimage.segmentation import random_walker

from reir.images.decode import read_image

Outline = tuple[tuple[int, int], ...]
Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

_DATA = Path(skimage.data.__file__).parent


@dataclass(frozen=True)
class Trace:
    """The outline of one subject in its source photo; points are (x, y) pixels of that photo.

    Attributes:
        file_name: name of the photo in scikit-image's data folder.
        outlines: outlines whose union is the subject; their edges are refined.
        holes: outlines of background that is seen through the subject.
        thin: parts that are too thin to be refined, such as tripod legs; they are added as traced.
        band_px: how far from the traced line the true edge may be.
        top_px: number of rows that are added above the photo by mirroring, for a subject that the
            photo cuts off; points there have negative y.
    """

    file_name: str
    outlines: tuple[Outline, ...]
    holes: tuple[Outline, ...] = ()
    thin: tuple[Outline, ...] = ()
    band_px: int = 5
    top_px: int = 0


def _ellipse(cx: float, cy: float, rx: float, ry: float) -> Outline:
    turns = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return tuple((round(cx + rx * np.cos(t)), round(cy + ry * np.sin(t))) for t in turns)


_WOMAN = Trace(
    "astronaut.png",
    (
        (
            (215, 17), (235, 16), (262, 20), (282, 32), (296, 55), (300, 85), (297, 110),
            (286, 124), (275, 133), (268, 138), (263, 156), (258, 173), (275, 183), (292, 205),
            (302, 226), (305, 236), (320, 243), (338, 260), (347, 280), (353, 292), (359, 318),
            (364, 335), (364, 348), (374, 346), (400, 343), (430, 349), (455, 360), (475, 382),
            (488, 410), (495, 445), (497, 455), (503, 458), (508, 475), (511, 490), (511, 511),
            (37, 511), (32, 500), (27, 480), (23, 460), (22, 410), (24, 390), (25, 340), (34, 310),
            (42, 290), (52, 268), (65, 248), (80, 231), (100, 214), (111, 207), (113, 187),
            (120, 186), (127, 169), (140, 157), (160, 150), (183, 149), (182, 136), (174, 129),
            (164, 115), (156, 97), (153, 75), (158, 55), (170, 43), (188, 32), (200, 22),
        ),
    ),
)  # fmt: skip

_CAT = Trace(
    "chelsea.png",
    (
        (
            (42, 0), (46, -30), (56, -62), (64, -72), (78, -66), (100, -40), (122, -24),
            (180, -34), (240, -34), (300, -24), (330, -40), (358, -66), (374, -74), (384, -68),
            (392, -40), (397, 0), (390, 20), (378, 40), (365, 60), (357, 75), (362, 100),
            (365, 125), (361, 150), (350, 175), (335, 196), (320, 215), (314, 240), (311, 262),
            (300, 275), (288, 282), (278, 299), (16, 299), (12, 270), (12, 240), (16, 200),
            (22, 165), (30, 140), (38, 118), (30, 92), (33, 60), (37, 25),
        ),
    ),
    band_px=6,
    top_px=80,
)  # fmt: skip

_CUP = Trace(
    "coffee.png",
    (
        _ellipse(278, 225, 200, 164),
        _ellipse(289, 112, 116, 95),
        ((398, 76), (408, 66), (420, 68), (425, 77), (416, 110), (400, 135)),
    ),
)

_MAN = Trace(
    "camera.png",
    (
        (
            (190, 68), (205, 63), (220, 66), (238, 75), (252, 88), (264, 102), (271, 115),
            (270, 130), (262, 137), (276, 139), (324, 139), (325, 155), (320, 160), (318, 172),
            (327, 168), (331, 185), (332, 200), (325, 208), (312, 214), (308, 235), (300, 248),
            (301, 262), (305, 274), (290, 286), (270, 300), (246, 313), (225, 305), (206, 293),
            (190, 315), (170, 341), (142, 381), (147, 410), (150, 440), (152, 511), (0, 511),
            (0, 258), (15, 235), (28, 215), (40, 195), (55, 170), (70, 150), (90, 135), (110, 127),
            (130, 124), (140, 112), (155, 106), (162, 105), (165, 90), (175, 78),
        ),
    ),
    holes=((
        (246, 184), (258, 181), (270, 186), (274, 198), (268, 208), (248, 246), (244, 232),
        (241, 212), (241, 200),
    ),),
    thin=(
        ((288, 212), (298, 212), (298, 486), (288, 486)),
        ((279, 313), (311, 313), (311, 346), (288, 346), (286, 331), (279, 331)),
        ((308, 318), (318, 310), (324, 303), (334, 300), (338, 304), (334, 308), (312, 322)),
        ((281, 330), (290, 332), (252, 485), (244, 512), (231, 512), (233, 486)),
        ((307, 330), (314, 330), (398, 486), (406, 512), (396, 512), (384, 490)),
    ),
    band_px=4,
)  # fmt: skip

_MOTORCYCLE = Trace(
    "motorcycle_left.png",
    (
        (
            (92, 200), (100, 196), (118, 198), (150, 196), (140, 176), (137, 158), (142, 148),
            (155, 144), (165, 149), (168, 160), (185, 161), (215, 165), (243, 167), (255, 178),
            (270, 190), (300, 195), (330, 190), (350, 188), (360, 194), (380, 180), (384, 174),
            (372, 168), (360, 174), (356, 168), (372, 156), (385, 142), (400, 133), (412, 124),
            (432, 124), (446, 136), (464, 142), (468, 125), (485, 120), (500, 118), (500, 105),
            (495, 85), (505, 78), (518, 82), (528, 92), (546, 98), (544, 103), (530, 102),
            (537, 115), (531, 124), (546, 121), (560, 127), (563, 119), (575, 117), (582, 128),
            (578, 140), (562, 142), (559, 165), (547, 184), (553, 190), (547, 205), (578, 261),
            (600, 265), (625, 280), (645, 305), (642, 314), (657, 328), (671, 350), (682, 385),
            (685, 418), (676, 440), (656, 452), (630, 455), (605, 446), (575, 426), (548, 400),
            (529, 372), (517, 348), (510, 338), (506, 325), (505, 305), (512, 290), (526, 279),
            (508, 240), (500, 228), (474, 234), (478, 256), (480, 300), (471, 330), (452, 356),
            (430, 376), (400, 381), (352, 378), (338, 378), (337, 410), (336, 430), (330, 437),
            (321, 434), (328, 426), (330, 392), (322, 372), (290, 364), (278, 369), (262, 386),
            (240, 399), (210, 403), (180, 396), (155, 379), (135, 352), (124, 320), (122, 290),
            (129, 265), (143, 250), (156, 244), (140, 246), (115, 247), (104, 242), (101, 228),
            (108, 221), (92, 216),
        ),
    ),
    holes=(((519, 218), (541, 206), (568, 262), (545, 268), (530, 272)),),
    band_px=3,
)  # fmt: skip

_TRACES = {
    "woman": _WOMAN,
    "cat": _CAT,
    "cup": _CUP,
    "man": _MAN,
    "motorcycle": _MOTORCYCLE,
}
KINDS = (*_TRACES, "horse")
# Hue of the paint of each kind that can be recolored, as a fraction of the color circle.
_PAINT_HUES = {"woman": 0.045, "cup": 0.02, "motorcycle": 0.0}
_NEW_HUES = {"blue": 0.6, "green": 0.36}


def _filled(outlines: tuple[Outline, ...], size: tuple[int, int], top_px: int) -> Mask:
    """Return the (H, W) mask of the union of outlines, shifted down by `top_px` rows."""
    canvas = Image.new("1", size)
    for outline in outlines:
        ImageDraw.Draw(canvas).polygon([(x, y + top_px) for x, y in outline], fill=1)
    return np.asarray(canvas)


def _eroded(mask: Mask, radius_px: int) -> Mask:
    """Return `mask` shrunk by `radius_px`; the edges of the photo do not count as edges."""
    # A subject that the photo cuts off must not shrink there: padding moves that edge away.
    grown = np.pad(mask, radius_px, mode="edge").astype(np.uint8) * 255
    shrunk = Image.fromarray(grown).filter(ImageFilter.MinFilter(2 * radius_px + 1))
    return np.asarray(shrunk)[radius_px:-radius_px, radius_px:-radius_px] > 0


def _refined(pixels: Pixels, mask: Mask, band_px: int) -> npt.NDArray[np.float64]:
    """Return (H, W) opacity in [0, 1], with the true edge within `band_px` of that of the mask."""
    # Only the band around the traced line is left for the random walker to decide.
    seeds = np.zeros(mask.shape, np.int8)
    seeds[_eroded(mask, band_px)] = 1
    seeds[_eroded(~mask, band_px)] = 2
    found = random_walker(
        pixels / 255.0,
        seeds,
        beta=600,
        mode="bf",
        return_full_prob=True,
        channel_axis=-1,
    )
    sharpened = np.clip((found[0] - 0.5) * 2.5 + 0.5, 0, 1)
    return np.asarray(sharpened, dtype=np.float64)


def _silhouette() -> Image.Image:
    """Return the horse of scikit-image, a transparent silhouette, shaded like a dark coat."""
    with Image.open(_DATA / "horse.png") as drawing:
        dark = np.asarray(drawing.convert("RGBA"))
    alpha = np.where(dark[..., :3].max(-1) < 128, dark[..., 3], 0)
    down = np.linspace(1, 0, len(alpha))[:, None]
    grain = np.random.default_rng(0).normal(0, 5, alpha.shape)
    coat = (14 + 26 * down + grain)[..., None] * [1.0, 0.9, 0.85]
    cut = Image.fromarray(np.dstack([coat.clip(0, 255), alpha]).astype(np.uint8))
    return cut.crop(cut.getchannel("A").getbbox())


def _cut(trace: Trace) -> Image.Image:
    """Return the traced subject as RGBA, cropped to what is visible."""
    source = read_image(_DATA / trace.file_name)
    pixels = np.pad(source, ((trace.top_px, 0), (0, 0), (0, 0)), mode="reflect")
    size = (pixels.shape[1], pixels.shape[0])
    mask = _filled(trace.outlines, size, trace.top_px)
    mask = mask & ~_filled(trace.holes, size, trace.top_px)
    alpha = np.rint(_refined(pixels, mask, trace.band_px) * 255).astype(np.uint8)
    # After the refinement, which would erode thin parts away.
    alpha[_filled(trace.thin, size, trace.top_px)] = 255
    soft = Image.fromarray(alpha).filter(ImageFilter.GaussianBlur(0.8))
    cut = Image.fromarray(np.dstack([pixels, np.asarray(soft)]))
    return cut.crop(soft.point(lambda value: 255 if value > 24 else 0).getbbox())


@cache
def cut_out(kind: str, color: str = "") -> Image.Image:
    """Return one subject as an RGBA image, cropped to what is visible.

    Args:
        kind: one of `KINDS`.
        color: "" keeps the original; "blue" or "green" recolors suit, cup or motorcycle; "grey"
            removes all color.

    Raises:
        ValueError: the kind is unknown or cannot have this color.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if color:
        return _painted(cut_out(kind), kind, color)
    return _cut(_TRACES[kind]) if kind in _TRACES else _silhouette()


def _painted(cut: Image.Image, kind: str, color: str) -> Image.Image:
    """Return the cutout in another color; only saturated pixels near its own hue change."""
    hsv = rgb2hsv(np.asarray(cut)[..., :3])
    if color == "grey":
        hsv[..., 1] *= 0.08
    elif kind in _PAINT_HUES and color in _NEW_HUES:
        # Hues form a circle: the distance between .95 and .05 is .1.
        away = np.abs((hsv[..., 0] - _PAINT_HUES[kind] + 0.5) % 1 - 0.5)
        painted = (away < 0.05) & (hsv[..., 1] > 0.55)
        hsv[..., 0] = np.where(painted, _NEW_HUES[color], hsv[..., 0])
    else:
        raise ValueError(f"a {kind} does not come in {color!r}")
    rgb = np.rint(hsv2rgb(hsv) * 255).astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, np.asarray(cut)[..., 3]]))
