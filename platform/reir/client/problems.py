"""Turns the problems that a server reports (RFC 9457) into the errors of the library."""

from __future__ import annotations

import json

from reir.errors import (
    AccessDenied,
    GalleryNotFound,
    ImageError,
    ImageFailure,
    ImageNotFound,
    QueryError,
    ReirError,
    SchemaMismatch,
    ServerError,
    ServerUnavailable,
    StoreUnavailable,
)

BUSY = (429, 503)
"""Requests with these answers may succeed later: 429 is a rate limit, and 503 a server without
capacity, store or replicas."""


def error_of(url: str, status: int, data: bytes) -> ReirError:
    """Return the error of the library for a problem that the server reported."""
    try:
        told = json.loads(data)
        name, detail = str(told["type"]).rpartition("/")[2], str(told["detail"])
    except (ValueError, KeyError, TypeError):  # not from `reir serve`, but from a proxy before it
        return ServerError(f"server {url} answered {status}: {data[:200]!r}")
    # Before the names: a photo whose file is missing also has the name `image-not-found`, which
    # would say that the gallery does not have the photo.
    if told.get("reason") in set(ImageFailure):
        return ImageError(ImageFailure(told["reason"]), detail)
    match name:
        case "gallery-not-found":
            return GalleryNotFound(detail)
        case "image-not-found":
            return ImageNotFound(detail)
        case "schema-mismatch":
            return SchemaMismatch(detail)
        case "store-unavailable":
            return StoreUnavailable(f"{url} (server)", detail)
        case "invalid-request" | "idempotency-key-reused":
            first = (told.get("errors") or [{}])[0]
            return QueryError(str(first.get("field", "request")), str(first.get("detail", detail)))
    if status in (401, 403):
        return AccessDenied(f"{detail} (server {url}; pass key=... or set REIR_API_KEY)")
    kind = ServerUnavailable if status in BUSY else ServerError
    return kind(f"server {url} answered {status}: {detail}")
