"""`ViewsEncoder`: encodes parts of large photos as well, with any `InstanceEncoder`.

A model resizes photos to its own resolution, so it misses small instances in a large photo. Here, a
large photo is encoded as a whole and in parts, which subclasses choose. Boxes that an inner edge of
a part cuts are dropped: they are complete in another part or in the whole photo. Instances that
several views contain are merged by box and vector.
"""

# Shapes: T parts of one photo, N instances of one photo, D vector dimension, H x W pixels

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from reir.errors import ConfigError
from reir.images.boxes import elementwise_iou
from reir.models.delegating_encoder import DelegatingEncoder
from reir.models.interfaces import InstanceEncoder
from reir.models.masked_encoder import MaskedEncoder
from reir.records import FloatArray, Instances, RgbImage

VIEWS_AT_ONCE = 8
"""Number of views to encode at once: a large photo has many, and each takes memory."""

_EDGE = 0.01
"""Fraction of a part's side within which a box counts as touching its edge."""


@dataclass(frozen=True, kw_only=True)
class ViewSettings(ABC):
    """When a photo is also encoded in parts, and how their instances are merged.

    They are part of a version's settings.

    Attributes:
        above_px: photos with a longer side than this are encoded in parts.
        times: such a photo keeps this many times the encoder's `num_candidates`.
        same_iou, same_similarity: two instances of different views are the same if both the IoU of
            their boxes and the inner product of their vectors are larger than these.

    Raises:
        ConfigError: a value is out of range.
    """

    prefix: ClassVar[str]
    at_least_1: ClassVar[tuple[str, ...]] = ("above_px", "times")

    above_px: int = 1600
    times: int = 4
    same_iou: float = 0.5
    same_similarity: float = 0.5

    def __post_init__(self) -> None:
        """Check the values."""
        for name in self.at_least_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")

    @property
    def settings(self) -> dict[str, int | float]:
        """The values under the names that a version stores them by."""
        return {f"{self.prefix}{name}": value for name, value in asdict(self).items()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self | None:
        """Return these settings of a version; None if it was indexed without them."""
        if not cls().settings.keys() <= settings.keys():
            return None
        return cls(**{each.name: settings[f"{cls.prefix}{each.name}"] for each in fields(cls)})

    def apply(self, encoder: InstanceEncoder) -> InstanceEncoder:
        """Return an encoder that also encodes parts of large photos.

        Raises:
            ConfigError: the encoder itself returns masks, which cannot be merged.
        """
        if isinstance(encoder, MaskedEncoder):  # which segments the merged instances
            return encoder.with_encoder(self.apply)
        return self._encoder(encoder)

    @abstractmethod
    def _encoder(self, encoder: InstanceEncoder) -> ViewsEncoder:
        """Return the encoder of parts around one without masks."""


@dataclass(frozen=True)
class _View:
    """A part of photo number `photo`: its pixels, and its (4,) normalized box in the photo."""

    photo: int
    pixels: RgbImage
    frame: FloatArray


class ViewsEncoder(DelegatingEncoder, ABC):
    """An `InstanceEncoder` that also encodes parts of large photos.

    Args:
        encoder: encodes whole photos and parts.
        views: when photos are encoded in parts, and how instances are merged.

    Raises:
        ConfigError: the encoder returns masks, which cannot be merged across views.
    """

    masks = False

    def __init__(self, encoder: InstanceEncoder, views: ViewSettings) -> None:
        if encoder.masks:
            raise ConfigError(
                "the masks of this encoder cannot be merged across parts of a photo; use "
                "--large-photos whole, or an encoder without masks"
            )
        super().__init__(encoder)
        self.views = views

    @property
    def num_candidates(self) -> int:
        """Maximum number of instances per photo."""
        return self._encoder.num_candidates * self.views.times

    @abstractmethod
    def parts(self, image: RgbImage) -> npt.NDArray[np.int64]:
        """Return the (T, 4) xyxy parts, in pixels, of a photo that is larger than `above_px`."""

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each photo, by descending objectness."""
        found: list[list[tuple[Instances, FloatArray]]] = [[] for _ in images]
        views = self._views(images)
        # One group after the other, so that the pixels of few parts are in memory.
        while group := list(islice(views, VIEWS_AT_ONCE)):
            answers = self._encoder.encode_images([view.pixels for view in group])
            for view, instances in zip(group, answers, strict=True):
                found[view.photo].append((instances, view.frame))
        return [self._merge(parts) for parts in found]

    def _views(self, images: Sequence[RgbImage]) -> Iterator[_View]:
        """Yield every photo, followed by its parts."""
        for number, image in enumerate(images):
            height_px, width_px = image.shape[:2]
            yield _View(number, image, np.array([0, 0, 1, 1], dtype=np.float32))
            if max(height_px, width_px) <= self.views.above_px:
                continue
            for x1, y1, x2, y2 in self.parts(image).tolist():
                frame = np.array([x1 / width_px, y1 / height_px, x2 / width_px, y2 / height_px])
                pixels = np.ascontiguousarray(image[y1:y2, x1:x2])
                yield _View(number, pixels, frame.astype(np.float32))

    def _merge(self, parts: Sequence[tuple[Instances, FloatArray]]) -> Instances:
        """Merge the instances of all views of one photo; the first view is the whole photo."""
        whole = parts[0][0]
        if len(parts) == 1:
            return whole
        kept = [drop_cut_boxes(instances, frame) for instances, frame in parts]
        boxes, objectness, vectors = (np.concatenate(each) for each in zip(*kept, strict=True))
        view_N = np.repeat(np.arange(len(kept)), [len(each[0]) for each in kept])
        chosen = self._distinct_rows(boxes, objectness, vectors, view_N)
        return Instances(
            boxes=boxes[chosen],
            objectness=objectness[chosen],
            vectors=vectors[chosen],
            image_vector=whole.image_vector,
        )

    def _distinct_rows(
        self,
        boxes: FloatArray,
        objectness: FloatArray,
        vectors: FloatArray,
        view_N: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Return the rows of instances, best first, without those found better in another view."""
        waiting = np.argsort(-objectness, kind="stable")
        chosen: list[int] = []
        while waiting.size and len(chosen) < self.num_candidates:
            best, waiting = int(waiting[0]), waiting[1:]
            chosen.append(best)
            iou = elementwise_iou(boxes[best], boxes[waiting])
            # Two people behind each other have overlapping boxes, but different vectors.
            alike = vectors[waiting] @ vectors[best] > self.views.same_similarity
            # Instances of one view are distinct already, since its encoder applies NMS.
            same = (iou > self.views.same_iou) & alike & (view_N[waiting] != view_N[best])
            waiting = waiting[~same]
        return np.array(chosen, dtype=np.int64)


def drop_cut_boxes(
    instances: Instances, frame: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return boxes in the whole photo, objectness and vectors, without boxes that an edge cuts.

    Args:
        instances: of the part.
        frame: (4,) xyxy of the part in [0, 1] of the photo.
    """
    # Only at edges within the photo: at the border of the photo itself, an instance is complete.
    near = instances.boxes[:, :2] <= _EDGE
    far = instances.boxes[:, 2:] >= 1 - _EDGE
    inner_near, inner_far = frame[:2] > 0, frame[2:] < 1
    kept = ~((near & inner_near) | (far & inner_far)).any(axis=1)
    corner, size = np.tile(frame[:2], 2), np.tile(frame[2:] - frame[:2], 2)
    boxes = np.clip(instances.boxes[kept] * size + corner, 0, 1)
    return boxes.astype(np.float32), instances.objectness[kept], instances.vectors[kept]
