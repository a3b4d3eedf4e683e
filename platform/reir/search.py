"""A gallery open for searching: the query path of `reir.answer` with its stages in this process.

Knows the store's contract and the encoder's seam; no model, no Ray and no command line.
"""

# Shapes: N expressions, D vector dimension

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from reir.answer import answer, run_now
from reir.clock import Costs
from reir.encoders import TRAINED_KIND, EncoderSpec, load_encoder_spec, stored_spec
from reir.errors import CheckpointError, GalleryNotFound, QueryError, nearest_name
from reir.models.seams import InstanceEncoder
from reir.presence import Calibration
from reir.query import MAX_K, Query, Term
from reir.records import FloatArray, MaskRle, SearchResult
from reir.retrieval import Retrieval, Retrieved, Retriever
from reir.stages import Refined, Refinement, Reordered, Reordering
from reir.store.contract import InstanceStore


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


class LocalStages:
    """The stages of one gallery in this process; see `reir.stages.Stages`."""

    reranks = localises = False

    def __init__(
        self, retriever: Retriever, encoder: InstanceEncoder, calibration: Calibration | None
    ) -> None:
        self.gallery = retriever.gallery
        self.calibration = calibration
        self.costs = Costs()
        self._retriever, self._encoder = retriever, encoder

    async def encode(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors."""
        return self._encoder.encode_expressions(expressions)

    async def retrieve(self, requests: Sequence[Retrieval]) -> Sequence[Retrieved]:
        """As `Retriever.retrieve`."""
        return self._retriever.retrieve(requests)

    async def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """As `Retriever.masks`."""
        return self._retriever.masks(version, instance_ids)

    async def rerank(
        self, requests: Sequence[Reordering], timeout_s: float | None
    ) -> Sequence[Sequence[Reordered]]:
        raise NotImplementedError

    async def localise(
        self, requests: Sequence[Refinement], timeout_s: float | None
    ) -> Sequence[Refined]:
        raise NotImplementedError


class Gallery:
    """A gallery open for searching; use it as a context manager, or call `close`.

    Every search asks the store for the live version, so that a promotion counts from the next
    search on.

    Attributes:
        name: of the gallery.
        owned: what `close` closes.
    """

    def __init__(
        self,
        name: str,
        store: InstanceStore,
        encoder: InstanceEncoder,
        calibration: Calibration | None = None,
    ) -> None:
        """Search gallery `name` of a store with the expression vectors of `encoder`.

        Raises:
            GalleryNotFound: no such gallery, or none of its versions is live.
            SchemaMismatch: the live version was built with another checkpoint.
        """
        self.name = name
        self.owned = ExitStack()
        self._retriever = Retriever(store, name, encoder.digest, encoder.dim)
        self._stages = LocalStages(self._retriever, encoder, calibration)

    @property
    def version(self) -> str:
        """Name of the version that was live at the last search or `refresh`."""
        return self._retriever.live

    def refresh(self) -> str:
        """Turn to the version that is live now and return its name; every search does so.

        Raises:
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version was built with another checkpoint.
        """
        return self._retriever.refresh()

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
        return self.ask(
            [
                Query(terms=(Term(expression=each),), k=k, per_image=per_image, where=where)
                for each in expressions
            ]
        )

    def ask(self, queries: Sequence[Query]) -> list[SearchResult]:
        """Answer queries with everything that they can say, in the order given.

        Raises:
            QueryError: a part of a query is wrong; `field` names it.
            GalleryNotFound: the gallery is gone.
            SchemaMismatch: the version that has become live was built with another checkpoint.
        """
        return run_now(answer(queries, self._stages))

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
