"""Gives every admitted request an id, security headers, a line in the access log, and metrics.

The middleware is a plain ASGI class, because Starlette's `BaseHTTPMiddleware` needs a task and a
queue for each request.
"""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reir.tracing import current_trace_id
from reir_serving.http.problems import INTERNAL, ProblemError, problem_response
from reir_serving.middleware.logs import ACCESS, log_line
from reir_serving.middleware.metrics import UNKNOWN_ROUTE, Metrics
from reir_serving.middleware.request_state import SCOPE_KEY, RequestState

CLIENT_GONE = 499
"""Status in the access log for a client that disconnected before the answer began."""

# An id that the client chose may contain nothing that a log or a header could misinterpret.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
# The page needs no other server than this one. With an API key, it fetches pictures by itself and
# shows them as `blob:`, because the request of an <img> cannot carry the key.
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
SECURITY_HEADERS = [
    (b"content-security-policy", _CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]

logger = logging.getLogger(__name__)


class RequestContextMiddleware:
    """Wraps an application. Every answer passes through here, also the answers to bugs (500)."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Count requests in `metrics`."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope))
        trace_id = current_trace_id(**{"reir.request_id": request_id})
        state = scope[SCOPE_KEY] = RequestState(request_id, trace_id=trace_id)
        started_s = time.perf_counter()
        self._metrics.in_flight.inc()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                state.status = message["status"]
                own = [*SECURITY_HEADERS, (b"x-request-id", state.request_id.encode())]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        # Not `BaseException`: if the client is gone, its request is canceled, which is not a
        # failure and only passes `finally`.
        except Exception:
            logger.exception("request %s failed", state.request_id)
            if state.status:  # the answer has begun, so the server can only cut the connection
                raise
            detail = f"the server's log explains this error under request id {state.request_id}"
            problem = ProblemError(INTERNAL, detail)
            await problem_response(problem, Request(scope))(scope, receive, send_with_headers)
        finally:
            self._metrics.in_flight.dec()
            self._note(scope, state, time.perf_counter() - started_s)

    def _note(self, scope: Scope, state: RequestState, seconds: float) -> None:
        """Count and log a request under the template of its route, which contains no names."""
        route = getattr(scope.get("route"), "path", "") or UNKNOWN_ROUTE
        status = state.status or CLIENT_GONE
        self._metrics.note_request(scope["method"], route, status, seconds)
        if state.problem:
            self._metrics.note_problem(state.problem)
        log_line(
            ACCESS,
            method=scope["method"],
            route=route,
            status=status,
            ms=round(1e3 * seconds, 2),
            request_id=state.request_id,
            key=state.caller.key_id,
            **({"problem": state.problem} if state.problem else {}),
            **({"trace_id": state.trace_id} if state.trace_id else {}),
        )


def request_id_of(headers: Headers) -> str:
    """Return the client's `X-Request-Id` if it is safe to log and send, or else a new id."""
    sent = headers.get("x-request-id", "")
    return sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(8)
