"""The way in: how many requests of the API are inside, and the answer when there is no room.

Under overload most requests are refused, on the cores that should answer the others. So a refusal
reads no body, looks for no route and is counted and logged with others of its second.
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
from reir_serving.envelope import SECURITY_HEADERS, request_id_of
from reir_serving.gate import API, SAFE_METHODS, is_form
from reir_serving.logs import ACCESS, log_line
from reir_serving.metrics import Metrics
from reir_serving.problems import (
    BAD_REQUEST,
    MEDIA_TYPE,
    OVERLOADED,
    Kind,
    Refused,
    problem_body,
)

RETRY_AFTER_S = 1
"""When a request that found no room should come again."""

TELL_EVERY_S = 1.0
"""How often refusals are counted and logged."""

HELD_BYTES = 60_000
"""HAProxy forwards a request of up to this many bytes only once all of it has arrived
(`haproxy_settings.py`). The rest of a larger request may arrive at any speed."""

_NO_ROOM = Refused(
    OVERLOADED, "the limit of requests in progress or waiting is reached; try again in a moment"
)
_ID = "{request_id}"
_BODY = problem_body(_NO_ROOM, _ID)
_HEADERS = [
    *SECURITY_HEADERS,
    (b"content-type", MEDIA_TYPE.encode()),
    (b"cache-control", b"no-store"),
]


class Door:
    """Counts requests while they are inside; those that only read cost little and always enter."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        """Have room for as many as may be worked on and wait."""
        self._limits, self._metrics = limits, metrics
        self._inside: Counter[bool] = Counter()  # whether it is large -> how many
        self._untold: Counter[str] = (
            Counter()
        )  # method -> how many were refused and not told of yet

    def is_full(self, scope: Scope) -> bool:
        """Return whether there is no room for this request.

        Large requests are held in memory and may arrive slowly, so only `ongoing` of them are let
        in at a time; none of them may wait.
        """
        if not _needs_room(scope):
            return False
        if self._inside.total() >= self._limits.ongoing + self._limits.queued:
            return True
        return self._inside[True] >= self._limits.ongoing and is_large(scope)

    @contextmanager
    def inside(self, scope: Scope) -> Iterator[None]:
        """Count a request while it is in progress."""
        if not _needs_room(scope):
            yield
            return
        large = is_large(scope)
        self._inside[large] += 1
        try:
            yield
        finally:
            self._inside[large] -= 1

    async def refuse(self, scope: Scope, send: Send) -> None:
        """Answer 503, and when to come again."""
        headers, body = self._refused(scope)
        start = {"type": "http.response.start", "status": OVERLOADED.status, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": body})

    def refusal(
        self, scope: Scope, more: Iterable[tuple[bytes, bytes]] = (), *, keep_alive: bool
    ) -> bytes:
        """Return the same answer as raw HTTP, with the headers `more` added."""
        headers, body = self._refused(scope)
        return _on_the_wire(OVERLOADED, [*headers, *more], body, keep_alive=keep_alive)

    def _refused(self, scope: Scope) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Count a refusal; returns its headers and its body."""
        if not self._untold:
            asyncio.get_running_loop().call_later(TELL_EVERY_S, self.tell)
        self._untold[scope["method"]] += 1
        request_id = request_id_of(Headers(scope=scope))
        body = _BODY.replace(_ID.encode(), request_id.encode())
        return [*_headers(request_id, body), (b"retry-after", b"%d" % RETRY_AFTER_S)], body

    def tell(self) -> None:
        """Count and log what was refused since the last time."""
        refused, self._untold = self._untold, Counter()  # first: the next one starts a new count
        for method, count in refused.items():
            self._metrics.note_refusals(method, OVERLOADED.status, OVERLOADED.name, count)
        log_line(
            ACCESS, status=OVERLOADED.status, problem=OVERLOADED.name, requests=refused.total()
        )


class Entrance:
    """The outermost layer of the application: through the door, or away."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        """Let requests in to `app`."""
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._door.is_full(scope):
            await self._door.refuse(scope, send)
        else:
            with self._door.inside(scope):
                await self._app(scope, receive, send)


def bad_request(said: str, more: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """Return the answer to a request that cannot be parsed, as raw HTTP that closes the connection.

    Args:
        said: what is wrong with the request.
        more: headers to add.
    """
    request_id = request_id_of(Headers())
    body = problem_body(Refused(BAD_REQUEST, said), request_id)
    return _on_the_wire(BAD_REQUEST, [*_headers(request_id, body), *more], body, keep_alive=False)


def _headers(request_id: str, body: bytes) -> list[tuple[bytes, bytes]]:
    length = str(len(body)).encode()
    return [*_HEADERS, (b"x-request-id", request_id.encode()), (b"content-length", length)]


def _on_the_wire(
    kind: Kind, headers: list[tuple[bytes, bytes]], body: bytes, *, keep_alive: bool
) -> bytes:
    if not keep_alive:
        headers.append((b"connection", b"close"))
    first = f"HTTP/1.1 {kind.status} {HTTPStatus(kind.status).phrase}".encode()
    return b"\r\n".join([first, *(b"%s: %s" % header for header in headers), b"", body])


def is_large(scope: Scope) -> bool:
    """Return whether a request has a photo, exceeds `HELD_BYTES`, or does not state its size."""
    headers = Headers(scope=scope)
    if is_form(headers) or "transfer-encoding" in headers:
        return True
    told = headers.get("content-length", "")
    body = int(told[:20]) if told.isascii() and told.isdigit() else 0
    address = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    return body + address + sum(len(name) + len(value) for name, value in headers.raw) > HELD_BYTES


def _needs_room(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.startswith(API) and scope["method"] not in SAFE_METHODS
