"""Requests and answers of the HTTP interface, version 1: what the page and `reir.Client` rely on.

Boxes are xyxy in [0, 1] of the upright photo. Unknown fields of a request are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_EXPRESSION, MAX_FILTER, MAX_K, MAX_TERMS, MAX_BATCH = 2000, 8192, 1000, 16, 100
Box = tuple[float, float, float, float]
Side = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
GalleryName = Annotated[str, Field(min_length=1, max_length=255)]
Scalar = str | int | float | bool | None


class Request(BaseModel):
    """Of every request."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


class Answer(BaseModel):
    """Of every answer."""

    model_config = ConfigDict(extra="forbid")


class TermIn(Request):
    """One more part of a query: an expression or an instance of the gallery, with a weight.

    A negative weight says "not this".
    """

    expression: str | None = Field(None, max_length=MAX_EXPRESSION)
    instance_id: str | None = Field(None, max_length=255)
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.expression is None) == (self.instance_id is None):
            raise ValueError("give either expression or instance_id")
        return self


class Options(Request):
    """What every kind of search can be told."""

    k: int = Field(10, ge=1, le=MAX_K, description="Most hits; a server may default to others.")
    per_image: int = Field(1, ge=1, le=MAX_K, description="Most hits of one photo.")
    where: str | None = Field(
        None,
        max_length=MAX_FILTER,
        description="Filter over fields of the instance and attributes of its photo.",
        examples=['area > 0.05 and cx < 0.5 and attr.camera == "X100"'],
    )
    group_by: Literal["image"] | None = Field(None, description="Also give the hits by photo.")
    min_presence: Side = Field(0.0, description="Leave out hits below this probability.")
    rerank: bool = Field(True, description="Let the relation re-ranker order the best photos.")
    localize: bool = Field(False, description="Refine the first boxes on their pixels.")
    explain: bool = Field(False, description="Say of every hit why it stands there.")
    budget_ms: float | None = Field(
        None, gt=0, le=60_000, description="Stages that would end later are left out."
    )
    cursor: str = Field("", max_length=2048, description="Of the page before.")


class SearchRequest(Options):
    """`POST /v1/search`."""

    gallery: GalleryName
    expression: str = Field(
        max_length=MAX_EXPRESSION,
        description="Describes one object.",
        examples=["the red mug left of the laptop"],
    )
    also: list[TermIn] = Field(default_factory=list, max_length=MAX_TERMS)


class BatchRequest(Options):
    """`POST /v1/search/batch`: one answer an expression, in the order given."""

    gallery: GalleryName
    expressions: list[Annotated[str, Field(max_length=MAX_EXPRESSION)]] = Field(
        min_length=1, max_length=MAX_BATCH
    )


class SimilarRequest(Options):
    """`POST /v1/search/similar`: an instance of the gallery as query.

    As multipart form the same endpoint takes a photo: part `image`, part `request` with this
    object as JSON (without `instance_id`, optionally with `box`).
    """

    gallery: GalleryName
    instance_id: str | None = Field(None, max_length=255)
    box: tuple[Side, Side, Side, Side] | None = None
    expression: str | None = Field(None, max_length=MAX_EXPRESSION)
    also: list[TermIn] = Field(default_factory=list, max_length=MAX_TERMS)


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
    """One instance found."""

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
        found: False where `presence` is below the checkpoint's threshold: it is not there.
        equally_good: so many first hits cannot be told apart.
        degraded: stages left out.
        cursor: of the next page; empty at the end.
    """

    gallery: str
    version: str
    checkpoint: str
    expression: str
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
    """One answer an expression."""

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
    """One version of a gallery."""

    name: str
    checkpoint: str
    dim: int
    live: bool
    num_images: int
    num_failed: int
    num_instances: int


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
