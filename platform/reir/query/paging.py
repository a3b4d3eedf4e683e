"""Cursors: where the next page of an answer begins, as opaque text that this module encodes."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Literal, NamedTuple

from reir.errors import QueryError
from reir.query.request import Query

MAX_HITS = 10_000
"""The last hit that paging reaches. Each page ranks all hits before it again, so cost grows with
depth."""

Order = Literal["dual", "pool", "rest"]
"""What ordered the last hit. "dual": the inner product, in an answer without the re-ranker. "pool":
the re-ranker. "rest": the inner product, after all photos that the re-ranker scored."""

_ORDERS: tuple[Order, ...] = ("dual", "pool", "rest")


# A tuple, because it becomes JSON as it is; `dataclasses.astuple` would copy deeply, which is slow.
class Cursor(NamedTuple):
    """The last hit of a page.

    Attributes:
        version: version of the gallery that was searched.
        fingerprint: `Query.fingerprint`, so that a cursor is not used with another query.
        order: what ordered the hit.
        score, image_id, number: identify the hit.
        num_hits: hits up to and including this one, also those that `min_presence` removed.
    """

    version: str
    fingerprint: str
    order: Order
    score: float
    image_id: str
    number: int
    num_hits: int

    def __str__(self) -> str:
        text = json.dumps(tuple(self)).encode()
        # Without "=", so that no character has to be escaped in a URL.
        return base64.urlsafe_b64encode(text).decode("ascii").rstrip("=")


def read_cursor(query: Query) -> Cursor | None:
    """Return where the page of a query begins; None for the first page.

    Raises:
        QueryError: with the field "cursor", if it is damaged or belongs to another query.
    """
    if not query.cursor:
        return None
    try:
        padded = query.cursor + "=" * (-len(query.cursor) % 4)
        values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        cursor = Cursor(*values)
        kinds = tuple(map(type, cursor))
    # Clients can send any text, also deeply nested JSON, for which the parser runs out of stack.
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise QueryError("cursor", f"{query.cursor[:40]!r} is not a cursor; {_ADVICE}") from error
    # Types are compared and not tested with `isinstance`, for which a boolean is an int.
    is_valid = kinds == (str, str, str, float, str, int, int) and cursor.order in _ORDERS
    # `num_hits` decides how many rows a search reads, so a forged one must not be larger than
    # paging allows.
    if not is_valid or not 1 <= cursor.num_hits <= MAX_HITS:
        raise QueryError("cursor", f"{query.cursor[:40]!r} is not a cursor; {_ADVICE}")
    if cursor.fingerprint != query.fingerprint:
        raise QueryError(
            "cursor",
            "belongs to another query; only k, budget_ms, explain and localize may differ between "
            "pages. Leave it out to start again",
        )
    return cursor


def version_gone(version: str) -> QueryError:
    """Return the error for a cursor whose version can no longer be searched."""
    return QueryError(
        "cursor",
        f"belongs to version '{version}', which was removed or built with another checkpoint; "
        f"leave it out to search the live version",
    )


_ADVICE = "pass the `cursor` of the previous page unchanged, or leave it out"
