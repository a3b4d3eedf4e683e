"""Errors as RFC 9457 problem details: which error becomes which answer, and what it may tell.

An error of the platform tells the caller what to change; what only the operator should know (an
address of the store, names of other galleries, a traceback) goes to the log.
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
    QueryError,
    ReirError,
    SchemaMismatch,
    StoreError,
    StoreFull,
)
from reir_serving.backend import Overloaded
from reir_serving.notes import notes_of

MEDIA_TYPE = "application/problem+json"
JSON, FORM = "application/json", "multipart/form-data"
RETRY_STORE_S = 2.0
RETRY_KEYS_S = 10.0
MAX_ERRORS = 20

_SHOWN_CHARS, _SHOWN_VALUE = 200, 80

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of problem: its name, which is also the end of its `type`, its status and title."""

    name: str
    status: int
    title: str


BAD_REQUEST = Kind("bad-request", 400, "The request cannot be read")
NO_KEY = Kind("no-key", 401, "An API key is needed")
FORBIDDEN = Kind("forbidden", 403, "Not allowed")
NOT_FOUND = Kind("not-found", 404, "Not found")
GALLERY_NOT_FOUND = Kind("gallery-not-found", 404, "No such gallery")
IMAGE_NOT_FOUND = Kind("image-not-found", 404, "No such image")
WRONG_METHOD = Kind("method-not-allowed", 405, "This method is not allowed here")
TOO_SLOW = Kind("request-timeout", 408, "The request came too slowly")
MISMATCH = Kind("schema-mismatch", 409, "Gallery and checkpoint do not fit")
TOO_LARGE = Kind("too-large", 413, "Too large")
WRONG_TYPE = Kind("unsupported-media-type", 415, "This kind of content is not taken")
INVALID = Kind("invalid-request", 422, "A value is wrong")
BAD_IMAGE = Kind("bad-image", 422, "The image cannot be decoded")
TOO_MANY = Kind("rate-limited", 429, "Too many requests")
INTERNAL = Kind("internal", 500, "Internal error")
OVERLOADED = Kind("overloaded", 503, "Too many requests wait")
STORE_UNAVAILABLE = Kind("store-unavailable", 503, "The store cannot be reached")
UNREACHABLE = Kind("image-unreachable", 503, "The photo cannot be read just now")
KEYS_UNUSABLE = Kind("keys-unusable", 503, "API keys cannot be checked")
NOT_READY = Kind("not-ready", 503, "Not ready")
FULL = Kind("storage-full", 507, "No space is left")
TIMED_OUT = Kind("timed-out", 503, "The answer took too long")

_OF_STATUS = {
    kind.status: kind
    for kind in (BAD_REQUEST, NO_KEY, FORBIDDEN, NOT_FOUND, WRONG_METHOD, TOO_LARGE, WRONG_TYPE)
}
_OF_IMAGE = {
    ImageFailure.NOT_AN_IMAGE: WRONG_TYPE,
    ImageFailure.UNSUPPORTED: WRONG_TYPE,
    ImageFailure.TOO_LARGE: TOO_LARGE,
    ImageFailure.UNREACHABLE: UNREACHABLE,
    ImageFailure.MISSING: IMAGE_NOT_FOUND,
}


class Refused(HTTPException):
    """A request that is answered with a problem.

    An `HTTPException`, so that it passes through FastAPI's reading of a body unharmed.
    """

    def __init__(
        self,
        kind: Kind,
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


def problem(refused: Refused, request: Request) -> Response:
    """Return the answer to a refused request."""
    kind, notes = refused.kind, notes_of(request.scope)
    notes.problem = kind.name
    headers = {"Cache-Control": "no-store", **(refused.headers or {})}
    if refused.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refused.retry_after_s)))
    return Response(problem_body(refused, notes.request_id), kind.status, headers, MEDIA_TYPE)


def problem_body(refused: Refused, request_id: str) -> bytes:
    """Return the problem details as JSON."""
    kind = refused.kind
    details: dict[str, Any] = {
        "type": f"/problems/{kind.name}",
        "title": kind.title,
        "status": kind.status,
        "detail": refused.detail,
        "instance": f"/requests/{request_id}",
        "request_id": request_id,
        "errors": refused.errors,
        **refused.more,
    }
    return to_json(details)


def of_http(error: HTTPException, request: Request) -> Refused:
    """Return what the framework refused (404, 405, a body that cannot be parsed) as ours."""
    if isinstance(error, Refused):
        return error
    if isinstance(error.__cause__, OSError) and is_full(error.__cause__):
        return full()  # the framework could not write the request body to disk
    status = HTTPStatus(error.status_code)
    kind = _OF_STATUS.get(status) or Kind("http-error", status.value, status.phrase)
    said = str(error.detail)
    if kind in (NOT_FOUND, WRONG_METHOD):
        said = f"{request.method} {_shown(request.url.path)!a} is not served; see /openapi.json"
    return Refused(kind, said, headers=error.headers)


def of_validation(error: RequestValidationError, request: Request) -> Refused:
    """Return the wrong fields of a request; of a body of another media type, that."""
    if request.method == "POST" and (sent := _not_taken(request)):
        return sent
    found = error.errors()
    errors = [
        {
            "field": _field(each["loc"]),
            "detail": each["msg"].removeprefix("Value error, "),
            "value": repr(each.get("input"))[:_SHOWN_VALUE],
            "kind": each["type"],
        }
        for each in found[:MAX_ERRORS]
    ]
    said = "; ".join(f"{each['field']}: {each['detail']}" for each in errors[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return Refused(INVALID, _shown(said) + more, errors=errors)


def _not_taken(request: Request) -> Refused | None:
    """The refusal of a body that is neither JSON nor a form, None where it is one of them."""
    sent = media_type(request)
    if sent in (JSON, FORM):
        return None
    return wrong_type(sent, f"{JSON}, or {FORM} with a photo")


def media_type(request: Request) -> str:
    """Return what a request says its body is."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def wrong_type(sent: str, taken: str) -> Refused:
    """Return the answer to a body of another media type than those that are taken."""
    return Refused(WRONG_TYPE, f"content type {_shown(sent)!a} is not taken here; send {taken}")


def of_platform(error: ReirError) -> Refused:
    """Return an error of the platform as a refusal; what is nobody's business is only logged."""
    match error:
        case QueryError():
            wrong = {"field": error.field, "detail": error.detail, "kind": type(error).__name__}
            return Refused(INVALID, str(error), errors=[wrong])
        case ImageError():
            kind = _OF_IMAGE.get(error.reason, BAD_IMAGE)
            later_s = RETRY_STORE_S if kind is UNREACHABLE else None
            said = _shown(str(error)) if kind.status in (413, 415, 422) else kind.title
            return Refused(kind, said, retry_after_s=later_s, reason=error.reason.value)
        case Overloaded():
            return Refused(OVERLOADED, str(error), retry_after_s=error.retry_after_s)
        case GalleryNotFound():
            return no_gallery("")
        case SchemaMismatch():
            return Refused(MISMATCH, str(error))
        case StoreFull():
            logger.error("%s", error)
            return full()
    logger.error("%s: %s", type(error).__name__, error)
    if isinstance(error, StoreError):
        said = "the store cannot be reached just now; try again later"
        return Refused(STORE_UNAVAILABLE, said, retry_after_s=RETRY_STORE_S)
    if isinstance(error, CheckpointError | ConfigError):
        said = "the checkpoint of this gallery cannot be loaded; its operator has to repair it"
        return Refused(NOT_READY, said, retry_after_s=60.0)
    return Refused(INTERNAL, f"it is logged under {error.__class__.__name__}")


def is_full(error: OSError) -> bool:
    """Return whether an error means that the disk is full or the disk quota is exceeded."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full() -> Refused:
    """Return the answer to a photo for which there is no disk space."""
    said = "a disk of this server is full, so nothing was stored; its operator has to free space"
    return Refused(FULL, said)


def no_gallery(name: str) -> Refused:
    """Return the answer for a gallery that is not there, or that the key may not see."""
    shown = f" {_shown(name)!a}" if name else ""
    return Refused(
        GALLERY_NOT_FOUND,
        f"there is no gallery{shown} that this key can use; GET /v1/galleries lists what there is",
    )


def no_image(gallery: str, image_id: str) -> Refused:
    """Return the answer for an image that a gallery does not have."""
    return Refused(
        IMAGE_NOT_FOUND, f"gallery {gallery!a} has no image {_shown(image_id)!a}; search gives ids"
    )


def _field(place: Sequence[int | str]) -> str:
    """Return the name of a field as the sender knows it; it may be any text that JSON can hold."""
    told = place[1:] if len(place) > 1 and place[0] in ("body", "query", "path") else place
    return _shown(".".join(map(str, told)).encode("utf-8", "backslashreplace").decode())


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
