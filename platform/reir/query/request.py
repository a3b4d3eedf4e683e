"""What a search may ask for: the same request in library, command line and service."""

# Shapes: D vector dimension

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np

from reir.errors import QueryError
from reir.records import FloatArray
from reir.store.filters import parse
from reir.text import validate_expression

MAX_K = 1000
"""Maximum number of hits of one query, and of queries in one call."""

MAX_TERMS = 16
MAX_WEIGHT = 10.0


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a query: an expression, an instance or a vector, exactly one of the three.

    Attributes:
        expression: describes an instance.
        instance_id: an instance of the gallery: "more like this".
        vector: (D,) float32 of any length, such as that of an instance in another photo.
        weight: factor of its unit vector in the sum; negative means "not like this".
    """

    expression: str = ""
    instance_id: str = ""
    vector: FloatArray | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Query:
    """One search of one gallery.

    Attributes:
        terms: what to look for; their unit vectors are added, each multiplied by its weight.
            Re-ranker and zoomer read the first expression with a positive weight.
        k: maximum number of hits, 1 to 1000.
        per_image: maximum number of hits in one photo, 1 to 1000.
        where: filter over instance fields and attributes (`reir.store.filters`).
        min_presence: hits with a lower presence are left out; 0 keeps all.
        rerank: let the relation re-ranker order the best photos, if the checkpoint has one; off by
            default, because the shipped one makes results worse on photos that it was not tuned
            on (docs/rerank.md).
        verify: compare the colors that the expression names with the pixels of the first hits, and
            order these by both (docs/search.md); not together with `rerank`.
        zoom: search the first photos again on their pixels, by zooming in; needs an expression.
        localize: refine boxes and masks of the first hits on the pixels of their photos.
        explain: give every hit its `Evidence`.
        budget_ms: stages that would end later are left out and named in `degraded`; None means no
            limit.
        cursor: `cursor` of the previous page; empty for the first page.
    """

    terms: tuple[Term, ...] = field(default_factory=tuple)
    k: int = 10
    per_image: int = 1
    where: str | None = None
    min_presence: float = 0.0
    rerank: bool = False
    verify: bool = False
    zoom: bool = False
    localize: bool = False
    explain: bool = False
    budget_ms: float | None = None
    cursor: str = ""

    @property
    def expression(self) -> str:
        """The first expression with a positive weight; empty if there is none."""
        return next((t.expression for t in self.terms if t.expression and t.weight > 0), "")

    @property
    def is_plain(self) -> bool:
        """Whether it is a single expression; calibrations are fitted on such queries only."""
        return len(self.terms) == 1 and bool(self.expression)

    @property
    def fingerprint(self) -> str:
        """Identifies the question: equal for all pages of one answer, whatever their size."""
        # Without k, budget_ms, explain, zoom and localize, which may differ from page to page.
        told = hashlib.sha256()
        for term in self.terms:
            vector = b"" if term.vector is None else term.vector.tobytes()
            parts = (term.expression.encode(), term.instance_id.encode(), vector)
            # `repr` puts each part in quotes, so no two different queries give the same text.
            told.update(repr((*parts, float(term.weight))).encode())
        ranking = (self.per_image, self.where, self.rerank, self.min_presence)
        # Without verification as before, so that cursors of earlier releases stay valid.
        told.update(repr((*ranking, "verify") if self.verify else ranking).encode())
        return told.hexdigest()[:16]


class SearchOptions(TypedDict, total=False):
    """Options of a search; all but `also` are fields of `Query`, with the same defaults.

    Attributes:
        also: terms beside the expression; a negative weight means "not like this".
    """

    k: int
    per_image: int
    where: str | None
    also: Sequence[Term]
    min_presence: float
    rerank: bool
    verify: bool
    zoom: bool
    localize: bool
    explain: bool
    budget_ms: float | None
    cursor: str


def query_of(terms: Sequence[Term], options: SearchOptions) -> Query:
    """Return the query for terms and options.

    Raises:
        TypeError: there is no such option.
    """
    fields: dict[str, Any] = dict(options)  # a copy, since `also` is removed from it
    return Query(terms=(*terms, *fields.pop("also", ())), **fields)


def check_query(query: Query) -> Query:
    """Return the query with normalized expressions and float32 unit vectors.

    Raises:
        QueryError: a part is out of range; `field` names it.
    """
    if query.where is not None:
        # Only for its errors: the stores parse the text themselves. A server may have added the
        # condition on a tenant.
        parse(query.where, added=1)
    if not 1 <= len(query.terms) <= MAX_TERMS:
        raise QueryError("terms", f"must hold 1 to {MAX_TERMS} terms, got {len(query.terms)}")
    terms = tuple(map(_checked_term, query.terms))
    # Negative terms alone do not say what to look for.
    if all(term.weight <= 0 for term in terms):
        raise QueryError("terms", "all have negative weights; at least one needs a weight above 0")
    if query.zoom and not query.expression:
        raise QueryError(
            "zoom",
            "needs an expression to look for; add one, or leave it out (an instance or a "
            "photo alone cannot be searched for on pixels)",
        )
    if query.verify and query.rerank:
        raise QueryError("verify", "cannot be combined with rerank; leave one of them out")
    check_number("min_presence", query.min_presence, 0.0, 1.0)
    if query.budget_ms is not None:
        check_number("budget_ms", query.budget_ms, 0.0, math.inf)
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
            "terms", "each take one of expression, instance_id and vector; one term has several"
        )
    check_number("weight", term.weight, -MAX_WEIGHT, MAX_WEIGHT)
    if term.weight == 0:
        raise QueryError("weight", "must not be 0; leave the term out instead")
    if term.vector is not None:
        return replace(term, vector=_vector(term.vector))
    if term.instance_id:
        return term
    return replace(term, expression=validate_expression(term.expression))


def _vector(given: FloatArray) -> FloatArray:
    vector = np.ascontiguousarray(given, dtype=np.float32)
    # After the conversion, in which large numbers become infinite and small ones 0.
    if vector.ndim != 1 or not np.isfinite(vector).all() or not vector.any():
        raise QueryError(
            "vector", f"must be (D,), finite and not zero, got an array of shape {vector.shape}"
        )
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def check_number(field_name: str, value: Any, least: float, most: float) -> None:
    """Check a number of a query.

    Raises:
        QueryError: it is no number, or not between `least` and `most`; `field_name` names it.
    """
    # For Python, True is an int, but as a number it is a mistake of the caller.
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise QueryError(field_name, f"must be a number from {least:g} to {most:g}, got {value!r}")


def _count(field_name: str, value: Any) -> int:
    """Return `value` as a number of hits."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 1 <= int(value) <= MAX_K:
        raise QueryError(field_name, f"must be a whole number from 1 to {MAX_K}, got {value!r}")
    return int(value)
