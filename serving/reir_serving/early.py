"""What Ray Serve puts before each replica: a request that finds no room is refused at once.

Ray's own part of a request (its metadata, metrics, a task that watches for the client to leave)
costs ten times what our refusal does, and under overload most requests are refused. Named by
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`; Serve's proxies load it too, and pass everything on.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

_of_this_process: list[Starlette] = []


def stand_before(app: Starlette) -> None:
    """Refuse from now on what this application has no room for; a process holds one."""
    _of_this_process[:] = [app]


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for when it starts to listen."""
    return [Middleware(RefuseEarly)]


class RefuseEarly:
    """Gives requests without a place to our application, past Ray; it refuses them."""

    def __init__(self, app: ASGIApp) -> None:
        """Pass all others on to `app`, which is Ray's."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        app: ASGIApp = self._app
        for own in _of_this_process:
            if scope["type"] == "http" and own.state.places.is_full(scope, Headers(scope=scope)):
                app = own
        await app(scope, receive, send)
