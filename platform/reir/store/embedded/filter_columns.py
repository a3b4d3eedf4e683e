"""Columns for filters over the rows of an exact index, built when a filter first names them.

When the index grows, its columns are extended. Numbers are copied out of the rows, where they are
1 KB apart and slow to scan. Strings and attributes are dictionary-encoded, so that a filter tests
each distinct value once instead of once per instance.
"""

# Shapes: N instances, W numbers a row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from reir.records import FloatArray
from reir.store.embedded.journal import JournalImage
from reir.store.filter_fields import NUMBER_FIELDS, InstanceArrays, NumberField
from reir.store.filter_numpy import Column, objects
from reir.store.filters import Field

MAX_COLUMNS = 32
"""Number of columns that are kept; without a limit, filters on ever new attributes would fill the
memory."""


class GrowingArray:
    """An array that grows at its end; appending an entry takes amortized constant time."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        """Start empty."""
        self._data: npt.NDArray[Any] = np.empty(1024, dtype=dtype)
        self._length = 0

    def __len__(self) -> int:
        """Number of entries."""
        return self._length

    @property
    def view(self) -> npt.NDArray[Any]:
        """The entries, not copied. Appending more entries does not change a view."""
        return self._data[: self._length]

    def append(self, entries: npt.NDArray[Any]) -> None:
        """Add entries at the end."""
        needed = self._length + len(entries)
        if needed > len(self._data):
            # A new array, not `resize`: views of the old one may be in use in other threads.
            grown = np.empty(max(needed, 2 * len(self._data)), dtype=self._data.dtype)
            grown[: self._length] = self.view
            self._data = grown
        self._data[self._length : needed] = entries
        self._length = needed


@dataclass(frozen=True)
class ImageRows:
    """An image, whose instances are the rows from `start` to `stop`."""

    image: JournalImage
    start: int

    @property
    def stop(self) -> int:
        """The number of the row after its last one."""
        return self.start + self.image.num_instances


class _Extendable(Protocol):
    def extend(self, rows_NW: FloatArray, images: Sequence[ImageRows]) -> Column: ...


class ColumnCache:
    """The columns of one index, by field."""

    def __init__(self) -> None:
        """Start without columns."""
        self._columns: dict[Field, _Extendable] = {}

    def get(self, field: Field, rows_NW: FloatArray, images: Sequence[ImageRows]) -> Column:
        """The column of a field for all rows; `rows_NW` and `images` only grow between calls."""
        if field not in self._columns:
            if len(self._columns) == MAX_COLUMNS:
                del self._columns[next(iter(self._columns))]  # the oldest one
            self._columns[field] = _column(field)
        return self._columns[field].extend(rows_NW, images)


def _column(field: Field) -> _Extendable:
    if not field.attribute and field.name in NUMBER_FIELDS:
        return _NumberColumn(NUMBER_FIELDS[field.name])
    return _DictionaryColumn(field)


class _NumberColumn:
    """A number of every row."""

    def __init__(self, field: NumberField) -> None:
        self._field = field
        self._values = GrowingArray(np.float32)
        self._num_images = 0

    def extend(self, rows_NW: FloatArray, images: Sequence[ImageRows]) -> Column:
        # Only what was added since the last call; rows that are there never change.
        # Replaced images are among them: their rows stay in the file, and need an entry, too.
        sizes = [each.image.num_instances for each in images[self._num_images :]]
        self._num_images = len(images)
        added_NW = rows_NW[len(self._values) :]
        photo_sizes = np.repeat(np.array(sizes, dtype=np.float32), sizes)
        arrays = InstanceArrays(added_NW[:, :4], added_NW[:, 4], photo_sizes)
        self._values.append(self._field.values(arrays))
        return Column(self._values.view)


class _DictionaryColumn:
    """A value of every image: the distinct values, and for each row the index of its value."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._index = GrowingArray(np.int32)
        # With the type in the key, since 1, 1.0 and True are equal but differ for a filter.
        self._known: dict[tuple[type, object], int] = {}
        self._num_images = 0

    def extend(self, _: FloatArray, images: Sequence[ImageRows]) -> Column:
        added = images[self._num_images :]
        self._num_images = len(images)
        values = [self._value(each.image) for each in added]
        index = [self._known.setdefault((type(each), each), len(self._known)) for each in values]
        sizes = [each.image.num_instances for each in added]
        self._index.append(np.repeat(np.array(index, dtype=np.int32), sizes))
        # In the order of their indices, because a dict keeps the order of insertion.
        return Column(objects([value for _, value in self._known]), self._index.view)

    def _value(self, image: JournalImage) -> object:
        if self._field.attribute:
            return image.attributes.get(self._field.name)
        return getattr(image, self._field.name)
