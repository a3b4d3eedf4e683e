"""The working parts of the service in one process: models, store, and what is batched with them.

`Parts` is what the service asks; `LocalParts` answers in this process. Deployments hold a
`LocalParts` each and pass the same calls on (`deployments.py`). Knows no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

from reir.encoders import checkpoint_folder, load_encoder_spec
from reir.errors import StoreUnavailable
from reir.localise import PixelLocaliser
from reir.models.seams import EncodedExpression, InstanceEncoder, encode_words
from reir.presence import Calibration
from reir.records import FloatArray, MaskRle
from reir.reordering import Reorderer
from reir.retrieval import Retrieval, Retrieved, Retriever
from reir.search import Companions, load_companions
from reir.stages import Refined, Refinement, Reordered, Reordering
from reir.store import InstanceStore, VersionSpec
from reir_serving.backend import Box, Localisation, Overloaded
from reir_serving.batching import Batcher
from reir_serving.config import Limits
from reir_serving.photos import Seen, locate, see, vector_of, without_masks
from reir_serving.sharing import SharedCores

LARGEST_BATCH, RERANKED_AT_ONCE = 32, 4
LIVE_KNOWN_S, LIVE_TRUSTED_S = 0.25, 1.0
"""How long the live version of a gallery counts as known, and how long it is searched while it is
asked for again: a promotion is seen that much later."""

PHOTO_RETRY_AFTER_S = 2.0
DOWN_FOR_S = 1.0
"""How long a store that did not answer is left alone; who asks meanwhile is told at once."""

CANARY = "the thing in the middle"
"""What is asked to see that models answer."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the service knows of an encoder without having it.

    Attributes:
        spec: as `reir.encoders` takes it.
        digest, dim: of its vectors.
        masks: whether instances come with masks.
        reranks: whether its checkpoint has a re-ranker.
        calibration: of its scores, None without one.
    """

    spec: str
    digest: str
    dim: int
    masks: bool
    reranks: bool
    calibration: Calibration | None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Rows that one call wants of a gallery.

    Attributes:
        pinned: version to search instead of the live one; empty for the live one.
    """

    gallery: str
    digest: str
    dim: int
    requests: tuple[Retrieval, ...]
    pinned: str = ""


class Parts(Protocol):
    """What the service asks of its parts, wherever they are.

    Every method raises `Overloaded` where a queue is full, and the errors of `reir.errors`.
    """

    async def describe(self, spec: str) -> Model:
        """Load the encoder that a spec names, and say what it is."""
        ...

    async def encode(
        self, spec: str, expressions: tuple[str, ...]
    ) -> tuple[EncodedExpression, ...]:
        """Vector of each expression by the encoder that a spec names; its words for a re-ranker."""
        ...

    async def retrieve(self, wanted: Wanted) -> tuple[Retrieved, ...]:
        """As `Retriever.retrieve`."""
        ...

    async def masks(
        self, gallery: str, version: str, instance_ids: tuple[str, ...]
    ) -> dict[str, MaskRle]:
        """As `InstanceStore.get_masks`."""
        ...

    async def rerank(
        self, spec: str, gallery: str, requests: tuple[Reordering, ...]
    ) -> tuple[Sequence[Reordered], ...]:
        """As `Reorderer.reorder`, with the re-ranker of the checkpoint that a spec names."""
        ...

    async def refine(self, spec: str, requests: tuple[Refinement, ...]) -> tuple[Refined, ...]:
        """As `PixelLocaliser.refine`."""
        ...

    async def see(self, spec: str, version: VersionSpec, data: bytes) -> Seen:
        """Decode and encode a photo as indexing into a version does.

        Raises:
            ImageError: it cannot be decoded.
        """
        ...

    async def look(self, spec: str, data: bytes, box: Box | None) -> FloatArray:
        """As `Backend.vector_of`, with the encoder that a spec names."""
        ...

    async def localise(
        self, spec: str, data: bytes, expression: str, k: int, *, masks: bool
    ) -> Localisation:
        """As `Backend.localise`, with the encoder that a spec names."""
        ...


@dataclass(frozen=True)
class Loaded:
    """An encoder, and what its checkpoint holds besides."""

    encoder: InstanceEncoder
    companions: Companions = field(default_factory=Companions)


def load(spec: str) -> Loaded:
    """Load the encoder that a spec names, with its companions.

    Raises:
        ConfigError, CheckpointError: as `load_encoder_spec` and `load_companions`.
    """
    encoder, folder = load_encoder_spec(spec), checkpoint_folder(spec)
    companions = Companions() if folder is None else load_companions(folder, encoder.digest)
    return Loaded(encoder, companions)


class Models:
    """Encoders by spec, each loaded when it is first needed; safe between threads."""

    def __init__(self, load: Callable[[str], Loaded] = load) -> None:
        """Load with `load`."""
        self._load = load
        self._loaded: dict[str, Loaded] = {}
        self._mutex = threading.Lock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Specs of those that are loaded."""
        return tuple(self._loaded)

    def get(self, spec: str) -> Loaded:
        """Return what a spec names.

        Raises:
            ConfigError, CheckpointError: it does not load.
        """
        with self._mutex:
            if spec not in self._loaded:
                self._loaded[spec] = self._load(spec)
            return self._loaded[spec]


class TextEncoder:
    """Vectors and words of expressions: all of one encoder in one pass of its model."""

    def __init__(self, models: Models) -> None:
        """Encode with the encoders that the specs of the calls name."""
        self._models = models

    def encode(
        self, calls: Sequence[tuple[str, tuple[str, ...]]]
    ) -> list[tuple[EncodedExpression, ...]]:
        """Return for each (spec, expressions) the encoded expressions."""
        answers: list[tuple[EncodedExpression, ...]] = [()] * len(calls)
        for spec in dict.fromkeys(spec for spec, _ in calls):
            numbers = [number for number, call in enumerate(calls) if call[0] == spec]
            texts = [text for number in numbers for text in calls[number][1]]
            loaded = self._models.get(spec)
            words = loaded.companions.reranker is not None
            encoded = iter(encode_words(loaded.encoder, texts, words=words))
            for number in numbers:
                answers[number] = tuple(islice(encoded, len(calls[number][1])))
        return answers


class WatchingRetriever(Retriever):
    """A retriever that can be held at one version, and seldom waits to hear which one is live.

    What was heard less than `LIVE_KNOWN_S` ago is taken as it is, what was heard less than
    `LIVE_TRUSTED_S` ago as well while a thread asks again; only after a pause a search waits.
    """

    def __init__(self, store: InstanceStore, gallery: str, digest: str, dim: int) -> None:
        self.pinned = ""
        self._heard_s = -LIVE_TRUSTED_S
        self._asker = ThreadPoolExecutor(1)
        self._asking: Future[None] | None = None
        super().__init__(store, gallery, digest, dim)

    def refresh(self) -> str:
        """Return the version to search."""
        if self.pinned:
            return self.pinned
        age_s = time.monotonic() - self._heard_s
        if age_s > LIVE_KNOWN_S and (self._asking is None or self._asking.done()):
            self._asking = self._asker.submit(self._ask)
        if age_s > LIVE_TRUSTED_S and self._asking is not None:
            self._asking.result()
        return self.live

    def _ask(self) -> None:
        asked_s = time.monotonic()
        super().refresh()
        self._heard_s = asked_s


class Searcher:
    """Best rows of any gallery of one store: equal searches of a batch become one."""

    def __init__(self, store: InstanceStore) -> None:
        """Search in `store`."""
        self._store = store
        self._retrievers: dict[tuple[str, str], WatchingRetriever] = {}

    def retrieve(self, calls: Sequence[Wanted]) -> list[tuple[Retrieved, ...]]:
        """Answer calls, in the order given."""
        answers: list[tuple[Retrieved, ...]] = [()] * len(calls)
        for key in dict.fromkeys((c.gallery, c.digest, c.pinned) for c in calls):
            numbers = [n for n, c in enumerate(calls) if (c.gallery, c.digest, c.pinned) == key]
            found = iter(self._retrieve(calls[numbers[0]], [calls[n].requests for n in numbers]))
            for number in numbers:
                answers[number] = tuple(next(found) for _ in calls[number].requests)
        return answers

    def _retrieve(
        self, call: Wanted, requests: Sequence[tuple[Retrieval, ...]]
    ) -> Sequence[Retrieved]:
        key = call.gallery, call.digest
        if key not in self._retrievers:
            self._retrievers[key] = WatchingRetriever(
                self._store, call.gallery, call.digest, call.dim
            )
        retriever = self._retrievers[key]
        retriever.pinned = call.pinned
        return retriever.retrieve([each for of in requests for each in of])


def _no_check() -> None:
    """Check nothing."""


class Breaker:
    """Spares a store that does not answer: after a failure nobody asks it for a moment.

    A store's own client tries for seconds before it gives up; a queue of requests that each wait
    as long would still be there when the store is back.
    """

    def __init__(
        self,
        check: Callable[[], None] = _no_check,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start closed: calls pass.

        Args:
            check: called before each call; raises `StoreUnavailable` if the store does not exist.
            clock: returns the time in seconds.
        """
        self._check, self._clock = check, clock
        self._failure: StoreUnavailable | None = None
        self._until_s = 0.0

    def call(self, work: Callable[[], T]) -> T:
        """Do `work`, unless the store failed a moment ago.

        Raises:
            StoreUnavailable: `work` says so, or said so less than `DOWN_FOR_S` ago.
        """
        if self._failure is not None and self._clock() < self._until_s:
            raise StoreUnavailable(self._failure.address, self._failure.detail)
        try:
            answer = self._checked(work)
        except StoreUnavailable as error:
            self._failure, self._until_s = error, self._clock() + DOWN_FOR_S
            raise
        self._failure = None
        return answer

    def _checked(self, work: Callable[[], T]) -> T:
        self._check()
        try:
            return work()
        except Exception:
            self._check()  # if the store has disappeared meanwhile, report that instead
            raise


def _do_all(work: Sequence[Callable[[], Any]]) -> list[Any]:
    return [each() for each in work]


def _ignore(_part: str, _size: int, _waiting: int) -> None:
    """Take note of nothing."""


class LocalParts:
    """All parts in this process; what works on models and store runs in threads, in batches.

    Photos are looked at one by one, in a thread of their own: a search never waits for one.
    """

    def __init__(
        self,
        store: InstanceStore,
        models: Models,
        limits: Limits,
        on_batch: Callable[[str, int, int], None] = _ignore,
        check: Callable[[], None] = _no_check,
    ) -> None:
        """Search `store` with `models`.

        Args:
            store: the store to search; the caller closes it.
            models: models of the galleries.
            limits: limits of photos and of waiting calls.
            on_batch: called for each batch with its part ("text", "search", "rerank", "photo"),
                its size, and how many calls wait for the next one.
            check: see `Breaker`.
        """
        self._store, self._models, self._limits = store, models, limits
        self._breaker = Breaker(check)
        text, searcher = TextEncoder(models), Searcher(store)

        def search(calls: Sequence[Wanted]) -> list[tuple[Retrieved, ...]]:
            return self._breaker.call(lambda: searcher.retrieve(calls))

        among = SharedCores().among
        self._text = Batcher(
            among(text.encode, gains=True),
            largest=LARGEST_BATCH,
            on_batch=partial(on_batch, "text"),
        )
        self._search = Batcher(
            among(search), largest=LARGEST_BATCH, on_batch=partial(on_batch, "search")
        )
        self._rerank = Batcher(
            among(self._reorder), largest=RERANKED_AT_ONCE, on_batch=partial(on_batch, "rerank")
        )
        self._photos: Batcher[Callable[[], Any], Any] = Batcher(
            among(_do_all), largest=1, on_batch=partial(on_batch, "photo")
        )

    async def describe(self, spec: str) -> Model:
        """Load an encoder, and say what it is."""
        loaded = await asyncio.to_thread(self._models.get, spec)
        return Model(
            spec=spec,
            digest=loaded.encoder.digest,
            dim=loaded.encoder.dim,
            masks=loaded.encoder.masks,
            reranks=loaded.companions.reranker is not None,
            calibration=loaded.companions.calibration,
        )

    async def encode(
        self, spec: str, expressions: tuple[str, ...]
    ) -> tuple[EncodedExpression, ...]:
        """Vector of each expression, and its words for a re-ranker."""
        return await self._text((spec, expressions))

    async def retrieve(self, wanted: Wanted) -> tuple[Retrieved, ...]:
        """Best rows."""
        return await self._search(wanted)

    async def masks(
        self, gallery: str, version: str, instance_ids: tuple[str, ...]
    ) -> dict[str, MaskRle]:
        """Masks of those instances that have one."""
        get = partial(self._store.get_masks, gallery, version, instance_ids)
        return await asyncio.to_thread(self._breaker.call, get)

    async def rerank(
        self, spec: str, gallery: str, requests: tuple[Reordering, ...]
    ) -> tuple[Sequence[Reordered], ...]:
        """The re-ranker's scores."""
        return await self._rerank((spec, gallery, requests))

    async def refine(self, spec: str, requests: tuple[Refinement, ...]) -> tuple[Refined, ...]:
        """Boxes and masks of hits, on their pixels."""
        return await self._look(lambda: tuple(self._localiser(spec).refine(requests)))

    async def see(self, spec: str, version: VersionSpec, data: bytes) -> Seen:
        """Decode and encode a photo as indexing into a version does."""
        return await self._look(
            lambda: see(self._models.get(spec).encoder, version, data, self._limits.pixels)
        )

    async def look(self, spec: str, data: bytes, box: Box | None) -> FloatArray:
        """(D,) vector of the instance that fits a box best; None: of the photo."""
        return await self._look(
            lambda: vector_of(self._models.get(spec).encoder, data, box, self._limits.pixels)
        )

    async def localise(
        self, spec: str, data: bytes, expression: str, k: int, *, masks: bool
    ) -> Localisation:
        """Where an expression is in a photo."""
        found = await self._look(
            lambda: locate(self._localiser(spec), data, expression, k, self._limits.pixels)
        )
        return found if masks else without_masks(found)

    async def check_health(self) -> None:
        """Encode an expression with every model that is loaded; raises whatever prevents that."""
        for spec in self._models.loaded:
            await self.encode(spec, (CANARY,))

    def _localiser(self, spec: str) -> PixelLocaliser:
        loaded = self._models.get(spec)
        return PixelLocaliser(loaded.encoder, loaded.companions.calibration)

    def _reorder(
        self, calls: Sequence[tuple[str, str, tuple[Reordering, ...]]]
    ) -> list[tuple[Sequence[Reordered], ...]]:
        """Answer calls of the re-ranker, those to one gallery together."""
        answers: list[tuple[Sequence[Reordered], ...]] = [()] * len(calls)
        for spec, gallery in dict.fromkeys((spec, gallery) for spec, gallery, _ in calls):
            reranker = self._models.get(spec).companions.reranker
            assert reranker is not None, "`Model.reranks` says so"
            reorderer = Reorderer(self._store, gallery, reranker)
            numbers = [n for n, call in enumerate(calls) if call[:2] == (spec, gallery)]
            requests = [each for number in numbers for each in calls[number][2]]
            found = iter(self._breaker.call(partial(reorderer.reorder, requests)))
            for number in numbers:
                answers[number] = tuple(islice(found, len(calls[number][2])))
        return answers

    async def _look(self, work: Callable[[], T]) -> T:
        """Do what looks at a photo, when those before it are done."""
        if self._photos.num_waiting >= self._limits.image_queue:
            raise Overloaded("the queue of photos to look at", PHOTO_RETRY_AFTER_S)
        answer: T = await self._photos(work)
        return answer
