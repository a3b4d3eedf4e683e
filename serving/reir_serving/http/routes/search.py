"""Search: by expression, in batches, and by similarity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from reir.errors import QueryError
from reir.operations.search_log import SearchLog, search_event
from reir.query.request import Query, Term
from reir.results import SearchResult
from reir_serving.backend.service import SLICE_QUERIES
from reir_serving.config import LiveSettings
from reir_serving.http.endpoint_context import Context, EndpointContext
from reir_serving.http.openapi import schema_ref
from reir_serving.http.problems import FORM, JSON, media_type, unsupported_media_type
from reir_serving.http.routes.search_schemas import (
    BaseSearchRequest,
    BatchAnswer,
    BatchRequest,
    SearchAnswer,
    SearchRequest,
    SimilarForm,
    SimilarRequest,
    TermIn,
    search_answer,
)
from reir_serving.http.schemas import JsonObject, json_response
from reir_serving.middleware.access import image_ids_of_terms

router = APIRouter(prefix="/v1/search", tags=["search"])

_INSTANCE_ONLY = {
    "required": ["instance_id"],
    "properties": {"instance_id": {"type": "string"}, "box": {"type": "null"}},
}
_SIMILAR: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {**schema_ref(SimilarRequest), **_INSTANCE_ONLY},
                "example": {"gallery": "photos", "instance_id": "0123456789abcdef0123#4"},
            },
            FORM: {"schema": schema_ref(SimilarForm)},
        },
    }
}
EXTRA_MODELS = (SimilarRequest, SimilarForm)
"""Models that no signature names, so FastAPI does not put them into the OpenAPI document."""


@router.post("", response_model=SearchAnswer)
async def search(body: SearchRequest, context: Context) -> Response:
    """Find the instances that an expression describes, best first."""
    terms = (Term(expression=body.expression), *_terms(body.also))
    return json_response(await _answer(context, body.gallery, body, terms))


@router.post("/batch", response_model=BatchAnswer)
async def search_batch(body: BatchRequest, context: Context) -> Response:
    """Answer several expressions with the same options; faster than one request for each."""
    if body.cursor:
        raise QueryError(
            "cursor",
            "must be empty in a batch, because it belongs to one expression; request the next page "
            "of that expression with POST /v1/search",
        )
    gallery = context.readable(body.gallery)
    queries = [
        _query(context, body, (Term(expression=expression),)) for expression in body.expressions
    ]
    return json_response({"answers": await _answers(context, gallery, body, queries)})


@router.post("/similar", response_model=SearchAnswer, openapi_extra=_SIMILAR)
async def search_similar(request: Request, context: Context) -> Response:
    """Find instances similar to an instance of the gallery, or to one in an uploaded photo.

    The request can add an expression, and terms with a negative weight: "like this, but not that".
    """
    photo, body = await _read_similar(request)
    gallery = context.readable(body.gallery)
    if photo is None:
        if body.instance_id is None:
            raise QueryError("instance_id", "is missing; name an instance, or send a photo")
        if body.box is not None:
            raise QueryError(
                "box", "is only allowed with an uploaded photo; an instance has its own box"
            )
        like = Term(instance_id=body.instance_id)
    else:
        if body.instance_id is not None:
            raise QueryError(
                "instance_id", "is not allowed together with a photo; add it to `also` instead"
            )
        like = Term(vector=await context.backend.vector_of(gallery, photo, body.box))
    expression = (Term(expression=body.expression),) if body.expression is not None else ()
    terms = (like, *expression, *_terms(body.also))
    return json_response(await _answer(context, gallery, body, terms))


async def _read_similar(request: Request) -> tuple[bytes | None, SimilarRequest]:
    """Read a request that comes as JSON, or as a form with a photo.

    A route of FastAPI takes either a JSON body or a form, so this route parses its body itself.

    Returns:
        The photo, None for JSON, and the request.

    Raises:
        ProblemError: the body has another media type.
        RequestValidationError: a field is wrong.
    """
    media = media_type(request)
    if media == JSON:
        return None, _similar_request(await request.body())
    if media != FORM:
        raise unsupported_media_type(media, f"{JSON} or {FORM}")
    # By default, Starlette accepts a thousand files and a thousand fields.
    async with request.form(max_files=1, max_fields=1) as form:
        image, text = form.get("image"), form.get("request")
        if not isinstance(image, UploadFile) or not isinstance(text, str) or len(form) != 2:
            raise QueryError("image", "send the parts 'image' (a file) and 'request' (JSON)")
        return await image.read(), _similar_request(text)


def _similar_request(text: bytes | str) -> SimilarRequest:
    try:
        return SimilarRequest.model_validate_json(text)
    except ValidationError as error:
        # As FastAPI itself would raise it for a wrong field of the body.
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(found) from error


async def _answer(
    context: EndpointContext, gallery: str, body: BaseSearchRequest, terms: Sequence[Term]
) -> JsonObject:
    gallery = context.readable(gallery)
    (answer,) = await _answers(context, gallery, body, [_query(context, body, terms)])
    return answer


async def _answers(
    context: EndpointContext, gallery: str, body: BaseSearchRequest, queries: Sequence[Query]
) -> list[JsonObject]:
    if context.caller.tenant:
        # A search with an instance of another tenant would reveal what is in that tenant's photo.
        for image_id in sorted(set().union(*map(image_ids_of_terms, queries))):
            await context.image(gallery, image_id)
    _check_work(context.backend.live, queries)
    results = await context.backend.search(gallery, queries)
    context.metrics.note_results(results, SLICE_QUERIES)
    by_image = body.group_by == "image"
    answers = [
        search_answer(result, context.request_id, context.caller, by_image=by_image)
        for result in results
    ]
    if context.search_log is not None:
        for query, result in zip(queries, results, strict=True):
            _log(context, context.search_log, query, body.where, result)
    return answers


def _log(
    context: EndpointContext,
    log: SearchLog,
    query: Query,
    where: str | None,
    result: SearchResult,
) -> None:
    """Log the first page of a search by one expression; other searches cannot become canaries."""
    if not query.is_plain or query.cursor:
        return
    make_event = partial(
        search_event,
        result,
        request_id=context.request_id,
        tenant=context.caller.tenant,
        k=query.k,
        where=where,  # without the condition on the tenant, which `query.where` contains
    )
    log.append(result.gallery, make_event)


def _check_work(live: LiveSettings, queries: Sequence[Query]) -> None:
    """Check a request against the limits of the live settings.

    Raises:
        QueryError: the request exceeds a limit.
    """
    hits, explains = sum(query.k for query in queries), any(query.explain for query in queries)
    most = min(live.hits, live.explained_hits) if explains else live.hits
    if hits > most:
        raise QueryError(
            "k",
            f"{hits} hits in total are requested (queries: {len(queries)}), but the limit for one "
            f"request{' with explain' if explains else ''} is {most}; lower k, or send several "
            f"requests",
        )
    limits = {
        "localize": live.localized_queries,
        "verify": live.localized_queries,
        "zoom": live.zoomed_queries,
    }
    for name, most in limits.items():
        number = sum(getattr(query, name) for query in queries)
        if number > most:
            raise QueryError(
                name,
                f"is set for {number} queries, but the limit for one request is {most}; send "
                f"several requests",
            )


def _query(context: EndpointContext, body: BaseSearchRequest, terms: Sequence[Term]) -> Query:
    # The defaults come from the live settings and not from the model of the request, so it matters
    # whether the request names a field.
    given, live = body.model_fields_set, context.backend.live
    return Query(
        terms=tuple(terms),
        k=body.k if "k" in given else live.k,
        per_image=body.per_image,
        where=context.caller.restrict_filter(body.where),
        min_presence=body.min_presence,
        rerank=body.rerank if "rerank" in given else live.rerank and not body.verify,
        verify=body.verify,
        zoom=body.zoom,
        localize=body.localize,
        explain=body.explain,
        budget_ms=body.budget_ms,
        cursor=body.cursor,
    )


def _terms(also: Sequence[TermIn]) -> tuple[Term, ...]:
    return tuple(
        Term(
            expression=term.expression or "",
            instance_id=term.instance_id or "",
            weight=term.weight,
        )
        for term in also
    )
