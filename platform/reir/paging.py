"""Where the next page of an answer begins, as text that only this module reads."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Literal, NamedTuple

from reir.errors import QueryError
from reir.query import Query

MAX_GIVEN = 10_000
"""Hits that pages reach; every page ranks all before it anew, so deep ones cost more and more."""

Order = Literal["dual", "pool", "rest"]
"""What the last hit was ordered by: the inner product in an answer without the re-ranker; the
re-ranker; the inner product beyond the photos that the re-ranker saw."""

_ORDERS: tuple[Order, ...] = ("dual", "pool", "rest")


class Cursor(NamedTuple):
    """The last hit of a page.

    Attributes:
        version: that was searched.
        fingerprint: of the query.
        order: what the hit was ordered by.
        score, image_id, number: the hit.
        given: hits up to here, those that `min_presence` left out included.
    """

    version: str
    fingerprint: str
    order: Order
    score: float
    image_id: str
    number: int
    given: int

    def __str__(self) -> str:
        text = json.dumps(tuple(self)).encode()
        return base64.urlsafe_b64encode(text).decode("ascii").rstrip("=")


def read_cursor(query: Query) -> Cursor | None:
    """Return where a query goes on, None for its first page.

    Raises:
        QueryError: field "cursor"; it is damaged, or belongs to another query.
    """
    if not query.cursor:
        return None
    try:
        padded = query.cursor + "=" * (-len(query.cursor) % 4)
        values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        cursor = Cursor(*values)
        kinds = tuple(map(type, cursor))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise QueryError("cursor", f"{query.cursor[:40]!r} is none; {_ADVICE}") from error
    whole = kinds == (str, str, str, float, str, int, int) and cursor.order in _ORDERS
    if not whole or not 1 <= cursor.given <= MAX_GIVEN:
        raise QueryError("cursor", f"{query.cursor[:40]!r} is none; {_ADVICE}")
    if cursor.fingerprint != query.fingerprint:
        raise QueryError(
            "cursor",
            "belongs to another query: between pages only k, budget, explain and localise may "
            "change; leave it out to begin anew",
        )
    return cursor


def version_gone(version: str) -> QueryError:
    """Return the error for a page of a version that cannot be searched any more."""
    return QueryError(
        "cursor",
        f"goes on in version '{version}', which is gone or of another checkpoint; "
        f"leave it out to search the live version from the start",
    )


_ADVICE = "give the `cursor` of the page before as it is, or leave it out"
