"""`TiledEncoder`: encodes large photos in tiles that overlap and cover the whole photo.

Instances that are smaller than the overlap are complete in some tile.
"""

# Shapes: T tiles of one photo

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from reir.errors import ConfigError
from reir.images.views import ViewsEncoder, ViewSettings
from reir.models.interfaces import InstanceEncoder
from reir.records import RgbImage


@dataclass(frozen=True, kw_only=True)
class Tiling(ViewSettings):
    """When and how a photo is divided into tiles; see `ViewSettings`.

    Attributes:
        side_px: side of a tile; larger if a photo would otherwise need more than `max_tiles`.
        overlap: minimum overlap of neighboring tiles, as a fraction of the side.
        max_tiles: maximum number of tiles per photo.

    Raises:
        ConfigError: a value is out of range.
    """

    prefix: ClassVar[str] = "tile_"
    at_least_1: ClassVar[tuple[str, ...]] = ("above_px", "side_px", "max_tiles", "times")

    side_px: int = 832
    overlap: float = 0.2
    max_tiles: int = 64

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap must be at least 0 and below 1, got {self.overlap}")

    def tiles(self, width_px: int, height_px: int) -> npt.NDArray[np.int64]:
        """Return the (T, 4) xyxy tiles of a photo in pixels, row by row; none for a small photo."""
        if max(width_px, height_px) <= self.above_px:
            return np.empty((0, 4), dtype=np.int64)
        side_px = self.side_px
        # Larger tiles rather than fewer: the whole photo has to be covered.
        while self._count(width_px, side_px) * self._count(height_px, side_px) > self.max_tiles:
            side_px = math.ceil(side_px * 1.1)
        columns, rows = self._places(width_px, side_px), self._places(height_px, side_px)
        return np.array(
            [
                (x, y, min(x + side_px, width_px), min(y + side_px, height_px))
                for y in rows
                for x in columns
            ],
            dtype=np.int64,
        )

    def _count(self, length_px: int, side_px: int) -> int:
        """Return how many tiles cover a length."""
        if length_px <= side_px:
            return 1
        step_px = max(side_px * (1 - self.overlap), 1.0)
        return 1 + math.ceil((length_px - side_px) / step_px)

    def _places(self, length_px: int, side_px: int) -> list[int]:
        """Return the evenly spaced starts of the tiles."""
        # Evenly, so that all overlaps are equal and no tile extends beyond the photo.
        last = max(length_px - side_px, 0)
        return [round(place) for place in np.linspace(0, last, self._count(length_px, side_px))]

    def _encoder(self, encoder: InstanceEncoder) -> TiledEncoder:
        return TiledEncoder(encoder, self)


class TiledEncoder(ViewsEncoder):
    """An `InstanceEncoder` that also encodes the tiles of large photos.

    Args:
        encoder: encodes whole photos and tiles.
        tiling: when and how to divide photos.

    Raises:
        ConfigError: the encoder returns masks, which cannot be merged across tiles.
    """

    def __init__(self, encoder: InstanceEncoder, tiling: Tiling) -> None:
        super().__init__(encoder, tiling)
        self._tiling = tiling

    def parts(self, image: RgbImage) -> npt.NDArray[np.int64]:
        """Return the tiles of a photo; see `Tiling.tiles`."""
        height_px, width_px = image.shape[:2]
        return self._tiling.tiles(width_px, height_px)
