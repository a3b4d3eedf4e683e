"""What the layers of the application know about one request; stored in its ASGI scope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reir_serving.middleware.access import NO_ACCESS, Caller

SCOPE_KEY = "reir.state"


@dataclass(slots=True)
class RequestState:
    """State of one request; the access log and the metrics read it when the answer is sent.

    Attributes:
        request_id: id of the request, which the answer contains as `X-Request-Id`.
        caller: the caller that the key belongs to; without access until the key has been checked.
        status: HTTP status of the answer; 0 until the answer begins.
        problem: name of the kind of problem; empty if there is none.
        trace_id: id of the trace that contains the request; empty if traces are off.
    """

    request_id: str
    caller: Caller = NO_ACCESS
    status: int = 0
    problem: str = ""
    trace_id: str = ""


def request_state(scope: Mapping[str, Any]) -> RequestState:
    """Return the state of a request."""
    state: RequestState = scope[SCOPE_KEY]
    return state
