"""Evaluates a filter tree over numpy columns: the reference meaning of a filter."""

# Shapes: N instances

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

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
