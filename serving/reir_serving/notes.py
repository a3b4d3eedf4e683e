"""What one request carries through the layers of the application, in its ASGI scope."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from reir_serving.access import NOBODY, Caller

_SCOPE_KEY = "reir.notes"


@dataclass(slots=True)
class Notes:
    """Notes on one request; access log and metrics read them when it is answered.

    Attributes:
        request_id: sent back as `X-Request-Id`.
        caller: whose key it is.
        status: of the answer; 0 until it begins.
        problem: name of its kind of problem, empty without one.
        more: for the access log.
    """

    request_id: str
    caller: Caller = NOBODY
    status: int = 0
    problem: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def put_notes(scope: MutableMapping[str, Any], notes: Notes) -> None:
    """Attach notes to a request."""
    scope[_SCOPE_KEY] = notes


def notes_of(scope: Mapping[str, Any]) -> Notes:
    """Return the notes of a request."""
    notes: Notes = scope[_SCOPE_KEY]
    return notes
