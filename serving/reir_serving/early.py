"""Refuses requests over the limit before Ray Serve and uvicorn spend any work on them.

What Ray does for a request (its metadata, metrics, a task that watches for the client to
disconnect) costs far more than a refusal, and so does uvicorn's call of the application. Ray Serve
loads this module because `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it. Serve's own proxies
load it too; they hold no application and let every request pass.

It also checks that requests come from the proxy of the same server (`environment.MARK`): the proxy
of another server on this machine may still send requests to a port that its own replica once used.
"""

from __future__ import annotations

import os
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from reir_serving.door import Door, bad_request
from reir_serving.environment import MARK
from reir_serving.haproxy_settings import MARK_HEADER

MISDIRECTED = b"HTTP/1.1 421 Misdirected Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
"""The answer to requests that do not come from this server's proxy."""

_of_this_process: list[Door] = []


def stand_at(door: Door) -> None:
    """Refuse from now on what finds no room behind this door; a process has one."""
    _of_this_process[:] = [door]


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for when it starts to listen, by uvicorn's own choice of a protocol."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{RefusingProtocol.__name__}"
    return [Middleware(RefuseEarly)]


class RefuseEarly:
    """Sends requests away that find no room; all others, and what is no request, go to Ray."""

    def __init__(self, app: ASGIApp) -> None:
        """Pass on to `app`, which is Ray's; it calls ours in turn, which counts who is inside."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        for door in _of_this_process:
            if scope["type"] == "http" and door.is_full(scope):
                await door.refuse(scope, send)
                return
        await self._app(scope, receive, send)


class RefusingProtocol(HttpToolsProtocol):
    """Sends requests away that find no room before uvicorn starts a task for them.

    Should uvicorn start its tasks in another way some day, `RefuseEarly` is there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mark = os.environ.get(MARK, "").encode()
        self._marks = [(MARK_HEADER.encode(), mark)] if mark else []
        # uvicorn adds `default_headers` to every answer, and rebuilds that list every second from
        # `encoded_headers`, so the secret has to be in both.
        for each in self._marks:
            if each not in self.config.encoded_headers:
                self.config.encoded_headers.append(each)
                self.server_state.default_headers.append(each)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed with problem details, as for all errors."""
        self.transport.write(bad_request(msg, self._marks))
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        scope: Any = cycle.scope  # uvicorn has types of its own for what ASGI calls by these names
        if not all(each in scope["headers"] for each in self._marks):
            cycle.keep_alive = False
            self._refuse(cycle, MISDIRECTED)
            return
        for door in _of_this_process:
            if door.is_full(scope):
                refusal = door.refusal(scope, self._marks, keep_alive=cycle.keep_alive)
                self._refuse(cycle, refusal)
                return
        super()._start_asgi_task(cycle, app)

    def _refuse(self, cycle: RequestResponseCycle, answer: bytes) -> None:
        self.transport.write(answer)
        cycle.response_started = cycle.response_complete = True  # the body is read and forgotten
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
