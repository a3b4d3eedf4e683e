"""Search: by expression, in batches, and by what is similar."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from reir.errors import QueryError
from reir.query import Query, Term
from reir_serving.access import named_images
from reir_serving.answers import Json, json_answer, search_answer
from reir_serving.config import LiveSettings
from reir_serving.context import Context, context_of
from reir_serving.forms import SimilarForm, read_json, read_similar
from reir_serving.openapi import body_of
from reir_serving.problems import FORM
from reir_serving.schemas import (
    BatchAnswer,
    BatchRequest,
    Options,
    SearchAnswer,
    SearchRequest,
    SimilarRequest,
    TermIn,
)

router = APIRouter(tags=["search"])

_SEARCH = body_of(
    SearchRequest,
    {
        "gallery": "photos",
        "expression": "the red mug left of the laptop",
        "k": 5,
        "where": "area > 0.01",
    },
)
_BATCH = body_of(
    BatchRequest, {"gallery": "photos", "expressions": ["the red mug", "the dog that lies down"]}
)
_SIMILAR = body_of(
    SimilarRequest,
    {"gallery": "photos", "instance_id": "0123456789abcdef0123#4"},
    {
        "required": ["instance_id"],
        "properties": {"instance_id": {"type": "string"}, "box": {"type": "null"}},
    },
    **{FORM: SimilarForm},
)
BODIES = (SearchRequest, BatchRequest, SimilarRequest, SimilarForm)
"""What these routes read by themselves."""


@router.post("/v1/search", response_model=SearchAnswer, openapi_extra=_SEARCH)
async def search(request: Request) -> Response:
    """Find the instances that an expression describes, best first."""
    body = await read_json(request, SearchRequest)
    terms = (Term(expression=body.expression), *_terms(body.also))
    return json_answer(await _answered(context_of(request), body.gallery, body, terms))


@router.post("/v1/search/batch", response_model=BatchAnswer, openapi_extra=_BATCH)
async def search_batch(request: Request) -> Response:
    """Answer several expressions with the same options at once; cheaper than one by one."""
    asked, body = context_of(request), await read_json(request, BatchRequest)
    if body.cursor:
        raise QueryError("cursor", "belongs to one expression; ask for its next page by itself")
    gallery = asked.readable(body.gallery)
    queries = [
        _query(asked, body, (Term(expression=expression),)) for expression in body.expressions
    ]
    return json_answer({"answers": await _all_answered(asked, gallery, body, queries)})


@router.post("/v1/search/similar", response_model=SearchAnswer, openapi_extra=_SIMILAR)
async def search_similar(request: Request) -> Response:
    """Find instances like one of the gallery, or like one in a photo that is sent along.

    An expression may be added, and terms with a negative weight: "like this, but not that".
    """
    asked, (photo, body) = context_of(request), await read_similar(request)
    gallery = asked.readable(body.gallery)
    if photo is None:
        if body.instance_id is None:
            raise QueryError("instance_id", "is missing; name an instance, or send a photo")
        if body.box is not None:
            raise QueryError("box", "is a part of a photo that is sent; an instance has its own")
        like = Term(instance_id=body.instance_id)
    else:
        if body.instance_id is not None:
            raise QueryError("instance_id", "cannot be given beside a photo; send it under `also`")
        like = Term(vector=await asked.backend.vector_of(gallery, photo, body.box))
    told = (Term(expression=body.expression),) if body.expression is not None else ()
    return json_answer(await _answered(asked, gallery, body, (like, *told, *_terms(body.also))))


async def _answered(asked: Context, gallery: str, body: Options, terms: Sequence[Term]) -> Json:
    gallery = asked.readable(gallery)
    query = _query(asked, body, terms)
    (answer,) = await _all_answered(asked, gallery, body, [query])
    return answer


async def _all_answered(
    asked: Context, gallery: str, body: Options, queries: Sequence[Query]
) -> list[Json]:
    if asked.caller.tenant:
        for image_id in sorted(set().union(*map(named_images, queries))):
            await asked.image(gallery, image_id)
    _check_work(asked.backend.live, queries)
    results = await asked.backend.search(gallery, queries)
    asked.site.metrics.note_results(results)
    by_image = body.group_by == "image"
    told = asked.notes.request_id, by_image, asked.caller
    return [search_answer(result, *told) for result in results]


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
    localized = sum(query.localise for query in queries)
    if localized > live.localized_queries:
        raise QueryError(
            "localize",
            f"is set for {localized} queries, but the limit for one request is "
            f"{live.localized_queries}; send several requests",
        )


def _query(asked: Context, body: Options, terms: Sequence[Term]) -> Query:
    said, live = body.model_fields_set, asked.backend.live
    return Query(
        terms=tuple(terms),
        k=body.k if "k" in said else live.k,
        per_image=body.per_image,
        where=asked.caller.narrowed(body.where),
        min_presence=body.min_presence,
        rerank=body.rerank if "rerank" in said else live.rerank,
        localise=body.localize,
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
