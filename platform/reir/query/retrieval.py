"""Retrieval: turns the terms of a query into one vector and searches the live version with it.

Runs in the process that has the store: that of the library, or of the service's retriever. Knows
the store's contract, no model and no Ray.
"""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reir.errors import GalleryNotFound, QueryError, SchemaMismatch
from reir.query.clock import Clock
from reir.query.paging import version_gone
from reir.query.ranking import Ranking
from reir.query.spans import STORE_SEARCH
from reir.records import FloatArray, MaskRle
from reir.store.contract import InstanceRow, InstanceStore, VersionInfo
from reir.store.validation import instance_id, unknown_version_error
from reir.tracing import Period

# Reading it takes calls of the store, which a search should not wait for each time.
SIZE_KNOWN_S = 600.0
"""The number of instances is read again after this time; only the calibration needs it."""

_MIN_LENGTH = 1e-3
"""Minimum length of the weighted sum of unit vectors; a shorter sum has no meaningful direction."""


@dataclass(frozen=True, kw_only=True)
class VectorTerm:
    """One term of a query for the retriever: a vector, or an instance whose vector is stored."""

    weight: float
    vector: FloatArray | None = None
    instance_id: str = ""


@dataclass(frozen=True, kw_only=True)
class RetrieveRequest:
    """A request to the retriever.

    Attributes:
        terms: unit vectors, which are added by weight.
        num_rows: rows to return.
        per_image: maximum number of rows of one photo.
        where: filter that every row must pass.
        num_photos: also return the best row of each of this many photos.
        version: version to search; empty for the live one.
    """

    terms: tuple[VectorTerm, ...]
    num_rows: int
    per_image: int
    where: str | None
    num_photos: int
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class RetrieveResult:
    """The answer of the retriever to one request.

    Attributes:
        version, digest: the version that was searched, and the checkpoint of its vectors.
        has_masks: whether the version stores masks.
        num_instances: approximate number of instances of the version.
        num_indexed: approximate number of photos of the version, without those that failed.
        vector: (D,) unit vector of the query.
        rows: best first.
        photos: the best row of each of the best photos, best first.
        rank_ms: the part of the time that was spent on choosing among rows.
        searches: when the store searched, for this request and those answered with it.
    """

    version: str
    digest: str
    has_masks: bool
    num_instances: int
    num_indexed: int
    vector: FloatArray
    rows: tuple[InstanceRow, ...]
    photos: tuple[InstanceRow, ...]
    rank_ms: float
    searches: tuple[Period, ...] = ()


class Retriever:
    """Searches the version of one gallery that is live at the time of each search.

    Attributes:
        live: the version that the last search or `refresh` used.
        pinned: version to search instead of the live one; empty for the live one.
    """

    def __init__(
        self, store: InstanceStore, gallery: str, digest: str, dim: int, pinned: str = ""
    ) -> None:
        """Search with vectors of dimension `dim` of the checkpoint `digest`.

        The store is not asked before the first search or `refresh`.
        """
        self._store, self.gallery = store, gallery
        self._digest, self._dim = digest, dim
        self.pinned = pinned
        self.live = ""
        self._known: VersionInfo | None = None
        self._known_until_s = 0.0

    def refresh(self) -> str:
        """Return the version to search: the pinned one, or the one that is live now.

        Every search does this.

        Raises:
            GalleryNotFound: no such gallery or version, or none of its versions is live.
            SchemaMismatch: the version was built with another checkpoint.
        """
        version = self.pinned or self._store.live_version(self.gallery)
        self._info(version)
        self.live = version
        return version

    def retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResult]:
        """Answer requests, in the order given; those that differ only in vectors share a search.

        Raises:
            QueryError: a filter is wrong, an instance or the version of a cursor does not exist,
                or the terms cancel each other.
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: a request names no version, and the live one was built with another
                checkpoint.
        """
        named, infos = self._with_versions(requests)
        clock = Clock("rank")
        vectors = [self._vector(each) for each in named]
        rows = self._best([_widened(each) for each in named], vectors, clock)
        # With one row per photo, these rows are the best photos as well. The other requests need a
        # search of their own for the best photos.
        several = [number for number, each in enumerate(named) if each.per_image > 1]
        first = self._best(
            [replace(named[n], num_rows=named[n].num_photos, per_image=1) for n in several],
            [vectors[n] for n in several],
            clock,
        )
        photos = dict(enumerate(rows)) | dict(zip(several, first, strict=True))
        searches = tuple(
            each._replace(name=STORE_SEARCH) for each in clock.periods if each.name == "search"
        )
        return [
            RetrieveResult(
                version=each.version,
                digest=infos[each.version].spec.digest,
                has_masks=infos[each.version].spec.has_masks,
                num_instances=infos[each.version].num_instances,
                num_indexed=infos[each.version].num_images - infos[each.version].num_failed,
                vector=vectors[number],
                rows=tuple(rows[number][: each.num_rows]),
                photos=tuple(photos[number][: each.num_photos]),
                rank_ms=clock.ms["rank"],
                searches=searches,
            )
            for number, each in enumerate(named)
        ]

    def _with_versions(
        self, requests: Sequence[RetrieveRequest]
    ) -> tuple[Sequence[RetrieveRequest], dict[str, VersionInfo]]:
        """Return requests that all name a version, and these versions by name."""
        # Once for all requests, so that a promotion meanwhile does not divide them.
        try:
            live = self._info(self.refresh())
        except SchemaMismatch:
            # A search for every photo goes on in its version after a promotion.
            if not all(each.version for each in requests):
                raise
            return requests, {each.version: self._paged(each.version) for each in requests}
        named = [each if each.version else replace(each, version=live.name) for each in requests]
        infos = {
            each.version: live if each.version == live.name else self._paged(each.version)
            for each in named
        }
        return named, infos

    def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """Return the masks of those instances that have one, by instance id."""
        return self._store.get_masks(self.gallery, version, instance_ids)

    def vectors(self, version: str, instance_ids: Sequence[str]) -> dict[str, FloatArray]:
        """Return the (D,) vectors of those instances that exist, by instance id."""
        return stored_vectors(self._store, self.gallery, version, instance_ids)

    def _info(self, version: str) -> VersionInfo:
        """Return the live version; refuse one whose vectors cannot be compared with queries."""
        known, now_s = self._known, time.monotonic()
        if known is None or version != known.name or now_s > self._known_until_s:
            self._known = known = self._look_up(version)
            self._known_until_s = time.monotonic() + SIZE_KNOWN_S
        return known

    def _paged(self, version: str) -> VersionInfo:
        """Return the version that a cursor names."""
        try:
            return self._look_up(version)
        except (GalleryNotFound, SchemaMismatch) as error:
            raise version_gone(version) from error

    def _look_up(self, version: str) -> VersionInfo:
        found = {each.name: each for each in self._store.versions(self.gallery)}
        if version not in found:
            raise unknown_version_error(self.gallery, version, found)
        self._check(found[version])
        return found[version]

    def _check(self, info: VersionInfo) -> None:
        if (info.spec.digest, info.spec.dim) != (self._digest, self._dim):
            raise SchemaMismatch(
                f"version '{info.name}' of gallery '{self.gallery}' was built with checkpoint "
                f"{_shown(info.spec.digest, info.spec.dim)}, the one in use is "
                f"{_shown(self._digest, self._dim)}; `reir index SOURCE --gallery {self.gallery}` "
                f"builds a version for this checkpoint, or name the other one with --encoder"
            )

    def _best(
        self, requests: Sequence[RetrieveRequest], vectors: Sequence[FloatArray], clock: Clock
    ) -> list[list[InstanceRow]]:
        """Return the first `num_rows` rows of each request, at most `per_image` of a photo."""
        # Requests whose rankings are equal differ only in their vectors, and share one search.
        groups: dict[Ranking, list[int]] = {}
        for number, each in enumerate(requests):
            if not each.num_rows:  # no calibration and no re-ranker asks for the best photos
                continue
            ranking = Ranking(
                store=self._store,
                gallery=self.gallery,
                version=each.version,
                num_hits=each.num_rows,
                per_image=each.per_image,
                where=each.where,
                # the instance that the user pointed at would always be the first hit
                excluded=frozenset(term.instance_id for term in each.terms if term.instance_id),
                clock=clock,
            )
            groups.setdefault(ranking, []).append(number)
        answers: list[list[InstanceRow]] = [[] for _ in requests]
        for ranking, numbers in groups.items():
            found = ranking.best(np.stack([vectors[number] for number in numbers]))
            for number, rows in zip(numbers, found, strict=True):
                answers[number] = rows
        return answers

    def _vector(self, request: RetrieveRequest) -> FloatArray:
        """Return the (D,) unit vector of a request."""
        stored = self._stored(request)
        weighted = [
            (term.weight, stored[term.instance_id] if term.vector is None else term.vector)
            for term in request.terms
        ]
        for _, vector in weighted:
            if len(vector) != self._dim:
                raise QueryError(
                    "vector",
                    f"must have {self._dim} numbers like those of the gallery, got {len(vector)}",
                )
        if len(weighted) == 1:
            # Already of unit length; normalizing it again could change its last bit. A weight does
            # not matter for a single term.
            return weighted[0][1]
        total = np.sum([weight * _unit(vector) for weight, vector in weighted], axis=0)
        if np.linalg.norm(total) < _MIN_LENGTH:
            raise QueryError("terms", "cancel each other; change a weight or leave one out")
        return _unit(total)

    def _stored(self, request: RetrieveRequest) -> Mapping[str, FloatArray]:
        """Return the vectors of the instances that a request names."""
        wanted = {term.instance_id for term in request.terms if term.instance_id}
        vectors = stored_vectors(self._store, self.gallery, request.version, wanted)
        if missing := sorted(wanted - vectors.keys()):
            raise QueryError(
                "instance_id",
                f"{missing[0]!r} is not an instance of gallery '{self.gallery}'; "
                f"use the instance_id of a hit in this gallery",
            )
        return vectors


def stored_vectors(
    store: InstanceStore, gallery: str, version: str, instance_ids: Collection[str]
) -> dict[str, FloatArray]:
    """Return the (D,) vectors of those instances that exist, by instance id."""
    if not instance_ids:
        return {}
    image_ids = sorted({each.rpartition("#")[0] for each in instance_ids})
    return {
        name: vector
        for image_id, photo in store.get_photos(gallery, version, image_ids).items()
        for number, vector in enumerate(photo.vectors)
        if (name := instance_id(image_id, number)) in instance_ids
    }


def _widened(request: RetrieveRequest) -> RetrieveRequest:
    """Return the request with enough rows for `num_photos` too, if it takes one row per photo."""
    if request.per_image > 1:
        return request
    return replace(request, num_rows=max(request.num_rows, request.num_photos))


def _unit(vector: FloatArray) -> FloatArray:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def _shown(digest: str, dim: int) -> str:
    return f"{digest[:12]} (dimension {dim})"
