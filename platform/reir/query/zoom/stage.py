"""The stage `zoom` of an answer: which photos are searched again, and how their hits change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, takewhile

from reir.models.zoom_steps import ZoomSearch
from reir.query.clock import Clock
from reir.query.pending import PendingAnswer, run_optional
from reir.query.stages import ZOOMED_PHOTOS, Stages, ZoomRequest
from reir.results import Hit, SearchResult

ZOOM = "zoom"
"""Name of the stage."""


async def zoom_in(
    pending: Sequence[PendingAnswer], results: list[SearchResult], stages: Stages, clock: Clock
) -> list[SearchResult]:
    """Search the first photos of those answers that ask for it again, by zooming in."""
    place = {id(one): number for number, one in enumerate(pending)}
    wanted = [one for one in pending if one.query.zoom and results[place[id(one)]].hits]

    async def work(
        able: Sequence[PendingAnswer], timeout_s: float | None
    ) -> list[list[ZoomSearch | None]]:
        hits = [_first_of_photos(results[place[id(one)]].hits) for one in able]
        requests = [
            ZoomRequest(image_id=hit.image_id, uri=hit.uri, expression=one.query.expression)
            for one, of_one in zip(able, hits, strict=True)
            for hit in of_one
        ]
        found = iter(await stages.zoom(requests, timeout_s))
        return [list(islice(found, len(of_one))) for of_one in hits]

    if wanted:
        for one, found in await run_optional(ZOOM, wanted, stages, clock, work, _num_searches):
            number = place[id(one)]
            results[number] = _zoomed(results[number], found, _tie_margin(one))
            # `run_optional` adds the name for queries without any answer; this line, for those in
            # which single photos were not searched.
            if None in found:
                one.degraded.append(ZOOM)
    return results


def _num_searches(found: Sequence[Sequence[ZoomSearch | None]]) -> int:
    # Only searches that were made: those that were left out took no time, and would make a search
    # look cheaper than it is.
    return sum(search is not None for of_one in found for search in of_one)


def _tie_margin(one: PendingAnswer) -> float:
    return one.calibration.tie_margin if one.calibration else 0.0


def _first_of_photos(hits: Sequence[Hit]) -> list[Hit]:
    """Return the best hit of each of the first photos."""
    # A search covers the whole photo, so other hits of the photo would only repeat it.
    best: dict[str, Hit] = {}
    for hit in hits:
        best.setdefault(hit.image_id, hit)
    return list(best.values())[:ZOOMED_PHOTOS]


def _zoomed(
    result: SearchResult, searches: Sequence[ZoomSearch | None], tie_margin: float
) -> SearchResult:
    """Return the answer with what the searches found.

    The searched hits change places among themselves, in the order of their searches, those that
    found nothing last; all other hits stay where they are, because scores of an index and of a
    search cannot be compared.
    """
    first = zip(_first_of_photos(result.hits), searches, strict=True)
    changed = {hit.instance_id: _moved(hit, search) for hit, search in first if search}
    ranked = iter(sorted(changed.values(), key=lambda hit: _search_of(hit).rank, reverse=True))
    hits = tuple(next(ranked) if hit.instance_id in changed else hit for hit in result.hits)
    if not changed or hits[0].zoom is None:
        return replace(result, hits=hits)
    best = hits[0].zoom.score
    near = takewhile(
        # Photos in which nothing was found do not fit equally well: they do not fit.
        lambda hit: hit.zoom and hit.zoom.found and best - hit.zoom.score <= tie_margin,
        hits,
    )
    return replace(result, hits=hits, equally_good=sum(1 for _ in near))


def _moved(hit: Hit, search: ZoomSearch) -> Hit:
    # A mask belongs to the box that it was computed for.
    mask = hit.mask if search.box == hit.box else None
    return replace(hit, box=search.box, mask=mask, zoom=search)


def _search_of(hit: Hit) -> ZoomSearch:
    assert hit.zoom is not None, "only searched hits are ordered by this"
    return hit.zoom
