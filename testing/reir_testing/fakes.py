"""`FakeEncoder`: an instance encoder without weights, for tests that need correct answers fast.

It finds blobs of saturated colors and understands words for color, place, size and shape. So "the
small red one on the left" ranks the right blob first. `draw_scene` draws photos that it can encode.
"""

# Shapes: N instances of one image, H x W pixels, C colors of the palette, D = 16

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from reir.models.interfaces import FoundBoxes, InstanceChoices
from reir.records import FloatArray, Instances, RgbImage

Color = tuple[int, int, int]
BoxPx = tuple[int, int, int, int]

PALETTE: Mapping[str, Color] = {
    "red": (220, 20, 20),
    "green": (20, 160, 20),
    "blue": (20, 20, 220),
    "yellow": (240, 240, 20),
    "cyan": (20, 220, 220),
    "magenta": (220, 20, 220),
    "orange": (250, 130, 10),
    "purple": (110, 20, 140),
}
"""The colors that the fake encoder recognizes: color word -> RGB."""

_TRAITS = ("left", "right", "top", "bottom", "small", "large", "wide", "tall")
_SYNONYMS = {"upper": "top", "lower": "bottom", "big": "large", "little": "small", "tiny": "small"}
_AXES = {word: axis for axis, word in enumerate([*PALETTE, *_TRAITS])}
_COLORS_C3 = np.array(list(PALETTE.values()), dtype=np.float32)
# Distance in RGB. JPEG noise stays below it, and two colors of the palette differ by more.
_COLOR_TOLERANCE = 60.0
# Low enough that a color word outweighs any other word.
_TRAIT_WEIGHT = 0.4
# Share of the photo's pixels. Smaller blobs are noise, for example at the edges in a JPEG.
_SMALLEST_SHARE = 0.0005


def draw_scene(
    size_px: tuple[int, int],
    shapes: Sequence[tuple[str, BoxPx]],
    background: Color = (128, 128, 128),
) -> RgbImage:
    """Draw filled boxes of palette colors on a plain background.

    Args:
        size_px: (width, height).
        shapes: (color word, xyxy box in pixels) of each shape; later shapes cover earlier ones.
        background: RGB of the background; the fake encoder ignores grey, white and black.

    Returns:
        (H, W, 3) uint8.

    Raises:
        KeyError: a color word is not in `PALETTE`.
    """
    width, height = size_px
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:] = background
    for word, (x1, y1, x2, y2) in shapes:
        image[y1:y2, x1:x2] = PALETTE[word]
    return image


class FakeEncoder:
    """An `InstanceEncoder` that consists of rules: it is deterministic and fast, without weights.

    Each blob is an instance. A blob is all pixels of one palette color within adjacent columns, so
    shapes of the same color must not overlap horizontally. Vectors have unit length. A photo
    without colors of the palette has no instances.
    """

    dim = len(_AXES)
    masks = False

    def __init__(self, num_candidates: int = 30) -> None:
        """Keep at most `num_candidates` blobs of a photo, the largest first."""
        self.num_candidates = num_candidates
        self.digest = hashlib.sha256(b"reir fake encoder 1").hexdigest()

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each (H, W, 3) uint8 image, in the same order."""
        return [self._encode_image(image) for image in images]

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """Return (N, 16) float32 unit vectors.

        Unknown words are ignored, unless an expression has no other words.
        """
        rows = [_expression_vector(expression) for expression in expressions]
        return np.stack(rows) if rows else np.empty((0, self.dim), dtype=np.float32)

    def _encode_image(self, image: RgbImage) -> Instances:
        color_of_pixel = _nearest_color(image)
        blobs = sorted(_blobs(color_of_pixel), key=lambda blob: (-blob[2], blob[0], blob[1]))
        blobs = blobs[: self.num_candidates]
        boxes = np.array([box for _, box, _ in blobs], dtype=np.float32).reshape(-1, 4)
        vectors = [_instance_vector(color, box) for color, box, _ in blobs]
        histogram = np.zeros(self.dim, dtype=np.float32)
        for color, _, share in blobs:
            histogram[color] += share
        return Instances(
            boxes=boxes,
            # The root spreads the small shares of typical blobs over [0, 1], in the same order.
            objectness=np.array([share**0.25 for _, _, share in blobs], dtype=np.float32),
            vectors=np.array(vectors, dtype=np.float32).reshape(-1, self.dim),
            image_vector=_unit(histogram),
        )


class ChoosingFakeEncoder(FakeEncoder):
    """A fake encoder that is an `ExpressionChooser` as well.

    An expression chooses among all blobs, including those that are not among the query-free
    instances.

    Args:
        num_candidates: number of blobs that are kept without a query, the largest first.
    """

    def encode_images_for(
        self, images: Sequence[RgbImage], expressions: Sequence[FloatArray], num_kept: int
    ) -> list[InstanceChoices]:
        """Return the instances of each image: the largest, and the best for each expression."""
        every = FakeEncoder(num_candidates=1000).encode_images(images)
        return [
            InstanceChoices(query_free, tuple(_best(found, text, num_kept) for text in texts))
            for query_free, found, texts in zip(
                self.encode_images(images), every, expressions, strict=True
            )
        ]


class FakeLocalizer:
    """An `ExpressionLocalizer` that finds all blobs, and scores them as `FakeEncoder` does."""

    digest = hashlib.sha256(b"reir fake localizer 1").hexdigest()

    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        """Return the blobs of each image, best first for its expression."""
        encoder = FakeEncoder(num_candidates=1000)
        answers = []
        for found, vector in zip(
            encoder.encode_images(images), encoder.encode_expressions(expressions), strict=True
        ):
            best = _best(found, vector, len(found))
            answers.append(FoundBoxes(best.boxes, best.objectness))
        return answers


def _best(found: Instances, text: FloatArray, num_kept: int) -> Instances:
    scores = found.vectors @ text
    rows = np.argsort(-scores, kind="stable")[:num_kept]
    return Instances(
        boxes=found.boxes[rows],
        objectness=np.asarray((1 + scores[rows]) / 2, dtype=np.float32),
        vectors=found.vectors[rows],
        image_vector=found.image_vector,
    )


def _nearest_color(image: RgbImage) -> npt.NDArray[np.int64]:
    """Return the (H, W) index of the palette color of each pixel; -1 for other colors."""
    offsets = image.astype(np.float32)[:, :, None, :] - _COLORS_C3
    distance_hwc = np.sqrt((offsets**2).sum(axis=-1))
    near_enough = distance_hwc.min(axis=-1) <= _COLOR_TOLERANCE
    return np.where(near_enough, distance_hwc.argmin(axis=-1), -1)


def _blobs(
    color_of_pixel: npt.NDArray[np.int64],
) -> Iterator[tuple[int, tuple[float, float, float, float], float]]:
    """Yield (color, xyxy box in [0, 1], share of the pixels) for each blob."""
    height, width = color_of_pixel.shape
    for color in range(len(PALETTE)):
        mask = color_of_pixel == color
        edges = np.flatnonzero(np.diff(mask.any(axis=0), prepend=False, append=False))
        for x1, x2 in edges.reshape(-1, 2):
            run = mask[:, x1:x2]
            share = float(run.sum()) / mask.size
            if share < _SMALLEST_SHARE:
                continue
            rows = np.flatnonzero(run.any(axis=1))
            box = (x1 / width, rows[0] / height, x2 / width, (rows[-1] + 1) / height)
            yield color, box, share


def _instance_vector(color: int, box: tuple[float, float, float, float]) -> FloatArray:
    """Return a (16,) unit vector: the color as one-hot, and the traits of the box by degree."""
    x1, y1, x2, y2 = box
    side = ((x2 - x1) * (y2 - y1)) ** 0.5
    # Positive values stand for the second word of each pair in `_TRAITS`, negative for the first.
    signed = ((x1 + x2) - 1, (y1 + y2) - 1, 4 * side - 1, (y2 - y1) - (x2 - x1))
    vector = np.zeros(len(_AXES), dtype=np.float32)
    vector[color] = 1.0
    for pair, value in enumerate(signed):
        low = len(PALETTE) + 2 * pair
        vector[low + (value > 0)] = _TRAIT_WEIGHT * min(abs(value), 1.0)
    return _unit(vector)


def _expression_vector(expression: str) -> FloatArray:
    """Return a (16,) unit vector of the known words, or a random direction for unknown text."""
    vector = np.zeros(len(_AXES), dtype=np.float32)
    for word in re.findall(r"[a-z]+", expression.lower()):
        axis = _AXES.get(_SYNONYMS.get(word, word))
        if axis is not None:
            vector[axis] += 1.0 if axis < len(PALETTE) else _TRAIT_WEIGHT
    if not vector.any():
        # Seeded by the text: equal texts get equal vectors, but Python's own hash of a text differs
        # between processes.
        seed = int.from_bytes(hashlib.sha256(expression.encode()).digest()[:8], "big")
        vector = np.random.default_rng(seed).normal(size=vector.shape).astype(np.float32)
    return _unit(vector)


def _unit(vector: FloatArray) -> FloatArray:
    """Scale a vector to length 1; a vector of zeros becomes the diagonal."""
    if not vector.any():
        vector = np.ones_like(vector)
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)
