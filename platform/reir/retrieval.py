"""The store's side of a search: query vectors, the version to search, and the best rows.

Lives where the store is: in the process of the library, or of the service's retriever. Knows the
store's contract, no model and no Ray.
"""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reir.clock import Clock
from reir.errors import GalleryNotFound, QueryError, SchemaMismatch
from reir.paging import version_gone
from reir.ranking import Ranking
from reir.records import FloatArray, MaskRle
from reir.store.checks import instance_id, no_version
from reir.store.contract import InstanceRow, InstanceStore, VersionInfo

SIZE_KNOWN_S = 600.0
"""How long the number of instances counts as known; it is only read by the calibration."""

_LEAST_LENGTH = 1e-3
"""Of a sum of unit vectors by weight; below, they cancel each other and point nowhere."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One term of a query as the store sees it: a vector, or an instance whose vector it has."""

    weight: float
    vector: FloatArray | None = None
    instance_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What a query asks of the store.

    Attributes:
        parts: unit vectors to be added by weight.
        most: rows wanted.
        per_image: most rows of one photo.
        where: filter that every row passes.
        photos: the best row of each of so many photos is wanted besides.
        version: to search; empty for the live one.
    """

    parts: tuple[Part, ...]
    most: int
    per_image: int
    where: str | None
    photos: int
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What the store says.

    Attributes:
        version, digest: what was searched, and of which checkpoint its vectors are.
        has_masks: whether it keeps masks.
        num_instances: about how many there are.
        vector: (D,) of the query, unit length.
        rows: best first.
        photos: the best row of each of the first photos, best first.
        rank_ms: time spent on choosing among rows, as part of the time for everything.
    """

    version: str
    digest: str
    has_masks: bool
    num_instances: int
    vector: FloatArray
    rows: tuple[InstanceRow, ...]
    photos: tuple[InstanceRow, ...]
    rank_ms: float


class Retriever:
    """Searches the live version of one gallery, whichever that is at each search.

    Attributes:
        live: the version that was live at the last search or `refresh`.
    """

    def __init__(self, store: InstanceStore, gallery: str, digest: str, dim: int) -> None:
        """Search with vectors of dimension `dim` of the checkpoint `digest`.

        Raises:
            GalleryNotFound: no such gallery, or none of its versions is live.
            SchemaMismatch: the live version was built with another checkpoint.
        """
        self._store, self.gallery = store, gallery
        self._digest, self._dim = digest, dim
        self.live = store.live_version(gallery)
        self._known = self._look_up(self.live)
        self._known_until_s = time.monotonic() + SIZE_KNOWN_S

    def refresh(self) -> str:
        """Turn to the version that is live now and return its name; every search does so.

        Raises:
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version was built with another checkpoint.
        """
        live = self._store.live_version(self.gallery)
        self._info(live)
        self.live = live
        return live

    def retrieve(self, requests: Sequence[Retrieval]) -> list[Retrieved]:
        """Answer requests, in the order given; equal ones but for their vectors in one search.

        Raises:
            QueryError: a filter is wrong, an instance or a page's version is not there, or the
                terms cancel each other.
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version that has become live was built with another checkpoint.
        """
        live = self.refresh()
        named = [each if each.version else replace(each, version=live) for each in requests]
        infos = {each.version: self._paged(each.version) for each in named if each.version != live}
        infos[live] = self._info(live)
        clock = Clock("rank")
        vectors = [self._vector(each) for each in named]
        rows = self._best([_widened(each) for each in named], vectors, clock)
        several = [number for number, each in enumerate(named) if each.per_image > 1]
        first = self._best(
            [replace(named[n], most=named[n].photos, per_image=1) for n in several],
            [vectors[n] for n in several],
            clock,
        )
        photos = dict(enumerate(rows)) | dict(zip(several, first, strict=True))
        return [
            Retrieved(
                version=each.version,
                digest=infos[each.version].spec.digest,
                has_masks=infos[each.version].spec.has_masks,
                num_instances=infos[each.version].num_instances,
                vector=vectors[number],
                rows=tuple(rows[number][: each.most]),
                photos=tuple(photos[number][: each.photos]),
                rank_ms=clock.ms["rank"],
            )
            for number, each in enumerate(named)
        ]

    def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """Masks of those instances that have one, by instance id."""
        return self._store.get_masks(self.gallery, version, instance_ids)

    def _info(self, version: str) -> VersionInfo:
        """Return what is known of the live version; refuse vectors that cannot be compared."""
        if version != self._known.name or time.monotonic() > self._known_until_s:
            self._known = self._look_up(version)
            self._known_until_s = time.monotonic() + SIZE_KNOWN_S
        return self._known

    def _paged(self, version: str) -> VersionInfo:
        """Return what is known of a version that a cursor names."""
        try:
            return self._look_up(version)
        except (GalleryNotFound, SchemaMismatch) as error:
            raise version_gone(version) from error

    def _look_up(self, version: str) -> VersionInfo:
        found = {each.name: each for each in self._store.versions(self.gallery)}
        if version not in found:
            raise no_version(self.gallery, version, found)
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
        self, requests: Sequence[Retrieval], vectors: Sequence[FloatArray], clock: Clock
    ) -> list[list[InstanceRow]]:
        """Return the first `most` rows of each request, at most `per_image` of a photo."""
        groups: dict[Ranking, list[int]] = {}
        for number, each in enumerate(requests):
            if not each.most:
                continue
            ranking = Ranking(
                store=self._store,
                gallery=self.gallery,
                version=each.version,
                most=each.most,
                per_image=each.per_image,
                where=each.where,
                without=frozenset(part.instance_id for part in each.parts if part.instance_id),
                clock=clock,
            )
            groups.setdefault(ranking, []).append(number)
        answers: list[list[InstanceRow]] = [[] for _ in requests]
        for ranking, numbers in groups.items():
            found = ranking.best(np.stack([vectors[number] for number in numbers]))
            for number, rows in zip(numbers, found, strict=True):
                answers[number] = rows
        return answers

    def _vector(self, request: Retrieval) -> FloatArray:
        """Return the (D,) unit vector of a request."""
        stored = self._stored(request)
        parts = [
            (part.weight, stored[part.instance_id] if part.vector is None else part.vector)
            for part in request.parts
        ]
        for _, vector in parts:
            if len(vector) != self._dim:
                raise QueryError(
                    "vector", f"must have {self._dim} numbers as the gallery's, got {len(vector)}"
                )
        if len(parts) == 1:
            return parts[0][1]  # to the last bit
        total = np.sum([weight * _unit(vector) for weight, vector in parts], axis=0)
        if np.linalg.norm(total) < _LEAST_LENGTH:
            raise QueryError("terms", "cancel each other; change a weight or leave one out")
        return _unit(total)

    def _stored(self, request: Retrieval) -> Mapping[str, FloatArray]:
        """Return the vectors of the instances that a request names."""
        wanted = {part.instance_id for part in request.parts if part.instance_id}
        if not wanted:
            return {}
        image_ids = sorted({each.rpartition("#")[0] for each in wanted})
        photos = self._store.get_photos(self.gallery, request.version, image_ids)
        vectors = {
            name: vector
            for image_id, photo in photos.items()
            for number, vector in enumerate(photo.vectors)
            if (name := instance_id(image_id, number)) in wanted
        }
        if missing := sorted(wanted - vectors.keys()):
            raise QueryError(
                "instance_id",
                f"{missing[0]!r} is no instance of gallery '{self.gallery}'; "
                f"take it from a hit of this gallery",
            )
        return vectors


def _widened(request: Retrieval) -> Retrieval:
    """Where one row a photo is wanted, the best rows are those of the best photos too."""
    if request.per_image > 1:
        return request
    return replace(request, most=max(request.most, request.photos))


def _unit(vector: FloatArray) -> FloatArray:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def _shown(digest: str, dim: int) -> str:
    return f"{digest[:12]} (dimension {dim})"
