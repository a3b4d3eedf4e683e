"""What the requests and answers of several routes have in common; version 1 of the API.

The page and `reir.Client` rely on these names. A model that only one subject needs is in the module
of its route, next to the function that fills it.

Boxes are xyxy in [0, 1] of the upright photo. Requests with unknown fields or values of the wrong
type are rejected: `0` is not a boolean. Fields have the same limits as in the library, imported
from it. A string with a grammar of its own has a `format` that names the grammar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import to_json
from starlette.responses import Response

from reir.images.mask_polygons import outlines
from reir.query.request import MAX_K
from reir.records import Box as Box
from reir.records import MaskRle
from reir.text import DEFAULT_MAX_CHARS as MAX_EXPRESSION
from reir_serving.http.problems import JSON

THUMBNAIL_PX = 400
"""Width of the thumbnails whose URLs the answers contain."""

JsonObject = dict[str, Any]


def _whole(value: object) -> object:
    """Return 5.0 as 5, because JSON does not distinguish integers from other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The limits come before the validator. In the other order, pydantic would write them as "ge" and
# "le" into the OpenAPI document, where clients look for "minimum" and "maximum".
Count = Annotated[int, Field(ge=1, le=MAX_K), BeforeValidator(_whole)]
GalleryName = Annotated[
    str, Field(min_length=1, max_length=255, json_schema_extra={"format": "gallery"})
]
Expression = Annotated[
    str, Field(max_length=MAX_EXPRESSION, json_schema_extra={"format": "expression"})
]
InstanceId = Annotated[str, Field(max_length=255, json_schema_extra={"format": "instance-id"})]
ImageId = Annotated[str, Field(max_length=128, json_schema_extra={"format": "image-id"})]
Scalar = str | int | float | bool | None


class ApiRequest(BaseModel):
    """Base class of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ApiAnswer(BaseModel):
    """Base class of all answers.

    The server never builds these models: it fills plain dictionaries, because validating an answer
    of a hundred hits and encoding it with FastAPI takes longer than the search. The models describe
    the answers in the OpenAPI document, and the tests check every answer against them.
    """

    model_config = ConfigDict(extra="forbid")


class MaskOut(ApiAnswer):
    """Pixels of an instance: COCO's compressed run lengths, and outlines to draw.

    Attributes:
        polygons: outlines, each a list of (x, y) in [0, 1].
    """

    size: tuple[int, int]
    counts: str
    polygons: list[list[tuple[float, float]]]


class Problem(BaseModel):
    """An error in the format of RFC 9457 (`application/problem+json`).

    Attributes:
        type: kind of error, as a URL relative to the server.
        detail: the rejected value, what is allowed, and what to do.
        errors: one entry for each wrong field of the request.
    """

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str = ""
    request_id: str = ""
    errors: list[dict[str, Any]] = Field(default_factory=list)


def json_response(value: JsonObject, status: int = 200) -> Response:
    """Return a response with plain values as JSON; a number that is not finite becomes null."""
    # An answer is for one key, so neither a proxy nor the browser may keep it.
    headers = {"Cache-Control": "no-store"}
    return Response(to_json(value, inf_nan_mode="null"), status, headers, JSON)


def mask_json(mask: MaskRle | None) -> JsonObject | None:
    """Return `MaskOut`."""
    if mask is None:
        return None
    return {"size": mask.size, "counts": mask.counts, "polygons": outlines(mask)}


def timings_json(timings_ms: Mapping[str, float]) -> dict[str, float]:
    """Return the duration of each stage, rounded to microseconds."""
    return {stage: round(ms, 3) for stage, ms in timings_ms.items()}


def image_urls(gallery: str, image_id: str) -> JsonObject:
    """Return the URLs of a photo and of its thumbnail, which differ only in the width."""
    url = f"/v1/images/{quote(image_id, safe='')}?gallery={quote(gallery, safe='')}"
    return {"image_url": url, "thumbnail_url": f"{url}&width={THUMBNAIL_PX}"}
