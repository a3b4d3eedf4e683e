"""Columns for filters over the rows of an exact index: made when asked for, extended as it grows.

Numbers are copied out of the rows, where they lie far apart. Strings and attributes are kept as
codes of their distinct values, so that a filter tests each value once and not each instance.
"""

# Shapes: N instances, W numbers a row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from reir.records import FloatArray
from reir.store.filter_numpy import Column, box_values, objects
from reir.store.filters import BOX_FIELDS, NEIGHBOURS, NUMBER_FIELDS, Field
from reir.store.journal import JournalImage

MAX_COLUMNS = 32
"""Columns kept at a time; filters may name any number of attributes."""

_OBJECTNESS = 4


class GrowingArray:
    """An array that grows at its end; appending is amortised constant time an entry."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        """Start empty."""
        self._data: npt.NDArray[Any] = np.empty(1024, dtype=dtype)
        self._length = 0

    def __len__(self) -> int:
        """Number of entries."""
        return self._length

    @property
    def view(self) -> npt.NDArray[Any]:
        """The entries, not a copy; stays valid, and as it is, when more are appended."""
        return self._data[: self._length]

    def append(self, entries: npt.NDArray[Any]) -> None:
        """Add entries at the end."""
        needed = self._length + len(entries)
        if needed > len(self._data):
            grown = np.empty(max(needed, 2 * len(self._data)), dtype=self._data.dtype)
            grown[: self._length] = self.view
            self._data = grown
        self._data[self._length : needed] = entries
        self._length = needed


@dataclass(frozen=True)
class Placed:
    """An image in the rows: its instances are rows `start` to `stop`."""

    image: JournalImage
    start: int

    @property
    def stop(self) -> int:
        """The row after its last one."""
        return self.start + self.image.num_instances


class _Extendable(Protocol):
    def extend(self, rows_NW: FloatArray, images: Sequence[Placed]) -> Column: ...


class ColumnCache:
    """Columns of one index by field."""

    def __init__(self) -> None:
        """Start with none."""
        self._columns: dict[Field, _Extendable] = {}

    def get(self, field: Field, rows_NW: FloatArray, images: Sequence[Placed]) -> Column:
        """The column of a field for all rows; both arguments have grown since the last call."""
        if field not in self._columns:
            if len(self._columns) == MAX_COLUMNS:
                del self._columns[next(iter(self._columns))]
            self._columns[field] = _column(field)
        return self._columns[field].extend(rows_NW, images)


def _column(field: Field) -> _Extendable:
    if field.attribute or field.name not in NUMBER_FIELDS:
        return _Codes(field)
    return _Neighbours() if field.name == NEIGHBOURS else _Numbers(field.name)


class _Neighbours:
    """How many other instances the photo of every row has."""

    def __init__(self) -> None:
        self._values = GrowingArray(np.float32)
        self._num_images = 0

    def extend(self, _: FloatArray, images: Sequence[Placed]) -> Column:
        counts = [each.image.num_instances for each in images[self._num_images :]]
        self._num_images = len(images)
        self._values.append(np.repeat(np.array(counts, dtype=np.float32) - 1, counts))
        return Column(self._values.view)


class _Numbers:
    """One number of every row, from its own numbers."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values = GrowingArray(np.float32)

    def extend(self, rows_NW: FloatArray, _: Sequence[Placed]) -> Column:
        self._values.append(self._of(rows_NW[len(self._values) :]))
        return Column(self._values.view)

    def _of(self, rows_NW: FloatArray) -> FloatArray:
        if self._name in BOX_FIELDS:
            return box_values(self._name, rows_NW)
        return areas(rows_NW) if self._name == "area" else rows_NW[:, _OBJECTNESS]


class _Codes:
    """A value of every image, by a code for each row."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._codes = GrowingArray(np.int32)
        self._known: dict[tuple[type, object], int] = {}  # 1, 1.0 and True are equal but not alike
        self._num_images = 0

    def extend(self, _: FloatArray, images: Sequence[Placed]) -> Column:
        fresh = images[self._num_images :]
        self._num_images = len(images)
        values = [self._value(each.image) for each in fresh]
        codes = [self._known.setdefault((type(each), each), len(self._known)) for each in values]
        counts = [each.image.num_instances for each in fresh]
        self._codes.append(np.repeat(np.array(codes, dtype=np.int32), counts))
        return Column(objects([value for _, value in self._known]), self._codes.view)

    def _value(self, image: JournalImage) -> object:
        if self._field.attribute:
            return image.attributes.get(self._field.name)
        return getattr(image, self._field.name)


def areas(rows_NW: FloatArray) -> FloatArray:
    """(N,) areas, computed in float32 as `Instances.areas` does."""
    sides = rows_NW[:, 2:4] - rows_NW[:, :2]
    return np.asarray(sides[:, 0] * sides[:, 1], dtype=np.float32)
