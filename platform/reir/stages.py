"""What an answer is made of: the stages, what each is asked, and what it says.

The library runs them in this process (`reir.search`), the service on deployments of their own; the
order in which they are asked is `reir.answer` in both.
"""

# Shapes: D vector dimension

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reir.clock import Costs
from reir.models.seams import EncodedExpression
from reir.presence import Calibration
from reir.records import MaskRle, Neighbour
from reir.retrieval import Retrieval, Retrieved
from reir.store.contract import InstanceRow

Box = tuple[float, float, float, float]
"""xyxy in [0, 1] of the upright photo."""

RERANKED_PHOTOS = 50
"""Best photos that the re-ranker sees."""

LOCALISED_HITS = 3
"""First hits that the localiser sees."""


@dataclass(frozen=True, kw_only=True)
class Reordering:
    """What the re-ranker is asked: score all instances of some photos anew.

    Attributes:
        expression: its words, with the vector of the whole query.
        version: to read the instances from.
        image_ids: of the photos.
        where: filter that every row passes; the others are neighbours all the same.
        per_image: rows wanted of each photo.
        without: ids of instances that are no hits.
        neighbours: whether they are wanted too.
    """

    expression: EncodedExpression
    version: str
    image_ids: tuple[str, ...]
    where: str | None = None
    per_image: int = 1
    without: frozenset[str] = frozenset()
    neighbours: bool = False


@dataclass(frozen=True, kw_only=True)
class Reordered:
    """One instance that the re-ranker scored.

    Attributes:
        row: its `score` is the inner product.
        score: the re-ranker's.
        neighbours: looked at most, most first; only where asked for.
    """

    row: InstanceRow
    score: float
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What the localiser is asked: where exactly the instance of a hit is in its photo."""

    image_id: str
    uri: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Box and mask of a hit, seen on its pixels."""

    box: Box
    mask: MaskRle | None = None


class Stages(Protocol):
    """The stages of one gallery. Those in process never wait; those of a service do.

    A stage that is given `timeout_s` raises `TimeoutError` where it would take longer, if it can.

    Attributes:
        gallery: that is searched.
        reranks, localises: whether there is such a stage.
        calibration: of the checkpoint, None without one.
        costs: what the optional stages took so far.
    """

    gallery: str
    reranks: bool
    localises: bool
    calibration: Calibration | None
    costs: Costs

    async def encode(self, expressions: Sequence[str]) -> Sequence[EncodedExpression]:
        """Vector of each expression, and its words where there is a re-ranker to read them."""
        ...

    async def retrieve(self, requests: Sequence[Retrieval]) -> Sequence[Retrieved]:
        """As `Retriever.retrieve`."""
        ...

    async def masks(self, version: str, instance_ids: Sequence[str]) -> dict[str, MaskRle]:
        """As `Retriever.masks`."""
        ...

    async def rerank(
        self, requests: Sequence[Reordering], timeout_s: float | None, /
    ) -> Sequence[Sequence[Reordered]]:
        """For each request the best rows of each photo, in any order."""
        ...

    async def localise(
        self, requests: Sequence[Refinement], timeout_s: float | None, /
    ) -> Sequence[Refined]:
        """For each request where the hit is."""
        ...
