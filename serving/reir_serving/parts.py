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
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from reir.encoders import load_encoder_spec
from reir.errors import StoreUnavailable
from reir.models.seams import InstanceEncoder
from reir.presence import Calibration
from reir.records import FloatArray, MaskRle
from reir.retrieval import Retrieval, Retrieved, Retriever
from reir.store import InstanceStore, VersionSpec
from reir_serving.backend import Box, Localisation, Overloaded
from reir_serving.batching import Batcher
from reir_serving.config import Limits
from reir_serving.photos import Seen, see, vector_of

LARGEST_BATCH = 32
LIVE_KNOWN_S, LIVE_TRUSTED_S = 0.25, 1.0
"""How long the live version of a gallery counts as known, and how long it is searched while it is
asked for again: a promotion is seen that much later."""

PHOTO_RETRY_AFTER_S = 2.0
DOWN_FOR_S = 1.0
"""How long a store that did not answer is left alone; who asks meanwhile is told at once."""

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

    async def encode(self, spec: str, expressions: tuple[str, ...]) -> FloatArray:
        """(N, D) vectors of expressions by the encoder that a spec names."""
        ...

    async def retrieve(self, wanted: Wanted) -> tuple[Retrieved, ...]:
        """As `Retriever.retrieve`."""
        ...

    async def masks(
        self, gallery: str, version: str, instance_ids: tuple[str, ...]
    ) -> dict[str, MaskRle]:
        """As `InstanceStore.get_masks`."""
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


class Encoders:
    """Encoders by spec, each loaded when it is first needed; safe between threads."""

    def __init__(self, load: Callable[[str], InstanceEncoder] = load_encoder_spec) -> None:
        """Load with `load`."""
        self._load = load
        self._loaded: dict[str, InstanceEncoder] = {}
        self._mutex = threading.Lock()

    def get(self, spec: str) -> InstanceEncoder:
        """Return the encoder that a spec names.

        Raises:
            ConfigError, CheckpointError: as `load_encoder_spec`.
        """
        with self._mutex:
            if spec not in self._loaded:
                self._loaded[spec] = self._load(spec)
            return self._loaded[spec]


class TextEncoder:
    """Vectors of expressions: all of one encoder in one pass of its model."""

    def __init__(self, encoders: Encoders) -> None:
        """Encode with the encoders that the specs of the calls name."""
        self._encoders = encoders

    def encode(self, calls: Sequence[tuple[str, tuple[str, ...]]]) -> list[FloatArray]:
        """Return for each (spec, expressions) the (N, D) vectors."""
        answers: list[FloatArray | None] = [None] * len(calls)
        for spec in dict.fromkeys(spec for spec, _ in calls):
            numbers = [number for number, call in enumerate(calls) if call[0] == spec]
            texts = [text for number in numbers for text in calls[number][1]]
            vectors = self._encoders.get(spec).encode_expressions(texts)
            ends = np.cumsum([len(calls[number][1]) for number in numbers])[:-1]
            for number, part in zip(numbers, np.split(vectors, ends), strict=True):
                answers[number] = part
        return [answer for answer in answers if answer is not None]


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


class Breaker:
    """Spares a store that does not answer: after a failure nobody asks it for a moment.

    A store's own client tries for seconds before it gives up; a queue of requests that each wait
    as long would still be there when the store is back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start closed: calls pass."""
        self._clock = clock
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
            answer = work()
        except StoreUnavailable as error:
            self._failure, self._until_s = error, self._clock() + DOWN_FOR_S
            raise
        self._failure = None
        return answer


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
        encoders: Encoders,
        limits: Limits,
        on_batch: Callable[[str, int, int], None] = _ignore,
    ) -> None:
        """Search `store` with `encoders`.

        Args:
            store: stays the caller's to close.
            encoders: of the galleries.
            limits: of photos, and of how many may wait.
            on_batch: told of each batch its part ("text", "search", "photo"), its size, and how
                many calls wait for the next one.
        """
        self._store, self._encoders, self._limits = store, encoders, limits
        self._breaker = Breaker()
        text, searcher = TextEncoder(encoders), Searcher(store)

        def search(calls: Sequence[Wanted]) -> list[tuple[Retrieved, ...]]:
            return self._breaker.call(lambda: searcher.retrieve(calls))

        self._text = Batcher(text.encode, largest=LARGEST_BATCH, on_batch=partial(on_batch, "text"))
        self._search = Batcher(search, largest=LARGEST_BATCH, on_batch=partial(on_batch, "search"))
        self._photos: Batcher[Callable[[], Any], Any] = Batcher(
            _do_all, largest=1, on_batch=partial(on_batch, "photo")
        )

    async def describe(self, spec: str) -> Model:
        """Load an encoder, and say what it is."""
        encoder = await asyncio.to_thread(self._encoders.get, spec)
        return Model(
            spec=spec,
            digest=encoder.digest,
            dim=encoder.dim,
            masks=encoder.masks,
            reranks=False,
            calibration=None,
        )

    async def encode(self, spec: str, expressions: tuple[str, ...]) -> FloatArray:
        """(N, D) vectors of expressions."""
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

    async def see(self, spec: str, version: VersionSpec, data: bytes) -> Seen:
        """Decode and encode a photo as indexing into a version does."""
        return await self._photo(
            lambda: see(self._encoders.get(spec), version, data, self._limits.pixels)
        )

    async def look(self, spec: str, data: bytes, box: Box | None) -> FloatArray:
        """(D,) vector of the instance that fits a box best; None: of the photo."""
        return await self._photo(
            lambda: vector_of(self._encoders.get(spec), data, box, self._limits.pixels)
        )

    async def _photo(self, work: Callable[[], T]) -> T:
        if self._photos.num_waiting >= self._limits.image_queue:
            raise Overloaded("the queue of photos to look at", PHOTO_RETRY_AFTER_S)
        answer: T = await self._photos(work)
        return answer
