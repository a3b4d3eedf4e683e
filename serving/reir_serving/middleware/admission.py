"""Admission control: limits how many requests are in progress, and rejects the others.

Under overload the server rejects most requests, on the same cores that should answer the rest.
Therefore the body of a rejected request is not read, its route is not looked up, and all rejections
of one second are counted and logged together.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from reir_serving.config import Limits
from reir_serving.http.problems import (
    BAD_REQUEST,
    MEDIA_TYPE,
    OVERLOADED,
    ProblemError,
    ProblemKind,
    problem_body,
)
from reir_serving.middleware.auth import PREFIX, SAFE_METHODS, is_form
from reir_serving.middleware.logs import ACCESS, log_line
from reir_serving.middleware.metrics import Metrics
from reir_serving.middleware.request_context import SECURITY_HEADERS, request_id_of

RETRY_AFTER_S = 1
"""`Retry-After` of a rejection, in seconds."""

REPORT_EVERY_S = 1.0
"""Interval in seconds at which rejections are counted and logged."""

BUFFERED_BYTES = 60_000
"""Size up to which HAProxy forwards a request only once all of it has arrived
(`haproxy_settings.py`). The rest of a larger request may arrive at any speed, and so occupy a
replica for long."""

_OVERLOAD = ProblemError(
    OVERLOADED,
    "the server already has as many requests in progress and waiting as it accepts; try again in a "
    "moment",
)
# Only the request id differs between rejections, so everything else is built once.
_ID = "{request_id}"
_BODY = problem_body(_OVERLOAD, _ID)
_HEADERS = [
    *SECURITY_HEADERS,
    (b"content-type", MEDIA_TYPE.encode()),
    (b"cache-control", b"no-store"),
]


class AdmissionControl:
    """Counts the requests in progress; requests that only read are cheap and always admitted."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        """Admit up to `max_ongoing_requests` plus `max_queued_requests` requests at a time."""
        # There are no locks, because everything runs in the event loop of the replica.
        self._limits, self._metrics = limits, metrics
        self._in_progress: Counter[bool] = Counter()  # whether it is large -> number
        self._unreported: Counter[str] = Counter()  # method -> number of rejections

    def is_full(self, scope: Scope) -> bool:
        """Return whether there is no room for this request.

        Large requests are held in memory and may arrive slowly, so only `max_ongoing_requests` of
        them are admitted at a time; none of them may wait.
        """
        if not _is_limited(scope):
            return False
        if (
            self._in_progress.total()
            >= self._limits.max_ongoing_requests + self._limits.max_queued_requests
        ):
            return True
        # `is_large` comes last, because it has to read the headers.
        return self._in_progress[True] >= self._limits.max_ongoing_requests and is_large(scope)

    @contextmanager
    def admit(self, scope: Scope) -> Iterator[None]:
        """Count a request while it is in progress."""
        if not _is_limited(scope):
            yield
            return
        large = is_large(scope)
        self._in_progress[large] += 1
        try:
            yield
        finally:
            self._in_progress[large] -= 1

    async def reject(self, scope: Scope, send: Send) -> None:
        """Answer 503, and say when to try again."""
        headers, body = self._rejection(scope)
        start = {"type": "http.response.start", "status": OVERLOADED.status, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": body})

    def raw_rejection(
        self, scope: Scope, more: Iterable[tuple[bytes, bytes]] = (), *, keep_alive: bool
    ) -> bytes:
        """Return the same answer as raw HTTP, with the headers `more` added."""
        headers, body = self._rejection(scope)
        return _raw_response(OVERLOADED, [*headers, *more], body, keep_alive=keep_alive)

    def _rejection(self, scope: Scope) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Count a rejection, and return its headers and body."""
        if not self._unreported:
            asyncio.get_running_loop().call_later(REPORT_EVERY_S, self.report)
        self._unreported[scope["method"]] += 1
        request_id = request_id_of(Headers(scope=scope))
        body = _BODY.replace(_ID.encode(), request_id.encode())
        return [*_headers(request_id, body), (b"retry-after", b"%d" % RETRY_AFTER_S)], body

    def report(self) -> None:
        """Add the rejections since the last report to the metrics and the access log."""
        # Replaced, because the next rejection schedules a new report if it finds an empty counter.
        rejections, self._unreported = self._unreported, Counter()
        for method, count in rejections.items():
            self._metrics.note_rejections(method, OVERLOADED.status, OVERLOADED.name, count)
        log_line(
            ACCESS, status=OVERLOADED.status, problem=OVERLOADED.name, requests=rejections.total()
        )


class AdmissionMiddleware:
    """The outermost layer of the application: admits a request or rejects it."""

    def __init__(self, app: ASGIApp, admission: AdmissionControl) -> None:
        """Pass admitted requests on to `app`."""
        self._app, self._admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._admission.is_full(scope):
            await self._admission.reject(scope, send)
        else:
            with self._admission.admit(scope):
                await self._app(scope, receive, send)


def raw_bad_request(detail: str, more: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """Return the answer to a request that cannot be parsed, as raw HTTP that closes the connection.

    Args:
        detail: what is wrong with the request.
        more: headers to add.
    """
    request_id = request_id_of(Headers())
    body = problem_body(ProblemError(BAD_REQUEST, detail), request_id)
    return _raw_response(BAD_REQUEST, [*_headers(request_id, body), *more], body, keep_alive=False)


def _headers(request_id: str, body: bytes) -> list[tuple[bytes, bytes]]:
    length = str(len(body)).encode()
    return [*_HEADERS, (b"x-request-id", request_id.encode()), (b"content-length", length)]


def _raw_response(
    kind: ProblemKind, headers: list[tuple[bytes, bytes]], body: bytes, *, keep_alive: bool
) -> bytes:
    if not keep_alive:
        headers.append((b"connection", b"close"))
    first = f"HTTP/1.1 {kind.status} {HTTPStatus(kind.status).phrase}".encode()
    return b"\r\n".join([first, *(b"%s: %s" % header for header in headers), b"", body])


def is_large(scope: Scope) -> bool:
    """Return whether a request is a form, exceeds `BUFFERED_BYTES`, or does not state its size."""
    headers = Headers(scope=scope)
    if is_form(headers) or "transfer-encoding" in headers:
        return True
    length = headers.get("content-length", "")
    # Cut off, because Python refuses to convert thousands of digits, and 20 exceed every limit.
    body = int(length[:20]) if length.isascii() and length.isdigit() else 0
    # HAProxy's buffer holds the first line and the headers as well.
    url = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    size = body + url + sum(len(name) + len(value) for name, value in headers.raw)
    return size > BUFFERED_BYTES


def _is_limited(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.startswith(PREFIX) and scope["method"] not in SAFE_METHODS
