"""Scores all instances of the best photos of a search with the relation re-ranker.

It reads the vectors and boxes that the store has; it does not open photo files. So it runs in a
process that has both a store and the re-ranker: that of the library, or the re-ranker worker of the
service.
"""

# Shapes: N instances of a photo, D vector dimension

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from reir.models.reranker import PhotoInstances, PhotoScores, Reranker
from reir.query.stages import RerankRequest, RerankResult
from reir.results import Neighbor
from reir.store.contract import InstanceStore, StoredPhoto
from reir.store.filter_numpy import Mask, evaluate, photo_column
from reir.store.filters import parse

NUM_NEIGHBORS = 3
"""Neighbors returned with each hit."""


class PhotoReranker:
    """Scores the instances of the best photos of a gallery with the relation re-ranker."""

    def __init__(self, store: InstanceStore, gallery: str, reranker: Reranker) -> None:
        """Prepare for requests to `gallery`, whose instances are read from `store`."""
        self._store, self._gallery, self._reranker = store, gallery, reranker

    def rerank(self, requests: Sequence[RerankRequest]) -> list[list[RerankResult]]:
        """Return the best instances of each photo of each request, in any order.

        A photo that was deleted since the search is left out.
        """
        photos = self._read(requests)
        wanted = [
            [
                photo
                for image_id in each.image_ids
                if (photo := photos.get((each.version, image_id)))
            ]
            for each in requests
        ]
        # All requests in one batch of the model, so attention is computed for all if one needs it.
        scored = self._reranker.score(
            [each.expression for each in requests],
            [[_instances(photo) for photo in of_one] for of_one in wanted],
            explain=any(each.neighbors for each in requests),
        )
        return [
            [
                found
                for photo, reranked in zip(of_one, scores, strict=True)
                for found in _best(request, photo, reranked)
            ]
            for request, of_one, scores in zip(requests, wanted, scored, strict=True)
        ]

    def _read(self, requests: Sequence[RerankRequest]) -> dict[tuple[str, str], StoredPhoto]:
        """Return the photos of all requests by version and image id."""
        # The inner dict serves as an ordered set: a photo that several requests name is read once.
        wanted: dict[str, dict[str, None]] = {}
        for each in requests:
            wanted.setdefault(each.version, {}).update(dict.fromkeys(each.image_ids))
        return {
            (version, image_id): photo
            for version, image_ids in wanted.items()
            for image_id, photo in self._store.get_photos(
                self._gallery, version, list(image_ids)
            ).items()
        }


def _instances(photo: StoredPhoto) -> PhotoInstances:
    return PhotoInstances(photo.vectors, photo.boxes, photo.objectness)


def _best(
    request: RerankRequest, photo: StoredPhoto, reranked: PhotoScores
) -> Iterator[RerankResult]:
    """Yield the best instances of one photo, leaving out those that must not be hits."""
    allowed = _allowed(request, photo)
    order = np.argsort(-reranked.scores, kind="stable")  # equal scores: in the order of numbers
    for number in order[allowed[order]][: request.per_image].tolist():
        # The search may not have returned this instance, so its inner product is not known yet.
        dual_score = float(photo.vectors[number] @ request.expression.vector)
        yield RerankResult(
            row=photo.row(number, dual_score),
            score=float(reranked.scores[number]),
            neighbors=_neighbors(photo, reranked, number) if request.neighbors else (),
        )


def _allowed(request: RerankRequest, photo: StoredPhoto) -> Mask:
    """(N,) whether each instance may be a hit."""
    # The search has applied the filter, too, but only to the instances that it returned.
    allowed = np.ones(len(photo), dtype=np.bool_)
    for each in request.excluded:
        image_id, _, number = each.rpartition("#")
        # The photo may have been indexed again since the search, with fewer instances.
        if image_id == photo.image_id and int(number) < len(photo):
            allowed[int(number)] = False
    if request.where is None:
        return allowed
    tree = parse(request.where, added=1)
    return allowed & evaluate(tree, lambda field: photo_column(photo, field))


def _neighbors(photo: StoredPhoto, reranked: PhotoScores, number: int) -> tuple[Neighbor, ...]:
    """Return the instances with the largest attention weights of one instance."""
    assert reranked.attention is not None, "asked for"
    shares = reranked.attention[number]
    # An instance attends to itself as well, which explains nothing.
    others = [each for each in np.argsort(-shares, kind="stable").tolist() if each != number]
    rows = [(photo.row(each), float(shares[each])) for each in others[:NUM_NEIGHBORS]]
    return tuple(
        Neighbor(instance_id=row.instance_id, box=row.box, weight=weight) for row, weight in rows
    )
