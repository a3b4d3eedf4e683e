"""Turns rows of the store into hits: the best rows, at most `per_image` of each photo, exactly.

Knows the store's contract and nothing of models.
"""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter

from reir.query.clock import Clock
from reir.records import FloatArray
from reir.store.contract import InstanceRow, InstanceStore
from reir.store.validation import MAX_LIMIT

_FIRST_ROWS, _ROWS_PER_HIT = 24, 8
"""Number of rows in the first read, in all and for each hit: usually enough, although several
instances of a photo may rank before the best one of the next photo."""

_GROWTH = 8
"""If the rows that were read are too few, the next read takes this many times as many."""

_ROWS_PER_CALL = 200_000
"""Maximum number of rows of one call to the store; a larger batch takes several calls."""

IdRange = tuple[str | None, str | None]
"""Image ids from the first up to but not including the second; None means no bound."""


def instance_number(instance_id: str) -> int:
    """Return n of `<image_id>#<n>`."""
    return int(instance_id.rpartition("#")[2])


def best_of_each_photo(
    rows: Iterable[InstanceRow], num_rows: int, per_image: int
) -> list[InstanceRow]:
    """Return the first `num_rows` rows, at most `per_image` of each photo.

    Args:
        rows: best score first. Rows with equal scores are put in the order of image id and
            instance number, so that every store gives the same answer.
        num_rows: rows to return; rows after the last one are not read.
        per_image: maximum number of rows of one photo.
    """
    taken: list[InstanceRow] = []
    of_image: Counter[str] = Counter()
    # Groups of equal scores are read and sorted one by one: an embedded store builds a row only
    # when it is read (`LazyRows`), so reading all of them would be slow.
    for _, equal in groupby(rows, key=_score):
        for row in sorted(equal, key=_tie_order):
            if of_image[row.image_id] < per_image:
                of_image[row.image_id] += 1
                taken.append(row)
                if len(taken) == num_rows:
                    return taken
    return taken


_score = attrgetter("score")


def _tie_order(row: InstanceRow) -> tuple[str, int]:
    # By number, not by the text of the instance id, in which #10 would come before #9.
    return row.image_id, instance_number(row.instance_id)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How the rows of one version become the hits of a query.

    Attributes:
        store, gallery, version: what to search.
        num_hits: hits of each query.
        per_image: maximum number of hits in one photo.
        where: filter that every hit must pass.
        excluded: ids of instances that must not be hits.
        clock: receives the time of the stages `search` and `rank`.
    """

    store: InstanceStore
    gallery: str
    version: str
    num_hits: int
    per_image: int
    where: str | None
    excluded: frozenset[str]
    clock: Clock

    def best(self, vectors_QD: FloatArray) -> list[list[InstanceRow]]:
        """Return the hits of each query, exactly as if all rows were ranked and grouped by photo.

        If each image has at most n instances, k hits lie within the first
        k + (n - per_image) * ((k - 1) // per_image) rows: 271 rows for 10 hits and 30 instances an
        image. That worst case is rare, so fewer rows are read first, and more rows only for the
        queries that need them.
        """
        answers: list[list[InstanceRow]] = [[] for _ in vectors_QD]
        pending = list(range(len(vectors_QD)))
        for limit in self._limits():
            unsettled: list[int] = []
            for queries in _chunks(pending, max(1, _ROWS_PER_CALL // limit)):
                pages = self._read(vectors_QD[queries], limit)
                for query, rows in zip(queries, pages, strict=True):
                    answers[query] = self._take(rows)
                    # Fewer rows than the limit are all rows that there are.
                    if len(rows) == limit and not self._settled(answers[query], rows[-1]):
                        unsettled.append(query)
            pending = unsettled
        for query in pending:
            answers[query] = self._best_by_parts(vectors_QD[query : query + 1], (None, None))
        return answers

    def _limits(self) -> Iterator[int]:
        """Yield the numbers of rows to try, up to the maximum that a store returns at once."""
        limit = _FIRST_ROWS + _ROWS_PER_HIT * self.num_hits
        while limit < MAX_LIMIT:
            yield limit
            limit *= _GROWTH
        yield MAX_LIMIT

    def _settled(self, hits: list[InstanceRow], last_read: InstanceRow) -> bool:
        """Whether no unread row can change the hits, not even a row with an equal score."""
        return len(hits) == self.num_hits and hits[-1].score > last_read.score

    def _best_by_parts(self, vector_1D: FloatArray, ids: IdRange) -> list[InstanceRow]:
        """Return the hits within a range of image ids, split in half while one read is too small.

        Only if rows with equal scores fill a whole read does the store choose among them.
        """
        (rows,) = self._read(vector_1D, MAX_LIMIT, ids)
        hits = self._take(rows)
        image_ids = sorted({row.image_id for row in rows})
        if len(hits) == self.num_hits or len(rows) < MAX_LIMIT or len(image_ids) < 2:
            return hits
        # Ranges of image ids never divide a photo, so `per_image` holds in each part by itself.
        middle = image_ids[len(image_ids) // 2]
        parts = [(ids[0], middle), (middle, ids[1])]
        found = (self._best_by_parts(vector_1D, part) for part in parts)
        return self._take(sorted(chain.from_iterable(found), key=_score, reverse=True))

    def _read(
        self, vectors_QD: FloatArray, limit: int, ids: IdRange = (None, None)
    ) -> Sequence[Sequence[InstanceRow]]:
        where = within(self.where, ids)
        with self.clock.stage("search"):
            return self.store.search(self.gallery, self.version, vectors_QD, limit, where=where)

    def _take(self, rows: Sequence[InstanceRow]) -> list[InstanceRow]:
        """Return the hits among rows."""
        with self.clock.stage("rank"):
            kept = (row for row in rows if row.instance_id not in self.excluded)
            return best_of_each_photo(
                kept if self.excluded else rows, self.num_hits, self.per_image
            )


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def within(where: str | None, ids: IdRange) -> str | None:
    """Return the filter `where`, narrowed to a range of image ids."""
    first, end = ids
    parts = [] if where is None else [f"({where})"]
    parts += [] if first is None else [f"image_id >= {_quoted(first)}"]
    parts += [] if end is None else [f"image_id < {_quoted(end)}"]
    return " and ".join(parts) if first or end else where


def _quoted(text: str) -> str:
    """Return `text` as a string of the filter language."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
