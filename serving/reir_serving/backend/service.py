"""`Service`: what the HTTP interface calls to search galleries and to change them.

It knows which galleries are served, with which model, and whether they can be searched. The work is
done by `SearchWorkers`, in this process or in other deployments. This module depends neither on Ray
nor on HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from reir.encoders import SHIPPED_KIND
from reir.errors import (
    GalleryNotFound,
    Overloaded,
    ReirError,
    SchemaMismatch,
    StoreError,
    StoreUnavailable,
    nearest_name,
)
from reir.images.decode import DEFAULT_MAX_BYTES
from reir.models.nano.encoder import cpu_path
from reir.query.answer import answer
from reir.query.clock import StageCosts
from reir.query.every_photo import EveryPhotoQuery, PhotoScan, begin_scan
from reir.query.request import Query, Term
from reir.records import Attributes, Box, FloatArray, ImageRecord
from reir.results import Localization, SearchResult
from reir.store import InstanceStore, VersionInfo
from reir.store.validation import unknown_version_error
from reir_serving.backend.circuit_breaker import CircuitBreaker
from reir_serving.backend.models import ModelInfo, ModelKey
from reir_serving.backend.photos import GalleryImage, Photos
from reir_serving.backend.stages import GalleryStages
from reir_serving.backend.store_folder import folder_check
from reir_serving.backend.workers import CANARY, SearchWorkers
from reir_serving.config import ServeConfig

CANARY_QUERY = Query(terms=(Term(expression=CANARY),), k=1)
"""Query that checks whether a gallery can be searched."""

WARM_UP_SEARCHES = 8
"""Number of searches before the first request, enough for a gallery of some 80,000 instances: the
reader of an embedded store computes a part of its int8 codes at each search
(`reir.store.embedded.int8_codes`)."""

SLICE_QUERIES = 4
"""Number of queries of one request that are answered together before other requests get a turn."""

MAX_RELOADS = 3
"""So often a search loads another model, if a version of another model becomes live meanwhile."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GalleryInfo:
    """A gallery as `GET /v1/galleries` lists it.

    Attributes:
        live: name of the live version; empty if none is live.
        loaded: whether this server has loaded the model of the live version.
        versions: oldest first.
    """

    name: str
    live: str
    loaded: bool
    versions: tuple[VersionInfo, ...]


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """Whether the server can answer requests now.

    Attributes:
        ready: whether all checks passed.
        checks: name of a check ("store", "gallery NAME") -> "ok", or what is wrong.
    """

    ready: bool
    checks: Mapping[str, str]


class Service:
    """Searches the galleries of one store, and adds and deletes photos.

    Methods raise the errors of `reir.errors`: among them `GalleryNotFound` if there is no such
    gallery, `StoreUnavailable` if the store does not answer, and `Overloaded` if a queue is full.

    Attributes:
        live: settings that may change while the service runs.
    """

    def __init__(
        self, config: ServeConfig, store: InstanceStore, workers: SearchWorkers, uploads: Path
    ) -> None:
        """Serve galleries of `store`.

        Args:
            config: what to serve.
            store: for everything but searches: galleries, ledger rows, bytes of photos. The caller
                closes it.
            workers: run the models and search.
            uploads: folder for photos that are added online.
        """
        self.live = config.live
        self._config, self._store, self._workers = config, store, workers
        self._photos = Photos(store, uploads, DEFAULT_MAX_BYTES)
        self._breaker = CircuitBreaker(folder_check(config.store))
        self._stages_of: dict[str, GalleryStages] = {}
        self._costs = StageCosts()

    async def search(self, gallery: str, queries: Sequence[Query]) -> list[SearchResult]:
        """Answer queries to one gallery, in the order given.

        The queries are answered in slices, so that other requests get a turn in between. The time
        budget of a query counts from the start of the whole request.

        Raises:
            QueryError: a part of a query is wrong; `field` names it.
        """
        started_s = time.monotonic()
        answers: list[SearchResult] = []
        for first in range(0, len(queries), SLICE_QUERIES):
            elapsed_ms = 1e3 * (time.monotonic() - started_s)
            remaining = [
                self._with_remaining_budget(query, elapsed_ms)
                for query in queries[first : first + SLICE_QUERIES]
            ]
            answers += await self._answer_slice(gallery, remaining)
        return answers

    def _with_remaining_budget(self, query: Query, elapsed_ms: float) -> Query:
        """Return a query with what is left of its time budget, or of the default budget."""
        budget_ms = self.live.budget_ms if query.budget_ms is None else query.budget_ms
        left_ms = None if budget_ms is None else max(0.0, budget_ms - elapsed_ms)
        return replace(query, budget_ms=left_ms)

    async def _answer_slice(self, gallery: str, queries: Sequence[Query]) -> list[SearchResult]:
        """Answer the queries of one slice together."""
        # The vector of a photo belongs to one model, so the photo has to be sent again.
        if any(term.vector is not None for query in queries for term in query.terms):
            return await answer(queries, await self._stages(gallery))
        return await self._with_live_model(gallery, lambda stages: answer(queries, stages))

    async def every_photo(self, gallery: str, query: EveryPhotoQuery) -> PhotoScan:
        """Begin a search for every photo of a gallery; the caller reads its parts.

        Raises:
            QueryError: a part of the query is wrong; `field` names it.
        """
        return await self._with_live_model(gallery, lambda stages: begin_scan(query, stages))

    async def _with_live_model(
        self, gallery: str, work: Callable[[GalleryStages], Awaitable[T]]
    ) -> T:
        """Do `work`, again with another model if a version of that model has become live."""
        for _ in range(MAX_RELOADS):
            try:
                return await work(await self._stages(gallery))
            except SchemaMismatch:
                await self._reload_stages(gallery, await self._searched_version(gallery))
        return await work(await self._stages(gallery))

    async def vector_of(self, gallery: str, data: bytes, box: Box | None) -> FloatArray:
        """Return the (D,) vector of the instance that a box overlaps most, by the live model.

        Without a box, return the vector of the whole photo.

        Raises:
            ImageError: the photo cannot be decoded.
            QueryError: no instance overlaps the box.
        """
        version = await self._searched_version(gallery)
        model = await self._model_of(gallery, version)
        return await self._workers.vector_of(model.key, data, box)

    async def localize(self, data: bytes, expression: str, k: int, *, masks: bool) -> Localization:
        """Return the instances of an encoded photo that an expression describes.

        Raises:
            ImageError: the photo cannot be decoded.
        """
        key = ModelKey(self._config.encoder or SHIPPED_KIND)  # the photo belongs to no gallery
        return await self._workers.localize(key, data, expression, k, masks=masks)

    async def galleries(self) -> list[GalleryInfo]:
        """Return all galleries that are served, by name."""
        return await self._ask_store(self._galleries)

    async def version(self, gallery: str) -> str:
        """Return the name of the version that searches use now."""
        return await self._ask_store(lambda: self._version(gallery))

    async def image(self, gallery: str, image_id: str) -> GalleryImage | None:
        """Return one photo; None if the gallery does not have it."""
        return await self._ask_store(
            lambda: self._photos.get(gallery, self._version(gallery), image_id)
        )

    async def some_images(
        self, gallery: str, number: int, shown: Callable[[ImageRecord], bool]
    ) -> list[ImageRecord]:
        """Return up to `number` photos for which `shown` is true; see `Photos.some`."""
        return await self._ask_store(
            lambda: self._photos.some(gallery, self._version(gallery), number, shown)
        )

    async def photo(self, gallery: str, image_id: str) -> bytes | None:
        """Return the encoded bytes of a photo; None if the gallery does not have it.

        Raises:
            ImageError: the gallery has the photo, but its file cannot be read.
        """
        return await self._ask_store(
            lambda: self._photos.read(gallery, self._version(gallery), image_id)
        )

    async def add_image(
        self, gallery: str, data: bytes, name: str, attributes: Attributes
    ) -> ImageRecord:
        """Save an uploaded photo, index it, and return its ledger row once searches can find it.

        Raises:
            ImageError: the photo cannot be decoded; nothing is saved.
            SchemaMismatch: the model of the version is not to be had; nothing is saved.
        """
        # Read once, so that the photo is encoded for the version that it is written to, even if
        # another version becomes live meanwhile.
        version = await self._searched_version(gallery)
        model = await self._model_of(gallery, version)
        encoded = await self._workers.encode_photo(model.key, version.spec, data)
        place = gallery, version.name
        return await self._ask_store(
            lambda: self._photos.add(place, encoded, data, name, attributes)
        )

    async def delete_image(self, gallery: str, image_id: str) -> bool:
        """Delete a photo from a gallery; return False if the gallery does not have it."""
        return await self._ask_store(
            lambda: self._photos.delete(gallery, self._version(gallery), image_id)
        )

    async def readiness(self) -> Readiness:
        """Check the store, and search each gallery that was configured or has been used."""
        checks = {"store": "ok"}
        try:
            served = await self._ask_store(self._served_galleries)
        except ReirError as error:
            return Readiness(ready=False, checks={"store": str(error)})
        # Without a list of galleries, those that nobody has used yet are not checked, because that
        # would load their models.
        for name in self._config.galleries or [each for each in self._stages_of if each in served]:
            try:
                # A full queue is no failure: the requests in it are being answered.
                with suppress(Overloaded):
                    await self._search_canary(name)
                checks[f"gallery {name}"] = "ok"
            except ReirError as error:
                checks[f"gallery {name}"] = str(error)
        return Readiness(ready=set(checks.values()) == {"ok"}, checks=checks)

    async def about(self) -> Mapping[str, Any]:
        """Return what the page shows of this server."""
        # Without the names of galleries and stores, because the route needs no key.
        models = [stages.model for stages in self._stages_of.values()]
        return {
            "cpu_path": cpu_path(),
            "checkpoints": sorted({model.digest for model in models}),
            "reranks": any(model.reranks for model in models),
            "masks": any(model.masks for model in models),
            "k": self.live.k,
            "budget_ms": self.live.budget_ms,
        }

    async def warm_up(self) -> None:
        """Load models and answer a few queries, so that the first request does not have to wait.

        If the store does not answer, nothing is loaded: the first request to a gallery does it.

        Raises:
            ReirError: one of the galleries in the settings cannot be served.
        """
        try:
            live = await self._ask_store(self._live_galleries)
            for name in self._config.galleries or live:
                await self._warm_up_gallery(name)
        except StoreUnavailable as error:
            logger.warning("no model is loaded yet, because the store does not answer: %s", error)

    async def _warm_up_gallery(self, gallery: str) -> None:
        try:
            for _ in range(WARM_UP_SEARCHES):
                await self._search_canary(gallery)
        except ReirError as error:
            if self._config.galleries or isinstance(error, StoreUnavailable):
                raise
            # Nobody asked for this gallery by name, and the others can be served without it.
            logger.error("gallery '%s' cannot be searched: %s", gallery, error)

    async def check_health(self) -> None:
        """Search for the canary expression in one gallery.

        Errors of the store and a full queue do not count as failures: Serve replaces a replica
        whose health check fails, and a new process would not help.

        Raises:
            Exception: anything else that prevents an answer.
        """
        stages = next(iter(self._stages_of.values()), None)
        if stages is None:
            return
        # One gallery is enough: all galleries share the process, and in most cases the model.
        with suppress(StoreError, Overloaded):
            await answer([CANARY_QUERY], stages)

    async def _search_canary(self, gallery: str) -> None:
        """Search a gallery for the canary expression."""
        await self._with_live_model(gallery, lambda stages: answer([CANARY_QUERY], stages))

    async def _stages(self, gallery: str) -> GalleryStages:
        """Return the stages of a gallery; the first call loads its model.

        Raises:
            GalleryNotFound: there is no such gallery, or it is not served here.
        """
        stages = self._stages_of.get(gallery)
        if stages is None:
            stages = await self._load_stages(gallery, await self._searched_version(gallery))
        # Read again for each request, because live settings may have changed.
        stages.pinned = self.live.pinned.get(gallery, "")
        return stages

    async def _load_stages(self, gallery: str, version: VersionInfo) -> GalleryStages:
        """Return the stages of a gallery with the model of a version, and use them from now on.

        Raises:
            SchemaMismatch: the checkpoint of the version has been replaced.
        """
        key = ModelKey(version.spec.encoder or SHIPPED_KIND, version.spec.digest)
        if self._config.encoder is not None:
            # Only a search can tell whether the version was indexed with it.
            key = ModelKey(self._config.encoder)
        # If two requests get here at the same time, the model is still loaded only once.
        model = await self._workers.load_model(key)
        stages = GalleryStages(gallery, model, self._workers, self._costs)
        self._stages_of[gallery] = stages
        return stages

    async def _model_of(self, gallery: str, version: VersionInfo) -> ModelInfo:
        """Return the model with which a version was indexed.

        Raises:
            SchemaMismatch: the settings require another model, or its checkpoint has been replaced.
        """
        model = (await self._stages(gallery)).model
        # The stages may have the model of a version that was live before this one, or after it.
        if model.digest != version.spec.digest:
            model = (await self._reload_stages(gallery, version)).model
        return model

    async def _reload_stages(self, gallery: str, version: VersionInfo) -> GalleryStages:
        """Replace the stages of a gallery, whose model is not that of the version.

        Raises:
            SchemaMismatch: the settings require that model, or the checkpoint has been replaced.
        """
        if self._config.encoder is not None:
            raise SchemaMismatch(
                f"the live version of gallery '{gallery}' was indexed with another checkpoint than "
                f"the one that this server was started with ({self._config.encoder}). Index a "
                f"version with that one (`reir index SOURCE --gallery {gallery}`), or start "
                f"`reir serve` without --checkpoint and --encoder"
            )
        return await self._load_stages(gallery, version)

    async def _ask_store(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread, because the store may take long, and the event loop must not."""
        return await asyncio.to_thread(self._breaker.call, work)

    def _served_galleries(self) -> list[str]:
        """Return the names of the store's galleries that are served."""
        served = self._config.galleries
        return [name for name in self._store.galleries() if served is None or name in served]

    def _live_galleries(self) -> tuple[str, ...]:
        """Return the names of the served galleries that have a live version."""
        return tuple(info.name for info in self._galleries() if info.live)

    def _galleries(self) -> list[GalleryInfo]:
        infos = []
        for name in self._served_galleries():
            versions = tuple(self._store.versions(name))
            live = next((each for each in versions if each.live), None)
            stages = self._stages_of.get(name)
            infos.append(
                GalleryInfo(
                    name=name,
                    live=live.name if live else "",
                    loaded=bool(live and stages and stages.model.digest == live.spec.digest),
                    versions=versions,
                )
            )
        return infos

    async def _searched_version(self, gallery: str) -> VersionInfo:
        """Return the version that is searched: the pinned or the live one."""
        return await self._ask_store(lambda: self._version_info(gallery))

    def _version_info(self, gallery: str) -> VersionInfo:
        name = self._version(gallery)
        found = {each.name: each for each in self._store.versions(gallery)}
        if name not in found:
            raise unknown_version_error(gallery, name, found)
        return found[name]

    def _version(self, gallery: str) -> str:
        """Return the name of the version that is searched: the pinned or the live one.

        Raises:
            GalleryNotFound: there is no such gallery, or it is not served.
        """
        served = self._config.galleries
        if served is not None and gallery not in served:
            raise GalleryNotFound(
                f"this server does not serve a gallery '{gallery}', only: {', '.join(served)}"
                f"{nearest_name(gallery, served)}"
            )
        return self.live.pinned.get(gallery, "") or self._store.live_version(gallery)
