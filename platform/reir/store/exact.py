"""Exact search over all instances of a version, in this process, one thread, filters included."""

# Shapes: Q queries, N instances, D vector dimension, M instances that a filter keeps

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from reir.records import FloatArray
from reir.store.checks import instance_id
from reir.store.contract import InstanceRow
from reir.store.filter_numpy import Column, Mask, evaluate, objects
from reir.store.filters import Field, Filter
from reir.store.journal import NUM_COLUMNS, Frame, JournalImage

_GATHER_BELOW = 1 / 8
"""Share of instances kept by a filter under which copying them out beats scanning them all."""

_CORNERS = {"x1": 0, "y1": 1, "x2": 2, "y2": 3, "objectness": 4}


class _Rows:
    """An array that grows at its end; appending is amortised constant time a row."""

    def __init__(self, dtype: npt.DTypeLike, width: tuple[int, ...] = ()) -> None:
        self._data: npt.NDArray[Any] = np.empty((1024, *width), dtype=dtype)
        self._length = 0

    @property
    def view(self) -> npt.NDArray[Any]:
        """The rows in use, not a copy."""
        return self._data[: self._length]

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add rows at the end."""
        needed = self._length + len(rows)
        if needed > len(self._data):
            grown = np.empty((max(needed, 2 * len(self._data)), *self._data.shape[1:]), self.dtype)
            grown[: self._length] = self.view
            self._data = grown
        self._data[self._length : needed] = rows
        self._length = needed

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows."""
        return self._data.dtype


@dataclass(frozen=True)
class _Span:
    """Which rows an image has."""

    start: int
    stop: int


class ExactIndex:
    """Instances of a version in memory, changed by journal frames.

    Replaced rows stay in place, masked out, until the index is made anew from a compacted journal.
    """

    def __init__(self, dim: int) -> None:
        """Start empty, for vectors of dimension `dim`."""
        self.dim = dim
        self._vectors = faiss.IndexFlatIP(dim)
        self._numbers = _Rows(np.float32, (NUM_COLUMNS,))
        self._image = _Rows(np.int64)
        self._alive = _Rows(np.bool_)
        self._images: list[JournalImage] = []
        self._spans: dict[str, _Span] = {}
        self._num_dead = 0
        self._columns: dict[Field, Column] = {}

    def __len__(self) -> int:
        """Number of instances, replaced ones left out."""
        return int(self._vectors.ntotal) - self._num_dead

    @property
    def num_dead(self) -> int:
        """Number of rows kept in memory of instances that were replaced or deleted."""
        return self._num_dead

    def apply(self, frame: Frame) -> None:
        """Take over one change."""
        for image_id in frame.deletes:
            self._forget(image_id)
        start = int(self._vectors.ntotal)
        for image in frame.puts:
            self._forget(image.image_id)
            span = _Span(start, start + image.num_instances)
            self._spans[image.image_id] = span
            self._image.append(np.full(image.num_instances, len(self._images)))
            self._images.append(image)
            start = span.stop
        self._alive.append(np.ones(len(frame.rows), dtype=np.bool_))
        self._numbers.append(frame.rows[:, :NUM_COLUMNS])
        self._vectors.add(np.ascontiguousarray(frame.rows[:, NUM_COLUMNS:]))
        self._columns.clear()

    def search(
        self, queries: FloatArray, limit: int, tree: Filter | None
    ) -> list[list[InstanceRow]]:
        """The `limit` instances of largest inner product for each of the (Q, D) queries."""
        mask = self._alive.view
        if tree is not None:
            mask = mask & evaluate(tree, self._column)
        num_kept = int(mask.sum())
        if not num_kept or not len(queries):
            return [[] for _ in queries]
        limit = min(limit, num_kept)
        faiss.omp_set_num_threads(1)  # of this thread; two were 4 to 6 times slower when busy
        if num_kept < _GATHER_BELOW * len(mask):
            scores, rows = self._search_gathered(queries, limit, np.flatnonzero(mask))
        else:
            scores, rows = self._search_scanning(queries, limit, mask)
        return [list(self._hits(*each)) for each in zip(scores, rows, strict=True)]

    def _search_gathered(
        self, queries: FloatArray, limit: int, kept_M: npt.NDArray[np.int64]
    ) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        total = int(self._vectors.ntotal)
        stored = faiss.rev_swig_ptr(self._vectors.get_xb(), total * self.dim)
        vectors_MD = stored.reshape(total, self.dim)[kept_M]
        scores, columns = faiss.knn(queries, vectors_MD, limit, faiss.METRIC_INNER_PRODUCT)
        return scores, kept_M[columns]

    def _search_scanning(
        self, queries: FloatArray, limit: int, mask: Mask
    ) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        if mask.all():
            scores, rows = self._vectors.search(queries, limit)
        else:
            bits = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]
            parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
            scores, rows = self._vectors.search(queries, limit, params=parameters)
        return scores, rows

    def _hits(self, scores: FloatArray, rows: npt.NDArray[np.int64]) -> Iterator[InstanceRow]:
        numbers = self._numbers.view[rows]
        areas = _areas(numbers)
        for i, row in enumerate(rows.tolist()):
            image = self._images[self._image.view[row]]
            x1, y1, x2, y2, objectness = numbers[i].tolist()
            yield InstanceRow(
                instance_id=instance_id(image.image_id, row - self._spans[image.image_id].start),
                image_id=image.image_id,
                uri=image.uri,
                box=(x1, y1, x2, y2),
                objectness=objectness,
                area=float(areas[i]),
                score=float(scores[i]),
                attributes=dict(image.attributes),
            )

    def _forget(self, image_id: str) -> None:
        span = self._spans.pop(image_id, None)
        if span is not None:
            self._alive.view[span.start : span.stop] = False
            self._num_dead += span.stop - span.start

    def _column(self, field: Field) -> Column:
        """Values of a field for every row; kept until the next change."""
        if field not in self._columns:
            self._columns[field] = self._make_column(field)
        return self._columns[field]

    def _make_column(self, field: Field) -> Column:
        if field.attribute:
            values = [image.attributes.get(field.name) for image in self._images]
            return Column(objects(values), self._image.view)
        if field.name in _CORNERS:
            return Column(self._numbers.view[:, _CORNERS[field.name]])
        if field.name == "area":
            return Column(_areas(self._numbers.view))
        values = [getattr(image, field.name) for image in self._images]
        return Column(objects(values), self._image.view)


def _areas(numbers: FloatArray) -> FloatArray:
    """(N,) areas of (N, 5) rows, computed in float32 as `Instances.areas` does."""
    sides = numbers[:, 2:4] - numbers[:, :2]
    return np.asarray(sides[:, 0] * sides[:, 1], dtype=np.float32)
