"""How many of the nearest instances a store's search finds, compared with an exact scan.

The scan reads vectors from the rows of record, not from the copy or index that searches use. On
large galleries it reads a sample of the photos, from which the recall of the whole is estimated.
"""

# Shapes: Q queries, H hits of one query, N instances, D vector dimension

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from reir.operations.gate.sampling import PhotoSample
from reir.records import FloatArray
from reir.store.contract import InstanceStore
from reir.store.validation import instance_id

K = 10
MAX_SCANNED_PHOTOS = 5_000
"""Galleries with more photos are sampled. So many have some 150,000 instances, which takes seconds
to scan."""

_CHUNK = 256
_TIE = 1e-5
"""Scores that differ by no more are equal: a server adds the products in another order."""


def search_recall(
    store: InstanceStore,
    gallery: str,
    version: str,
    queries: FloatArray,
    *,
    max_photos: int = MAX_SCANNED_PHOTOS,
) -> list[float]:
    """Return recall@10 of the store's search for each query.

    Args:
        store: the store.
        gallery, version: the version to search.
        queries: (Q, D) vectors of expressions.
        max_photos: how many photos are scanned at most. With a sample, a hit counts as one of the
            true ten if fewer than ten instances score higher, scaled to the whole gallery.
    """
    found = store.search(gallery, version, queries, K)
    hits = [
        _Hits([row.instance_id for row in rows], query)
        for rows, query in zip(found, queries, strict=True)
    ]
    photos = sorted({row.image_id for rows in found for row in rows})
    for ids, vectors in _scan(store, gallery, version, photos):
        for each in hits:
            each.note_own(ids, vectors)
    sample = PhotoSample(max_photos)
    for row in store.iter_images(gallery, version, status="indexed"):
        if row.holds_instances:
            sample.add(row.image_id)
    num_scanned = 0
    for ids, vectors in _scan(store, gallery, version, sample.image_ids):
        num_scanned += len(ids)
        for each in hits:
            each.note_others(ids, vectors)
    wanted = min(K, round(num_scanned / sample.share))
    return [each.recall(wanted, sample.share) for each in hits]


class _Hits:
    """The hits of one query, and how many other instances score higher than each of them."""

    def __init__(self, ids: Sequence[str], query: FloatArray) -> None:
        self._place = {each: place for place, each in enumerate(ids)}
        self._query = query
        # The scores that the search returned are not used: its copy of the vectors may be wrong. A
        # hit that the rows of record lack keeps this score, and is never one of the true ten.
        self._scores_H = np.full(len(ids), -np.inf)
        self._higher_H = np.zeros(len(ids))

    def note_own(self, ids: Sequence[str], vectors_ND: FloatArray) -> None:
        """Set the exact scores of those hits that are among these instances."""
        for each, vector in zip(ids, vectors_ND, strict=True):
            if each in self._place:
                self._scores_H[self._place[each]] = self._query @ vector

    def note_others(self, ids: Sequence[str], vectors_ND: FloatArray) -> None:
        """Count which of these instances score higher than the hits."""
        others = np.array([each not in self._place for each in ids], dtype=bool)
        scores_N = (vectors_ND @ self._query)[others]
        self._higher_H += (scores_N[None, :] > self._scores_H[:, None] + _TIE).sum(axis=1)

    def recall(self, wanted: int, share: float) -> float:
        """Return the share of the `wanted` nearest instances that are among the hits."""
        if not wanted:
            return 1.0
        order = np.argsort(-self._scores_H, kind="stable")
        places_H = np.arange(len(order)) + self._higher_H[order] / share
        is_true_H: npt.NDArray[np.bool_] = places_H < wanted
        return float((is_true_H & np.isfinite(self._scores_H[order])).sum() / wanted)


def _scan(
    store: InstanceStore, gallery: str, version: str, image_ids: Sequence[str]
) -> Iterator[tuple[list[str], FloatArray]]:
    """Yield ids and (N, D) vectors of the instances of these photos, as the store records them."""
    remaining = iter(image_ids)
    while chunk := list(islice(remaining, _CHUNK)):
        indexed = store.get_indexed(gallery, version, chunk)
        photos = [each for each in indexed.values() if each.instances is not None]
        ids = [
            instance_id(photo.record.image_id, number)
            for photo in photos
            for number in range(photo.record.num_instances)
        ]
        if ids:
            vectors = [each.instances.vectors for each in photos if each.instances is not None]
            yield ids, np.concatenate(vectors)
