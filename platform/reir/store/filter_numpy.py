"""Evaluates a filter tree over numpy columns: the reference meaning of a filter."""

# Shapes: N instances

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from reir.records import FloatArray
from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.filters import (
    BOX_FIELDS,
    NEIGHBOURS,
    STRING_FIELDS,
    And,
    Comparison,
    Field,
    Filter,
    In,
    Not,
    Operator,
    Or,
    StartsWith,
    Value,
)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Column:
    """Values of one field.

    Attributes:
        values: (N,) float32 for number fields, else objects; with `index` any number of them.
        index: (N,) the place in `values` for each instance, or None if there is one value each.
    """

    values: npt.NDArray[Any]
    index: npt.NDArray[np.int32] | None = None

    def expand(self, mask: Mask) -> Mask:
        """Return the mask over instances for one over `values`."""
        return mask if self.index is None else mask[self.index]


Columns = Callable[[Field], Column]

_OPERATORS: dict[Operator, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def evaluate(tree: Filter, columns: Columns) -> Mask:
    """Return the (N,) mask of the instances for which `tree` holds."""
    match tree:
        case Comparison(field, name, value):
            column = columns(field)
            return column.expand(_compare(column.values, name, value))
        case In(field, values):
            column = columns(field)
            masks = [_compare(column.values, "==", value) for value in values]
            return column.expand(_any(masks, len(column.values)))
        case StartsWith(field, prefix):
            column = columns(field)
            return column.expand(_test(column.values, str, lambda text: text.startswith(prefix)))
        case Not(operand):
            return ~evaluate(operand, columns)
        case And(operands):
            return reduce(operator.and_, (evaluate(each, columns) for each in operands))
        case Or(operands):
            return reduce(operator.or_, (evaluate(each, columns) for each in operands))


def objects(values: Sequence[object]) -> npt.NDArray[np.object_]:
    """Return `values` as a one-dimensional array of Python objects."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def row_column(rows: Sequence[InstanceRow], field: Field) -> Column:
    """Return the values of one field for rows, which are all instances of their photos."""
    if field.attribute:
        return Column(objects([row.attributes.get(field.name) for row in rows]))
    if field.name in STRING_FIELDS:
        return Column(objects([getattr(row, field.name) for row in rows]))
    if field.name == NEIGHBOURS:
        counts = Counter(row.image_id for row in rows)
        return Column(np.array([counts[row.image_id] - 1 for row in rows], dtype=np.float32))
    if field.name in BOX_FIELDS:
        boxes = np.array([row.box for row in rows], dtype=np.float32).reshape(-1, 4)
        return Column(box_values(field.name, boxes))
    return Column(np.array([getattr(row, field.name) for row in rows], dtype=np.float32))


def photo_column(photo: StoredPhoto, field: Field) -> Column:
    """Return the values of one field for the instances of a photo."""
    if not field.attribute and field.name in BOX_FIELDS:
        return Column(box_values(field.name, photo.boxes))
    if not field.attribute and field.name == "objectness":
        return Column(photo.objectness)
    if not field.attribute and field.name == "area":
        sides = photo.boxes[:, 2:] - photo.boxes[:, :2]
        return Column(sides[:, 0] * sides[:, 1])
    if not field.attribute and field.name == NEIGHBOURS:
        return Column(np.full(len(photo), len(photo) - 1, dtype=np.float32))
    value = photo.attributes.get(field.name) if field.attribute else getattr(photo, field.name)
    return Column(objects([value]), np.zeros(len(photo), dtype=np.int32))


def box_values(name: str, boxes_N4: FloatArray) -> FloatArray:
    """(N,) float32 of one of `BOX_FIELDS`, computed in float32 wherever it is computed."""
    x1, y1, x2, y2 = boxes_N4[:, 0], boxes_N4[:, 1], boxes_N4[:, 2], boxes_N4[:, 3]
    match name:
        case "cx":
            return np.asarray((x1 + x2) / 2, dtype=np.float32)
        case "cy":
            return np.asarray((y1 + y2) / 2, dtype=np.float32)
        case "width":
            return np.asarray(x2 - x1, dtype=np.float32)
        case "height":
            return np.asarray(y2 - y1, dtype=np.float32)
    return boxes_N4[:, ("x1", "y1", "x2", "y2").index(name)]


def _any(masks: list[Mask], length: int) -> Mask:
    return reduce(operator.or_, masks, np.zeros(length, dtype=np.bool_))


def _compare(values: npt.NDArray[Any], name: Operator, value: Value) -> Mask:
    """Compare each value with one literal; values of another type compare as false."""
    compare = _OPERATORS[name]
    if values.dtype != object:
        return np.asarray(compare(values, values.dtype.type(value)), dtype=np.bool_)
    kind = type(value) if isinstance(value, str | bool) else (int, float)
    return _test(values, kind, lambda each: compare(each, value))


def _test(
    values: npt.NDArray[Any], kind: type | tuple[type, ...], test: Callable[[Any], bool]
) -> Mask:
    booleans = kind is bool
    return np.fromiter(
        (
            isinstance(value, kind) and isinstance(value, bool) == booleans and bool(test(value))
            for value in values
        ),
        dtype=np.bool_,
        count=len(values),
    )
