"""`WeakLocalizer`: a trained `WeakRec` as an `ExpressionLocalizer`."""

# Shapes: B photos, A anchors

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from reir.models.interfaces import FoundBoxes
from reir.models.weak_rec.checkpoint import load_weak_rec, weights_digest
from reir.models.weak_rec.model import WeakRec
from reir.records import RgbImage

BATCH = 16


class WeakLocalizer:
    """Finds what expressions describe; thread-safe after construction.

    Args:
        model: trained.
        digest: sha256 of its weights.
    """

    def __init__(self, model: WeakRec, digest: str) -> None:
        self._model, self._digest = model.eval(), digest

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        return self._digest

    @torch.inference_mode()
    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        """Return the anchors of each photo, best first; see `ExpressionLocalizer.localize`.

        The scores of a photo sum to 1: they say how clearly the expression prefers one anchor to
        the others, and not whether the photo shows what it describes.
        """
        if len(images) != len(expressions):
            raise ValueError(
                f"each photo needs one expression, got {len(images)} and {len(expressions)}"
            )
        found: list[FoundBoxes] = []
        for start in range(0, len(images), BATCH):
            some = slice(start, start + BATCH)
            found += self._localize_batch(images[some], expressions[some])
        return found

    def _localize_batch(
        self, images: Sequence[RgbImage], expressions: Sequence[str]
    ) -> list[FoundBoxes]:
        """Localize a few expressions; a photo that is given repeatedly is loaded only once."""
        unique = {id(image): image for image in images}
        places = {key: place for place, key in enumerate(unique)}
        rows = [places[id(image)] for image in images]
        inputs = self._model.source.load(list(unique.values()))
        anchors = self._model.anchors({name: value[rows] for name, value in inputs.items()})
        scores_BA = self._model.score(anchors, self._model.language.load(expressions))
        boxes_BA4 = anchors.answers()
        return [
            _best_first(boxes[valid], scores[valid])
            for boxes, scores, valid in zip(boxes_BA4, scores_BA, anchors.valid, strict=True)
        ]


def _best_first(boxes: torch.Tensor, scores: torch.Tensor) -> FoundBoxes:
    order = scores.argsort(descending=True, stable=True)
    shares = scores.softmax(0)[order]
    return FoundBoxes(
        np.asarray(boxes[order].numpy(), np.float32), np.asarray(shares.numpy(), np.float32)
    )


def load_weak_localizer(source: str) -> WeakLocalizer:
    """Load the model in a directory that `reir train --preset weak-rec` wrote.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(source).expanduser()
    return WeakLocalizer(load_weak_rec(folder), weights_digest(folder))
