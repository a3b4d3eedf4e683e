"""`InstanceZoomer` zooms into photos with an encoder; `OneLook` only looks, with a localizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reir.models.interfaces import ExpressionLocalizer, FoundBoxes, InstanceEncoder, Zoomer
from reir.models.localizers import load_localizer_spec
from reir.models.query_zoom.looks import PhotoLooks
from reir.models.query_zoom.policy import ZoomPolicy
from reir.models.query_zoom.rule import ZoomRule
from reir.models.zoom_steps import ZoomSearch, ZoomStep
from reir.records import Box, FloatArray, RgbImage

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class ZoomStrategy(Protocol):
    """Decides where to look: `ZoomPolicy` learned it, `ZoomRule` follows the best score."""

    def search(self, photo: PhotoLooks, expression_D: FloatArray) -> ZoomSearch:
        """Search a photo for the (D,) vector of an expression."""
        ...


class InstanceZoomer:
    """Implements `Zoomer` for every encoder.

    Args:
        encoder: finds the instances of each look, and encodes expressions.
        strategy: decides where to look.
    """

    def __init__(self, encoder: InstanceEncoder, strategy: ZoomStrategy) -> None:
        self._encoder, self._strategy = encoder, strategy

    def zoom(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[ZoomSearch]:
        """See `Zoomer.zoom`; parts of a photo that is given several times are encoded once."""
        vectors = self._encoder.encode_expressions(expressions)
        photos = {id(image): PhotoLooks.of(self._encoder, image) for image in images}
        return [
            self._strategy.search(photos[id(image)], vector)
            for image, vector in zip(images, vectors, strict=True)
        ]


class OneLook:
    """Implements `Zoomer` for a localizer that cannot zoom in: one look at the whole photo.

    Args:
        localizer: finds the best box of each photo.
    """

    def __init__(self, localizer: ExpressionLocalizer) -> None:
        self._localizer = localizer

    def zoom(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[ZoomSearch]:
        """See `Zoomer.zoom`; every search has one step."""
        return [_one_step(found) for found in self._localizer.localize(images, expressions)]


def _one_step(found: FoundBoxes) -> ZoomSearch:
    box, score = WHOLE, 0.0
    if len(found.boxes):
        x1, y1, x2, y2 = found.boxes[0].tolist()
        box, score = (x1, y1, x2, y2), float(found.scores[0])
    step = ZoomStep(frame=WHOLE, box=box, score=score, end=1.0)
    return ZoomSearch(steps=(step,), box=box, score=score)


def zoomer_of(encoder: InstanceEncoder, policy: ZoomPolicy | None) -> InstanceZoomer:
    """Return the zoomer of an encoder: with the policy of its checkpoint, or with the rule."""
    return InstanceZoomer(encoder, policy or ZoomRule())


def load_zoomer_spec(spec: str) -> Zoomer:
    """Load the zoomer of the spec of a localizer; one that cannot zoom in looks once.

    Raises:
        ConfigError: the spec cannot be parsed, or a package that it needs is not installed.
        CheckpointError: the model is missing, incomplete or of another kind.
    """
    found = load_localizer_spec(spec)
    return found if isinstance(found, Zoomer) else OneLook(found)
