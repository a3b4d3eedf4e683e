"""`Service`: the backend of the HTTP interface, over parts that are here or elsewhere.

It knows which galleries are served, and with which encoder, and whether answers can be given; the
work is that of the parts (`parts.py`). Knows no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from reir.answer import answer
from reir.clock import Costs
from reir.encoders import SHIPPED_KIND, stored_spec
from reir.errors import (
    GalleryNotFound,
    ReirError,
    SchemaMismatch,
    StoreError,
    StoreUnavailable,
    nearest_name,
)
from reir.images import DEFAULT_MAX_BYTES
from reir.models.nano_encoder import cpu_path
from reir.models.seams import EncodedExpression
from reir.presence import Calibration
from reir.query import Query, Term
from reir.records import Attributes, FloatArray, ImageRecord, MaskRle, SearchResult
from reir.retrieval import Retrieval, Retrieved
from reir.stages import Refined, Refinement, Reordered, Reordering
from reir.store import InstanceStore, VersionInfo
from reir.store.checks import no_version
from reir_serving.backend import (
    Box,
    GalleryImage,
    GalleryInfo,
    Localisation,
    Overloaded,
    Readiness,
)
from reir_serving.config import ServeConfig
from reir_serving.parts import CANARY, Breaker, Model, Parts, Wanted
from reir_serving.photos import Photos
from reir_serving.store_folder import folder_check

ASKED = Query(terms=(Term(expression=CANARY),), k=1)
"""What is asked of a gallery to see that it can answer."""

WARM_UP_ROUNDS = 8
"""Enough for the codes of some 80,000 rows: the embedded store's reader makes a part of them at
each search (`reir.store.codes`)."""

SLICE_QUERIES = 4
"""How many queries of one request are answered together before other requests get a turn."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class GalleryStages:
    """The stages of one gallery, asked of the parts; see `reir.stages.Stages`."""

    def __init__(self, gallery: str, model: Model, parts: Parts, costs: Costs) -> None:
        self.gallery, self.model = gallery, model
        self.pinned = ""
        self.reranks, self.localises = model.reranks, True
        self.calibration: Calibration | None = model.calibration
        self.costs = costs
        self._parts = parts

    async def encode(self, expressions: Sequence[str]) -> Sequence[EncodedExpression]:
        """Vector of each expression, and its words for a re-ranker."""
        return await self._parts.encode(self.model.spec, tuple(expressions))

    async def retrieve(self, requests: Sequence[Retrieval]) -> Sequence[Retrieved]:
        """Rows of the live version, or of the one that the gallery is held at."""
        return await self._parts.retrieve(
            Wanted(
                gallery=self.gallery,
                digest=self.model.digest,
                dim=self.model.dim,
                requests=tuple(requests),
                pinned=self.pinned,
            )
        )

    async def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """Masks by instance id."""
        return await self._parts.masks(self.gallery, version, tuple(instance_ids))

    async def rerank(
        self, requests: Sequence[Reordering], timeout_s: float | None, /
    ) -> Sequence[Sequence[Reordered]]:
        """The re-ranker's scores of the best photos."""
        async with asyncio.timeout(timeout_s):
            return await self._parts.rerank(self.model.spec, self.gallery, tuple(requests))

    async def localise(
        self, requests: Sequence[Refinement], timeout_s: float | None, /
    ) -> Sequence[Refined]:
        """Boxes and masks of hits, on their pixels."""
        async with asyncio.timeout(timeout_s):
            return await self._parts.refine(self.model.spec, tuple(requests))


class Service:
    """Implements `reir_serving.backend.Backend`.

    Attributes:
        live: settings that may change while it runs.
    """

    def __init__(
        self, config: ServeConfig, store: InstanceStore, parts: Parts, uploads: Path
    ) -> None:
        """Serve galleries of `store`; the store stays the caller's to close.

        Args:
            config: what to serve.
            store: for what is not searched: lists, ledger rows, bytes of photos.
            parts: do the work.
            uploads: folder of photos that are added online.
        """
        self.live = config.live
        self._config, self._store, self._parts = config, store, parts
        self._photos = Photos(store, uploads, DEFAULT_MAX_BYTES)
        self._breaker = Breaker(folder_check(config.store))
        self._opened: dict[str, GalleryStages] = {}
        self._costs = Costs()

    async def search(self, gallery: str, queries: Sequence[Query]) -> list[SearchResult]:
        """Answer queries to one gallery, in the order given.

        They are answered in slices, so that other requests get a turn in between. The time budget
        of a query counts from the start of the whole request.
        """
        started_s = time.monotonic()
        answers: list[SearchResult] = []
        for first in range(0, len(queries), SLICE_QUERIES):
            gone_ms = 1e3 * (time.monotonic() - started_s)
            asked = [
                self._within_budget(each, gone_ms)
                for each in queries[first : first + SLICE_QUERIES]
            ]
            answers += await self._answered(gallery, asked)
        return answers

    def _within_budget(self, query: Query, gone_ms: float) -> Query:
        """Return a query with what is left of its time budget, or of the default budget."""
        budget_ms = self.live.budget_ms if query.budget_ms is None else query.budget_ms
        left_ms = None if budget_ms is None else max(0.0, budget_ms - gone_ms)
        return replace(query, budget_ms=left_ms)

    async def _answered(self, gallery: str, asked: Sequence[Query]) -> list[SearchResult]:
        """Answer the queries of one slice together."""
        stages = await self._stages(gallery)
        try:
            return await answer(asked, stages)
        except SchemaMismatch:
            await self._reopened(gallery)
        return await answer(asked, await self._stages(gallery))

    async def vector_of(self, gallery: str, data: bytes, box: Box | None) -> FloatArray:
        """(D,) vector of the instance of a photo that fits a box best; None: of the photo."""
        stages = await self._stages(gallery)
        return await self._parts.look(stages.model.spec, data, box)

    async def localise(self, data: bytes, expression: str, k: int, *, masks: bool) -> Localisation:
        """Find the instances of a photo that fit an expression."""
        spec = self._config.encoder or SHIPPED_KIND
        return await self._parts.localise(spec, data, expression, k, masks=masks)

    async def galleries(self) -> list[GalleryInfo]:
        """All galleries that are served, by name."""
        return await self._ask_store(self._galleries)

    async def image(self, gallery: str, image_id: str) -> GalleryImage | None:
        """One photo; None where the gallery has none under that id."""
        return await self._ask_store(
            lambda: self._photos.get(gallery, self._version(gallery), image_id)
        )

    async def photo(self, gallery: str, image_id: str) -> bytes | None:
        """The encoded bytes of a photo of a gallery."""
        return await self._ask_store(
            lambda: self._photos.read(gallery, self._version(gallery), image_id)
        )

    async def add_image(
        self, gallery: str, data: bytes, name: str, attributes: Attributes
    ) -> ImageRecord:
        """Keep an uploaded photo, index it, and return its ledger row when it can be found."""
        version = await self._ask_store(lambda: self._version_info(gallery))
        model = (await self._stages(gallery)).model
        if model.digest != version.spec.digest:
            model = await self._reopened(gallery)
        seen = await self._parts.see(model.spec, version.spec, data)
        place = gallery, version.name
        return await self._ask_store(lambda: self._photos.add(place, seen, data, name, attributes))

    async def delete_image(self, gallery: str, image_id: str) -> bool:
        """Delete a photo from a gallery; False where there was none."""
        return await self._ask_store(
            lambda: self._photos.delete(gallery, self._version(gallery), image_id)
        )

    async def readiness(self) -> Readiness:
        """Check what an answer needs: store, model, and that they belong together."""
        checks = {"store": "ok"}
        try:
            names = await self._ask_store(self._served)
        except ReirError as error:
            return Readiness(ready=False, checks={"store": str(error)})
        for name in self._config.galleries or [each for each in self._opened if each in names]:
            try:
                await answer([ASKED], await self._stages(name))
                checks[f"gallery {name}"] = "ok"
            except ReirError as error:
                checks[f"gallery {name}"] = str(error)
        return Readiness(ready=set(checks.values()) == {"ok"}, checks=checks)

    async def about(self) -> Mapping[str, Any]:
        """What the page shows of this server."""
        models = [stages.model for stages in self._opened.values()]
        return {
            "cpu_path": cpu_path(),
            "checkpoints": sorted({model.digest for model in models}),
            "reranks": any(model.reranks for model in models),
            "masks": any(model.masks for model in models),
            "k": self.live.k,
            "budget_ms": self.live.budget_ms,
        }

    async def warm_up(self) -> None:
        """Open what is served and answer a few queries, so that the first user finds all loaded.

        A store that is away is waited for by nobody: what it holds is opened when it is asked for.

        Raises:
            ReirError: a gallery that was named cannot be served.
        """
        try:
            live = await self._ask_store(self._live_names)
            names = self._config.galleries or live
            for name in names:
                stages = await self._stages(name)
                for _ in range(WARM_UP_ROUNDS):
                    await answer([ASKED], stages)
        except StoreUnavailable as error:
            logger.warning("nothing is loaded yet: %s", error)

    async def check_health(self) -> None:
        """Ask the canary query of an open gallery.

        A store that is away, a gallery that is gone and a full queue are no ill health: a new
        process would not have them back.

        Raises:
            Exception: whatever else makes answers impossible.
        """
        stages = next(iter(self._opened.values()), None)
        if stages is None:
            return
        with suppress(StoreError, Overloaded):
            await answer([ASKED], stages)

    async def _stages(self, gallery: str) -> GalleryStages:
        """Return the stages of a gallery; opens it at its first use.

        Raises:
            GalleryNotFound: there is none, or it is not served here.
        """
        stages = self._opened.get(gallery)
        if stages is None:
            spec = self._config.encoder
            if spec is None:
                spec = await self._ask_store(lambda: self._own_spec(gallery))
            model = await self._parts.describe(spec)
            stages = self._opened[gallery] = GalleryStages(gallery, model, self._parts, self._costs)
        stages.pinned = self.live.pinned.get(gallery, "")
        return stages

    async def _reopened(self, gallery: str) -> Model:
        """Take the encoder of a version of another checkpoint that has become live.

        Raises:
            SchemaMismatch: the encoder is the one that was asked for, and stays.
        """
        if self._config.encoder is not None:
            raise SchemaMismatch(
                f"gallery '{gallery}' has turned to another checkpoint than the one that is served "
                f"({self._config.encoder}); `reir index SOURCE --gallery {gallery}` builds a "
                f"version for that one, or serve without --encoder"
            )
        self._opened.pop(gallery, None)
        return (await self._stages(gallery)).model

    async def _ask_store(self, work: Callable[[], T]) -> T:
        """Do what may wait for the store in a thread."""
        return await asyncio.to_thread(self._breaker.call, work)

    def _served(self) -> list[str]:
        """Names of the galleries that are served and there."""
        wanted = self._config.galleries
        return [name for name in self._store.galleries() if wanted is None or name in wanted]

    def _live_names(self) -> tuple[str, ...]:
        """Those of them that have a live version."""
        return tuple(info.name for info in self._galleries() if info.live)

    def _galleries(self) -> list[GalleryInfo]:
        found = []
        for name in self._served():
            versions = tuple(self._store.versions(name))
            live = next((each for each in versions if each.live), None)
            opened = self._opened.get(name)
            found.append(
                GalleryInfo(
                    name=name,
                    live=live.name if live else "",
                    loaded=bool(live and opened and opened.model.digest == live.spec.digest),
                    versions=versions,
                )
            )
        return found

    def _own_spec(self, gallery: str) -> str:
        """Return the encoder that the gallery's live version was made with."""
        self._version(gallery)
        return stored_spec(self._store, gallery) or SHIPPED_KIND

    def _version_info(self, gallery: str) -> VersionInfo:
        name = self._version(gallery)
        found = {each.name: each for each in self._store.versions(gallery)}
        if name not in found:
            raise no_version(gallery, name, found)
        return found[name]

    def _version(self, gallery: str) -> str:
        """Return the version that is searched.

        Raises:
            GalleryNotFound: there is no such gallery, or it is not served.
        """
        wanted = self._config.galleries
        if wanted is not None and gallery not in wanted:
            raise GalleryNotFound(
                f"no gallery '{gallery}' is served here: {', '.join(wanted)}"
                f"{nearest_name(gallery, wanted)}"
            )
        return self.live.pinned.get(gallery, "") or self._store.live_version(gallery)
