"""`LocalStages`: the stages of a query as function calls in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reir.models.interfaces import EncodedExpression, InstanceEncoder, encode_words
from reir.models.zoom_steps import ZoomSearch
from reir.query.clock import StageCosts
from reir.query.differences import Alternatives
from reir.query.localize import PixelLocalizer
from reir.query.presence import Calibration
from reir.query.rerank import PhotoReranker
from reir.query.retrieval import Retriever, RetrieveRequest, RetrieveResult
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
from reir.query.verify.photos import PixelVerifier
from reir.query.zoom.photos import PhotoZoomer
from reir.records import MaskRle


class LocalStages:
    """The stages of one gallery in this process; implements `reir.query.stages.Stages`."""

    def __init__(  # noqa: PLR0913 - the stages of a gallery
        self,
        encoder: InstanceEncoder,
        retriever: Retriever,
        reranker: PhotoReranker | None,
        verifier: PixelVerifier | None,
        localizer: PixelLocalizer,
        zoomer: PhotoZoomer,
        calibration: Calibration | None,
    ) -> None:
        self.gallery = retriever.gallery
        # Localization needs only the encoder, which a local gallery always has.
        self.reranks, self.verifies, self.localizes = (
            reranker is not None,
            verifier is not None,
            True,
        )
        self.localized_hits = localizer.max_hits
        self.calibration = calibration
        self.costs = StageCosts()
        self._alternatives: Alternatives | None = None
        self._encoder, self._retriever = encoder, retriever
        self._reranker, self._verifier = reranker, verifier
        self._localizer, self._zoomer = localizer, zoomer

    async def encode(self, expressions: Sequence[str]) -> Sequence[EncodedExpression]:
        """See `Stages.encode`."""
        return encode_words(self._encoder, expressions, words=self.reranks)

    async def retrieve(self, requests: Sequence[RetrieveRequest]) -> Sequence[RetrieveResult]:
        """See `Retriever.retrieve`."""
        return self._retriever.retrieve(requests)

    async def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """See `Retriever.masks`."""
        return self._retriever.masks(version, instance_ids)

    async def rerank(
        self, requests: Sequence[RerankRequest], _: float | None, /
    ) -> Sequence[Sequence[RerankResult]]:
        """See `PhotoReranker.rerank`; runs to its end, since nothing here can interrupt it."""
        assert self._reranker is not None, "`reranks` says so"
        return self._reranker.rerank(requests)

    async def verify(
        self, requests: Sequence[VerifyRequest], _: float | None, /
    ) -> Sequence[VerifyResult | None]:
        """See `PixelVerifier.verify`; runs to its end, since nothing here can interrupt it."""
        assert self._verifier is not None, "`verifies` says so"
        return self._verifier.verify(requests)

    async def localize(
        self, requests: Sequence[RefineRequest], _: float | None, /
    ) -> Sequence[RefineResult | None]:
        """See `PixelLocalizer.refine`; runs to its end, since nothing here can interrupt it."""
        return self._localizer.refine(requests)

    async def zoom(
        self, requests: Sequence[ZoomRequest], timeout_s: float | None, /
    ) -> Sequence[ZoomSearch | None]:
        """See `PhotoZoomer.zoom`."""
        return self._zoomer.zoom(requests, timeout_s)

    async def compare(
        self, instance_ids: Mapping[str, Sequence[str]], _: float | None, /
    ) -> CompareResult:
        """See `Stages.compare`; runs to its end, since nothing here can interrupt it."""
        # Alternatives depend on the encoder alone, so they are encoded once, for the first query
        # that needs them.
        if self._alternatives is None:
            vectors = self._encoder.encode_expressions(Alternatives.SENTENCES)
            self._alternatives = Alternatives.of(vectors)
        return CompareResult(
            alternatives=self._alternatives,
            instances={
                version: self._retriever.vectors(version, ids)
                for version, ids in instance_ids.items()
            },
        )
