"""A gallery open for searching: the query path of `reir.answer` with its stages in this process.

Knows the store's contract and the encoder's seam; no model, no Ray and no command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from reir.answer import answer, run_now
from reir.clock import Costs
from reir.encoders import (
    TRAINED_KIND,
    EncoderSpec,
    checkpoint_folder,
    load_encoder_spec,
    stored_spec,
)
from reir.errors import CheckpointError, GalleryNotFound, QueryError, nearest_name
from reir.localise import PixelLocaliser
from reir.models.reranker import Reranker
from reir.models.seams import EncodedExpression, InstanceEncoder, encode_words
from reir.presence import Calibration, load_calibration
from reir.query import MAX_K, Query, Term
from reir.records import MaskRle, SearchResult
from reir.reordering import Reorderer
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
        folder = None
        if encoder is None:
            store.live_version(name)  # says so when none is
            spec = stored_spec(store, name)
            encoder, folder = _load_own(name, spec), checkpoint_folder(spec)
        elif isinstance(encoder, str):
            folder = checkpoint_folder(encoder)
            encoder = load_encoder_spec(encoder)
        companions = Companions() if folder is None else load_companions(folder, encoder.digest)
        gallery = Gallery(name, store, encoder, companions)
        gallery.owned = owned.pop_all()
        return gallery


@dataclass(frozen=True)
class Companions:
    """What a checkpoint may hold besides its encoder."""

    reranker: Reranker | None = None
    calibration: Calibration | None = None


def load_companions(folder: Path, digest: str) -> Companions:
    """Load what lies in a checkpoint directory besides the encoder of this digest.

    Nothing is taken from a directory of other weights.

    Raises:
        CheckpointError: a file is damaged, or the re-ranker was trained on other weights.
    """
    from reir.checkpoint import load_reranker, read_config

    if read_config(folder).get("digest") != digest:
        return Companions()
    return Companions(load_reranker(folder, digest), load_calibration(folder, digest))


class LocalStages:
    """The stages of one gallery in this process; see `reir.stages.Stages`."""

    def __init__(
        self,
        encoder: InstanceEncoder,
        retriever: Retriever,
        reorderer: Reorderer | None,
        localiser: PixelLocaliser,
        calibration: Calibration | None,
    ) -> None:
        self.gallery = retriever.gallery
        self.reranks, self.localises = reorderer is not None, True
        self.calibration = calibration
        self.costs = Costs()
        self._encoder, self._retriever = encoder, retriever
        self._reorderer, self._localiser = reorderer, localiser

    async def encode(self, expressions: Sequence[str]) -> Sequence[EncodedExpression]:
        """Vector of each expression, and its words where there is a re-ranker to read them."""
        return encode_words(self._encoder, expressions, words=self.reranks)

    async def retrieve(self, requests: Sequence[Retrieval]) -> Sequence[Retrieved]:
        """As `Retriever.retrieve`."""
        return self._retriever.retrieve(requests)

    async def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """As `Retriever.masks`."""
        return self._retriever.masks(version, instance_ids)

    async def rerank(
        self, requests: Sequence[Reordering], _: float | None, /
    ) -> Sequence[Sequence[Reordered]]:
        """As `Reorderer.reorder`; a call in process cannot be cut short."""
        assert self._reorderer is not None, "`reranks` says so"
        return self._reorderer.reorder(requests)

    async def localise(
        self, requests: Sequence[Refinement], _: float | None, /
    ) -> Sequence[Refined]:
        """As `Localiser.refine`; a call in process cannot be cut short."""
        return self._localiser.refine(requests)


class Gallery(AbstractContextManager["Gallery"]):
    """A gallery open for searching; use it as a context manager, or call `close`.

    Every search asks the store for the live version, so that a promotion counts from the next
    search on.

    Attributes:
        name: of the gallery.
        stages: what a query goes through.
        owned: what `close` closes.
    """

    def __init__(
        self,
        name: str,
        store: InstanceStore,
        encoder: InstanceEncoder,
        companions: Companions | None = None,
    ) -> None:
        """Search gallery `name` of a store with the expression vectors of `encoder`.

        Without `companions`, there is no re-ranking and no presence.

        Raises:
            GalleryNotFound: no such gallery, or none of its versions is live.
            SchemaMismatch: the live version was built with another checkpoint.
        """
        self.name = name
        self.owned = ExitStack()
        self._retriever = Retriever(store, name, encoder.digest, encoder.dim)
        companions = companions or Companions()
        reranker = companions.reranker
        self.stages = LocalStages(
            encoder=encoder,
            retriever=self._retriever,
            reorderer=None if reranker is None else Reorderer(store, name, reranker),
            localiser=PixelLocaliser(encoder, companions.calibration),
            calibration=companions.calibration,
        )

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
        return run_now(answer(queries, self.stages))

    def close(self) -> None:
        """Close the store, if this gallery opened it."""
        self.owned.close()

    def __exit__(self, *_: object) -> None:
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


def _load_own(gallery: str, spec: str) -> InstanceEncoder:
    """Load the encoder that a gallery's live version was indexed with."""
    try:
        return load_encoder_spec(spec)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} (gallery '{gallery}' was indexed with {spec or 'the shipped checkpoint'}; "
            f"--encoder names where it is now)"
        ) from error
