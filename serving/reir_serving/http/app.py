"""`create_app`: the HTTP interface of a `Service`.

Before a request reaches a route, it passes `AdmissionMiddleware` (whether there is room for it),
`RequestContextMiddleware` (request id, security headers, log, metrics) and `AuthMiddleware` (key,
rate, size, time). Every error on the way becomes problem details (RFC 9457).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from reir.errors import ReirError
from reir.operations.search_log import SearchLog
from reir.tracing import stop_tracing, tracer_provider
from reir_serving.backend.service import Service
from reir_serving.config import ServeConfig
from reir_serving.http.endpoint_context import AppState
from reir_serving.http.openapi import PROBLEM_RESPONSES, set_openapi
from reir_serving.http.pictures import PictureCache
from reir_serving.http.problems import (
    WRONG_METHOD,
    is_disk_full,
    problem_of_http_exception,
    problem_of_reir_error,
    problem_of_validation_error,
    problem_response,
    storage_full,
)
from reir_serving.http.routes import every_photo, feedback, galleries, images, operation, search
from reir_serving.middleware.admission import AdmissionControl, AdmissionMiddleware
from reir_serving.middleware.auth import AuthMiddleware
from reir_serving.middleware.keys import KeyRing
from reir_serving.middleware.metrics import Metrics
from reir_serving.middleware.rate_limits import RateLimit
from reir_serving.middleware.request_context import RequestContextMiddleware

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
"""HTTP methods that a path may support."""


def create_app(backend: Service, config: ServeConfig, metrics: Metrics | None = None) -> FastAPI:
    """Return the application; the caller serves it, with uvicorn or in Ray Serve.

    Args:
        backend: galleries and models.
        config: keys and limits; the caller checks the address with `check_bind`.
        metrics: metrics that the backend counts into as well; None creates new ones.

    Raises:
        ConfigError: the keys file cannot be used.
    """
    metrics = metrics or Metrics()
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        lifespan=_closing(metrics),
        telemetry=_telemetry(),
    )
    keys = KeyRing(config.keys_file) if config.keys_file else None
    log = _search_log(config, metrics)
    limits = config.limits
    feedback_rate = RateLimit(limits.feedback_rate_per_s, limits.feedback_burst)
    app.state.app_state = AppState(
        backend, config, metrics, PictureCache(), feedback_rate, keys=keys, search_log=log
    )
    for module in (search, every_photo, feedback, galleries, images, operation):
        app.include_router(module.router, responses=PROBLEM_RESPONSES)
    app.include_router(operation.page_router())
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(ReirError, _answer_reir_error)
    app.add_exception_handler(OSError, _answer_os_error)
    app.state.admission = AdmissionControl(config.limits, metrics)
    # The middleware that is added last is the first to see a request.
    app.add_middleware(AuthMiddleware, keys=keys, limits=config.limits)
    app.add_middleware(RequestContextMiddleware, metrics=metrics)
    app.add_middleware(AdmissionMiddleware, admission=app.state.admission)
    set_openapi(app, (*search.EXTRA_MODELS, *every_photo.EXTRA_MODELS), needs_key=keys is not None)
    return app


def _closing(metrics: Metrics) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return a lifespan that closes metrics and traces when the application is stopped."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        metrics.close()
        stop_tracing()

    return lifespan


def _telemetry() -> TelemetryConfig:
    """Return what FastAPI traces: requests of the API, if `reir.tracing.start_tracing` has run."""
    provider = tracer_provider()
    return {
        "tracer_provider": provider,
        "tracing": provider is not None,
        "metrics": False,
        "logs": False,  # would contain the messages of errors, which may quote an expression
        "operation_spans": False,
        "auto_configure": False,
        # Machines request the health checks and the metrics every few seconds.
        "exclude": lambda scope: not scope["path"].startswith("/v1/"),
    }


def _search_log(config: ServeConfig, metrics: Metrics) -> SearchLog | None:
    if config.search_log is None:
        return None
    on_drop = metrics.note_dropped_event
    return SearchLog(config.search_log, config.search_log_days, on_drop=on_drop)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # Starlette's type for handlers is wider
    problem = problem_of_http_exception(error, request)
    if problem.kind is WRONG_METHOD:
        # The framework lists only the methods of the first route whose path matches.
        problem.headers = {"Allow": ", ".join(_allowed_methods(request))}
    return problem_response(problem, request)


def _allowed_methods(request: Request) -> list[str]:
    """Return the HTTP methods that the path of a request supports, over all routes."""
    app: FastAPI = request.app
    candidates = [{**request.scope, "method": method} for method in METHODS]
    return [
        scope["method"]
        for scope in candidates
        if any(route.matches(scope)[0] is Match.FULL for route in app.routes)
    ]


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(problem_of_validation_error(error, request), request)


async def _answer_reir_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ReirError)
    return problem_response(problem_of_reir_error(error), request)


async def _answer_os_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if not is_disk_full(error):
        raise error  # a bug: `RequestContextMiddleware` logs it and answers 500
    return problem_response(storage_full(), request)
