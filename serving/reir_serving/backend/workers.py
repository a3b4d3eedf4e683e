"""`SearchWorkers`: the threads that run models and search the store, each on batches of calls.

In the fused layout each replica has its own workers. In the split layout the workers are
deployments of their own, which `reir_serving.ray.deployments.RemoteWorkers` calls. This module
depends neither on Ray nor on HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from reir.errors import Overloaded
from reir.models.interfaces import EncodedExpression, encode_words
from reir.models.zoom_steps import ZoomSearch
from reir.query.photo_query import locate, vector_of
from reir.query.rerank import PhotoReranker
from reir.query.retrieval import (
    SIZE_KNOWN_S,
    Retriever,
    RetrieveRequest,
    RetrieveResult,
    stored_vectors,
)
from reir.query.stages import (
    RefineRequest,
    RefineResult,
    RerankRequest,
    RerankResult,
    VerifyRequest,
    VerifyResult,
    ZoomRequest,
)
from reir.records import Box, FloatArray, MaskRle
from reir.results import Localization
from reir.store import InstanceStore, VersionInfo, VersionSpec
from reir_serving.backend.batching import Batcher
from reir_serving.backend.circuit_breaker import CircuitBreaker
from reir_serving.backend.models import ModelCache, ModelInfo, ModelKey
from reir_serving.backend.photos import EncodedPhoto, encode_photo
from reir_serving.config import Limits

MAX_BATCH_SIZE, MAX_RERANK_BATCH_SIZE = 32, 4
"""A batch of the re-ranker is smaller because each of its calls scores up to 50 photos."""

LIVE_FRESH_S, LIVE_STALE_S = 0.25, 1.0
"""Age in seconds up to which the name of a gallery's live version is used as it is, and age up to
which it is used while a thread reads it from the store again. So a promotion takes effect at most
`LIVE_STALE_S` later."""

DEPLOYMENT_OF: Mapping[str, str] = {
    "load_model": "text",
    "encode": "text",
    "retrieve": "retriever",
    "masks": "retriever",
    "vectors": "retriever",
    "rerank": "reranker",
    "verify": "localizer",
    "refine": "localizer",
    "zoom": "localizer",
    "encode_photo": "localizer",
    "vector_of": "localizer",
    "localize": "localizer",
}
"""Method of `SearchWorkers` -> the deployment that runs it in the split layout. It is here, so that
a new method changes only this file."""

PHOTO_RETRY_AFTER_S = 2.0
"""`Retry-After` of a request that found the queue of photos full."""

CANARY = "the thing in the middle"
"""Expression that health checks encode and search for."""

T = TypeVar("T")
Call = TypeVar("Call")
Request = TypeVar("Request")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class RetrieveCall:
    """Requests for the best rows of one gallery.

    Attributes:
        digest, dim: of the model that encoded the requests.
        pinned: version to search instead of the live one; empty for the live one.
    """

    gallery: str
    digest: str
    dim: int
    requests: tuple[RetrieveRequest, ...]
    pinned: str = ""


class CachedLiveRetriever(Retriever):
    """A retriever that rarely waits for the store to say which version is live.

    Asking a Milvus server before each search would add a round trip to each of them. If the name
    was read less than `LIVE_FRESH_S` ago, it is used as it is. If it was read less than
    `LIVE_STALE_S` ago, it is used while a thread reads it again. An older name is only left after a
    pause without searches; then the search waits until the name has been read.
    """

    def __init__(
        self, store: InstanceStore, gallery: str, digest: str, dim: int, pinned: str = ""
    ) -> None:
        self._read_at_s = -LIVE_STALE_S  # so long ago that the first search reads the name
        self._executor = ThreadPoolExecutor(1)
        self._reading: Future[None] | None = None
        super().__init__(store, gallery, digest, dim, pinned)

    def refresh(self) -> str:
        """Return the name of the version to search."""
        if self.pinned:
            return self.pinned
        age_s = time.monotonic() - self._read_at_s
        if age_s > LIVE_FRESH_S and (self._reading is None or self._reading.done()):
            self._reading = self._executor.submit(self._read_live_version)
        # If a read fails, searches use the old name until here, where `result` raises the error.
        if age_s > LIVE_STALE_S and self._reading is not None:
            self._reading.result()
        return self.live

    def _read_live_version(self) -> None:
        # Its age counts from the start of the call, because a promotion can happen during the call.
        started_s = time.monotonic()
        version = self._store.live_version(self.gallery)
        if version != self.live or started_s > self._known_until_s:
            # A server takes some 300 ms for this, in which searches use the version before.
            self._known = self._look_up(version)
            self._known_until_s = started_s + SIZE_KNOWN_S
        self.live, self._read_at_s = version, started_s

    def _info(self, version: str) -> VersionInfo:
        """Return the live version; its size is read again together with its name."""
        known = self._known
        if self.pinned or known is None or version != known.name:
            return super()._info(version)
        return known


def answer_in_groups(
    calls: Sequence[Call],
    key: Callable[[Call], Hashable],
    requests_of: Callable[[Call], Sequence[Request]],
    work: Callable[[Call, list[Request]], Sequence[Result]],
) -> list[tuple[Result, ...]]:
    """Answer all calls of a batch that have the same key in one go.

    Args:
        calls: the batch.
        key: what calls must have in common to be answered together.
        requests_of: returns the requests of a call.
        work: first call of a group, requests of the whole group -> one result for each request.

    Returns:
        For each call, the results of its requests.
    """
    answers: list[tuple[Result, ...]] = [()] * len(calls)
    for group in dict.fromkeys(map(key, calls)):  # like a set, but in the order of the calls
        members = [n for n, call in enumerate(calls) if key(call) == group]
        requests = [request for n in members for request in requests_of(calls[n])]
        results = iter(work(calls[members[0]], requests))
        for n in members:
            answers[n] = tuple(islice(results, len(requests_of(calls[n]))))
    return answers


def _run_all(work: Sequence[Callable[[], Any]]) -> list[Any]:
    return [each() for each in work]


class SearchWorkers:
    """Four worker threads over one store: for text, search, re-ranking and photos.

    Methods raise the errors of `reir.errors`, and `Overloaded` if a queue is full.
    """

    def __init__(
        self,
        store: InstanceStore,
        models: ModelCache,
        limits: Limits,
        on_batch: Callable[[str, int, int], None] = lambda *_: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Search `store` with `models`.

        Args:
            store: the store to search; the caller closes it.
            models: models of the galleries.
            limits: limits of photos and of waiting calls.
            on_batch: called for each batch with the name of its worker ("text", "search", "rerank",
                "photo"), its size, and how many calls wait for the next one.
            check: see `CircuitBreaker`.
        """
        self._store, self._models, self._limits = store, models, limits
        self._breaker = CircuitBreaker(check)
        self._retrievers: dict[tuple[str, str, str], CachedLiveRetriever] = {}
        self._text = Batcher(
            self._encode_batch, max_batch_size=MAX_BATCH_SIZE, on_batch=partial(on_batch, "text")
        )
        self._search = Batcher(
            self._retrieve_batch,
            max_batch_size=MAX_BATCH_SIZE,
            on_batch=partial(on_batch, "search"),
        )
        self._rerank = Batcher(
            self._rerank_batch,
            max_batch_size=MAX_RERANK_BATCH_SIZE,
            on_batch=partial(on_batch, "rerank"),
        )
        # Photos take long, so they have a worker of their own, and no search ever waits for one.
        self._photos: Batcher[Callable[[], Any], Any] = Batcher(
            _run_all, max_batch_size=1, on_batch=partial(on_batch, "photo")
        )

    async def load_model(self, key: ModelKey) -> ModelInfo:
        """Load a model, and return its description; see `ModelCache.get` for errors."""
        # In a thread, because loading takes seconds, in which other requests must be answered.
        loaded = await asyncio.to_thread(self._models.get, key)
        return loaded.info(key.spec)

    async def encode(
        self, key: ModelKey, expressions: tuple[str, ...]
    ) -> tuple[EncodedExpression, ...]:
        """Return the vector of each expression, and its words if the model has a re-ranker."""
        return await self._text((key, expressions))

    async def retrieve(self, call: RetrieveCall) -> tuple[RetrieveResult, ...]:
        """Return the best rows for each request; see `Retriever.retrieve`."""
        return await self._search(call)

    async def masks(
        self, gallery: str, version: str, instance_ids: tuple[str, ...]
    ) -> dict[str, MaskRle]:
        """Return the masks of those instances that have one."""
        get = partial(self._store.get_masks, gallery, version, instance_ids)
        return await asyncio.to_thread(self._breaker.call, get)

    async def vectors(
        self, gallery: str, version: str, instance_ids: tuple[str, ...]
    ) -> dict[str, FloatArray]:
        """Return the (D,) vectors of those instances that exist, by instance id."""
        get = partial(stored_vectors, self._store, gallery, version, instance_ids)
        return await asyncio.to_thread(self._breaker.call, get)

    async def rerank(
        self, key: ModelKey, gallery: str, requests: tuple[RerankRequest, ...]
    ) -> tuple[Sequence[RerankResult], ...]:
        """Return the re-ranker's scores for each request; see `PhotoReranker.rerank`."""
        return await self._rerank((key, gallery, requests))

    async def verify(
        self, key: ModelKey, requests: tuple[VerifyRequest, ...]
    ) -> tuple[VerifyResult | None, ...]:
        """Compare expressions with the pixels of hits; see `PixelVerifier.verify`."""

        def work() -> tuple[VerifyResult | None, ...]:
            verifier = self._models.get(key).extras.verifier
            assert verifier is not None, "only models whose `ModelInfo.verifies` is true are asked"
            return tuple(verifier.verify(requests))

        return await self._run_on_photo(work)

    async def refine(
        self, key: ModelKey, requests: tuple[RefineRequest, ...]
    ) -> tuple[RefineResult | None, ...]:
        """Return refined boxes and masks of hits; see `PixelLocalizer.refine`."""
        return await self._run_on_photo(
            lambda: tuple(self._models.get(key).localizer.refine(requests))
        )

    async def zoom(
        self, key: ModelKey, requests: tuple[ZoomRequest, ...], timeout_s: float | None
    ) -> tuple[ZoomSearch | None, ...]:
        """Search photos within so many seconds; see `PhotoZoomer.zoom`."""
        started_s = time.monotonic()

        def work() -> tuple[ZoomSearch | None, ...]:
            # Without the time in the queue.
            waited_s = time.monotonic() - started_s
            left_s = None if timeout_s is None else timeout_s - waited_s
            return tuple(self._models.get(key).zoomer.zoom(requests, left_s))

        return await self._run_on_photo(work)

    async def encode_photo(self, key: ModelKey, version: VersionSpec, data: bytes) -> EncodedPhoto:
        """Decode and encode a photo with the settings of a version.

        Raises:
            ImageError: the photo cannot be decoded.
        """
        return await self._run_on_photo(
            lambda: encode_photo(self._models.get(key).encoder, version, data, self._limits.pixels)
        )

    async def vector_of(self, key: ModelKey, data: bytes, box: Box | None) -> FloatArray:
        """Return a (D,) vector: that of the instance that a box overlaps most, or of the photo."""
        return await self._run_on_photo(
            lambda: vector_of(self._models.get(key).encoder, data, box, self._limits.pixels)
        )

    async def localize(
        self, key: ModelKey, data: bytes, expression: str, k: int, *, masks: bool
    ) -> Localization:
        """Return the instances of a photo that an expression describes."""
        max_pixels = self._limits.pixels
        # The localizer is made in the worker, too: it may have to load a model, which would stop
        # the event loop for seconds.
        return await self._run_on_photo(
            lambda: locate(
                self._models.get(key).localizer,
                data,
                expression,
                k,
                masks=masks,
                max_pixels=max_pixels,
            )
        )

    async def check_health(self) -> None:
        """Encode an expression with each loaded model, which raises an error if one has failed."""
        for spec in self._models.specs:
            await self.encode(ModelKey(spec), (CANARY,))

    def _encode_batch(
        self, calls: Sequence[tuple[ModelKey, tuple[str, ...]]]
    ) -> list[tuple[EncodedExpression, ...]]:
        """Encode all expressions for the same model in one pass."""

        def encode(
            call: tuple[ModelKey, tuple[str, ...]], texts: list[str]
        ) -> list[EncodedExpression]:
            loaded = self._models.get(call[0])
            words = loaded.extras.reranker is not None
            return list(encode_words(loaded.encoder, texts, words=words))

        return answer_in_groups(calls, lambda call: call[0], lambda call: call[1], encode)

    def _retrieve_batch(self, calls: Sequence[RetrieveCall]) -> list[tuple[RetrieveResult, ...]]:
        """Search once for all calls about the same version of a gallery."""

        def retrieve(
            call: RetrieveCall, requests: list[RetrieveRequest]
        ) -> Sequence[RetrieveResult]:
            return self._breaker.call(lambda: self._retriever(call).retrieve(requests))

        return answer_in_groups(
            calls,
            lambda call: (call.gallery, call.digest, call.pinned),
            lambda call: call.requests,
            retrieve,
        )

    def _retriever(self, call: RetrieveCall) -> CachedLiveRetriever:
        # Without a lock, because only the thread of the search worker gets here.
        key = call.gallery, call.digest, call.pinned
        if key not in self._retrievers:
            self._retrievers[key] = CachedLiveRetriever(
                self._store, call.gallery, call.digest, call.dim, call.pinned
            )
        return self._retrievers[key]

    def _rerank_batch(
        self, calls: Sequence[tuple[ModelKey, str, tuple[RerankRequest, ...]]]
    ) -> list[tuple[Sequence[RerankResult], ...]]:
        """Re-rank all calls to one gallery together."""

        def rerank(
            call: tuple[ModelKey, str, tuple[RerankRequest, ...]], requests: list[RerankRequest]
        ) -> Sequence[Sequence[RerankResult]]:
            key, gallery, _ = call
            reranker = self._models.get(key).extras.reranker
            assert reranker is not None, "only models whose `ModelInfo.reranks` is true are asked"
            photos = PhotoReranker(self._store, gallery, reranker)
            return self._breaker.call(lambda: photos.rerank(requests))

        return answer_in_groups(calls, lambda call: call[:2], lambda call: call[2], rerank)

    async def _run_on_photo(self, work: Callable[[], T]) -> T:
        """Run `work` on the photo worker, after the calls that already wait for it."""
        # Checked before the photo is decoded, so that a rejected request costs almost nothing.
        if self._photos.num_waiting >= self._limits.max_queued_photos:
            raise Overloaded("the queue of photos", PHOTO_RETRY_AFTER_S)
        answer: T = await self._photos(work)
        return answer
