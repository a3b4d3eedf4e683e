"""`create_app`: the HTTP interface over a `Backend`.

A request passes `Entrance` (is there room?), `Envelope` (id, headers, log, metrics), `Gate` (key,
rate, size, time), then one of the routes; every error on its way becomes a problem.
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from reir.errors import ReirError
from reir_serving.backend import Backend
from reir_serving.config import ServeConfig
from reir_serving.context import Site
from reir_serving.door import Door, Entrance
from reir_serving.envelope import Envelope
from reir_serving.gate import Gate
from reir_serving.keys import KeyRing
from reir_serving.metrics import Metrics
from reir_serving.openapi import publish
from reir_serving.pictures import PictureCache
from reir_serving.problems import (
    WRONG_METHOD,
    full,
    is_full,
    of_http,
    of_platform,
    of_validation,
    problem,
)
from reir_serving.routes import galleries, images, operation, search

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
"""HTTP methods that a path may support."""


def create_app(backend: Backend, config: ServeConfig, metrics: Metrics | None = None) -> FastAPI:
    """Return the application; the caller serves it, with uvicorn or in Ray Serve.

    Args:
        backend: galleries and models.
        config: keys and limits; where to listen is the caller's business (`check_bind`).
        metrics: that others count into as well; None for new ones.

    Raises:
        ConfigError: the file of keys cannot be used.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    metrics = metrics or Metrics()
    keys = KeyRing(config.keys_file) if config.keys_file else None
    app.state.site = Site(backend, config, metrics, PictureCache(), keys)
    for part in (search, galleries, images, operation):
        app.include_router(part.router)
    app.include_router(operation.page_router())
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_validation)
    app.add_exception_handler(ReirError, _refuse_platform)
    app.add_exception_handler(OSError, _refuse_system)
    app.state.door = Door(config.limits, metrics)
    app.add_middleware(Gate, keys=keys, limits=config.limits)
    app.add_middleware(Envelope, metrics=metrics)
    app.add_middleware(Entrance, door=app.state.door)
    publish(app, search.BODIES, needs_key=keys is not None)
    return app


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = of_http(error, request)
    if refused.kind is WRONG_METHOD:
        refused.headers = {"Allow": ", ".join(_allowed(request))}
    return problem(refused, request)


def _allowed(request: Request) -> list[str]:
    """Return the HTTP methods that the path of a request supports, over all routes."""
    app: FastAPI = request.app
    asked = [{**request.scope, "method": method} for method in METHODS]
    return [
        scope["method"]
        for scope in asked
        if any(route.matches(scope)[0] is Match.FULL for route in app.routes)
    ]


async def _refuse_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem(of_validation(error, request), request)


async def _refuse_platform(request: Request, error: Exception) -> Response:
    assert isinstance(error, ReirError)
    return problem(of_platform(error), request)


async def _refuse_system(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if not is_full(error):
        raise error
    return problem(full(), request)
