"""Authenticates callers, and limits the rate, size and duration of their requests.

Most rejections cost little, because they come before the body is read and the route is looked up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reir_serving.config import Limits
from reir_serving.http.problems import (
    FORBIDDEN,
    FORM,
    KEYS_UNUSABLE,
    NO_KEY,
    RETRY_KEYS_S,
    TIMED_OUT,
    TOO_LARGE,
    TOO_MANY,
    TOO_SLOW,
    ProblemError,
    problem_response,
)
from reir_serving.middleware.access import FULL_ACCESS, NO_ACCESS, Caller, is_loopback
from reir_serving.middleware.keys import KeyRing, KeysUnusable
from reir_serving.middleware.rate_limits import RateLimit
from reir_serving.middleware.request_state import RequestState, request_state

PREFIX = "/v1/"
"""Start of the paths of the API; all other paths (page, health, metrics) need no key."""

OPEN_PATHS = frozenset({"/v1/about"})
"""Paths of the API that need no key. From `/v1/about`, the page learns whether it has to ask the
user for a key."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class AuthMiddleware:
    """Rejects requests to the API without a valid key, and applies limits to all requests."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Check keys with `keys`; without keys, every request from this machine is allowed."""
        self._app, self._keys, self._limits, self._clock = app, keys, limits, clock
        self._rate = RateLimit(limits.rate_per_s, limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or answer it with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Created before the limit is known, because `_timeout` below needs it in any case.
        headers = Headers(scope=scope)
        body = _BodyLimit(receive, 0, is_complete=not _has_body(headers))
        try:
            if scope["path"].startswith(PREFIX):
                self._authenticate(scope, headers, request_state(scope))
            body.limit_bytes = self._body_limit(headers)
            async with asyncio.timeout(self._limits.request_timeout_s):
                await self._app(scope, body.receive, send)
        except ProblemError as error:
            await problem_response(error, Request(scope))(scope, receive, send)
        except TimeoutError:
            if request_state(scope).status:
                raise  # the answer has begun, so the server can only cut the connection
            await problem_response(self._timeout(body), Request(scope))(scope, receive, send)

    def _authenticate(self, scope: Scope, headers: Headers, state: RequestState) -> None:
        """Find out who the caller is, and apply the rate limit.

        Raises:
            ProblemError: the key is missing or wrong, the request comes from a foreign web page, or
                the key has sent too many requests.
        """
        if self._keys is None:
            _check_origin(scope["method"], headers)
        is_open = scope["path"] in OPEN_PATHS
        # Stored before the rate is checked, so that the access log names the key of refusals, too.
        state.caller = caller = self._caller(headers, needs_key=not is_open)
        # Callers without a key have the same empty id, so they share one rate limit.
        wait_s = self._rate.take(caller.key_id, caller.rate_per_s, self._clock())
        if wait_s:
            detail = f"this key has reached its rate limit; try again in {wait_s:.1f} s"
            raise ProblemError(TOO_MANY, detail, retry_after_s=wait_s)

    def _caller(self, headers: Headers, needs_key: bool) -> Caller:
        if self._keys is None:
            return FULL_ACCESS
        try:
            caller = self._keys.caller(_token(headers))
        except KeysUnusable as error:  # the reason is in the server's log, not in the answer
            if not needs_key:
                return NO_ACCESS
            detail = (
                "this server cannot check API keys at the moment; "
                "try again later, or tell the server's operator"
            )
            raise ProblemError(KEYS_UNUSABLE, detail, retry_after_s=RETRY_KEYS_S) from error
        if caller is not None:
            return caller
        if not needs_key:
            return NO_ACCESS
        raise ProblemError(
            NO_KEY,
            "send a key of this server as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _body_limit(self, headers: Headers) -> int:
        """Return the maximum number of bytes of a request's body.

        Raises:
            ProblemError: the request states a larger size.
        """
        limit = self._limits.upload_bytes if is_form(headers) else self._limits.body_bytes
        # Python refuses to convert texts of thousands of digits, and 20 exceed every limit.
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise _too_large(limit)
        return limit

    def _timeout(self, body: _BodyLimit) -> ProblemError:
        limit_s = self._limits.request_timeout_s
        if not body.is_complete:
            return ProblemError(TOO_SLOW, f"the body did not arrive within {limit_s:g} s")
        detail = f"there was no answer within {limit_s:g} s; request fewer hits, or try again"
        return ProblemError(TIMED_OUT, detail, retry_after_s=1.0)


class _BodyLimit:
    """Counts the bytes of a body as they arrive, because a request may not state its size."""

    def __init__(self, receive: Receive, limit_bytes: int, *, is_complete: bool) -> None:
        self.limit_bytes, self.is_complete = limit_bytes, is_complete
        self._receive, self._num_bytes = receive, 0

    async def receive(self) -> Message:
        """Return the next part of the body.

        Raises:
            ProblemError: the body exceeds the limit.
        """
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self.limit_bytes:
                raise _too_large(self.limit_bytes)
            self.is_complete = not message.get("more_body", False)
        return message


def _too_large(limit_bytes: int) -> ProblemError:
    # The connection is closed, because the server would mistake the rest of the body, which nobody
    # has read, for the next request.
    detail = f"the body exceeds this server's limit of {limit_bytes} bytes; send a smaller one"
    return ProblemError(TOO_LARGE, detail, headers={"Connection": "close"})


def _has_body(headers: Headers) -> bool:
    """Return whether the headers of a request announce a body, which the server then waits for."""
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""


def is_form(headers: Headers) -> bool:
    """Return whether a request is a multipart form, in which clients upload photos."""
    return headers.get("content-type", "").lower().startswith(FORM)


def _token(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _check_origin(method: str, headers: Headers) -> None:
    """Reject requests that a foreign web page sends through a browser on this machine.

    A server without keys is protected only by its loopback address, but a web page can reach that
    address through the user's browser. Two checks prevent it. The host must be a loopback name,
    because a page can make its own name resolve to this machine (DNS rebinding). The origin of a
    request that writes must be this server.

    Raises:
        ProblemError: the request may come from a foreign page.
    """
    host = headers.get("host", "")
    if not is_loopback(_host_name(host)):
        raise ProblemError(
            FORBIDDEN,
            f"a server without API keys answers only under a loopback name such as localhost, not "
            f"{host[:200]!a}",
        )
    origin = headers.get("origin")
    # With the port, because a page of another server on this machine is foreign, too.
    if origin is not None and method not in SAFE_METHODS and origin.partition("://")[2] != host:
        raise ProblemError(
            FORBIDDEN, f"requests from web pages of {origin[:200]!a} are not accepted"
        )


def _host_name(host: str) -> str:
    """Return the value of a `Host` header without the port; empty if it is not valid."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
