"""Errors as problem details (RFC 9457): which error becomes which answer, and what the answer says.

An answer tells the caller what to change. Details that only the operator may know, such as the
address of the store, names of other galleries, or a traceback, go to the log.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.params import Form
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from reir.errors import (
    CheckpointError,
    ConfigError,
    GalleryNotFound,
    ImageError,
    ImageFailure,
    Overloaded,
    PhotoErased,
    QueryError,
    ReirError,
    SchemaMismatch,
    StoreError,
    StoreFull,
)
from reir_serving.middleware.request_state import request_state

MEDIA_TYPE = "application/problem+json"
JSON, FORM = "application/json", "multipart/form-data"
RETRY_STORE_S = 2.0
RETRY_KEYS_S = 10.0
MAX_ERRORS = 20

_MAX_TEXT_CHARS, _MAX_VALUE_CHARS = 200, 80

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProblemKind:
    """A kind of problem.

    Attributes:
        name: name of the kind, and the last part of `type` in the problem details.
        status: HTTP status.
        title: a summary that is the same for all problems of this kind.
    """

    name: str
    status: int
    title: str


BAD_REQUEST = ProblemKind("bad-request", 400, "The request cannot be read")
NO_KEY = ProblemKind("no-key", 401, "An API key is required")
FORBIDDEN = ProblemKind("forbidden", 403, "Not allowed")
NOT_FOUND = ProblemKind("not-found", 404, "Not found")
GALLERY_NOT_FOUND = ProblemKind("gallery-not-found", 404, "No such gallery")
IMAGE_NOT_FOUND = ProblemKind("image-not-found", 404, "No such image")
WRONG_METHOD = ProblemKind("method-not-allowed", 405, "Method not allowed")
TOO_SLOW = ProblemKind("request-timeout", 408, "The request arrived too slowly")
ERASED = ProblemKind("erased", 409, "The photo was erased")
MISMATCH = ProblemKind("schema-mismatch", 409, "The gallery and the checkpoint do not match")
TOO_LARGE = ProblemKind("too-large", 413, "Too large")
WRONG_TYPE = ProblemKind("unsupported-media-type", 415, "Unsupported media type")
INVALID = ProblemKind("invalid-request", 422, "A value is invalid")
KEY_REUSED = ProblemKind(
    "idempotency-key-reused", 422, "The idempotency key belongs to another request"
)
BAD_IMAGE = ProblemKind("bad-image", 422, "The image cannot be decoded")
TOO_MANY = ProblemKind("rate-limited", 429, "Too many requests")
INTERNAL = ProblemKind("internal", 500, "Internal error")
FEEDBACK_DISABLED = ProblemKind("feedback-disabled", 501, "This server records no feedback")
OVERLOADED = ProblemKind("overloaded", 503, "Too many requests are waiting")
STORE_UNAVAILABLE = ProblemKind("store-unavailable", 503, "The store cannot be reached")
UNREACHABLE = ProblemKind("image-unreachable", 503, "The photo cannot be read at the moment")
KEYS_UNUSABLE = ProblemKind("keys-unusable", 503, "API keys cannot be checked")
NOT_READY = ProblemKind("not-ready", 503, "Not ready")
FULL = ProblemKind("storage-full", 507, "The disk is full")
TIMED_OUT = ProblemKind("timed-out", 503, "The answer took too long")

PROBLEM_KINDS = tuple(each for each in [*globals().values()] if isinstance(each, ProblemKind))

_KIND_OF_STATUS = {
    kind.status: kind
    for kind in (BAD_REQUEST, NO_KEY, FORBIDDEN, NOT_FOUND, WRONG_METHOD, TOO_LARGE, WRONG_TYPE)
}
_KIND_OF_IMAGE_FAILURE = {
    ImageFailure.NOT_AN_IMAGE: WRONG_TYPE,
    ImageFailure.UNSUPPORTED: WRONG_TYPE,
    ImageFailure.TOO_LARGE: TOO_LARGE,
    ImageFailure.UNREACHABLE: UNREACHABLE,
    ImageFailure.MISSING: IMAGE_NOT_FOUND,
}


class ProblemError(HTTPException):
    """Raised wherever a request is to be answered with a problem.

    It is an `HTTPException`, because FastAPI turns any other error that occurs while it reads a
    body into a 400 of its own.
    """

    def __init__(
        self,
        kind: ProblemKind,
        detail: str,
        *,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        **more: object,
    ) -> None:
        super().__init__(kind.status, detail, headers=dict(headers or {}))
        self.kind, self.errors, self.more = kind, list(errors), more
        self.retry_after_s = retry_after_s


def problem_response(problem: ProblemError, request: Request) -> Response:
    """Return the response to a request that ends with a problem."""
    kind, state = problem.kind, request_state(request.scope)
    state.problem = kind.name
    headers = {"Cache-Control": "no-store", **(problem.headers or {})}
    if problem.retry_after_s is not None:
        # The header counts whole seconds; with 0, clients would try again at once.
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after_s)))
    body = problem_body(problem, state.request_id, state.trace_id)
    return Response(body, kind.status, headers, MEDIA_TYPE)


def problem_body(problem: ProblemError, request_id: str, trace_id: str = "") -> bytes:
    """Return the problem details as JSON."""
    kind = problem.kind
    details: dict[str, Any] = {
        "type": f"/problems/{kind.name}",
        "title": kind.title,
        "status": kind.status,
        "detail": problem.detail,
        "instance": f"/requests/{request_id}",
        "request_id": request_id,
        **({"trace_id": trace_id} if trace_id else {}),
        "errors": problem.errors,
        **problem.more,
    }
    return to_json(details)


def problem_of_http_exception(error: HTTPException, request: Request) -> ProblemError:
    """Return the problem for an error of the framework, such as 404, 405 or an invalid body."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error.__cause__, OSError) and is_disk_full(error.__cause__):
        return storage_full()  # the framework could not write the request body to disk
    status = HTTPStatus(error.status_code)
    kind = _KIND_OF_STATUS.get(status) or ProblemKind("http-error", status.value, status.phrase)
    detail = str(error.detail)
    if kind in (NOT_FOUND, WRONG_METHOD):
        path = _shorten(request.url.path)
        detail = f"this server has no {request.method} {path!a}; /openapi.json lists all operations"
    return ProblemError(kind, detail, headers=error.headers)


def problem_of_validation_error(error: RequestValidationError, request: Request) -> ProblemError:
    """Return the problem for a request with invalid fields or of an unsupported media type."""
    if request.method == "POST":
        # A body of another media type is not parsed, so all of its fields seem to be missing.
        sent, expected = media_type(request), _expected_media_type(request)
        if sent != expected:
            return unsupported_media_type(sent, expected)
    found = error.errors()
    errors = [
        {
            "field": _field(each["loc"]),
            "detail": each["msg"].removeprefix("Value error, "),  # pydantic's, for a ValueError
            "value": repr(each.get("input"))[:_MAX_VALUE_CHARS],
            "kind": each["type"],
        }
        for each in found[:MAX_ERRORS]
    ]
    detail = "; ".join(f"{each['field']}: {each['detail']}" for each in errors[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ProblemError(INVALID, _shorten(detail) + more, errors=errors)


def _expected_media_type(request: Request) -> str:
    """Return the media type that the route of a request declares by its parameters."""
    body = getattr(request.scope["route"], "body_field", None)
    if body is None:
        return media_type(request)  # the route parses its body itself, and checks this first
    return FORM if isinstance(body.field_info, Form) else JSON


def media_type(request: Request) -> str:
    """Return the media type of a request's body, as the request states it."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported_media_type(sent: str, expected: str) -> ProblemError:
    """Return the problem for a body of another media type than the expected one."""
    return ProblemError(
        WRONG_TYPE, f"content type {_shorten(sent)!a} is not supported here; send {expected}"
    )


def problem_of_reir_error(error: ReirError) -> ProblemError:
    """Return the problem for an error of the platform; details for the operator are only logged."""
    match error:
        case QueryError():
            wrong = {"field": error.field, "detail": error.detail, "kind": type(error).__name__}
            return ProblemError(INVALID, str(error), errors=[wrong])
        case ImageError():
            kind = _KIND_OF_IMAGE_FAILURE.get(error.reason, BAD_IMAGE)
            retry_s = RETRY_STORE_S if kind is UNREACHABLE else None
            # The text of other kinds may contain the path of a stored photo.
            detail = _shorten(str(error)) if kind.status in (413, 415, 422) else kind.title
            return ProblemError(kind, detail, retry_after_s=retry_s, reason=error.reason.value)
        case PhotoErased():
            return ProblemError(ERASED, str(error))
        case Overloaded():
            return ProblemError(OVERLOADED, str(error), retry_after_s=error.retry_after_s)
        # This and the next two are kinds of `StoreError`, so they come before the test for that.
        case GalleryNotFound():  # its text may name galleries that the key must not know
            return gallery_not_found("")
        case SchemaMismatch():
            return ProblemError(MISMATCH, str(error))
        case StoreFull():
            logger.error("%s", error)
            return storage_full()
    logger.error("%s: %s", type(error).__name__, error)
    if isinstance(error, StoreError):
        detail = "the store cannot be reached at the moment; try again later"
        return ProblemError(STORE_UNAVAILABLE, detail, retry_after_s=RETRY_STORE_S)
    if isinstance(error, CheckpointError | ConfigError):
        detail = "the checkpoint of this gallery cannot be loaded; tell the server's operator"
        return ProblemError(NOT_READY, detail, retry_after_s=60.0)
    return ProblemError(INTERNAL, f"the server's log explains this error as {type(error).__name__}")


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means that the disk is full or the disk quota is exceeded."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def storage_full() -> ProblemError:
    """Return the problem for a photo for which there is no disk space."""
    detail = "a disk of this server is full, so nothing was stored; tell the server's operator"
    return ProblemError(FULL, detail)


def gallery_not_found(name: str) -> ProblemError:
    """Return the problem for a gallery that does not exist, or that the key may not see."""
    shown = f" {_shorten(name)!a}" if name else ""
    return ProblemError(
        GALLERY_NOT_FOUND,
        f"there is no gallery{shown} that this key can use; GET /v1/galleries lists the galleries",
    )


def image_not_found(gallery: str, image_id: str) -> ProblemError:
    """Return the problem for an image that a gallery does not have."""
    return ProblemError(
        IMAGE_NOT_FOUND,
        f"gallery {gallery!a} has no image {_shorten(image_id)!a}; the hits of a search contain "
        f"image ids",
    )


def instance_not_found(image_id: str, instance_id: str) -> ProblemError:
    """Return the problem for an instance that an image does not have."""
    return ProblemError(
        IMAGE_NOT_FOUND,
        f"image {image_id} has no instance {instance_id[:100]!a}; "
        f"GET /v1/galleries/GALLERY/images/{image_id} lists its instances",
    )


def _field(location: Sequence[int | str]) -> str:
    """Return the name of a field as the client knows it, without the part of the request."""
    has_part = len(location) > 1 and location[0] in ("body", "query", "path", "header")
    name = ".".join(map(str, location[1:] if has_part else location))
    # The name comes from the client and may hold lone surrogates, which UTF-8 cannot encode.
    return _shorten(name.encode("utf-8", "backslashreplace").decode())


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_CHARS else text[:_MAX_TEXT_CHARS] + "..."
