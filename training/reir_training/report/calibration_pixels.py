"""Opens the photos on which a calibration is fitted, as searches with pixels do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reir.datasets.dataset import ReferringDataset
from reir.datasets.generated_expressions import names_color
from reir.images.decode import read_image
from reir.query.stages import VerifyResult
from reir.query.verify.scores import VERIFIED_INSTANCES
from reir_training.report.calibration import best_photos
from reir_training.report.score_table import Pair, PixelEvidence, ScoreTable

if TYPE_CHECKING:
    from reir.models.nano.color_reader import ColorReader

Searches = Iterable[tuple[int, npt.NDArray[np.int64]]]
"""Pairs of an expression and the photos in which it is searched for; numbers of a `ScoreTable`."""


def read_pixels(  # noqa: PLR0913 - the searches are by name
    reader: ColorReader,
    scored: ScoreTable,
    dataset: ReferringDataset,
    images_dir: Path,
    *,
    searches: Searches,
    photos: Searches,
) -> PixelEvidence:
    """Read the colors of the instances that searches verify.

    Args:
        reader: of the checkpoint.
        scored: scores of all expressions on the photos of the dataset.
        dataset: the photos.
        images_dir: their folder.
        searches: of galleries. The best instance of each photo among the first hits is verified.
        photos: single photos for each expression, whose first instances are verified.

    Raises:
        ImageError: a photo cannot be decoded.
    """
    # A set, because the same photo may be among the hits of an expression in several galleries.
    hits = {
        (expression, photo)
        for expression, searched in searches
        for photo in best_photos(scored, expression, searched).tolist()
    }
    boxes_px = {pair: scored.best_box_px(*pair)[None] for pair in hits}
    of_hits = _read_colors(reader, scored, dataset, images_dir, boxes_px)
    boxes_px = {pair: scored.first_boxes_px(*pair, VERIFIED_INSTANCES) for pair in _pairs(photos)}
    return PixelEvidence(
        hits={pair: readings[0] for pair, readings in of_hits.items()},
        instances=_read_colors(reader, scored, dataset, images_dir, boxes_px),
    )


def _read_colors(
    reader: ColorReader,
    scored: ScoreTable,
    dataset: ReferringDataset,
    images_dir: Path,
    boxes_px: dict[Pair, npt.NDArray[np.float64]],
) -> dict[Pair, Sequence[VerifyResult]]:
    """Read the colors of the boxes of each pair whose expression names a color."""
    colored = [names_color(text) for text in scored.texts]
    readings: dict[Pair, list[VerifyResult]] = defaultdict(list)
    for photo, expressions in _by_photo({each for each in boxes_px if colored[each[0]]}).items():
        image = dataset.images[int(scored.photos[photo])]
        size_px = np.array([image.width_px, image.height_px] * 2)
        asked = [
            ((box / size_px).astype(np.float32), expression)
            for expression in expressions
            for box in boxes_px[expression, photo]
        ]
        # All instances of a photo together, so that it is decoded once.
        pixels = read_image(images_dir / image.file_name)
        found = reader.read(pixels, [(box, scored.texts[each]) for box, each in asked])
        for (_, expression), of_one in zip(asked, found, strict=True):
            readings[expression, photo].append(tuple(of_one))
    return dict(readings)


def _pairs(searches: Searches) -> set[Pair]:
    return {(expression, photo) for expression, photos in searches for photo in photos.tolist()}


def _by_photo(pairs: Iterable[Pair]) -> dict[int, list[int]]:
    """Map each photo to its expressions."""
    found: dict[int, list[int]] = defaultdict(list)
    for expression, photo in sorted(pairs):
        found[photo].append(expression)
    return found
