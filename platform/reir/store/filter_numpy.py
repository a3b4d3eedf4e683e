"""Evaluates a filter tree over numpy columns; this defines the meaning of a filter."""

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

from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.filter_fields import NUMBER_FIELDS, InstanceArrays
from reir.store.filters import (
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
        values: (N,) float32 for number fields, otherwise Python objects. With `index`, the distinct
            values, so that a filter tests each of them once instead of once per instance.
        index: (N,) the index in `values` of each instance; None if `values` has one per instance.
    """

    values: npt.NDArray[Any]
    index: npt.NDArray[np.int32] | None = None

    def expand(self, mask: Mask) -> Mask:
        """Turn a mask over `values` into a mask over instances."""
        return mask if self.index is None else mask[self.index]


ColumnGetter = Callable[[Field], Column]

_OPERATORS: dict[Operator, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def evaluate(tree: Filter, get_column: ColumnGetter) -> Mask:
    """Return the (N,) mask of the instances for which `tree` is true."""
    match tree:
        case Comparison(field, name, value):
            column = get_column(field)
            return column.expand(_compare(column.values, name, value))
        case In(field, values):
            column = get_column(field)
            return column.expand(_equals_any(column.values, values))
        case StartsWith(field, prefix):
            column = get_column(field)
            return column.expand(_test(column.values, str, lambda text: text.startswith(prefix)))
        case Not(operand):
            return ~evaluate(operand, get_column)
        case And(operands):
            return reduce(operator.and_, (evaluate(each, get_column) for each in operands))
        case Or(operands):
            return reduce(operator.or_, (evaluate(each, get_column) for each in operands))


def objects(values: Sequence[object]) -> npt.NDArray[np.object_]:
    """Return `values` as a one-dimensional array of Python objects."""
    # `np.array` would convert strings to fixed lengths, and numbers and booleans to one type.
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def row_column(rows: Sequence[InstanceRow], field: Field) -> Column:
    """Return the values of one field for these rows, which include all rows of each photo."""
    if field.attribute:
        return Column(objects([row.attributes.get(field.name) for row in rows]))
    if field.name in NUMBER_FIELDS:
        return Column(NUMBER_FIELDS[field.name].values(_row_arrays(rows)))
    return Column(objects([getattr(row, field.name) for row in rows]))


def photo_column(photo: StoredPhoto, field: Field) -> Column:
    """Return the values of one field for the instances of a photo."""
    if not field.attribute and field.name in NUMBER_FIELDS:
        arrays = InstanceArrays.of_photo(photo.boxes, photo.objectness)
        return Column(NUMBER_FIELDS[field.name].values(arrays))
    value = photo.attributes.get(field.name) if field.attribute else getattr(photo, field.name)
    return Column(objects([value]), np.zeros(len(photo), dtype=np.int32))


def _row_arrays(rows: Sequence[InstanceRow]) -> InstanceArrays:
    sizes = Counter(row.image_id for row in rows)
    return InstanceArrays(
        boxes=np.array([row.box for row in rows], dtype=np.float32).reshape(-1, 4),
        objectness=np.array([row.objectness for row in rows], dtype=np.float32),
        photo_sizes=np.array([sizes[row.image_id] for row in rows], dtype=np.float32),
    )


def _compare(values: npt.NDArray[Any], name: Operator, value: Value) -> Mask:
    """Compare each value with one literal; values of another type compare as false."""
    compare = _OPERATORS[name]
    if values.dtype != object:
        # The literal is rounded to float32 like the values, so that 0.1 equals a stored 0.1.
        return np.asarray(compare(values, values.dtype.type(value)), dtype=np.bool_)
    return _test(values, _kind(value), lambda each: compare(each, value))


def _equals_any(values: npt.NDArray[Any], wanted: Sequence[Value]) -> Mask:
    """Compare each value with many literals, without one pass for each of them."""
    if values.dtype != object:
        rounded = [values.dtype.type(each) for each in wanted]
        return np.isin(values, np.array(rounded, dtype=values.dtype))
    by_kind: dict[type | tuple[type, ...], set[Value]] = {}
    for each in wanted:
        by_kind.setdefault(_kind(each), set()).add(each)
    masks = (_test(values, kind, literals.__contains__) for kind, literals in by_kind.items())
    return reduce(operator.or_, masks, np.zeros(len(values), dtype=np.bool_))


def _kind(value: Value) -> type | tuple[type, ...]:
    """Return the types of the values that a literal can equal."""
    return type(value) if isinstance(value, str | bool) else (int, float)


def _test(
    values: npt.NDArray[Any], kind: type | tuple[type, ...], test: Callable[[Any], bool]
) -> Mask:
    booleans = kind is bool  # for Python, True is an int as well; for a filter it is not
    return np.fromiter(
        (
            isinstance(value, kind) and isinstance(value, bool) == booleans and bool(test(value))
            for value in values
        ),
        dtype=np.bool_,
        count=len(values),
    )
