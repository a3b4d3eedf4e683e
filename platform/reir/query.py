"""What a search may ask: the request of library, command line and service alike."""

# Shapes: D vector dimension

from __future__ import annotations

from dataclasses import dataclass, field

from reir.records import FloatArray


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a query; exactly one of the three that can be searched with.

    Attributes:
        expression: describes an instance.
        instance_id: an instance of the gallery: "more like this".
        vector: (D,) float32, of an instance in a photo from elsewhere.
        weight: share in the query's vector; negative for "not this".
    """

    expression: str = ""
    instance_id: str = ""
    vector: FloatArray | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Query:
    """One search of one gallery.

    Attributes:
        terms: what is looked for; their unit vectors are added by weight. The first expression
            of positive weight is what re-ranker and localiser read.
        k: most hits, 1 to 1000.
        per_image: most hits of one photo, 1 to 1000.
        where: filter over instance fields and attributes (`reir.store.filters`).
        min_presence: hits below are left out; 0 keeps all.
        rerank: let the relation re-ranker order the best photos, where the checkpoint has one.
        localise: refine boxes (and masks) of the first hits on their pixels.
        explain: give every hit its `Evidence`.
        budget_ms: stages that would end later are left out, and named in `degraded`; None takes
            all the time that it needs.
        cursor: of the page before; empty for the first page.
    """

    terms: tuple[Term, ...] = field(default_factory=tuple)
    k: int = 10
    per_image: int = 1
    where: str | None = None
    min_presence: float = 0.0
    rerank: bool = True
    localise: bool = False
    explain: bool = False
    budget_ms: float | None = None
    cursor: str = ""

    @property
    def expression(self) -> str:
        """The first expression of positive weight; empty where there is none."""
        return next((t.expression for t in self.terms if t.expression and t.weight > 0), "")
