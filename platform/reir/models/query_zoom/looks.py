"""`Look`: the instances that an encoder finds in a part of a photo."""

# Shapes: N instances, D vector dimension

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from reir.images.views import drop_cut_boxes
from reir.models.interfaces import InstanceEncoder
from reir.models.query_zoom.frames import FrameGrid
from reir.records import Box, FloatArray, RgbImage


@dataclass(frozen=True)
class Look:
    """What a look at a part of a photo shows, whatever the search is for.

    Attributes:
        frame: (4,) xyxy of the part, in [0, 1] of the photo.
        boxes: (N, 4) xyxy in [0, 1] of the photo; without instances that the frame cuts.
        objectness: (N,) in [0, 1].
        vectors: (N, D).
    """

    frame: FloatArray
    boxes: FloatArray
    objectness: FloatArray
    vectors: FloatArray


class PhotoLooks:
    """The looks at one photo; each part is encoded once.

    Args:
        grid: the parts of the photo.
        encode: encodes a part.
        known: looks that were encoded before.
    """

    def __init__(
        self,
        grid: FrameGrid,
        encode: Callable[[FloatArray], Look],
        known: Iterable[Look] = (),
    ) -> None:
        self.grid, self._encode = grid, encode
        # Floats are safe as keys here, because all frames of a photo come from the same grid.
        self._known = {as_box(look.frame): look for look in known}

    @classmethod
    def of(
        cls, encoder: InstanceEncoder, image: RgbImage, known: Iterable[Look] = ()
    ) -> PhotoLooks:
        """Return the looks of an encoder at a photo: (H, W, 3) uint8, upright."""
        height, width = image.shape[:2]
        return cls(FrameGrid(width, height), lambda frame: look_at(encoder, image, frame), known)

    @property
    def known(self) -> tuple[Look, ...]:
        """All looks so far."""
        return tuple(self._known.values())

    def at(self, frame: FloatArray) -> Look:
        """Look at a part of the photo: (4,) xyxy of whole pixels, in [0, 1]."""
        place = as_box(frame)
        if place not in self._known:
            self._known[place] = self._encode(frame)
        return self._known[place]


def look_at(encoder: InstanceEncoder, image: RgbImage, frame: FloatArray) -> Look:
    """Encode a part of a photo.

    Args:
        encoder: finds the instances.
        image: (H, W, 3) uint8, upright.
        frame: (4,) xyxy of whole pixels, in [0, 1] of the photo.
    """
    height, width = image.shape[:2]
    # Rounded instead of truncated, since a float32 share may lie just below its pixel.
    x1, y1, x2, y2 = np.rint(frame * np.array([width, height] * 2)).astype(int).tolist()
    (found,) = encoder.encode_images([np.ascontiguousarray(image[y1:y2, x1:x2])])
    return Look(np.asarray(frame, dtype=np.float32), *drop_cut_boxes(found, frame))


def as_box(corners: FloatArray) -> Box:
    """Return (4,) corners as a box."""
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2
