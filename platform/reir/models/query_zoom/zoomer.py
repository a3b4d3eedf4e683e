"""`InstanceZoomer`: zooms into photos with the instances of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reir.errors import ConfigError
from reir.models.interfaces import InstanceEncoder, Zoomer
from reir.models.localizers import load_localizer_spec
from reir.models.query_zoom.looks import PhotoLooks
from reir.models.query_zoom.policy import ZoomPolicy
from reir.models.query_zoom.rule import ZoomRule
from reir.models.zoom_steps import ZoomSearch
from reir.records import FloatArray, RgbImage


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


def zoomer_of(encoder: InstanceEncoder, policy: ZoomPolicy | None) -> InstanceZoomer:
    """Return the zoomer of an encoder: with the policy of its checkpoint, or with the rule."""
    return InstanceZoomer(encoder, policy or ZoomRule())


def load_zoomer_spec(spec: str) -> Zoomer:
    """Load the zoomer of a spec: a localizer that zooms in, such as `piza:DIR`.

    Raises:
        ConfigError: the spec cannot be parsed, a package that it needs is not installed, or the
            localizer does not zoom in.
        CheckpointError: the model is missing, incomplete or of another kind.
    """
    found = load_localizer_spec(spec)
    if not isinstance(found, Zoomer):
        raise ConfigError(f"localizer {spec!r} does not zoom in; use piza:DIR")
    return found
