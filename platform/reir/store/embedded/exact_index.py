"""Exact search over all instances of a version, on one thread, with filters.

The vectors stay in the rows file of the journal, which every process maps into its memory. So a
process holds no copy of them, and many processes share the same pages. What each process does hold
are int8 codes, which tell which few rows a query has to score exactly (`int8_codes.py`).
"""

# Shapes: Q queries, N instances, D vector dimension, W = 5 + D, M instances that a search considers

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import faiss
import numpy as np
import numpy.typing as npt

from reir.records import FloatArray
from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.embedded.filter_columns import ColumnCache, GrowingArray, ImageRows
from reir.store.embedded.int8_codes import Int8Codes, Int8Snapshot
from reir.store.embedded.journal import NUM_COLUMNS, Frame
from reir.store.filter_fields import box_areas
from reir.store.filter_numpy import Column, evaluate
from reir.store.filters import Field, Filter
from reir.store.validation import instance_id

_MATRIX_FROM_QUERIES = 12
"""From this many queries on, one matrix product of all queries and all rows is as fast as one query
after the other with codes (7.7 ms for 12 queries on 70,000 rows)."""

_CODES_FROM_ROWS = 8_192
"""Below this number of rows, codes save no time."""

_CODES_PER_ROW = 7
"""Number of codes that are scanned in the time that it takes to score one row exactly. So if a
filter keeps less than a seventh of the rows, scoring all of those is faster than scanning all
codes. Measured on 70,000 rows, with and without codes: 2.8 and 1.7 ms if the filter keeps 10% of
them, 2.3 and 2.2 ms if it keeps 13%, 1.9 and 2.7 ms if it keeps 17%, 1.6 and 6 ms if it keeps 43%.
"""

_CODES_AFTER_SEARCHES = 2
"""Number of searches before a process starts to encode rows. A process that answers only a few
questions, such as `reir search`, would spend more time on codes than it saves."""


@dataclass(frozen=True)
class Selection:
    """The instances that a search considers, at one moment; safe to search in any thread.

    Attributes:
        rows: (N, W) all rows of the journal, including replaced instances.
        codes: int8 codes of the first rows.
        kept: (M,) numbers of the rows to consider, in ascending order; None for all.
        images: all images, including replaced and deleted ones.
        image_of: (N,) for each row, the index of its image in `images`.
    """

    rows: FloatArray
    codes: Int8Snapshot
    kept: npt.NDArray[np.int64] | None
    images: Sequence[ImageRows]
    image_of: npt.NDArray[np.int32]

    def search(self, queries: FloatArray, limit: int) -> Sequence[Sequence[InstanceRow]]:
        """The `limit` instances of largest inner product for each of the (Q, D) queries."""
        num_kept = len(self.rows) if self.kept is None else len(self.kept)
        if not num_kept or not len(queries):
            return [[] for _ in queries]
        # The numbers before the vector get weight 0: that is cheaper than vectors in a file of
        # their own, or than a copy of them without those numbers.
        queries_QW = np.zeros((len(queries), self.rows.shape[1]), dtype=np.float32)
        queries_QW[:, NUM_COLUMNS:] = queries
        # Asked for more rows than there are, faiss would fill up its answer with row number -1.
        limit = min(limit, num_kept)
        # Applies to this thread only. With two threads per search, concurrent searches took 4 to 6
        # times as long.
        faiss.omp_set_num_threads(1)
        if len(queries) < _MATRIX_FROM_QUERIES:
            found = [self._nearest(queries_QW[i : i + 1], limit) for i in range(len(queries))]
        else:
            found = [*zip(*self._best(queries_QW, self.kept, limit), strict=True)]
        return [LazyRows(self, *each) for each in found]

    def _nearest(
        self, query_1W: FloatArray, limit: int
    ) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """Best scores and row numbers of one query, with the help of codes where that is faster."""
        num_rows, kept = len(self.rows), self.kept
        num_codes = len(self.codes.codes)
        without_code = np.arange(num_codes, num_rows)
        num_kept = num_rows if kept is None else len(kept)
        # Usually enough for the last hit to beat the bound: with half of it, one in six searches
        # of 30,000 real rows scanned the codes twice. Divided by the share that the filter keeps,
        # since codes ignore the filter.
        num = (4 * limit + num_rows // 500) * num_rows // num_kept
        use_codes = num_codes >= _CODES_FROM_ROWS and num_codes // _CODES_PER_ROW <= num_kept
        # The zero vector has no codes, since its scale would be a division by 0.
        while use_codes and num + len(without_code) <= num_rows // 8 and query_1W.any():
            proposed, bound = self.codes.best(query_1W[0, NUM_COLUMNS:], num)
            # `_common` needs ascending order, which this keeps: rows without a code come last.
            proposed = np.concatenate([proposed, without_code])
            if kept is not None:
                proposed = _common(proposed, kept)
            if len(proposed) >= limit:
                (scores,), (rows,) = self._best(query_1W, proposed, limit)
                # Then no row that was left out can be better than the last hit.
                if scores[-1] > bound:
                    return scores, rows
            num *= 8  # vectors are crowded around this query: propose more, or score all rows
        (scores,), (rows,) = self._best(query_1W, kept, limit)
        return scores, rows

    def _best(
        self, queries_QW: FloatArray, kept: npt.NDArray[np.int64] | None, limit: int
    ) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """(Q, limit) best scores and row numbers among the `kept` rows; None for all rows."""
        # faiss multiplies matrices from this threshold on, which it compares with the number of
        # values in the queries. It is a setting of the whole process and affects speed only.
        faiss.cvar.distance_compute_blas_threshold = _MATRIX_FROM_QUERIES * self.rows.shape[1]
        if kept is None:
            return faiss.knn(queries_QW, self.rows, limit, faiss.METRIC_INNER_PRODUCT)
        scores = np.empty((len(queries_QW), limit), dtype=np.float32)
        rows = np.empty((len(queries_QW), limit), dtype=np.int64)
        faiss.knn_inner_products_by_idx(  # type: ignore[attr-defined]
            faiss.swig_ptr(queries_QW),
            faiss.swig_ptr(self.rows),
            faiss.swig_ptr(kept),
            self.rows.shape[1],
            len(queries_QW),
            len(self.rows),
            len(kept),
            limit,
            faiss.swig_ptr(scores),
            faiss.swig_ptr(rows),
            0,  # 0: `kept` applies to every query
        )
        return scores, rows


def _common(some_M: npt.NDArray[np.int64], many_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return what two ascending arrays have in common; fast if the first one is much shorter."""
    places = np.searchsorted(many_N, some_M)
    common: npt.NDArray[np.int64] = some_M[many_N.take(places, mode="clip") == some_M]
    return common


class LazyRows(Sequence[InstanceRow]):
    """The hits of a query, best first; an `InstanceRow` is created when it is first accessed.

    A search that wants the best photos asks for many instances, but accesses few of them.
    """

    def __init__(
        self, selection: Selection, scores: FloatArray, rows: npt.NDArray[np.int64]
    ) -> None:
        """Take the (M,) best scores of a selection and their row numbers."""
        numbers = selection.rows[rows, :NUM_COLUMNS]
        self._images = selection.images
        self._scores: list[float] = scores.tolist()
        self._rows: list[int] = rows.tolist()
        self._image_of: list[int] = selection.image_of[rows].tolist()
        self._areas: list[float] = box_areas(numbers).tolist()
        self._numbers: list[list[float]] = numbers.tolist()

    def __len__(self) -> int:
        """Return the number of hits."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> InstanceRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[InstanceRow]: ...
    def __getitem__(self, index: int | slice) -> InstanceRow | list[InstanceRow]:
        """Create one row, or a list of rows."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        placed = self._images[self._image_of[index]]
        image = placed.image
        x1, y1, x2, y2, objectness = self._numbers[index]
        return InstanceRow(
            instance_id(image.image_id, self._rows[index] - placed.start),
            image.image_id,
            image.uri,
            (x1, y1, x2, y2),
            objectness,
            self._areas[index],
            image.attributes,
            self._scores[index],
        )


class ExactIndex:
    """Which image each row of a journal belongs to, and which rows searches may find.

    Rows of replaced and deleted images stay in the file until the journal is compacted; searches
    leave them out.
    """

    def __init__(self, dim: int) -> None:
        """Start empty, for vectors of dimension `dim`."""
        self.dim = dim
        self.num_dead = 0
        """Number of rows whose image was replaced or deleted."""
        self._rows: FloatArray = np.empty((0, NUM_COLUMNS + dim), dtype=np.float32)
        self._codes = Int8Codes(dim)
        self._num_searches = 0
        self._image_of = GrowingArray(np.int32)
        self._alive = GrowingArray(np.bool_)
        self._images: list[ImageRows] = []
        self._current: dict[str, ImageRows] = {}
        self._columns = ColumnCache()

    def __len__(self) -> int:
        """Number of instances, without replaced and deleted ones."""
        return len(self._rows) - self.num_dead

    def apply(self, frame: Frame) -> None:
        """Apply one change of the journal."""
        change = frame.change
        for image_id in change.deletes:
            self._remove(image_id)
        start = len(self._rows)
        numbers = range(len(self._images), len(self._images) + len(change.puts))
        for image in change.puts:
            self._remove(image.image_id)
            placed = self._current[image.image_id] = ImageRows(image, start)
            self._images.append(placed)
            start = placed.stop
        self._image_of.append(np.repeat(numbers, [each.num_instances for each in change.puts]))
        self._alive.append(np.ones(len(change.rows), dtype=np.bool_))
        self._rows = frame.table

    def select(self, tree: Filter | None) -> Selection:
        """Select the instances that a filter keeps, for a search."""
        self._num_searches += 1
        if self._num_searches > _CODES_AFTER_SEARCHES and len(self._rows) >= _CODES_FROM_ROWS:
            self._codes.extend(self._rows[:, NUM_COLUMNS:])
        # `kept` must be a copy and no view of `_alive`: `_remove` changes that in place, possibly
        # while another thread still searches with this selection.
        kept = None
        if tree is not None:
            kept = np.flatnonzero(evaluate(tree, self._column) & self._alive.view)
        elif self.num_dead:
            kept = np.flatnonzero(self._alive.view)
        return Selection(self._rows, self._codes.snapshot, kept, self._images, self._image_of.view)

    def photos(self, image_ids: Iterable[str]) -> dict[str, StoredPhoto]:
        """The images that have instances; their arrays are views of the rows file."""
        found: dict[str, StoredPhoto] = {}
        for image_id in image_ids:
            placed = self._current.get(image_id)
            if placed is not None and placed.image.num_instances:
                rows = self._rows[placed.start : placed.stop]
                found[image_id] = StoredPhoto(
                    image_id=image_id,
                    uri=placed.image.uri,
                    attributes=dict(placed.image.attributes),
                    boxes=rows[:, : NUM_COLUMNS - 1],
                    objectness=rows[:, NUM_COLUMNS - 1],
                    vectors=rows[:, NUM_COLUMNS:],
                )
        return found

    def _column(self, field: Field) -> Column:
        return self._columns.get(field, self._rows, self._images)

    def _remove(self, image_id: str) -> None:
        placed = self._current.pop(image_id, None)
        if placed is not None:
            self._alive.view[placed.start : placed.stop] = False
            self.num_dead += placed.image.num_instances
