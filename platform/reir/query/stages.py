"""The interface of the stages that produce an answer, with their requests and results.

The library implements the stages as function calls (`reir.query.local_stages`), and the service as
calls to Ray Serve deployments. `reir.query.answer` calls them in the same order in both cases.
"""

# Shapes: D vector dimension

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from reir.models.color_reading import ColorReading
from reir.models.interfaces import EncodedExpression
from reir.models.zoom_steps import ZoomSearch
from reir.query.clock import StageCosts
from reir.query.differences import Alternatives
from reir.query.presence import Calibration
from reir.query.retrieval import RetrieveRequest, RetrieveResult
from reir.records import Box, FloatArray, MaskRle
from reir.results import Neighbor
from reir.store.contract import InstanceRow

RERANKED_PHOTOS = 50
"""Number of best photos that the re-ranker scores."""

VERIFIED_HITS = 10
"""Number of first hits that the verifier compares with their pixels."""

ZOOMED_PHOTOS = 5
"""Maximum number of photos of a page that the zoomer searches."""

COMPARED_HITS = 20
"""Maximum number of hits of a page for which the answer says what differs from the sentence."""


@dataclass(frozen=True, kw_only=True)
class RerankRequest:
    """Asks the re-ranker to score all instances of some photos.

    Attributes:
        expression: token states of the expression, with the vector of the whole query.
        version: version to read the instances from.
        image_ids: the photos.
        where: filter that every returned row must pass; other instances still count as neighbors.
        per_image: rows to return of each photo.
        excluded: ids of instances that must not be returned.
        neighbors: whether to return the neighbors of each instance.
    """

    expression: EncodedExpression
    version: str
    image_ids: tuple[str, ...]
    where: str | None = None
    per_image: int = 1
    excluded: frozenset[str] = frozenset()
    neighbors: bool = False


@dataclass(frozen=True, kw_only=True)
class RerankResult:
    """One instance that the re-ranker scored.

    Attributes:
        row: the instance; its `score` is the inner product.
        score: score of the re-ranker.
        neighbors: instances with the largest attention weights, largest first; if asked for.
    """

    row: InstanceRow
    score: float
    neighbors: tuple[Neighbor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RefineRequest:
    """Asks the localizer for the exact box of a hit in its photo."""

    image_id: str
    uri: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class RefineResult:
    """Box and mask of a hit, refined on the pixels of its photo."""

    box: Box
    mask: MaskRle | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """Asks the verifier to compare an expression with the pixels of a hit."""

    image_id: str
    uri: str
    box: Box
    expression: str


VerifyResult = tuple[ColorReading, ...]
"""What the pixels say about each color word of the expression."""


@dataclass(frozen=True, kw_only=True)
class ZoomRequest:
    """Asks the zoomer to search a photo for an expression."""

    image_id: str
    uri: str
    expression: str


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """Vectors of alternatives, and of instances to compare them with.

    Attributes:
        alternatives: of the encoder of the instances.
        instances: version -> (D,) vectors by instance id; instances that were deleted meanwhile are
            left out.
    """

    alternatives: Alternatives
    instances: Mapping[str, Mapping[str, FloatArray]]


class Stages(Protocol):
    """The stages of one gallery.

    The methods are coroutines because those of a service wait for other processes. Those of the
    library never wait, so that `run_now` can run them without an event loop.

    A method with `timeout_s` raises `TimeoutError` after that time, if it can be interrupted.

    Attributes:
        gallery: name of the gallery.
        reranks, verifies, localizes: whether these optional stages exist.
        localized_hits: number of first hits that are localized.
        calibration: calibration of the checkpoint; None if it has none.
        costs: how long the optional stages usually take.
    """

    gallery: str
    reranks: bool
    verifies: bool
    localizes: bool
    localized_hits: int
    calibration: Calibration | None
    costs: StageCosts

    async def encode(self, expressions: Sequence[str]) -> Sequence[EncodedExpression]:
        """Encode each expression; with token states if there is a re-ranker, which reads them."""
        ...

    async def retrieve(self, requests: Sequence[RetrieveRequest]) -> Sequence[RetrieveResult]:
        """See `Retriever.retrieve`."""
        ...

    async def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """See `Retriever.masks`."""
        ...

    async def rerank(
        self, requests: Sequence[RerankRequest], timeout_s: float | None, /
    ) -> Sequence[Sequence[RerankResult]]:
        """Return, for each request, the best rows of each of its photos, in any order."""
        ...

    async def verify(
        self, requests: Sequence[VerifyRequest], timeout_s: float | None, /
    ) -> Sequence[VerifyResult | None]:
        """Compare expressions with pixels, in the order given; see `PixelVerifier.verify`."""
        ...

    async def localize(
        self, requests: Sequence[RefineRequest], timeout_s: float | None, /
    ) -> Sequence[RefineResult | None]:
        """Return the refined box and mask of each request; see `PixelLocalizer.refine`."""
        ...

    async def zoom(
        self, requests: Sequence[ZoomRequest], timeout_s: float | None, /
    ) -> Sequence[ZoomSearch | None]:
        """Search photos within so many seconds, in the order given; see `PhotoZoomer.zoom`."""
        ...

    async def compare(
        self, instance_ids: Mapping[str, Sequence[str]], timeout_s: float | None, /
    ) -> CompareResult:
        """Return the vectors of the instances that are named for each version."""
        ...
