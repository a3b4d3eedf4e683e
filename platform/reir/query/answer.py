"""The query path: terms, vector, rows, page of hits; optionally re-ranked, verified, localized.

Library and service both run `answer`; they differ in where the stages run (`reir.query.stages`).
Stages that fail, or for which no time is left, are named in `degraded`. Encoding the text and
searching the store are required: if they fail, the query fails.
"""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile, zip_longest
from typing import Any, TypeVar

from reir.query.clock import Clock
from reir.query.differences import Alternatives
from reir.query.paging import MAX_HITS, Cursor
from reir.query.pending import PendingAnswer, RankedRow, pending_answer, run_optional
from reir.query.presence import Calibration, count_words
from reir.query.ranking import instance_number
from reir.query.request import Query
from reir.query.retrieval import RetrieveRequest, VectorTerm
from reir.query.spans import record_answer
from reir.query.stages import (
    COMPARED_HITS,
    RefineRequest,
    RefineResult,
    RerankRequest,
    RerankResult,
    Stages,
)
from reir.query.verify.stage import verify_hits
from reir.query.zoom.stage import zoom_in
from reir.records import FloatArray, MaskRle
from reir.results import Evidence, Hit, SearchResult

T = TypeVar("T")


async def answer(queries: Sequence[Query], stages: Stages) -> list[SearchResult]:
    """Answer queries to one gallery, in the order given; each stage runs once for all of them.

    The timings of each result are those of the whole call.

    Raises:
        QueryError: a part of a query is wrong; `field` names it.
        ReirError: an error of the text model or of the store.
    """
    clock = Clock("text", "search", "rank")
    pending = [pending_answer(query, stages) for query in queries]
    if not pending:
        return []
    try:
        return await _answer(pending, stages, clock)
    finally:
        record_answer(clock, stages.gallery, len(pending))


async def _answer(
    pending: Sequence[PendingAnswer], stages: Stages, clock: Clock
) -> list[SearchResult]:
    with clock.stage("text"):
        requests = await _retrieve_requests(pending, stages)
    with clock.stage("search"):
        found = await stages.retrieve(requests)
    # The searches of the first result are those of the whole call, since all requests share them.
    clock.periods += found[0].searches
    for one, each in zip(pending, found, strict=True):
        one.retrieved = each
    rank_ms = max(each.rank_ms for each in found)
    # the retriever both reads rows and chooses among them; the choice counts as ranking
    clock.add("search", -rank_ms)
    clock.add("rank", rank_ms)
    if wanted := [one for one in pending if one.reranks]:
        await _rerank(wanted, stages, clock)
    if wanted := [one for one in pending if one.verifies]:
        await verify_hits(wanted, stages, clock)
    with clock.stage("rank"):
        pages = [one.page() for one in pending]
    masks = await _masks(pending, [page for page, _ in pages], stages, clock)
    with clock.stage("rank"):
        results = [
            _result(one, page, beyond, masks)
            for one, (page, beyond) in zip(pending, pages, strict=True)
        ]
    # Zooming comes first, because it changes boxes, which are then refined, and the order of hits.
    results = await zoom_in(pending, results, stages, clock)
    results = await _localize(pending, results, stages, clock)
    results = await _compare(pending, results, stages, clock)
    return [
        replace(
            each,
            gallery=stages.gallery,
            timings_ms=dict(clock.ms),
            degraded=tuple(one.degraded),
        )
        for one, each in zip(pending, results, strict=True)
    ]


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits, such as stages in this process, without an event loop."""
    try:
        # This runs the coroutine until it first waits. One that never waits ends here.
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    raise RuntimeError("a stage waited; await the coroutine in an event loop instead")


async def _retrieve_requests(
    pending: Sequence[PendingAnswer], stages: Stages
) -> list[RetrieveRequest]:
    """Return the request of each query to the retriever; encodes all expressions in one call."""
    # A dict instead of a set: it drops repeated expressions and keeps their order.
    texts = {
        term.expression: None for one in pending for term in one.query.terms if term.expression
    }
    encoded = dict(zip(texts, await stages.encode(list(texts)), strict=True)) if texts else {}
    for one in pending:
        one.encoded = encoded.get(one.query.expression)
    return [
        RetrieveRequest(
            terms=tuple(
                VectorTerm(
                    weight=term.weight,
                    vector=encoded[term.expression].vector if term.expression else term.vector,
                    instance_id=term.instance_id,
                )
                for term in one.query.terms
            ),
            num_rows=one.num_rows,
            per_image=one.query.per_image,
            where=one.query.where,
            num_photos=one.num_photos,
            version=one.cursor.version if one.cursor else "",
        )
        for one in pending
    ]


async def _rerank(pending: Sequence[PendingAnswer], stages: Stages, clock: Clock) -> None:
    """Let the re-ranker score the instances of the best photos."""

    def work(
        able: Sequence[PendingAnswer], timeout_s: float | None
    ) -> Awaitable[Sequence[Sequence[RerankResult]]]:
        return stages.rerank([_rerank_request(one) for one in able], timeout_s)

    for one, reranked in await run_optional("rerank", pending, stages, clock, work):
        one.reranked = reranked


def _rerank_request(one: PendingAnswer) -> RerankRequest:
    query = one.query
    assert one.encoded is not None, "queries without an expression are never re-ranked"
    return RerankRequest(
        expression=replace(one.encoded, vector=one.retrieved.vector),
        version=one.retrieved.version,
        image_ids=one.pool,
        where=query.where,
        per_image=query.per_image,
        excluded=frozenset(term.instance_id for term in query.terms if term.instance_id),
        neighbors=query.explain,
    )


def _result(
    one: PendingAnswer,
    page: Sequence[RankedRow],
    beyond: Sequence[RankedRow],
    masks: Mapping[str, MaskRle],
) -> SearchResult:
    """Return the answer, without gallery, timings and degraded stages."""
    found, calibration, best = one.retrieved, one.calibration, one.best_scores
    presence = None
    if calibration is not None:
        size, words = found.num_instances, count_words(one.query.expression)
        presence = calibration.of_gallery(best, one.background, size, words, one.surprisal)
    is_there = calibration is None or calibration.is_found(presence)
    # What is probably not in the gallery is probably in none of its photos either.
    highest = 1.0 if is_there or presence is None else presence
    # Each hit with the one that follows it, which for the last one is the first beyond the page.
    hits = [
        _hit(one, each, after, masks.get(each.row.instance_id), highest)
        for each, after in zip_longest(page, [*page[1:], *beyond][: len(page)])
    ]
    kept = [
        (ranked, hit)
        for ranked, hit in zip(page, hits, strict=True)
        if (hit.presence or 0.0) >= one.query.min_presence
    ]
    return SearchResult(
        expression=one.original_expression,
        gallery="",
        version=found.version,
        hits=tuple(hit for _, hit in kept),
        timings_ms={},
        digest=found.digest,
        presence=presence,
        found=bool(kept) and is_there,
        equally_good=_equally_good([ranked for ranked, _ in kept], calibration),
        cursor=_cursor(one, page) if beyond else "",
    )


def _hit(
    one: PendingAnswer,
    ranked: RankedRow,
    after: RankedRow | None,
    mask: MaskRle | None,
    max_photo_presence: float,
) -> Hit:
    row, calibration = ranked.row, one.calibration
    presence = photo_presence = None
    if calibration is not None:
        others = one.best_scores, one.background, one.retrieved.num_instances
        presence = calibration.of_hit(ranked.calibrated_score, *others)
        best = one.best_of_photo[row.image_id]
        words = count_words(one.query.expression)
        alone = calibration.of_photo(best.score, one.background, words, best.colors)
        photo_presence = min(alone, max_photo_presence)
    return Hit(
        instance_id=row.instance_id,
        image_id=row.image_id,
        uri=row.uri,
        box=row.box,
        score=ranked.score,
        objectness=row.objectness,
        attributes=dict(row.attributes),  # a copy: all rows of a photo share one mapping
        mask=mask,
        presence=presence,
        photo_presence=photo_presence,
        evidence=_evidence(ranked, after) if one.query.explain else None,
    )


def _evidence(ranked: RankedRow, after: RankedRow | None) -> Evidence:
    # Scores of the re-ranker and inner products have different scales.
    comparable = after is not None and after.order == ranked.order
    return Evidence(
        dual_score=ranked.row.score,
        rerank_score=ranked.reranked.score if ranked.reranked else None,
        margin=ranked.score - after.score if after and comparable else None,
        neighbors=ranked.reranked.neighbors if ranked.reranked else (),
        colors=ranked.verified or (),
    )


def _equally_good(ranked: Sequence[RankedRow], calibration: Calibration | None) -> int:
    """Return how many first hits have scores too close to the best one to tell them apart."""
    if not ranked:
        return 0
    first = ranked[0]
    margin = calibration.tie_margin if calibration else 0.0
    near = takewhile(
        lambda each: each.order == first.order and first.score - each.score <= margin, ranked
    )
    return sum(1 for _ in near)


def _cursor(one: PendingAnswer, page: Sequence[RankedRow]) -> str:
    """Return the cursor of the next page."""
    num_hits = one.num_previous + len(page)
    if num_hits >= MAX_HITS:
        return ""
    last = page[-1]
    cursor = Cursor(
        version=one.retrieved.version,
        fingerprint=one.query.fingerprint,
        order=last.order,
        score=last.score,
        image_id=last.row.image_id,
        number=instance_number(last.row.instance_id),
        num_hits=num_hits,
    )
    return str(cursor)


async def _masks(
    pending: Sequence[PendingAnswer],
    pages: Sequence[Sequence[RankedRow]],
    stages: Stages,
    clock: Clock,
) -> dict[str, MaskRle]:
    """Return the masks of all hits by instance id, from those versions that store masks."""
    wanted: dict[str, dict[str, None]] = {}
    for one, page in zip(pending, pages, strict=True):
        if one.retrieved.has_masks and page:
            of_page = (each.row.instance_id for each in page)
            wanted.setdefault(one.retrieved.version, {}).update(dict.fromkeys(of_page))
    masks: dict[str, MaskRle] = {}
    for version, ids in wanted.items():
        with clock.stage("search"):
            masks |= await stages.masks(version, list(ids))
    return masks


async def _localize(
    pending: Sequence[PendingAnswer], results: list[SearchResult], stages: Stages, clock: Clock
) -> list[SearchResult]:
    """Refine boxes and masks of the first hits on the pixels of their photos."""
    # By identity, because a mutable dataclass has no hash.
    place = {id(one): number for number, one in enumerate(pending)}
    wanted = [one for one in pending if one.query.localize and results[place[id(one)]].hits]

    async def work(
        able: Sequence[PendingAnswer], timeout_s: float | None
    ) -> list[list[RefineResult | None]]:
        hits = [results[place[id(one)]].hits[: stages.localized_hits] for one in able]
        requests = [
            RefineRequest(image_id=hit.image_id, uri=hit.uri, box=hit.box)
            for of_one in hits
            for hit in of_one
        ]
        refined = iter(await stages.localize(requests, timeout_s))
        return [list(islice(refined, len(of_one))) for of_one in hits]

    if wanted and not stages.localizes:
        for one in wanted:
            one.degraded.append("localize")
    elif wanted:
        for one, refined in await run_optional("localize", wanted, stages, clock, work):
            number = place[id(one)]
            results[number] = _refined(results[number], refined)
            # `run_optional` adds the name for queries without any result; this line, for those of
            # which single photos cannot be read.
            if None in refined:
                one.degraded.append("localize")
    return results


def _refined(result: SearchResult, refined: Sequence[RefineResult | None]) -> SearchResult:
    """Return the answer with the refined boxes and masks of its first hits."""
    first = [
        replace(hit, box=each.box, mask=each.mask or hit.mask) if each else hit
        for hit, each in zip(result.hits, refined, strict=False)
    ]
    return replace(result, hits=(*first, *result.hits[len(first) :]))


async def _compare(
    pending: Sequence[PendingAnswer], results: list[SearchResult], stages: Stages, clock: Clock
) -> list[SearchResult]:
    """Name what differs between the sentence and the first hits, if they are misses."""
    place = {id(one): number for number, one in enumerate(pending)}
    # A query that finds what it looks for does not pay for this.
    wanted = [
        one
        for one, result in zip(pending, results, strict=True)
        if (one.query.explain or not result.found) and result.hits and one.compares
    ]

    async def work(able: Sequence[PendingAnswer], timeout_s: float | None) -> list[SearchResult]:
        found = [results[place[id(one)]] for one in able]
        ids: dict[str, list[str]] = {}
        for result in found:
            # What zooming found has no vector in the index.
            first = (hit.instance_id for hit in result.hits[:COMPARED_HITS] if hit.zoom is None)
            ids.setdefault(result.version, []).extend(first)
        compared = await stages.compare(ids, timeout_s)
        return [
            _compared(result, one, compared.alternatives, compared.instances[result.version])
            for one, result in zip(able, found, strict=True)
        ]

    for one, result in await run_optional("compare", wanted, stages, clock, work) if wanted else ():
        results[place[id(one)]] = result
    return results


def _compared(
    result: SearchResult,
    one: PendingAnswer,
    alternatives: Alternatives,
    instances: Mapping[str, FloatArray],
) -> SearchResult:
    """Return the answer with what differs in those hits whose vectors are given."""
    colors = one.colors
    hits = tuple(
        replace(
            hit,
            differs=one.comparison.differences(
                alternatives, instances[hit.instance_id], colors.get(hit.instance_id, ())
            ),
        )
        if hit.instance_id in instances and hit.zoom is None
        else hit
        for hit in result.hits
    )
    return replace(result, hits=hits)
