"""The whole query path: expression -> vector -> candidates -> grouped by image -> hits.

Knows the store's contract and the encoder's seam; no model, no Ray and no command line.
"""

# Shapes: Q expressions, D vector dimension

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from reir.encoders import TRAINED_KIND, EncoderSpec, load_encoder_spec, stored_spec
from reir.errors import CheckpointError, GalleryNotFound, QueryError, SchemaMismatch, nearest_name
from reir.models.seams import InstanceEncoder
from reir.records import FloatArray, Hit, MaskRle, SearchResult
from reir.store.checks import MAX_LIMIT, no_version
from reir.store.contract import InstanceRow, InstanceStore, VersionSpec
from reir.text import validate_expression

MAX_K = 1000
"""Most hits of one expression, and most expressions of one batch."""

_FIRST_ROWS, _ROWS_A_HIT = 32, 8
"""What is read at first: enough for photos that put several instances before the next photo."""

_GROWTH = 8
"""How many times more is read where that was too little."""

_ROWS_A_CALL = 200_000
"""Most rows of one call of the store; a larger batch takes several."""

_Range = tuple[str | None, str | None]
"""Image ids: from the first, up to but without the second; None is no bound."""


def open_gallery(
    name: str,
    *,
    store: InstanceStore | str | None = None,
    encoder: InstanceEncoder | str | None = None,
    checkpoint: Path | None = None,
) -> Gallery:
    """Open the live version of a gallery for searching.

    Args:
        name: gallery.
        store: an open store, which stays the caller's to close; or a location as
            `reir.store.open_store` takes it, None being the default one.
        encoder: makes the expression vectors; or its name as `reir.encoders` takes it.
        checkpoint: checkpoint directory, instead of an encoder. Without both, the encoder that the
            live version was indexed with is loaded.

    Raises:
        GalleryNotFound: no such gallery, or none of its versions is live.
        SchemaMismatch: the live version was built with another checkpoint.
        ConfigError: the encoder's name is not known, or a package that it needs is missing.
        CheckpointError: the checkpoint does not load.
        StoreUnavailable: the store cannot be reached.
    """
    with ExitStack() as owned:
        if store is None or isinstance(store, str):
            from reir.store import open_store

            store = open_store(store)
            owned.callback(store.close)
        check_gallery(store, name)  # before the checkpoint, which takes seconds to load
        if encoder is None and checkpoint is not None:
            encoder = str(EncoderSpec(TRAINED_KIND, str(checkpoint.absolute())))
        if encoder is None:
            encoder = _load_own(store, name)
        elif isinstance(encoder, str):
            encoder = load_encoder_spec(encoder)
        gallery = Gallery(name, store, encoder)
        gallery.owned = owned.pop_all()
        return gallery


class Gallery:
    """A gallery open for searching; use it as a context manager, or call `close`.

    Every search asks the store for the live version, so that a promotion counts from the next
    search on.

    Attributes:
        name: of the gallery.
        owned: what `close` closes.
    """

    def __init__(self, name: str, store: InstanceStore, encoder: InstanceEncoder) -> None:
        """Search gallery `name` of a store with the expression vectors of `encoder`.

        Raises:
            GalleryNotFound: no such gallery, or none of its versions is live.
            SchemaMismatch: the live version was built with another checkpoint.
        """
        self.name = name
        self.owned = ExitStack()
        self._store = store
        self._encoder = encoder
        self._version, self._has_masks = "", False
        self.refresh()

    @property
    def version(self) -> str:
        """Name of the version that was live at the last search or `refresh`."""
        return self._version

    def refresh(self) -> str:
        """Turn to the version that is live now and return its name; every search does so.

        Raises:
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version was built with another checkpoint.
        """
        live = self._store.live_version(self.name)
        if live != self._version:
            spec = _checked_spec(self._store, self.name, live, self._encoder)
            self._version, self._has_masks = live, spec.has_masks
        return live

    def search(
        self, expression: str, k: int = 10, per_image: int = 1, where: str | None = None
    ) -> SearchResult:
        """Find the instances that an expression describes.

        Args:
            expression: describes one object.
            k: most hits, 1 to 1000.
            per_image: most hits of one image, 1 to 1000.
            where: filter over instance fields and attributes (`reir.store.filters`).

        Returns:
            Hits by score; where scores are equal, by image id and number of the instance.

        Raises:
            QueryError: an argument is out of range; `field` names it.
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version that has become live was built with another checkpoint.
        """
        return self.search_batch([expression], k, per_image, where)[0]

    def search_batch(
        self,
        expressions: Sequence[str],
        k: int = 10,
        per_image: int = 1,
        where: str | None = None,
    ) -> list[SearchResult]:
        """Answer up to 1000 expressions with one pass of the text model and one call of the store.

        Arguments and errors are those of `search`. The timings of each result are those of the
        whole batch.
        """
        if isinstance(expressions, str):
            raise QueryError("expressions", f"must be a list, got the text {expressions!r}")
        if len(expressions) > MAX_K:
            raise QueryError(
                "expressions", f"holds {len(expressions)}, at most {MAX_K} are allowed; split them"
            )
        k, per_image = _count("k", k), _count("per_image", per_image)
        texts = [validate_expression(expression) for expression in expressions]
        if not texts:
            return []
        clock = _Clock()
        with clock.stage("text"):
            vectors_QD = self._encoder.encode_expressions(texts)
        with clock.stage("search"):
            version = self.refresh()
        ranking = _Ranking(
            store=self._store,
            gallery=self.name,
            version=version,
            k=k,
            per_image=per_image,
            where=where,
            clock=clock,
        )
        answers = ranking.best(vectors_QD)
        masks = self._masks(answers, clock) if self._has_masks else {}
        with clock.stage("rank"):
            hits = [
                tuple(_hit(row, masks.get(row.instance_id)) for row in rows) for rows in answers
            ]
        return [
            SearchResult(
                expression=expression,
                gallery=self.name,
                version=version,
                hits=found,
                timings_ms=dict(clock.ms),
            )
            for expression, found in zip(expressions, hits, strict=True)
        ]

    def _masks(self, answers: Sequence[Sequence[InstanceRow]], clock: _Clock) -> dict[str, MaskRle]:
        """Return the masks of all hits, by instance id."""
        wanted = {row.instance_id: None for rows in answers for row in rows}
        with clock.stage("search"):
            return self._store.get_masks(self.name, self._version, list(wanted))

    def close(self) -> None:
        """Close the store, if this gallery opened it."""
        self.owned.close()

    def __enter__(self) -> Self:
        """Return this gallery."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


class _Clock:
    """Milliseconds of each stage; a stage that comes again adds up."""

    def __init__(self) -> None:
        self.ms = {"text": 0.0, "search": 0.0, "rank": 0.0}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] += (time.perf_counter() - started_s) * 1e3


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """One request to a version: how its rows become hits.

    Attributes:
        k: most hits of a query.
        per_image: most hits of one image.
        where: filter that every hit passes.
    """

    store: InstanceStore
    gallery: str
    version: str
    k: int
    per_image: int
    where: str | None
    clock: _Clock

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
        limit = _FIRST_ROWS + _ROWS_A_HIT * self.k
        while limit < MAX_LIMIT:
            yield limit
            limit *= _GROWTH
        yield MAX_LIMIT

    def _settled(self, hits: list[InstanceRow], last_read: InstanceRow) -> bool:
        """Whether rows that were not read can change nothing, not even among equal scores."""
        return len(hits) == self.k and hits[-1].score > last_read.score

    def _best_by_parts(self, vector_1D: FloatArray, ids: _Range) -> list[InstanceRow]:
        """Return the hits among a range of images, halving it while one read is too little.

        Only where equal scores fill a whole read does the store choose among them.
        """
        (rows,) = self._read(vector_1D, MAX_LIMIT, ids)
        hits = self._take(rows)
        image_ids = sorted({row.image_id for row in rows})
        if len(hits) == self.k or len(rows) < MAX_LIMIT or len(image_ids) < 2:
            return hits
        middle = image_ids[len(image_ids) // 2]
        lower = self._best_by_parts(vector_1D, (ids[0], middle))
        return self._take(lower + self._best_by_parts(vector_1D, (middle, ids[1])))

    def _read(
        self, vectors_QD: FloatArray, limit: int, ids: _Range = (None, None)
    ) -> list[list[InstanceRow]]:
        where = _within(self.where, ids)
        with self.clock.stage("search"):
            return self.store.search(self.gallery, self.version, vectors_QD, limit, where=where)

    def _take(self, rows: list[InstanceRow]) -> list[InstanceRow]:
        """Return the first `k` rows in order, at most `per_image` of each image."""
        taken: list[InstanceRow] = []
        of_image: Counter[str] = Counter()
        with self.clock.stage("rank"):
            for row in sorted(rows, key=_order):
                if of_image[row.image_id] < self.per_image:
                    of_image[row.image_id] += 1
                    taken.append(row)
                    if len(taken) == self.k:
                        break
        return taken


def _order(row: InstanceRow) -> tuple[float, str, int]:
    """Best score first; where equal, by image and then by the instance's number."""
    return -row.score, row.image_id, int(row.instance_id.rpartition("#")[2])


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


def _hit(row: InstanceRow, mask: MaskRle | None) -> Hit:
    return Hit(
        instance_id=row.instance_id,
        image_id=row.image_id,
        uri=row.uri,
        box=row.box,
        score=row.score,
        objectness=row.objectness,
        attributes=row.attributes,
        mask=mask,
    )


def _count(field: str, value: int) -> int:
    """Return `value` as a number of hits.

    Raises:
        QueryError: it is no whole number from 1 to `MAX_K`.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 1 <= int(value) <= MAX_K:
        raise QueryError(field, f"must be a whole number from 1 to {MAX_K}, got {value!r}")
    return int(value)


def check_gallery(store: InstanceStore, name: str) -> None:
    """Refuse a gallery that the store does not have, naming those that it has."""
    known = store.galleries()
    if name not in known:
        more = f" and {len(known) - 10} more" if len(known) > 10 else ""
        have = f"this store has {', '.join(known[:10])}{more}" if known else "this store has none"
        advice = nearest_name(name, known) or f"; `reir index SOURCE --gallery {name}` makes it"
        raise GalleryNotFound(f"no gallery '{name}': {have}{advice}")


def _load_own(store: InstanceStore, gallery: str) -> InstanceEncoder:
    """Load the encoder that the live version was indexed with."""
    store.live_version(gallery)  # says so when none is
    spec = stored_spec(store, gallery)
    try:
        return load_encoder_spec(spec)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} (gallery '{gallery}' was indexed with {spec or 'the shipped checkpoint'}; "
            f"--encoder names where it is now)"
        ) from error


def _checked_spec(
    store: InstanceStore, gallery: str, version: str, encoder: InstanceEncoder
) -> VersionSpec:
    """Return a version's spec; refuse one whose vectors cannot be compared with the encoder's."""
    specs = {each.name: each.spec for each in store.versions(gallery)}
    if version not in specs:
        raise no_version(gallery, version, specs)
    spec = specs[version]
    if (spec.digest, spec.dim) != (encoder.digest, encoder.dim):
        raise SchemaMismatch(
            f"version '{version}' of gallery '{gallery}' was built with checkpoint "
            f"{_shown(spec.digest, spec.dim)}, the one in use is "
            f"{_shown(encoder.digest, encoder.dim)}; `reir index SOURCE --gallery {gallery}` "
            f"builds a version for this checkpoint, or name the other one with --encoder"
        )
    return spec


def _shown(digest: str, dim: int) -> str:
    return f"{digest[:12]} (dimension {dim})"
