"""For those who run the server, and the page: health, readiness, metrics, what it is."""

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
from reir_serving.answers import json_answer
from reir_serving.context import Asked
from reir_serving.problems import NOT_READY, RETRY_STORE_S, Refused

router = APIRouter(tags=["operation"])
logger = logging.getLogger(__name__)

OK = "ok"
PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}


@router.get("/healthz")
async def healthz() -> Response:
    """Report that the process is running, without checking anything else."""
    return json_answer({"status": "ok"})


@router.get("/readyz")
async def readyz(asked: Asked) -> Response:
    """Report readiness: the store, the models, that they match, and the API keys."""
    found, keys = await asked.backend.readiness(), asked.site.keys
    own = {} if keys is None else {"keys": keys.problem() or OK}
    checks = _told({**found.checks, **own}, to_everyone=keys is not None)
    if not found.ready or (keys is not None and keys.is_expired):
        logger.warning("not ready: %s", {**found.checks, **own})
        wrong = ", ".join(name for name, said in checks.items() if said != OK) or "starting"
        raise Refused(NOT_READY, f"not ready: {wrong}", retry_after_s=RETRY_STORE_S, checks=checks)
    return json_answer({"status": "ready", "checks": checks})


def _told(checks: Mapping[str, str], *, to_everyone: bool) -> dict[str, str]:
    """Return what may be told of checks: where keys are asked for, no name and no address."""
    if not to_everyone:
        return dict(checks)
    kinds = {name: name.partition(" ")[0] for name in checks}
    failing = {kinds[name] for name, said in checks.items() if said != OK}
    return {kind: "failing" if kind in failing else OK for kind in kinds.values()}


@router.get("/metrics", response_class=Response)
async def metrics(asked: Asked) -> Response:
    """Give the metrics of this replica in Prometheus's text format."""
    return Response(asked.site.metrics.text(), media_type=asked.site.metrics.media_type)


@router.get("/v1/about")
async def about(asked: Asked) -> Response:
    """Say what this server is, and whether who asks may change galleries; needs no key."""
    config = asked.site.config
    own: dict[str, Any] = {
        "release": reir.__version__,
        "keys_required": config.keys_file is not None,
        "examples": config.examples,
        "writes": bool(asked.caller.write),
        "limits": {
            "body_bytes": config.limits.body_bytes,
            "upload_bytes": config.limits.upload_bytes,
            "pixels": config.limits.pixels,
        },
    }
    return json_answer({**await asked.backend.about(), **own})


def page_router() -> APIRouter:
    """Return the routes of the page: one a file, so that no name can lead anywhere else."""
    page = APIRouter(include_in_schema=False)
    folder = files("reir_serving") / "page"
    if not folder.is_dir():
        return page
    for file in folder.iterdir():
        kind = PAGE_TYPES.get(file.name[file.name.rfind(".") :])
        if kind is not None:
            place = "/" if file.name == "index.html" else f"/page/{file.name}"
            page.add_api_route(place, _sender(file, kind), response_class=Response)
    return page


def _sender(file: Traversable, kind: str) -> Any:
    data = file.read_bytes()
    headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()[:24]}"',
        "Cache-Control": "no-cache",
    }

    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, 200, headers, kind)

    return send
