"""Verifies colors in the photos on which a calibration is fitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reir.datasets.dataset import ReferringDataset
from reir.datasets.generated_expressions import names_color
from reir.images.decode import read_image
from reir.query.stages import VerifyResult
from reir.query.verify.scores import VERIFIED_INSTANCES
from reir.records import FloatArray
from reir_training.report.calibration import ScoreTable, best_photos

if TYPE_CHECKING:
    from reir.models.nano.color_reader import ColorReader


Searches = Iterable[tuple[int, npt.NDArray[np.int64]]]
"""Pairs of an expression and the photos in which it is searched for; numbers of a `ScoreTable`."""


def read_colors(  # noqa: PLR0913 - what is searched for in what, and the photos
    scored: ScoreTable,
    reader: ColorReader,
    dataset: ReferringDataset,
    images_dir: Path,
    *,
    searches: Searches,
    photos: Searches,
) -> dict[tuple[int, int], list[VerifyResult]]:
    """Return what pixels say about the colors in expressions, as `ScoreTable.readings` wants it.

    Args:
        scored: scores of all expressions on the photos of the dataset.
        reader: color reader of the checkpoint.
        dataset: the photos.
        images_dir: their folder.
        searches: of galleries. The best instance of each photo among the first hits is verified.
        photos: single photos for each expression. The first instances of each are verified.

    Raises:
        ImageError: a photo cannot be decoded.
    """
    readings: dict[tuple[int, int], list[VerifyResult]] = {}
    for photo, wanted in _by_photo(scored, searches, photos).items():
        image = dataset.images[int(scored.photos[photo])]
        size_px = np.array([image.width_px, image.height_px] * 2)
        asked: list[tuple[FloatArray, str]] = []
        owners: list[int] = []
        for expression, num in wanted.items():
            boxes_px = scored.first_boxes_px(expression, photo, num)
            for box in (boxes_px / size_px).astype(np.float32):
                asked.append((box, scored.texts[expression]))
                owners.append(expression)
        # All instances of a photo together, so that it is decoded once.
        found = reader.read(read_image(images_dir / image.file_name), asked)
        for expression, of_one in zip(owners, found, strict=True):
            readings.setdefault((expression, photo), []).append(tuple(of_one))
    return readings


def _by_photo(
    scored: ScoreTable, searches: Searches, photos: Searches
) -> dict[int, dict[int, int]]:
    """Return the number of instances to read for each expression that names a color, by photo."""
    colored = [names_color(text) for text in scored.texts]
    wanted: dict[int, dict[int, int]] = defaultdict(dict)
    for expression, searched in searches:
        if colored[expression]:
            for photo in best_photos(scored, expression, searched).tolist():
                wanted[photo][expression] = 1
    for expression, searched in photos:
        if colored[expression]:
            for photo in searched.tolist():
                wanted[photo][expression] = VERIFIED_INSTANCES
    return wanted
