"""The fields of an instance that a filter can name.

The parser, the evaluation in numpy and the translation for Milvus all use this table.
"""

# Shapes: N instances

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reir.records import FloatArray


@dataclass(frozen=True)
class InstanceArrays:
    """The values that the number fields of instances are computed from.

    Attributes:
        boxes: (N, 4) float32, x1, y1, x2, y2 in shares of the photo.
        objectness: (N,) float32.
        photo_sizes: (N,) float32, for each instance the number of instances in its photo.
    """

    boxes: FloatArray
    objectness: FloatArray
    photo_sizes: FloatArray

    @classmethod
    def of_photo(cls, boxes: FloatArray, objectness: FloatArray) -> InstanceArrays:
        """All instances of one photo."""
        size = len(objectness)
        return cls(boxes, objectness, np.full(size, size, dtype=np.float32))


@dataclass(frozen=True)
class NumberField:
    """A field whose values are numbers.

    Attributes:
        values: computes (N,) float32. Every store uses this function, so that the same filter keeps
            the same instances everywhere: rounding differs between float32 and float64.
        is_derived: whether its Milvus column exists for filters alone, and on a server only.
            Milvus cannot compute with two columns in a filter. The column of any other field is
            stored with every instance. A column has the name of its field.
    """

    values: Callable[[InstanceArrays], FloatArray]
    is_derived: bool = False


def box_areas(boxes_N4: FloatArray) -> FloatArray:
    """(N,) float32 areas, computed like `Instances.areas`."""
    sides = boxes_N4[:, 2:4] - boxes_N4[:, :2]
    return np.asarray(sides[:, 0] * sides[:, 1], dtype=np.float32)


def _middle(low: FloatArray, high: FloatArray) -> FloatArray:
    return np.asarray((low + high) / 2, dtype=np.float32)


STRING_FIELDS = ("image_id", "uri")
"""Fields whose values are strings; all instances of a photo share them."""

NUMBER_FIELDS = {
    "x1": NumberField(lambda each: each.boxes[:, 0]),
    "y1": NumberField(lambda each: each.boxes[:, 1]),
    "x2": NumberField(lambda each: each.boxes[:, 2]),
    "y2": NumberField(lambda each: each.boxes[:, 3]),
    "objectness": NumberField(lambda each: each.objectness),
    "area": NumberField(lambda each: box_areas(each.boxes)),
    "cx": NumberField(lambda each: _middle(each.boxes[:, 0], each.boxes[:, 2]), is_derived=True),
    "cy": NumberField(lambda each: _middle(each.boxes[:, 1], each.boxes[:, 3]), is_derived=True),
    "width": NumberField(lambda each: each.boxes[:, 2] - each.boxes[:, 0], is_derived=True),
    "height": NumberField(lambda each: each.boxes[:, 3] - each.boxes[:, 1], is_derived=True),
    # The number of other instances in the photo, whatever they show.
    "neighbors": NumberField(lambda each: each.photo_sizes - 1, is_derived=True),
}

FIELDS = (*STRING_FIELDS, *NUMBER_FIELDS)
