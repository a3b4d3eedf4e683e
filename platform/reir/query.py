"""What a search may ask: the request of library, command line and service alike."""

# Shapes: D vector dimension

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reir.errors import QueryError
from reir.records import FloatArray
from reir.store.filters import parse
from reir.text import validate_expression

MAX_K = 1000
"""Most hits of one query, and most queries of one call."""

MAX_TERMS = 16
MAX_WEIGHT = 10.0


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a query; exactly one of the three that can be searched with.

    Attributes:
        expression: describes an instance.
        instance_id: an instance of the gallery: "more like this".
        vector: (D,) float32 of any length, of an instance in a photo from elsewhere.
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
        rerank: let the relation re-ranker order the best photos, if the checkpoint has one; off by
            default, as the shipped one hurts on photos that it was not tuned on (docs/rerank.md).
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
    rerank: bool = False
    localise: bool = False
    explain: bool = False
    budget_ms: float | None = None
    cursor: str = ""

    @property
    def expression(self) -> str:
        """The first expression of positive weight; empty where there is none."""
        return next((t.expression for t in self.terms if t.expression and t.weight > 0), "")

    @property
    def is_plain(self) -> bool:
        """Whether it is one expression and nothing else: what calibrations are made of."""
        return len(self.terms) == 1 and bool(self.expression)

    @property
    def fingerprint(self) -> str:
        """Names what is asked: equal for two pages of one answer, whatever their length."""
        told = hashlib.sha256()
        for term in self.terms:
            vector = b"" if term.vector is None else term.vector.tobytes()
            parts = (term.expression.encode(), term.instance_id.encode(), vector)
            told.update(repr((*parts, float(term.weight))).encode())
        told.update(repr((self.per_image, self.where, self.rerank, self.min_presence)).encode())
        return told.hexdigest()[:16]


def check_query(query: Query) -> Query:
    """Return the query with its expressions as encoders take them and its vectors as float32.

    Raises:
        QueryError: a part is out of range; `field` names it.
    """
    if query.where is not None:
        parse(query.where)
    if not 1 <= len(query.terms) <= MAX_TERMS:
        raise QueryError(
            "terms", f"must be 1 to {MAX_TERMS}, got {len(query.terms)}; say what to look for"
        )
    terms = tuple(map(_checked_term, query.terms))
    if all(term.weight <= 0 for term in terms):
        raise QueryError(
            "terms", "are all unwanted; at least one needs a weight above 0: what to look for"
        )
    _check_number("min_presence", query.min_presence, 0.0, 1.0)
    if query.budget_ms is not None:
        _check_number("budget_ms", query.budget_ms, 0.0, math.inf)
    return replace(
        query,
        terms=terms,
        k=_count("k", query.k),
        per_image=_count("per_image", query.per_image),
    )


def _checked_term(term: Term) -> Term:
    given = (term.expression != "", term.instance_id != "", term.vector is not None)
    if sum(given) > 1:
        raise QueryError(
            "terms", "hold one of expression, instance_id and vector each, got several in one"
        )
    _check_number("weight", term.weight, -MAX_WEIGHT, MAX_WEIGHT)
    if term.weight == 0:
        raise QueryError("weight", "must not be 0; leave the term out")
    if term.vector is not None:
        return replace(term, vector=_vector(term.vector))
    if term.instance_id:
        return term
    return replace(term, expression=validate_expression(term.expression))


def _vector(given: FloatArray) -> FloatArray:
    vector = np.ascontiguousarray(given, dtype=np.float32)
    if vector.ndim != 1 or not np.isfinite(vector).all() or not vector.any():
        raise QueryError(
            "vector", f"must be (D,), finite and not zero, got an array of shape {vector.shape}"
        )
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def _check_number(field_name: str, value: Any, least: float, most: float) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise QueryError(field_name, f"must be a number from {least:g} to {most:g}, got {value!r}")


def _count(field_name: str, value: Any) -> int:
    """Return `value` as a number of hits."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 1 <= int(value) <= MAX_K:
        raise QueryError(field_name, f"must be a whole number from 1 to {MAX_K}, got {value!r}")
    return int(value)
