"""Exact search over all instances of a version, one thread, filters included.

The vectors are those of the journal's rows file, searched where they lie: a process holds no copy
of them, and many processes share one. What each holds is a byte for every number of them, which
tells which few rows a query has to look at (`codes.py`).
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
from reir.store.checks import instance_id
from reir.store.codes import Coded, Codes
from reir.store.columns import ColumnCache, GrowingArray, Placed, areas
from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.filter_numpy import Column, evaluate
from reir.store.filters import Field, Filter
from reir.store.journal import NUM_COLUMNS, Frame

_TOGETHER_FROM = 12
"""So many queries are multiplied with all rows as one matrix: 7.7 ms for twelve on 70,000 rows, as
one by one with codes."""

_CODED_FROM = 8_192
"""Rows below which their codes save nothing."""

_CODES_A_ROW = 5
"""Codes that are scanned in the time of one row that is looked at exactly: where a filter keeps
fewer than a fifth, its rows alone take less time (100,000 rows: 2.3 for .8 ms where it keeps 10 %,
1.8 for 2.3 where 20, 1.8 for 5.2 where 50)."""

_CODED_AFTER = 2
"""Searches before a process begins to make codes: for a few questions they would cost more than
they save."""


@dataclass(frozen=True)
class Selection:
    """The instances that a search considers, as they were at one moment; searched in any thread.

    Attributes:
        rows: (N, W) of the journal, replaced instances too.
        coded: codes of the first of them.
        kept: (M,) the rows to consider in ascending order, None for all.
        images: every image there is or was.
        image_of: (N,) the number of each row's image.
    """

    rows: FloatArray
    coded: Coded
    kept: npt.NDArray[np.int64] | None
    images: Sequence[Placed]
    image_of: npt.NDArray[np.int32]

    def search(self, queries: FloatArray, limit: int) -> Sequence[Sequence[InstanceRow]]:
        """The `limit` instances of largest inner product for each of the (Q, D) queries."""
        num_kept = len(self.rows) if self.kept is None else len(self.kept)
        if not num_kept or not len(queries):
            return [[] for _ in queries]
        # The numbers before the vector take part with weight 0: cheaper than a second file.
        queries_QW = np.zeros((len(queries), self.rows.shape[1]), dtype=np.float32)
        queries_QW[:, NUM_COLUMNS:] = queries
        limit = min(limit, num_kept)
        faiss.omp_set_num_threads(1)  # of this thread; two were 4 to 6 times slower when busy
        if len(queries) < _TOGETHER_FROM:
            found = [self._nearest(queries_QW[i : i + 1], limit) for i in range(len(queries))]
        else:
            found = [*zip(*self._best(queries_QW, self.kept, limit), strict=True)]
        return [Hits(self, *each) for each in found]

    def _nearest(
        self, query_1W: FloatArray, limit: int
    ) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """Best scores and rows of one query, among rows that their codes propose if they may."""
        num_rows, kept = len(self.rows), self.kept
        num_coded = len(self.coded.codes)
        fresh = np.arange(num_coded, num_rows)
        num_kept = num_rows if kept is None else len(kept)
        # as a rule enough to beat the bound of the rest
        num = (2 * limit + num_rows // 1000) * num_rows // num_kept
        is_worth_it = num_coded >= _CODED_FROM and num_coded // _CODES_A_ROW <= num_kept
        while is_worth_it and num + len(fresh) <= num_rows // 8 and query_1W.any():
            proposed, beyond = self.coded.best(query_1W[0, NUM_COLUMNS:], num)
            proposed = np.concatenate([proposed, fresh])
            if kept is not None:
                proposed = np.intersect1d(proposed, kept, assume_unique=True)
            if len(proposed) >= limit:
                (scores,), (rows,) = self._best(query_1W, proposed, limit)
                if scores[-1] > beyond:
                    return scores, rows
            num *= 8
        (scores,), (rows,) = self._best(query_1W, kept, limit)
        return scores, rows

    def _best(
        self, queries_QW: FloatArray, kept: npt.NDArray[np.int64] | None, limit: int
    ) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """(Q, limit) best scores and rows, among `kept` ones; None for all."""
        # of the process, and only about speed; faiss compares it with queries x numbers
        faiss.cvar.distance_compute_blas_threshold = _TOGETHER_FROM * self.rows.shape[1]
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
            0,  # the same rows for every query
        )
        return scores, rows


class Hits(Sequence[InstanceRow]):
    """The rows that a search has found, best first; each is made when somebody looks at it.

    Whoever wants one row of each photo reads many and looks at few of them.
    """

    def __init__(
        self, selection: Selection, scores: FloatArray, rows: npt.NDArray[np.int64]
    ) -> None:
        """Take the (M,) best scores of a selection, and the numbers of their rows."""
        numbers = selection.rows[rows, :NUM_COLUMNS]
        self._images = selection.images
        self._scores: list[float] = scores.tolist()
        self._rows: list[int] = rows.tolist()
        self._image_of: list[int] = selection.image_of[rows].tolist()
        self._areas: list[float] = areas(numbers).tolist()
        self._numbers: list[list[float]] = numbers.tolist()

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> InstanceRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[InstanceRow]: ...
    def __getitem__(self, index: int | slice) -> InstanceRow | list[InstanceRow]:
        """Make one row, or some."""
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
    """What the frames of a journal say of its rows: whose they are, and which are still alive.

    Replaced rows stay in place, left out of searches, until the journal is compacted.
    """

    def __init__(self, dim: int) -> None:
        """Start empty, for vectors of dimension `dim`."""
        self.dim = dim
        self.num_dead = 0
        """Rows of instances that were replaced or deleted."""
        self._rows: FloatArray = np.empty((0, NUM_COLUMNS + dim), dtype=np.float32)
        self._codes = Codes(dim)
        self._num_searches = 0
        self._image_of = GrowingArray(np.int32)
        self._alive = GrowingArray(np.bool_)
        self._images: list[Placed] = []
        self._current: dict[str, Placed] = {}
        self._columns = ColumnCache()

    def __len__(self) -> int:
        """Number of instances, replaced ones left out."""
        return len(self._rows) - self.num_dead

    def apply(self, frame: Frame) -> None:
        """Take over one change."""
        change = frame.change
        for image_id in change.deletes:
            self._forget(image_id)
        start = len(self._rows)
        numbers = range(len(self._images), len(self._images) + len(change.puts))
        for image in change.puts:
            self._forget(image.image_id)
            placed = self._current[image.image_id] = Placed(image, start)
            self._images.append(placed)
            start = placed.stop
        self._image_of.append(np.repeat(numbers, [each.num_instances for each in change.puts]))
        self._alive.append(np.ones(len(change.rows), dtype=np.bool_))
        self._rows = frame.table

    def select(self, tree: Filter | None) -> Selection:
        """The instances that a filter keeps; for a search."""
        self._num_searches += 1
        if self._num_searches > _CODED_AFTER and len(self._rows) >= _CODED_FROM:
            self._codes.follow(self._rows[:, NUM_COLUMNS:])
        kept = None
        if tree is not None:
            kept = np.flatnonzero(evaluate(tree, self._column) & self._alive.view)
        elif self.num_dead:
            kept = np.flatnonzero(self._alive.view)
        return Selection(self._rows, self._codes.now, kept, self._images, self._image_of.view)

    def photos(self, image_ids: Iterable[str]) -> dict[str, StoredPhoto]:
        """Those of the images that have instances; nothing is copied."""
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

    def _forget(self, image_id: str) -> None:
        placed = self._current.pop(image_id, None)
        if placed is not None:
            self._alive.view[placed.start : placed.stop] = False
            self.num_dead += placed.image.num_instances
