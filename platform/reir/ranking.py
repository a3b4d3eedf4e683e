"""Rows of the store -> the best of them by photo, exactly.

Knows the store's contract and nothing of models.
"""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter

from reir.clock import Clock
from reir.records import FloatArray
from reir.store.checks import MAX_LIMIT
from reir.store.contract import InstanceRow, InstanceStore

_FIRST_ROWS, _ROWS_A_HIT = 24, 8
"""What is read at first: enough for photos that put several instances before the next photo."""

_GROWTH = 8
"""How many times more is read where that was too little."""

_ROWS_A_CALL = 200_000
"""Most rows of one call of the store; a larger batch takes several."""

_Range = tuple[str | None, str | None]
"""Image ids: from the first, up to but without the second; None is no bound."""


def instance_number(instance_id: str) -> int:
    """Return n of `<image_id>#<n>`."""
    return int(instance_id.rpartition("#")[2])


def best_of_each_photo(rows: Iterable[InstanceRow], most: int, per_image: int) -> list[InstanceRow]:
    """Return the first `most` of rows, at most `per_image` of each photo.

    Args:
        rows: best score first; of equal scores, the order is by image and then by instance number.
        most: rows wanted; what comes after the last of them is not looked at.
        per_image: most rows of one photo.
    """
    taken: list[InstanceRow] = []
    of_image: Counter[str] = Counter()
    for _, equal in groupby(rows, key=_score):
        for row in sorted(equal, key=_among_equal):
            if of_image[row.image_id] < per_image:
                of_image[row.image_id] += 1
                taken.append(row)
                if len(taken) == most:
                    return taken
    return taken


_score = attrgetter("score")


def _among_equal(row: InstanceRow) -> tuple[str, int]:
    return row.image_id, instance_number(row.instance_id)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """One request to a version: how its rows become hits.

    Attributes:
        most: hits of a query.
        per_image: most hits of one photo.
        where: filter that every hit passes.
        without: ids of instances that are no hits.
        clock: gets the stages `search` and `rank`.
    """

    store: InstanceStore
    gallery: str
    version: str
    most: int
    per_image: int
    where: str | None
    without: frozenset[str]
    clock: Clock

    def best(self, vectors_QD: FloatArray) -> list[list[InstanceRow]]:
        """Return the hits of each query: exactly what grouping all rows in order would give.

        Of images with at most n instances, k hits lie within the first
        k + (n - per_image) * ((k - 1) // per_image) rows: 271 for the best 10 of 30 an image. That
        worst case is rare, so less is read first, and more for the queries that need it.
        """
        answers: list[list[InstanceRow]] = [[] for _ in vectors_QD]
        pending = list(range(len(vectors_QD)))
        for limit in self._limits():
            unsettled: list[int] = []
            for queries in _chunks(pending, max(1, _ROWS_A_CALL // limit)):
                pages = self._read(vectors_QD[queries], limit)
                for query, rows in zip(queries, pages, strict=True):
                    answers[query] = self._take(rows)
                    if len(rows) == limit and not self._settled(answers[query], rows[-1]):
                        unsettled.append(query)
            pending = unsettled
        for query in pending:
            answers[query] = self._best_by_parts(vectors_QD[query : query + 1], (None, None))
        return answers

    def _limits(self) -> Iterator[int]:
        """Yield the numbers of rows to try, up to the most that a store gives at once."""
        limit = _FIRST_ROWS + _ROWS_A_HIT * self.most
        while limit < MAX_LIMIT:
            yield limit
            limit *= _GROWTH
        yield MAX_LIMIT

    def _settled(self, hits: list[InstanceRow], last_read: InstanceRow) -> bool:
        """Whether rows that were not read can change nothing, not even among equal scores."""
        return len(hits) == self.most and hits[-1].score > last_read.score

    def _best_by_parts(self, vector_1D: FloatArray, ids: _Range) -> list[InstanceRow]:
        """Return the hits among a range of images, halving it while one read is too little.

        Only where equal scores fill a whole read does the store choose among them.
        """
        (rows,) = self._read(vector_1D, MAX_LIMIT, ids)
        hits = self._take(rows)
        image_ids = sorted({row.image_id for row in rows})
        if len(hits) == self.most or len(rows) < MAX_LIMIT or len(image_ids) < 2:
            return hits
        middle = image_ids[len(image_ids) // 2]
        parts = [(ids[0], middle), (middle, ids[1])]
        found = (self._best_by_parts(vector_1D, part) for part in parts)
        return self._take(sorted(chain.from_iterable(found), key=_score, reverse=True))

    def _read(
        self, vectors_QD: FloatArray, limit: int, ids: _Range = (None, None)
    ) -> Sequence[Sequence[InstanceRow]]:
        where = _within(self.where, ids)
        with self.clock.stage("search"):
            return self.store.search(self.gallery, self.version, vectors_QD, limit, where=where)

    def _take(self, rows: Sequence[InstanceRow]) -> list[InstanceRow]:
        """Return the hits among rows."""
        with self.clock.stage("rank"):
            kept = (row for row in rows if row.instance_id not in self.without)
            return best_of_each_photo(kept if self.without else rows, self.most, self.per_image)


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _within(where: str | None, ids: _Range) -> str | None:
    """Return the filter `where`, narrowed to a range of image ids."""
    first, end = ids
    parts = [] if where is None else [f"({where})"]
    parts += [] if first is None else [f"image_id >= {_quoted(first)}"]
    parts += [] if end is None else [f"image_id < {_quoted(end)}"]
    return " and ".join(parts) if first or end else where


def _quoted(text: str) -> str:
    """Return `text` as a string of the filter language."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
