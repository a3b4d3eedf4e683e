"""`ScoreTable`: the scores of expressions on photos, from which a calibration is fitted."""

# Shapes: M expressions, P photos, J instances, N instances of one photo

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from reir.errors import DataError
from reir.images.boxes import elementwise_iou
from reir.metrics import Gallery
from reir.query.presence import Background
from reir.query.stages import VerifyResult
from reir.query.verify.scores import RankedInstances, by_score, rank_instances, scores_in_photo
from reir.records import FloatArray
from reir_training.report.calibration_queries import CalibrationQueries

MATCH_IOU = 0.5
"""An instance is right if its box overlaps the described box by at least this IoU."""

MIN_GALLERY = 20
"""The share of correct answers among fewer photos would mostly be noise."""

MIN_PHOTOS = MIN_GALLERY + 1
"""A gallery without the photo that an expression describes has only the others."""

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.bool_]
Pair = tuple[int, int]
"""An expression and a photo; numbers of a `ScoreTable`."""


@dataclass(frozen=True)
class PixelEvidence:
    """What photos say about expressions beyond the vectors of their instances.

    Attributes:
        hits: what the pixels say about the colors of a photo's best instance, as a search verifies
            it; nothing for expressions without colors.
        instances: what the pixels say about the colors of a photo's first instances.
    """

    hits: Mapping[Pair, VerifyResult] = field(default_factory=dict)
    instances: Mapping[Pair, Sequence[VerifyResult]] = field(default_factory=dict)


class ScoreTable:
    """The score of every expression on every photo.

    Attributes:
        best: (M, P) score of the best instance of each photo.
        right: (M, P) whether that instance is the described one.
        counts: (P,) number of instances of each photo.
        own: (M,) the photo that each expression describes.
        background: (M,) score of each expression on the background.
        texts: M expressions.
        alike: M arrays of photos that may show what the expression describes.
        photos: (P,) position of each photo in the dataset.
        pixels: what the photos themselves say; nothing at first.
    """

    def __init__(
        self,
        gallery: Gallery,
        queries: CalibrationQueries,
        background: Background,
        candidate_dims: int = 0,
    ) -> None:
        """Score all expressions; photos without instances, and their expressions, are dropped.

        Args:
            gallery: the photos.
            queries: the expressions.
            background: of the encoder.
            candidate_dims: of the encoder, see `CandidateEncoder`.

        Raises:
            DataError: there are too few photos to draw galleries from.
        """
        photos, starts, counts = np.unique(gallery.images, return_index=True, return_counts=True)
        if len(photos) < MIN_PHOTOS:
            raise DataError(
                f"calibration needs at least {MIN_PHOTOS} photos with instances, got "
                f"{len(photos)}: use more photos"
            )
        kept = np.isin(queries.images, photos)
        self.vectors = queries.vectors[kept]
        self.boxes_px = queries.boxes_px[kept]
        # `photos` is sorted, because `np.unique` sorts.
        self.own = np.searchsorted(photos, queries.images[kept])
        self.texts = [text for text, here in zip(queries.texts, kept, strict=True) if here]
        self.pixels = PixelEvidence()
        self.photos = photos
        self.alike = [
            np.flatnonzero(np.isin(photos, list(alike)))
            for alike, here in zip(queries.alike, kept, strict=True)
            if here
        ]
        self.background = [background.score(vector) for vector in self.vectors]
        self.counts, self._starts, self._gallery = counts, starts, gallery
        self._candidate_dims = candidate_dims
        # `reduceat` relies on the order in which galleries are encoded: photo by photo.
        scores_MJ = self.vectors @ gallery.vectors.T
        self.best = np.maximum.reduceat(scores_MJ, starts, axis=1).astype(np.float64)
        self.right = np.zeros(self.best.shape, dtype=np.bool_)
        for m, photo in enumerate(self.own):
            best = self.best_box_px(m, int(photo))
            self.right[m, photo] = elementwise_iou(self.boxes_px[m], best[None])[0] >= MATCH_IOU

    @property
    def unique(self) -> npt.NDArray[np.bool_]:
        """(M,) whether an expression describes one instance of all photos."""
        return np.array([len(photos) == 1 for photos in self.alike])

    def best_box_px(self, expression: int, photo: int) -> Floats:
        """Return the (4,) xyxy box of the instance of a photo that a search finds."""
        rows = self._rows(photo)
        vectors, vector, _ = self._compared(expression, photo)
        best = by_score(vectors @ vector)[0]
        return np.asarray(self._gallery.boxes_px[rows][best], dtype=np.float64)

    def first_boxes_px(self, expression: int, photo: int, num: int) -> Floats:
        """Return the (num', 4) xyxy boxes of the first instances of a photo."""
        first = by_score(scores_in_photo(*self._compared(expression, photo)))[:num]
        return np.asarray(self._gallery.boxes_px[self._rows(photo)][first], dtype=np.float64)

    def _compared(self, expression: int, photo: int) -> tuple[FloatArray, FloatArray, int]:
        """Return the arguments of `scores_in_photo` for an expression and a photo."""
        vectors = self._gallery.vectors[self._rows(photo)]
        return vectors, self.vectors[expression], self._candidate_dims

    def _rows(self, photo: int) -> slice:
        return slice(self._starts[photo], self._starts[photo] + self.counts[photo])

    def within(
        self, expression: int, photo: int, *, verified: bool
    ) -> tuple[RankedInstances, Labels]:
        """Return the instances of a photo, and which of them are the described one."""
        rows = self._rows(photo)
        pixels = self.pixels if verified else PixelEvidence()
        ranked = rank_instances(
            *self._compared(expression, photo), pixels.instances.get((expression, photo), ())
        )
        if photo != self.own[expression]:
            return ranked, np.zeros(len(ranked.order), dtype=np.bool_)
        boxes_px = self._gallery.boxes_px[rows][ranked.order]
        return ranked, elementwise_iou(self.boxes_px[expression], boxes_px) >= MATCH_IOU
