"""`GalleryStages`: the stages of a search in one gallery, run by the workers."""

# Shapes: D vector dimension

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np

from reir.models.interfaces import EncodedExpression
from reir.models.zoom_steps import ZoomSearch
from reir.query.clock import StageCosts
from reir.query.differences import Alternatives
from reir.query.presence import Calibration
from reir.query.retrieval import RetrieveRequest, RetrieveResult
from reir.query.stages import (
    CompareResult,
    RefineRequest,
    RefineResult,
    RerankRequest,
    RerankResult,
    VerifyRequest,
    VerifyResult,
    ZoomRequest,
)
from reir.records import MaskRle
from reir_serving.backend.models import ModelInfo
from reir_serving.backend.workers import RetrieveCall, SearchWorkers


class GalleryStages:
    """Implements `reir.query.stages.Stages` for one gallery."""

    def __init__(
        self, gallery: str, model: ModelInfo, workers: SearchWorkers, costs: StageCosts
    ) -> None:
        self.gallery, self.model = gallery, model
        self.pinned = ""
        self.reranks, self.verifies, self.localizes = model.reranks, model.verifies, True
        self.localized_hits = model.localized_hits
        self.calibration: Calibration | None = model.calibration
        self.costs = costs
        self._alternatives: Alternatives | None = None
        self._workers = workers

    async def encode(self, expressions: Sequence[str]) -> Sequence[EncodedExpression]:
        """Return the vector of each expression, and its words if there is a re-ranker."""
        return await self._workers.encode(self.model.key, tuple(expressions))

    async def retrieve(self, requests: Sequence[RetrieveRequest]) -> Sequence[RetrieveResult]:
        """Return the best rows of the live version, or of the pinned one."""
        return await self._workers.retrieve(
            RetrieveCall(
                gallery=self.gallery,
                digest=self.model.digest,
                dim=self.model.dim,
                requests=tuple(requests),
                pinned=self.pinned,
            )
        )

    async def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """Return masks by instance id."""
        return await self._workers.masks(self.gallery, version, tuple(instance_ids))

    async def rerank(
        self, requests: Sequence[RerankRequest], timeout_s: float | None, /
    ) -> Sequence[Sequence[RerankResult]]:
        """Return the re-ranker's scores of the best photos."""
        # After the timeout, the answer leaves this stage out. A call that no worker has started yet
        # is then dropped (`batching.py`).
        async with asyncio.timeout(timeout_s):
            return await self._workers.rerank(self.model.key, self.gallery, tuple(requests))

    async def verify(
        self, requests: Sequence[VerifyRequest], timeout_s: float | None, /
    ) -> Sequence[VerifyResult | None]:
        """Compare expressions with the pixels of hits."""
        async with asyncio.timeout(timeout_s):
            return await self._workers.verify(self.model.key, tuple(requests))

    async def localize(
        self, requests: Sequence[RefineRequest], timeout_s: float | None, /
    ) -> Sequence[RefineResult | None]:
        """Return refined boxes and masks of hits."""
        async with asyncio.timeout(timeout_s):
            return await self._workers.refine(self.model.key, tuple(requests))

    async def zoom(
        self, requests: Sequence[ZoomRequest], timeout_s: float | None, /
    ) -> Sequence[ZoomSearch | None]:
        """Search photos by zooming in, as many as there is time for."""
        # The worker stops in time by itself; this limits how long the call waits for the worker.
        async with asyncio.timeout(timeout_s):
            return await self._workers.zoom(self.model.key, tuple(requests), timeout_s)

    async def compare(
        self, instance_ids: Mapping[str, Sequence[str]], timeout_s: float | None, /
    ) -> CompareResult:
        """Return the vectors of instances."""
        async with asyncio.timeout(timeout_s):
            if self._alternatives is None:
                encoded = await self.encode(Alternatives.SENTENCES)
                self._alternatives = Alternatives.of(np.stack([each.vector for each in encoded]))
            return CompareResult(
                alternatives=self._alternatives,
                instances={
                    version: await self._workers.vectors(self.gallery, version, tuple(ids))
                    for version, ids in instance_ids.items()
                },
            )
