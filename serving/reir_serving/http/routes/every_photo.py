"""Search for every photo that has the described instance, as a stream of JSON lines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Any, Self

from fastapi import APIRouter
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import to_json
from starlette.responses import Response, StreamingResponse

from reir.errors import QueryError, ReirError
from reir.query.every_photo import (
    EveryPhotoQuery,
    FoundPhoto,
    PhotoScan,
    end_line,
    search_line,
)
from reir.query.photo_curve import DEFAULT_MIN_PRESENCE
from reir_serving.http.endpoint_context import Context, EndpointContext
from reir_serving.http.openapi import schema_ref
from reir_serving.http.problems import problem_body, problem_of_reir_error
from reir_serving.http.routes.search_schemas import Side, Where
from reir_serving.http.schemas import (
    ApiAnswer,
    ApiRequest,
    Box,
    Expression,
    GalleryName,
    JsonObject,
    Problem,
    Scalar,
    image_urls,
)

router = APIRouter(prefix="/v1/search", tags=["search"])

LINES = "application/x-ndjson"
"""Media type of an answer with one JSON value in each line."""

_THRESHOLDS = ("min_presence", "precision", "recall")
# At most one of them: what only a validator checks has to be added to the schema by hand.
_ONE_THRESHOLD: dict[str, Any] = {
    "anyOf": [
        {"properties": {name: {"type": "null"} for name in _THRESHOLDS if name != given}}
        for given in _THRESHOLDS
    ],
    "examples": [{"gallery": "photos", "expression": "a dog on a sofa", "recall": 0.9}],
}


class EveryPhotoRequest(ApiRequest):
    """`POST /v1/search/all`; at most one of `min_presence`, `precision` and `recall`."""

    model_config = ConfigDict(json_schema_extra=_ONE_THRESHOLD)

    gallery: GalleryName
    expression: Expression = Field(
        description="Description of one object.", examples=["a dog on a sofa"]
    )
    where: Where | None = Field(None, description="Filter that the object must pass.")
    min_presence: Side | None = Field(
        None,
        description="Threshold of the probability that the object is in a photo. "
        f"Default: {DEFAULT_MIN_PRESENCE}.",
    )
    precision: Side | None = Field(
        None,
        description="Set the threshold so that this share of the found photos should have the "
        "object, if one photo of the gallery has it. Not for a key with a tenant.",
    )
    recall: Side | None = Field(
        None,
        description="Set the threshold so that this share of the photos with the object should be "
        "found.",
    )

    verify: bool = Field(
        False,
        description="Compare the colors in the expression with the pixels of each found photo, and "
        "leave out a photo if its probability is then below the threshold.",
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if sum(getattr(self, name) is not None for name in _THRESHOLDS) > 1:
            raise ValueError("give at most one of min_presence, precision and recall")
        return self


class SearchBegun(ApiAnswer):
    """The search of an answer to `POST /v1/search/all`.

    Attributes:
        num_photos: number of photos in the gallery; null for a key with a tenant.
        min_presence: the threshold.
        recall, precision: what to expect of the threshold, if one photo of the gallery has the
            object; `precision` is null for a key with a tenant, too.
    """

    expression: str
    gallery: str
    version: str
    num_photos: int | None
    min_presence: float
    recall: float
    precision: float | None


class FoundPhotoOut(ApiAnswer):
    """A photo that has the object, with the instance that fits best."""

    image_id: str
    uri: str
    presence: float
    instance_id: str
    box: Box
    score: float
    attributes: dict[str, Scalar]
    image_url: str
    thumbnail_url: str


class SearchEnd(ApiAnswer):
    """The end of a complete answer.

    Attributes:
        found: number of photos.
        contradicted: number of photos that were left out, because their pixels contradict a color
            of the expression.
    """

    found: int
    contradicted: int


class EveryPhotoLine(ApiAnswer):
    """One line of an answer: the search first, then each photo, at last the end or an error."""

    search: SearchBegun | None = None
    photo: FoundPhotoOut | None = None
    end: SearchEnd | None = None
    error: Problem | None = None


EXTRA_MODELS = (EveryPhotoLine,)
"""Models that no signature names, so FastAPI does not put them into the OpenAPI document."""


@router.post(
    "/all",
    response_class=Response,
    responses={200: {"content": {LINES: {"schema": schema_ref(EveryPhotoLine)}}}},
)
async def search_all(body: EveryPhotoRequest, context: Context) -> Response:
    """Find every photo that has the object: one JSON value in each line, as they are found.

    The first line is the search, then follows a line for each photo, and the last line is the end
    or an error. An answer without such a last line is not complete.
    """
    gallery = context.readable(body.gallery)
    if context.caller.tenant and body.precision is not None:
        raise QueryError(
            "precision",
            "is not available to the key of a tenant, because the threshold would depend on how "
            "many photos all tenants have; use min_presence or recall instead",
        )
    query = EveryPhotoQuery(
        expression=body.expression,
        where=context.caller.restrict_filter(body.where),
        min_presence=body.min_presence,
        precision=body.precision,
        recall=body.recall,
        verify=body.verify,
    )
    # Errors up to here, such as a wrong filter, are answered with their status.
    scan = await context.backend.every_photo(gallery, query)
    return StreamingResponse(_lines(context, gallery, scan), media_type=LINES)


async def _lines(context: EndpointContext, gallery: str, scan: PhotoScan) -> AsyncIterator[bytes]:
    """Yield the lines of an answer, those of one part of the gallery at once."""
    first = scan.first
    # A tenant may not learn how many photos other tenants have, and the precision depends on it.
    tenant = context.caller.tenant
    num_photos = None if tenant else first.num_indexed
    decision = replace(scan.decision, precision=None) if tenant else scan.decision
    told = (scan.query.expression, gallery, first.version, num_photos, decision)
    yield _line(search_line(*told))
    num_found = num_contradicted = 0
    try:
        async for part in scan.parts():
            num_found += len(part.photos)
            num_contradicted += part.num_contradicted
            yield b"".join(_line({"photo": _photo(each, context, gallery)}) for each in part.photos)
    except ReirError as error:  # the status has been sent, so the last line says what happened
        problem = problem_of_reir_error(error)
        yield _line({"error": json.loads(problem_body(problem, context.request_id))})
        return
    yield _line(end_line(num_found, num_contradicted))


def _photo(photo: FoundPhoto, context: EndpointContext, gallery: str) -> JsonObject:
    visible = replace(photo, uri=context.caller.visible_uri(photo.uri))
    return {**asdict(visible), **image_urls(gallery, photo.image_id)}


def _line(value: JsonObject) -> bytes:
    return to_json(value) + b"\n"
