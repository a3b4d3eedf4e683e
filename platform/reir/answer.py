"""The whole query path: terms -> vector -> rows -> (re-rank) -> page of hits -> (localise).

`answer` is what library and service run alike; the stages differ in where they are
(`reir.stages`). Stages that a budget leaves out, or that fail, are named in `degraded`; text and
search are what no answer can do without.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile, zip_longest
from typing import Any, TypeVar

from reir.clock import Clock
from reir.errors import QueryError
from reir.models.seams import EncodedExpression
from reir.paging import MAX_GIVEN, Cursor, Order, read_cursor
from reir.presence import PHOTOS, Calibration
from reir.query import Query, check_query
from reir.ranking import instance_number
from reir.records import Evidence, Hit, MaskRle, SearchResult
from reir.retrieval import Part, Retrieval, Retrieved
from reir.stages import (
    LOCALISED_HITS,
    RERANKED_PHOTOS,
    Refined,
    Refinement,
    Reordered,
    Reordering,
    Stages,
)
from reir.store.contract import InstanceRow

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def answer(queries: Sequence[Query], stages: Stages) -> list[SearchResult]:
    """Answer queries to one gallery, in the order given: one call a stage for all of them.

    The timings of each result are those of the whole call.

    Raises:
        QueryError: a part of a query is wrong; `field` names it.
        ReirError: whatever text or search raise.
    """
    clock = Clock("text", "search", "rank")
    drafts = [_drafted(query, stages) for query in queries]
    if not drafts:
        return []
    with clock.stage("text"):
        requests = await _retrievals(drafts, stages)
    with clock.stage("search"):
        found = await stages.retrieve(requests)
    for draft, each in zip(drafts, found, strict=True):
        draft.found = each
    rank_ms = max(each.rank_ms for each in found)
    clock.add("search", -rank_ms)
    clock.add("rank", rank_ms)
    if wanted := [draft for draft in drafts if draft.reranks]:
        await _rerank(wanted, stages, clock)
    with clock.stage("rank"):
        pages = [draft.page() for draft in drafts]
    masks = await _masks(drafts, [page for page, _ in pages], stages, clock)
    with clock.stage("rank"):
        results = [
            _result(draft, page, beyond, masks)
            for draft, (page, beyond) in zip(drafts, pages, strict=True)
        ]
    results = await _localise(drafts, results, stages, clock)
    return [
        replace(
            each,
            gallery=stages.gallery,
            timings_ms=dict(clock.ms),
            degraded=tuple(draft.degraded),
        )
        for draft, each in zip(drafts, results, strict=True)
    ]


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns whose awaits never wait, as those of stages in process."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    raise RuntimeError("a stage waited; await `answer` in an event loop instead")


@dataclass(frozen=True)
class _Ranked:
    """One instance in its place; `score` is what orders it."""

    row: InstanceRow
    score: float
    order: Order
    reordered: Reordered | None = None

    @property
    def place(self) -> tuple[bool, float, str, int]:
        """Sort key; what the re-ranker has not seen comes after what it has."""
        row = self.row
        return self.order == "rest", -self.score, row.image_id, instance_number(row.instance_id)


@dataclass
class _Draft:
    """One query on its way.

    Attributes:
        said: the expression as it was asked.
        cursor: of the page before, None for the first page.
        reranks: whether the re-ranker is to order the best photos.
        calibration: where the query is one that it was made of.
        words: of the expression that the re-ranker reads.
        found: what the store says.
        reordered: what the re-ranker says; None where it was not asked.
        degraded: stages left out.
    """

    said: str
    query: Query
    cursor: Cursor | None
    reranks: bool
    calibration: Calibration | None
    words: EncodedExpression | None = None
    found: Retrieved = field(init=False)
    reordered: Sequence[Reordered] | None = None
    degraded: list[str] = field(default_factory=list)

    @property
    def last_order(self) -> Order | None:
        """What ordered the last hit of the page before."""
        return self.cursor.order if self.cursor else None

    @property
    def given(self) -> int:
        """Hits on the pages before."""
        return self.cursor.given if self.cursor else 0

    @property
    def num_photos(self) -> int:
        """Best photos needed."""
        return max(
            PHOTOS if self.calibration else 0,
            RERANKED_PHOTOS if self.reranks or self.last_order == "rest" else 0,
        )

    @property
    def pool(self) -> tuple[str, ...]:
        """Photos that the re-ranker sees, best first."""
        return tuple(row.image_id for row in self.found.photos[:RERANKED_PHOTOS])

    @property
    def best_scores(self) -> list[float]:
        """Scores of the best photos, for the calibration."""
        return [row.score for row in self.found.photos[:PHOTOS]]

    def needs(self, stage: str) -> bool:
        """Whether an optional stage is none here: the page goes on within its order."""
        return stage == "rerank" and self.last_order == "pool"

    def left_ms(self, stage: str, clock: Clock) -> float | None:
        """What is left of the budget for a stage; None for as long as it takes."""
        if self.query.budget_ms is None or self.needs(stage):
            return None
        return self.query.budget_ms - clock.elapsed_ms

    def page(self) -> tuple[list[_Ranked], list[_Ranked]]:
        """Return what is on the page, and the next one after it, if there is one."""
        ranked = self._ranked()
        start = self._start(ranked)
        end = start + self.query.k
        return ranked[start:end], ranked[end : end + 1]

    def _ranked(self) -> list[_Ranked]:
        rows = self.found.rows
        if self.reordered is None and self.last_order != "rest":
            return [_Ranked(row, row.score, "dual") for row in rows]
        seen = set(self.pool)
        first = [_Ranked(each.row, each.score, "pool", each) for each in self.reordered or ()]
        rest = [_Ranked(row, row.score, "rest") for row in rows if row.image_id not in seen]
        return sorted(first, key=lambda each: each.place) + rest

    def _start(self, ranked: Sequence[_Ranked]) -> int:
        """Return where the page begins: after the last hit of the page before."""
        last = self.cursor
        if last is None:
            return 0
        place = (last.order == "rest", -last.score, last.image_id, last.number)
        for position, each in enumerate(ranked):
            if each.place[2:] == place[2:]:  # its score may differ in the last bit
                return position + 1
        return sum(each.place <= place for each in ranked)


def _drafted(query: Query, stages: Stages) -> _Draft:
    """Check a query and begin its answer."""
    checked = check_query(query)
    cursor = read_cursor(checked)
    calibration = stages.calibration if checked.is_plain else None
    if checked.min_presence and calibration is None:
        raise QueryError(
            "min_presence",
            "needs a single expression and a checkpoint with a calibration.json; leave it out",
        )
    if cursor is not None and cursor.order == "pool" and not stages.reranks:
        raise QueryError("cursor", "goes on in the order of a re-ranker that is gone; leave it out")
    wanted = checked.rerank and stages.reranks and checked.expression != ""
    return _Draft(
        said=query.expression,
        query=checked,
        cursor=cursor,
        reranks=wanted if cursor is None else cursor.order == "pool",
        calibration=calibration,
    )


async def _retrievals(drafts: Sequence[_Draft], stages: Stages) -> list[Retrieval]:
    """Return what each query asks of the store; all expressions are encoded at once."""
    texts = {
        term.expression: None for draft in drafts for term in draft.query.terms if term.expression
    }
    encoded = dict(zip(texts, await stages.encode(list(texts)), strict=True)) if texts else {}
    for draft in drafts:
        draft.words = encoded.get(draft.query.expression)
    return [
        Retrieval(
            parts=tuple(
                Part(
                    weight=term.weight,
                    vector=encoded[term.expression].vector if term.expression else term.vector,
                    instance_id=term.instance_id,
                )
                for term in draft.query.terms
            ),
            most=draft.given + draft.query.k + 1,  # one more says whether a page follows
            per_image=draft.query.per_image,
            where=draft.query.where,
            photos=draft.num_photos,
            version=draft.cursor.version if draft.cursor else "",
        )
        for draft in drafts
    ]


async def _optional(
    name: str,
    drafts: Sequence[_Draft],
    stages: Stages,
    clock: Clock,
    work: Callable[[Sequence[_Draft], float | None], Awaitable[Sequence[T]]],
) -> list[tuple[_Draft, T]]:
    """Run a stage for the queries that have time for it; name it in `degraded` of the others.

    The time it will take is what it usually took. A failure leaves it out too, but for a page that
    needs it.
    """
    usual_ms = stages.costs.usual_ms(name) * len(drafts)
    left = [(draft, draft.left_ms(name, clock)) for draft in drafts]
    able = [draft for draft, ms in left if ms is None or ms > usual_ms]
    limits = [ms for _, ms in left if ms is not None and ms > usual_ms]
    done: Sequence[T] = ()
    failed = False
    started_ms = clock.elapsed_ms
    if len(able) < len(drafts):
        stages.costs.note_left_out(name)
    if able:
        try:
            with clock.stage(name):
                done = await work(able, min(limits) / 1e3 if limits else None)
        except Exception as error:
            if any(draft.needs(name) for draft in able):
                raise
            logger.warning("stage %s left out: %r", name, error)
            failed = not isinstance(error, TimeoutError)
        if not failed:
            stages.costs.note(name, (clock.elapsed_ms - started_ms) / len(able))
    answered = list(zip(able, done, strict=bool(done)))
    names = {id(draft) for draft, _ in answered}
    for draft in drafts:
        if id(draft) not in names:
            draft.degraded.append(name)
    return answered


async def _rerank(drafts: Sequence[_Draft], stages: Stages, clock: Clock) -> None:
    """Let the re-ranker score the instances of the best photos."""

    def work(
        able: Sequence[_Draft], timeout_s: float | None
    ) -> Awaitable[Sequence[Sequence[Reordered]]]:
        return stages.rerank([_reordering(draft) for draft in able], timeout_s)

    for draft, reordered in await _optional("rerank", drafts, stages, clock, work):
        draft.reordered = reordered


def _reordering(draft: _Draft) -> Reordering:
    query = draft.query
    assert draft.words is not None, "only queries with an expression are re-ranked"
    return Reordering(
        expression=replace(draft.words, vector=draft.found.vector),
        version=draft.found.version,
        image_ids=draft.pool,
        where=query.where,
        per_image=query.per_image,
        without=frozenset(term.instance_id for term in query.terms if term.instance_id),
        neighbours=query.explain,
    )


def _result(
    draft: _Draft, page: Sequence[_Ranked], beyond: Sequence[_Ranked], masks: Mapping[str, MaskRle]
) -> SearchResult:
    """Return an answer without its timings."""
    found, calibration, best = draft.found, draft.calibration, draft.best_scores
    presence = None
    if calibration is not None:
        presence = calibration.of_gallery(best, found.num_instances) if best else 0.0
    hits = [
        _hit(draft, each, after, masks.get(each.row.instance_id))
        for each, after in zip_longest(page, [*page[1:], *beyond][: len(page)])
    ]
    return SearchResult(
        expression=draft.said,
        gallery="",
        version=found.version,
        hits=tuple(hit for hit in hits if (hit.presence or 0.0) >= draft.query.min_presence),
        timings_ms={},
        digest=found.digest,
        presence=presence,
        found=bool(page) and (calibration is None or calibration.is_found(presence)),
        equally_good=_equally_good(page, calibration),
        cursor=_cursor(draft, page) if beyond else "",
    )


def _hit(draft: _Draft, ranked: _Ranked, after: _Ranked | None, mask: MaskRle | None) -> Hit:
    row, calibration = ranked.row, draft.calibration
    presence = None
    if calibration is not None:
        presence = calibration.of_hit(row.score, draft.best_scores, draft.found.num_instances)
    return Hit(
        instance_id=row.instance_id,
        image_id=row.image_id,
        uri=row.uri,
        box=row.box,
        score=ranked.score,
        objectness=row.objectness,
        attributes=dict(row.attributes),  # the caller's own
        mask=mask,
        presence=presence,
        evidence=_evidence(ranked, after) if draft.query.explain else None,
    )


def _evidence(ranked: _Ranked, after: _Ranked | None) -> Evidence:
    comparable = after is not None and after.order == ranked.order
    return Evidence(
        dual_score=ranked.row.score,
        rerank_score=ranked.reordered.score if ranked.reordered else None,
        margin=ranked.score - after.score if after and comparable else None,
        neighbours=ranked.reordered.neighbours if ranked.reordered else (),
    )


def _equally_good(page: Sequence[_Ranked], calibration: Calibration | None) -> int:
    """Return how many first hits lie within the margin that tells nothing."""
    if not page:
        return 0
    first = page[0]
    margin = calibration.tie_margin if calibration else 0.0
    near = takewhile(
        lambda each: each.order == first.order and first.score - each.score <= margin, page
    )
    return sum(1 for _ in near)


def _cursor(draft: _Draft, page: Sequence[_Ranked]) -> str:
    """Return where the next page begins."""
    given = draft.given + len(page)
    if given >= MAX_GIVEN:
        return ""
    if not page:
        return draft.query.cursor
    last = page[-1]
    cursor = Cursor(
        version=draft.found.version,
        fingerprint=draft.query.fingerprint,
        order=last.order,
        score=last.score,
        image_id=last.row.image_id,
        number=instance_number(last.row.instance_id),
        given=given,
    )
    return str(cursor)


async def _masks(
    drafts: Sequence[_Draft], pages: Sequence[Sequence[_Ranked]], stages: Stages, clock: Clock
) -> dict[str, MaskRle]:
    """Return the masks of all hits, by instance id, where the versions keep them."""
    wanted: dict[str, dict[str, None]] = {}
    for draft, page in zip(drafts, pages, strict=True):
        if draft.found.has_masks and page:
            of_page = (each.row.instance_id for each in page)
            wanted.setdefault(draft.found.version, {}).update(dict.fromkeys(of_page))
    masks: dict[str, MaskRle] = {}
    for version, ids in wanted.items():
        with clock.stage("search"):
            masks |= await stages.masks(version, list(ids))
    return masks


async def _localise(
    drafts: Sequence[_Draft], results: list[SearchResult], stages: Stages, clock: Clock
) -> list[SearchResult]:
    """Refine boxes and masks of the first hits on their pixels."""
    place = {id(draft): number for number, draft in enumerate(drafts)}
    wanted = [draft for draft in drafts if draft.query.localise and results[place[id(draft)]].hits]

    async def work(able: Sequence[_Draft], timeout_s: float | None) -> list[list[Refined]]:
        hits = [results[place[id(draft)]].hits[:LOCALISED_HITS] for draft in able]
        requests = [
            Refinement(image_id=hit.image_id, uri=hit.uri, box=hit.box)
            for of_one in hits
            for hit in of_one
        ]
        refined = iter(await stages.localise(requests, timeout_s))
        return [list(islice(refined, len(of_one))) for of_one in hits]

    if wanted and not stages.localises:
        for draft in wanted:
            draft.degraded.append("localise")
    elif wanted:
        for draft, refined in await _optional("localise", wanted, stages, clock, work):
            number = place[id(draft)]
            results[number] = _refined(results[number], refined)
    return results


def _refined(result: SearchResult, refined: Sequence[Refined]) -> SearchResult:
    """Return the answer with the first boxes and masks as they were seen on the pixels."""
    first = [
        replace(hit, box=each.box, mask=each.mask or hit.mask)
        for hit, each in zip(result.hits, refined, strict=False)
    ]
    return replace(result, hits=(*first, *result.hits[len(first) :]))
