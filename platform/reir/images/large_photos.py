"""The ways to encode large photos, by the name that the user chooses, and by version settings.

The command line imports this module at its start, so it imports numpy only when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reir.images.views import ViewSettings
    from reir.models.interfaces import InstanceEncoder


class LargePhotos(StrEnum):
    """How large photos are encoded."""

    WHOLE = "whole"
    """Only as a whole, like other photos."""

    ZOOM = "zoom"
    """Also in the parts that seem to show small instances."""

    TILES = "tiles"
    """Also in tiles that cover the photo."""

    @property
    def views(self) -> ViewSettings | None:
        """The default settings of this way; None for `WHOLE`."""
        kind = _kinds().get(self)
        return None if kind is None else kind()


def views_of(settings: Mapping[str, Any]) -> ViewSettings | None:
    """Return how a version with these settings encodes large photos; None for only as a whole."""
    found = (kind.from_settings(settings) for kind in _kinds().values())
    return next((views for views in found if views is not None), None)


def with_views(encoder: InstanceEncoder, views: ViewSettings | None) -> InstanceEncoder:
    """Return an encoder that encodes large photos in this way.

    Raises:
        ConfigError: the encoder itself returns masks, which cannot be merged.
    """
    return encoder if views is None else views.apply(encoder)


def _kinds() -> Mapping[LargePhotos, type[ViewSettings]]:
    from reir.images.tiling import Tiling
    from reir.images.zoom import Zoom

    return {LargePhotos.ZOOM: Zoom, LargePhotos.TILES: Tiling}
