"""Routes for operators (health, readiness, metrics), for the page, and the page itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

import reir
from reir_serving.http.endpoint_context import Context
from reir_serving.http.problems import NOT_READY, RETRY_STORE_S, ProblemError
from reir_serving.http.schemas import json_response

router = APIRouter(tags=["operation"])
logger = logging.getLogger(__name__)

OK = "ok"
PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@router.get("/healthz")
async def healthz() -> Response:
    """Report that the process is running, without checking anything else."""
    return json_response({"status": "ok"})


@router.get("/readyz")
async def readyz(context: Context) -> Response:
    """Report readiness: the store, the models, that they match, and the API keys."""
    readiness, keys = await context.backend.readiness(), context.keys
    checks = dict(readiness.checks) | ({} if keys is None else {"keys": keys.problem() or OK})
    # /readyz needs no key, so on a server with keys it must not name galleries or stores.
    public = checks if keys is None else _without_names(checks)
    # While the keys file cannot be used, the keys that were loaded last stay valid for a minute.
    # Only then is the server not ready; until then, the problem is merely reported.
    if not readiness.ready or (keys is not None and keys.is_expired):
        logger.warning("not ready: %s", checks)
        failing = ", ".join(name for name, result in public.items() if result != OK) or "starting"
        raise ProblemError(
            NOT_READY, f"not ready: {failing}", retry_after_s=RETRY_STORE_S, checks=public
        )
    return json_response({"status": "ready", "checks": public})


def _without_names(checks: Mapping[str, str]) -> dict[str, str]:
    """Return checks by their kind, without names of galleries and addresses of stores."""
    kinds = {name: name.partition(" ")[0] for name in checks}
    failing = {kinds[name] for name, result in checks.items() if result != OK}
    return {kind: "failing" if kind in failing else OK for kind in kinds.values()}


@router.get("/metrics", response_class=Response)
async def metrics(context: Context) -> Response:
    """Return the metrics of this server in Prometheus's text format."""
    return Response(context.metrics.text(), media_type=context.metrics.media_type)


@router.get("/v1/about")
async def about(context: Context) -> Response:
    """Return release, limits and models of the server, and whether the caller may change galleries.

    Needs no key.
    """
    config = context.config
    own: dict[str, Any] = {
        "release": reir.__version__,
        "keys_required": config.keys_file is not None,
        "examples": config.examples,
        "writes": bool(context.caller.write),
        "feedback": context.search_log is not None,
        "limits": {
            "body_bytes": config.limits.body_bytes,
            "upload_bytes": config.limits.upload_bytes,
            "pixels": config.limits.pixels,
        },
    }
    return json_response({**await context.backend.about(), **own})


def page_router() -> APIRouter:
    """Return the routes of the search page."""
    return static_router(files("reir_serving") / "page", "/", "/page/")


def static_router(folder: Traversable, index: str, others: str) -> APIRouter:
    """Return a route for each file of a page, so that no URL can reach another file.

    Args:
        folder: folder of the files.
        index: path of `index.html`.
        others: start of the paths of the other files, with a slash at the end.
    """
    page = APIRouter(include_in_schema=False)
    if not folder.is_dir():
        return page
    for file in folder.iterdir():
        # By hand, because a `Traversable` has no `suffix`.
        kind = PAGE_TYPES.get(file.name[file.name.rfind(".") :])
        if kind is not None:
            path = index if file.name == "index.html" else others + file.name
            page.add_api_route(path, _file_endpoint(file, kind), response_class=Response)
    return page


def _file_endpoint(file: Traversable, kind: str) -> Any:
    # Read once, when the application is created, so no request waits for the disk.
    data = file.read_bytes()
    headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()[:24]}"',
        # "no-cache" lets the browser keep the file, but makes it ask each time for a newer one.
        "Cache-Control": "no-cache",
    }

    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, 200, headers, kind)

    return send
