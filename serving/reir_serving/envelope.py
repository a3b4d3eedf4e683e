"""Around all that is let in: request id, security headers, access log and metrics of every answer.

Plain ASGI, since a layer of Starlette's own kind costs a task and a queue for each request.
"""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reir_serving.logs import ACCESS, log_line
from reir_serving.metrics import UNKNOWN_ROUTE, Metrics
from reir_serving.notes import Notes, put_notes
from reir_serving.problems import INTERNAL, Refused, problem

CLIENT_GONE = 499
"""What the access log says of a request whose client went away before the answer began."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; "
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


class Envelope:
    """Wraps an application; every answer leaves through here, those to bugs as well."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Count into `metrics`."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = Notes(request_id_of(Headers(scope=scope)))
        put_notes(scope, notes)
        started_s = time.perf_counter()
        self._metrics.in_flight.inc()

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes.status = message["status"]
                own = [*SECURITY_HEADERS, (b"x-request-id", notes.request_id.encode())]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception:
            logger.exception("request %s failed", notes.request_id)
            if notes.status:  # the answer has begun; the server cuts the connection
                raise
            refused = Refused(INTERNAL, f"it is logged under request id {notes.request_id}")
            await problem(refused, Request(scope))(scope, receive, send_on)
        finally:
            self._metrics.in_flight.dec()
            self._note(scope, notes, time.perf_counter() - started_s)

    def _note(self, scope: Scope, notes: Notes, seconds: float) -> None:
        """Count and log a request under the template of its path, which holds no names."""
        route = getattr(scope.get("route"), "path", "") or UNKNOWN_ROUTE
        status = notes.status or CLIENT_GONE
        self._metrics.note_request(scope["method"], route, status, seconds)
        if notes.problem:
            self._metrics.note_problem(notes.problem)
        log_line(
            ACCESS,
            method=scope["method"],
            route=route,
            status=status,
            ms=round(1e3 * seconds, 2),
            request_id=notes.request_id,
            key=notes.caller.key_id,
            **({"problem": notes.problem} if notes.problem else {}),
            **notes.more,
        )


def request_id_of(headers: Headers) -> str:
    """Return the id that the client gave, if it can be written anywhere, or a new one."""
    sent = headers.get("x-request-id", "")
    return sent if _SANE_ID.fullmatch(sent) else secrets.token_hex(8)
