"""Reads the colors of hits from their photos, so that a calibration knows verified scores."""

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
from reir_training.report.calibration import ScoreTable, best_photos

if TYPE_CHECKING:
    from reir.models.nano.color_reader import ColorReader


Searches = Iterable[tuple[int, npt.NDArray[np.int64]]]
"""Pairs of an expression and the photos in which it is searched for; numbers of a `ScoreTable`."""


def read_colors(
    scored: ScoreTable,
    searches: Searches,
    reader: ColorReader,
    dataset: ReferringDataset,
    images_dir: Path,
) -> dict[tuple[int, int], VerifyResult]:
    """Read the colors of the first hits of some searches, for `ScoreTable.readings`.

    Args:
        scored: scores of all expressions on the photos of the dataset.
        searches: expressions, and the photos in which each of them is searched for.
        reader: color reader of the checkpoint.
        dataset: the photos.
        images_dir: their folder.

    Raises:
        ImageError: a photo cannot be decoded.
    """
    readings: dict[tuple[int, int], VerifyResult] = {}
    for photo, expressions in _compared(scored, searches).items():
        image = dataset.images[int(scored.photos[photo])]
        size_px = np.array([image.width_px, image.height_px] * 2)
        # All hits of a photo together, so that it is decoded once.
        asked = [
            ((scored.best_box_px(each, photo) / size_px).astype(np.float32), scored.texts[each])
            for each in expressions
        ]
        found = reader.read(read_image(images_dir / image.file_name), asked)
        readings |= {
            (each, photo): tuple(of_one) for each, of_one in zip(expressions, found, strict=True)
        }
    return readings


def _compared(scored: ScoreTable, searches: Searches) -> dict[int, list[int]]:
    """Return the photos of first hits, each with the expressions that name a color."""
    colored = [names_color(text) for text in scored.texts]
    hits = {
        (photo, expression)
        for expression, photos in searches
        if colored[expression]
        for photo in best_photos(scored, expression, photos).tolist()
    }
    compared: dict[int, list[int]] = defaultdict(list)
    for photo, expression in sorted(hits):
        compared[photo].append(expression)
    return compared
