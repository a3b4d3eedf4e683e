"""The layer before the routes: who may ask, how often, how much and for how long.

What it refuses costs nothing: no body has been read and no route looked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reir_serving.access import EVERYBODY, NOBODY, Caller, is_loopback
from reir_serving.config import Limits
from reir_serving.keys import KeyRing, KeysUnusable
from reir_serving.limits import RateLimit
from reir_serving.notes import Notes, notes_of
from reir_serving.problems import (
    FORBIDDEN,
    FORM,
    KEYS_UNUSABLE,
    NO_KEY,
    RETRY_KEYS_S,
    TIMED_OUT,
    TOO_LARGE,
    TOO_MANY,
    TOO_SLOW,
    Refused,
    problem,
)

API = "/v1/"
OPEN = frozenset({"/v1/about"})
"""Paths of the API that need no key: the page asks there whether it needs one."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Gate:
    """Lets requests of the API through to the routes; all others pass with their limits."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Check keys with `keys`; None lets everyone in who is on this machine."""
        self._app, self._keys, self._limits, self._clock = app, keys, limits, clock
        self._rate = RateLimit(limits.rate_per_s, limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, headers = _Body(receive, 0), Headers(scope=scope)
        try:
            if scope["path"].startswith(API):
                self._admit(scope, headers, notes_of(scope))
            body.limit_bytes = self._body_limit(headers)
            async with asyncio.timeout(self._limits.request_s):
                await self._app(scope, body.receive, send)
        except Refused as refused:
            await problem(refused, Request(scope))(scope, receive, send)
        except TimeoutError:
            if notes_of(scope).status:
                raise
            await problem(self._too_long(body), Request(scope))(scope, receive, send)

    def _admit(self, scope: Scope, headers: Headers, notes: Notes) -> None:
        """Find out who asks.

        Raises:
            Refused: no key or a wrong one, a page of elsewhere, or too many requests.
        """
        if self._keys is None:
            _check_place(scope["method"], headers)
        notes.caller = caller = self._caller(headers, is_needed=scope["path"] not in OPEN)
        wait_s = self._rate.take(caller.key_id, caller.rate_per_s, self._clock())
        if wait_s:
            said = f"this key may send more in {wait_s:.1f} s"
            raise Refused(TOO_MANY, said, retry_after_s=wait_s)

    def _caller(self, headers: Headers, is_needed: bool) -> Caller:
        if self._keys is None:
            return EVERYBODY
        try:
            caller = self._keys.caller(_token(headers))
        except KeysUnusable as error:
            if not is_needed:
                return NOBODY
            said = (
                "this server cannot check API keys at the moment; "
                "try again later, or tell the server's operator"
            )
            raise Refused(KEYS_UNUSABLE, said, retry_after_s=RETRY_KEYS_S) from error
        if caller is None:
            if not is_needed:
                return NOBODY
            raise Refused(
                NO_KEY,
                "send a key of this server as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return caller

    def _body_limit(self, headers: Headers) -> int:
        """Return how many bytes a request may have.

        Raises:
            Refused: it says itself that it has more.
        """
        limit = self._limits.upload_bytes if is_form(headers) else self._limits.body_bytes
        sent = headers.get("content-length", "")
        if sent.isascii() and sent.isdigit() and int(sent[:20]) > limit:
            raise _too_large(limit)
        return limit

    def _too_long(self, body: _Body) -> Refused:
        limit_s = self._limits.request_s
        if not body.is_read:
            return Refused(TOO_SLOW, f"the body did not arrive within {limit_s:g} s")
        said = f"no answer after {limit_s:g} s; ask for less, or try again"
        return Refused(TIMED_OUT, said, retry_after_s=1.0)


class _Body:
    """Counts the bytes of a request as they come."""

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self.limit_bytes, self.is_read = limit_bytes, False
        self._receive, self._num_bytes = receive, 0

    async def receive(self) -> Message:
        """Return the next part.

        Raises:
            Refused: there are more bytes than allowed.
        """
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self.limit_bytes:
                raise _too_large(self.limit_bytes)
            self.is_read = not message.get("more_body", False)
        return message


def _too_large(limit_bytes: int) -> Refused:
    # what is not read would be taken for the next request of this connection
    said = f"the body has more than {limit_bytes} bytes, which is the limit of this server"
    return Refused(TOO_LARGE, said, headers={"Connection": "close"})


def is_form(headers: Headers) -> bool:
    """Whether a request comes with files, photos that is."""
    return headers.get("content-type", "").lower().startswith(FORM)


def _token(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")


def _check_place(method: str, headers: Headers) -> None:
    """Refuse what a web page of elsewhere sends through the browser of someone at this machine.

    Without keys the address is all that protects: so a name that is not this machine's (a page
    that has its name resolve to here) and a foreign origin of a request that writes are refused.
    """
    host = headers.get("host", "")
    if not is_loopback(_name_of(host)):
        raise Refused(FORBIDDEN, "without API keys this server answers to names of loopback only")
    origin = headers.get("origin")
    if origin is not None and method not in SAFE_METHODS and origin.partition("://")[2] != host:
        raise Refused(FORBIDDEN, f"requests from pages of {origin[:200]!a} are not taken")


def _name_of(host: str) -> str:
    """Return a `Host` without its port; empty where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
