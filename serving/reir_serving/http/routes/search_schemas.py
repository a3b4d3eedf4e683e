"""Requests and answers of the search routes, and how a search result becomes an answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reir.query.language import seems_foreign
from reir.query.request import MAX_TERMS, MAX_WEIGHT
from reir.results import Evidence, Hit, Likelihood, SearchResult
from reir.store.filters import MAX_LENGTH as MAX_FILTER
from reir_serving.http.schemas import (
    ApiAnswer,
    ApiRequest,
    Box,
    Count,
    Expression,
    GalleryName,
    InstanceId,
    JsonObject,
    MaskOut,
    Scalar,
    image_urls,
    mask_json,
    timings_json,
)
from reir_serving.middleware.access import Caller

MAX_BATCH, MAX_CURSOR = 100, 2048
MAX_ALSO = MAX_TERMS - 1
"""Maximum number of terms in `also`, which come after the first term."""

Side = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
# The schema says "not 0" as `anyOf`, because schemathesis, which tests the API, cannot handle `not`
# in the schema of a multipart form.
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
Where = Annotated[str, Field(max_length=MAX_FILTER, json_schema_extra={"format": "filter"})]
Photo = Annotated[
    bytes,
    Field(json_schema_extra={"format": "photo", "contentMediaType": "application/octet-stream"}),
]

# What only validators check has to be added to the schemas by hand, or the OpenAPI document would
# allow requests that the server rejects.
_EITHER_EXPRESSION_OR_INSTANCE: dict[str, Any] = {
    "oneOf": [
        {
            "properties": {one: {"type": "string"}, other: {"type": "null"}},
            "required": [one],
        }
        for one, other in (("expression", "instance_id"), ("instance_id", "expression"))
    ]
}
# Presence is only known for a single expression, so a request may have either more terms or a
# minimum presence, but not both.
_NO_MORE_TERMS: dict[str, Any] = {"properties": {"also": {"maxItems": 0}}}
_NO_MIN_PRESENCE: dict[str, Any] = {"properties": {"min_presence": {"maximum": 0}}}


class TermIn(ApiRequest):
    """One more part of a query: an expression or an instance of the gallery, with a weight.

    A negative weight means "not this".
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


class BaseSearchRequest(ApiRequest):
    """Base class of search requests: the options of every kind of search."""

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
    verify: bool = Field(
        False,
        description="Compare the colors that the expression names with the pixels of the first "
        "hits, and order these by both. Cannot be combined with `rerank`.",
    )
    zoom: bool = Field(
        False,
        description="Search the first photos again on their pixels, by zooming in, and order their "
        "hits by what is found. Needs an expression.",
    )
    localize: bool = Field(
        False, description="Refine the boxes of the first hits on the pixels of their photos."
    )
    explain: bool = Field(
        False,
        description="Return with each hit the evidence for its rank, and what differs between it "
        "and the expression. An answer that was not found has the differences in any case.",
    )
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


class SearchRequest(BaseSearchRequest):
    """`POST /v1/search`."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [_NO_MORE_TERMS, _NO_MIN_PRESENCE],
            "examples": [
                {
                    "gallery": "photos",
                    "expression": "the red mug left of the laptop",
                    "k": 5,
                    "where": "area > 0.01",
                }
            ],
        }
    )

    gallery: GalleryName
    expression: Expression = Field(
        description="Description of one object.", examples=["the red mug left of the laptop"]
    )
    also: list[TermIn] = Field(default_factory=list, max_length=MAX_ALSO)


class BatchRequest(BaseSearchRequest):
    """`POST /v1/search/batch`: returns one answer for each expression, in the same order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"gallery": "photos", "expressions": ["the red mug", "the dog that lies down"]}
            ]
        }
    )

    gallery: GalleryName
    expressions: list[Expression] = Field(min_length=1, max_length=MAX_BATCH)
    # The limit of 0 is only in the schema: the route itself refuses a cursor, with a message that
    # says how to get the next page.
    cursor: str = Field(
        "",
        max_length=MAX_CURSOR,
        description="Must be empty: a cursor belongs to a single expression.",
        json_schema_extra={"maxLength": 0},
    )


class SimilarRequest(BaseSearchRequest):
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


class SimilarForm(BaseModel):
    """The multipart form of `POST /v1/search/similar`, as the OpenAPI document describes it.

    Attributes:
        image: the photo.
        request: the other parts of the request, as JSON.
    """

    model_config = ConfigDict(extra="forbid")

    image: Photo
    request: SimilarRequest


class NeighborOut(ApiAnswer):
    """Another instance in the same photo that the re-ranker considered."""

    instance_id: str
    box: Box
    weight: float


class ColorReadingOut(ApiAnswer):
    """What the pixels say about a color word: its probability, and the most probable color."""

    word: str
    probability: float
    likely: str
    likely_probability: float


class EvidenceOut(ApiAnswer):
    """The evidence for the rank of a hit."""

    dual_score: float
    rerank_score: float | None
    margin: float | None
    neighbors: list[NeighborOut]
    colors: list[ColorReadingOut]
    version: str
    checkpoint: str


class DifferenceOut(ApiAnswer):
    """A word of the expression that does not fit the hit, and the word that fits better."""

    kind: str
    wanted: str
    seen: str


class ZoomStepOut(ApiAnswer):
    """One look at a part of a photo.

    Attributes:
        frame: the part.
        box: the best instance of this look, in [0, 1] of the whole photo.
        end: probability that the search was over after this look.
    """

    frame: Box
    box: Box
    score: float
    end: float


class ZoomOut(ApiAnswer):
    """The search of a photo by zooming in: where it looked, in order, and what it found."""

    steps: list[ZoomStepOut]
    box: Box
    score: float


class HitOut(ApiAnswer):
    """One instance that was found.

    Attributes:
        presence: probability that this is the one described instance.
        photo_presence: probability that the photo shows the described instance, however many other
            photos show it too.
        likelihood: `photo_presence` in words.
        differs: what differs between the expression and this instance.
        zoom: how the photo was searched by zooming in; null if it was not. `box` is then what that
            search found.
        uri: URI of the photo; here and in all other answers, a key with a tenant gets only the
            file name.
    """

    instance_id: str
    image_id: str
    uri: str
    box: Box
    score: float
    presence: float | None
    photo_presence: float | None
    likelihood: Likelihood | None
    differs: list[DifferenceOut]
    objectness: float
    area: float
    attributes: dict[str, Scalar]
    mask: MaskOut | None = None
    image_url: str
    thumbnail_url: str
    zoom: ZoomOut | None = None
    evidence: EvidenceOut | None = None


class ImageHits(ApiAnswer):
    """The hits of one photo."""

    image_id: str
    uri: str
    score: float
    presence: float | None
    hits: list[HitOut]


class SearchAnswer(ApiAnswer):
    """Hits, best first.

    Attributes:
        english: False if the expression does not seem to be English, the only language that the
            models know.
        likelihood: `presence` in words.
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
    likelihood: Likelihood | None
    found: bool
    equally_good: int
    timings_ms: dict[str, float]
    degraded: list[str]
    cursor: str
    request_id: str


class BatchAnswer(ApiAnswer):
    """One answer for each expression."""

    answers: list[SearchAnswer]


def search_answer(
    result: SearchResult, request_id: str, caller: Caller, *, by_image: bool
) -> JsonObject:
    """Return `SearchAnswer`."""
    hits = [_hit(hit, result, caller) for hit in result.hits]
    return {
        "gallery": result.gallery,
        "version": result.version,
        "checkpoint": result.digest,
        "expression": result.expression,
        "english": not seems_foreign(result.expression),
        "hits": hits,
        "images": _hits_by_image(hits) if by_image else None,
        "presence": result.presence,
        "likelihood": result.likelihood,
        "found": result.found,
        "equally_good": result.equally_good,
        "timings_ms": timings_json(result.timings_ms),
        "degraded": list(result.degraded),
        "cursor": result.cursor,
        "request_id": request_id,
    }


def _hit(hit: Hit, result: SearchResult, caller: Caller) -> JsonObject:
    return {
        "instance_id": hit.instance_id,
        "image_id": hit.image_id,
        "uri": caller.visible_uri(hit.uri),
        "box": hit.box,
        "score": hit.score,
        "presence": hit.presence,
        "photo_presence": hit.photo_presence,
        "likelihood": hit.likelihood,
        "differs": [
            {"kind": each.kind, "wanted": each.wanted, "seen": each.seen} for each in hit.differs
        ],
        "objectness": hit.objectness,
        "area": hit.area,
        "attributes": dict(hit.attributes),
        "mask": mask_json(hit.mask),
        **image_urls(result.gallery, hit.image_id),
        "zoom": None if hit.zoom is None else asdict(hit.zoom),
        "evidence": None if hit.evidence is None else _evidence(hit.evidence, result),
    }


def _evidence(evidence: Evidence, result: SearchResult) -> JsonObject:
    return {
        "dual_score": evidence.dual_score,
        "rerank_score": evidence.rerank_score,
        "margin": evidence.margin,
        "neighbors": [
            {"instance_id": each.instance_id, "box": each.box, "weight": each.weight}
            for each in evidence.neighbors
        ],
        "colors": [asdict(each) for each in evidence.colors],
        "version": result.version,
        "checkpoint": result.digest,
    }


def _hits_by_image(hits: list[JsonObject]) -> list[JsonObject]:
    """Return the hits grouped by photo; photos are in the order of their best hits."""
    groups: dict[str, JsonObject] = {}
    for hit in hits:
        # Hits are best first, so a photo gets the score and the presence of its first hit;
        # `setdefault` ignores those of the later ones.
        photo = {name: hit[name] for name in ("image_id", "uri", "score", "presence")}
        groups.setdefault(hit["image_id"], {**photo, "hits": []})["hits"].append(hit)
    return list(groups.values())
