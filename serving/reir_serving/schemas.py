"""Requests and answers of the HTTP interface, version 1: what the page and `reir.Client` rely on.

Boxes are xyxy in [0, 1] of the upright photo. Unknown fields in a request are rejected, and so are
values of the wrong type: `0` is not a boolean. Fields have the same limits as in the library,
imported from it. Strings with a grammar of their own have a `format` that names it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from reir.query import MAX_K, MAX_TERMS, MAX_WEIGHT
from reir.store.filters import MAX_LENGTH as MAX_FILTER
from reir.text import DEFAULT_MAX_CHARS as MAX_EXPRESSION

MAX_BATCH, MAX_CURSOR = 100, 2048
MAX_ALSO = MAX_TERMS - 1
"""Maximum number of terms in `also`, which come after the first term."""


def _whole(value: object) -> object:
    """Return 5.0 as 5, because JSON does not distinguish integers from other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Box = tuple[float, float, float, float]
Side = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[
    float,
    Field(
        ge=-MAX_WEIGHT,
        le=MAX_WEIGHT,
        allow_inf_nan=False,
        description="Must not be 0. A negative weight means 'not this'.",
        json_schema_extra={"anyOf": [{"exclusiveMinimum": 0}, {"exclusiveMaximum": 0}]},
    ),
]
Count = Annotated[int, Field(ge=1, le=MAX_K), BeforeValidator(_whole)]
GalleryName = Annotated[
    str, Field(min_length=1, max_length=255, json_schema_extra={"format": "gallery"})
]
Expression = Annotated[
    str, Field(max_length=MAX_EXPRESSION, json_schema_extra={"format": "expression"})
]
Where = Annotated[str, Field(max_length=MAX_FILTER, json_schema_extra={"format": "filter"})]
InstanceId = Annotated[str, Field(max_length=255, json_schema_extra={"format": "instance-id"})]
Scalar = str | int | float | bool | None

_EITHER_EXPRESSION_OR_INSTANCE: dict[str, Any] = {
    "oneOf": [
        {
            "properties": {one: {"type": "string"}, other: {"type": "null"}},
            "required": [one],
        }
        for one, other in (("expression", "instance_id"), ("instance_id", "expression"))
    ]
}
_NO_MORE_TERMS: dict[str, Any] = {"properties": {"also": {"maxItems": 0}}}
_NO_MIN_PRESENCE: dict[str, Any] = {"properties": {"min_presence": {"maximum": 0}}}


class Request(BaseModel):
    """Base class of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Answer(BaseModel):
    """Base class of all answers."""

    model_config = ConfigDict(extra="forbid")


class TermIn(Request):
    """One more part of a query: an expression or an instance of the gallery, with a weight.

    A negative weight says "not this".
    """

    model_config = ConfigDict(json_schema_extra=_EITHER_EXPRESSION_OR_INSTANCE)

    expression: Expression | None = None
    instance_id: InstanceId | None = None
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.expression is None) == (self.instance_id is None):
            raise ValueError("give either expression or instance_id")
        return self


class Options(Request):
    """Options of every kind of search."""

    k: Count = Field(
        10, description="Maximum number of hits. A server can be configured with another default."
    )
    per_image: Count = Field(1, description="Maximum number of hits from one photo.")
    where: Where | None = Field(
        None,
        description="Filter on fields of the instance and attributes of its photo.",
        examples=['area > 0.05 and cx < 0.5 and attr.camera == "X100"'],
    )
    group_by: Literal["image"] | None = Field(
        None, description="Also return the hits grouped by photo."
    )
    min_presence: Side = Field(
        0.0,
        description="Leave out hits whose presence is below this probability. "
        "Only for a query that is a single expression.",
    )
    rerank: bool = Field(
        False,
        description="Have the relation re-ranker order the best photos. "
        "A server can be configured to do this by default.",
    )
    localize: bool = Field(
        False, description="Refine the boxes of the first hits on the pixels of their photos."
    )
    explain: bool = Field(False, description="Return with each hit the evidence for its rank.")
    budget_ms: float | None = Field(
        None,
        gt=0,
        le=60_000,
        description="Time budget in milliseconds; stages that would exceed it are skipped.",
    )
    cursor: str = Field(
        "",
        max_length=MAX_CURSOR,
        description="Cursor from the answer with the previous page; empty for the first page.",
        json_schema_extra={"format": "cursor"},
    )


class SearchRequest(Options):
    """`POST /v1/search`."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_NO_MORE_TERMS, _NO_MIN_PRESENCE]})

    gallery: GalleryName
    expression: Expression = Field(
        description="Description of one object.", examples=["the red mug left of the laptop"]
    )
    also: list[TermIn] = Field(default_factory=list, max_length=MAX_ALSO)


class BatchRequest(Options):
    """`POST /v1/search/batch`: returns one answer for each expression, in the same order."""

    gallery: GalleryName
    expressions: list[Expression] = Field(min_length=1, max_length=MAX_BATCH)
    cursor: str = Field(
        "",
        max_length=MAX_CURSOR,
        description="Must be empty: a cursor belongs to a single expression.",
        json_schema_extra={"maxLength": 0},
    )


class SimilarRequest(Options):
    """`POST /v1/search/similar`: finds instances similar to an instance of the gallery.

    The same endpoint also accepts a photo, as a multipart form: the part `image` is the photo, and
    the part `request` is this object as JSON (without `instance_id`, optionally with `box`).
    """

    gallery: GalleryName
    instance_id: InstanceId | None = None
    box: tuple[Side, Side, Side, Side] | None = None
    expression: Expression | None = None
    also: list[TermIn] = Field(
        default_factory=list,
        max_length=MAX_ALSO,
        description=f"More terms; at most {MAX_ALSO - 1} if `expression` is given.",
    )
    min_presence: Side = Field(
        0.0,
        description="Must be 0: presence is only known for a query that is a single expression.",
        json_schema_extra={"maximum": 0},
    )


class MaskOut(Answer):
    """Pixels of an instance: COCO's compressed runs, and outlines to draw.

    Attributes:
        polygons: outlines, each a list of (x, y) in [0, 1].
    """

    size: tuple[int, int]
    counts: str
    polygons: list[list[tuple[float, float]]]


class NeighbourOut(Answer):
    """Another instance of the photo that the re-ranker looked at."""

    instance_id: str
    box: Box
    weight: float


class EvidenceOut(Answer):
    """Why a hit stands where it stands."""

    dual_score: float
    rerank_score: float | None
    margin: float | None
    neighbours: list[NeighbourOut]
    version: str
    checkpoint: str


class HitOut(Answer):
    """One instance that was found.

    Attributes:
        uri: URI of the photo; here and in all other answers, a tenant's key gets the file name
            only.
    """

    instance_id: str
    image_id: str
    uri: str
    box: Box
    score: float
    presence: float | None
    objectness: float
    area: float
    attributes: dict[str, Scalar]
    mask: MaskOut | None = None
    image_url: str
    thumbnail_url: str
    evidence: EvidenceOut | None = None


class ImageHits(Answer):
    """The hits of one photo."""

    image_id: str
    uri: str
    score: float
    presence: float | None
    hits: list[HitOut]


class SearchAnswer(Answer):
    """Hits, best first.

    Attributes:
        english: False if the expression does not seem to be English, the only language that the
            models know.
        found: False if `presence` is below the checkpoint's threshold, so the object is probably
            not in the gallery.
        equally_good: number of first hits that are equally good.
        degraded: stages that were skipped.
        cursor: cursor of the next page; empty on the last page.
    """

    gallery: str
    version: str
    checkpoint: str
    expression: str
    english: bool
    hits: list[HitOut]
    images: list[ImageHits] | None = None
    presence: float | None
    found: bool
    equally_good: int
    timings_ms: dict[str, float]
    degraded: list[str]
    cursor: str
    request_id: str


class BatchAnswer(Answer):
    """One answer for each expression."""

    answers: list[SearchAnswer]


class LocatedOut(Answer):
    """One box that answers the expression."""

    box: Box
    score: float
    presence: float | None
    mask: MaskOut | None = None


class LocalizeAnswer(Answer):
    """`POST /v1/localize` (multipart: `image`, `expression`, optional `k` and `masks`)."""

    expression: str
    width_px: int
    height_px: int
    present: bool
    presence: float | None
    boxes: list[LocatedOut]
    timings_ms: dict[str, float]
    request_id: str


class VersionOut(Answer):
    """One version of a gallery.

    Attributes:
        num_images, num_failed, num_instances: counts over the photos of all tenants; null for the
            key of a tenant.
    """

    name: str
    checkpoint: str
    dim: int
    live: bool
    num_images: int | None
    num_failed: int | None
    num_instances: int | None


class GalleryOut(Answer):
    """One gallery.

    Attributes:
        searchable: whether this server can answer questions to it.
        writable: whether the key may add and delete photos.
    """

    name: str
    live: str
    searchable: bool
    writable: bool
    versions: list[VersionOut]


class GalleriesAnswer(Answer):
    """`GET /v1/galleries`: those that the key may read."""

    galleries: list[GalleryOut]


class InstanceOut(Answer):
    """One instance of a photo."""

    instance_id: str
    box: Box
    objectness: float
    area: float


class ImageAnswer(Answer):
    """`GET /v1/galleries/{gallery}/images/{image_id}`: a photo and all its instances."""

    image_id: str
    uri: str
    status: str
    reason: str
    width_px: int
    height_px: int
    attributes: dict[str, Scalar]
    instances: list[InstanceOut]
    image_url: str
    thumbnail_url: str


class ImageAdded(Answer):
    """`POST /v1/galleries/{gallery}/images` (multipart: `image`, optional `attributes` as JSON)."""

    gallery: str
    image_id: str
    uri: str
    num_instances: int


class Problem(BaseModel):
    """An error, as RFC 9457 has it (`application/problem+json`).

    Attributes:
        type: names the kind of error, relative to the server.
        detail: the value, what is allowed, what to do.
        errors: of a request with several wrong fields.
    """

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str = ""
    request_id: str = ""
    errors: list[dict[str, Any]] = Field(default_factory=list)
