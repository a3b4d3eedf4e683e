"""An answer in progress: its query, what the stages have found so far, and the page of hits."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

from reir.datasets.generated_expressions import names_color
from reir.errors import QueryError
from reir.models.interfaces import EncodedExpression
from reir.query.clock import Clock
from reir.query.differences import Comparison
from reir.query.paging import Cursor, Order, read_cursor
from reir.query.presence import PHOTOS, Calibration
from reir.query.ranking import instance_number
from reir.query.request import Query, check_query
from reir.query.retrieval import RetrieveResult
from reir.query.stages import (
    RERANKED_PHOTOS,
    VERIFIED_HITS,
    RerankResult,
    Stages,
    VerifyResult,
)
from reir.query.verify.scores import mean_surprisal, verified_scores
from reir.store.contract import InstanceRow

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RankedRow:
    """One instance with the score that orders it."""

    row: InstanceRow
    score: float
    order: Order
    reranked: RerankResult | None = None
    verified: VerifyResult | None = None

    @property
    def calibrated_score(self) -> float:
        """The score from which presence is computed: never a re-ranker's, whose scale differs."""
        return self.row.score if self.reranked else self.score

    @property
    def place(self) -> tuple[bool, float, str, int]:
        """Sort key; what was not re-ranked or verified is last: its scores are of another kind."""
        row = self.row
        return self.order == "rest", -self.score, row.image_id, instance_number(row.instance_id)


class BestInstance(NamedTuple):
    """The best instance of a photo.

    Attributes:
        verified: its score after its verification; the same as `score` without one.
        score: inner product.
        colors: what the pixels say about it.
    """

    verified: float
    score: float
    colors: VerifyResult


@dataclass
class PendingAnswer:
    """A query whose answer is not complete yet.

    Attributes:
        original_expression: the expression before it was normalized.
        query: the checked query.
        cursor: end of the previous page, None for the first page.
        reranks: whether the re-ranker orders the best photos.
        verifies: whether the verifier orders the first rows.
        calibration: None if the query is of a kind that the calibration was not fitted on.
        encoded: the expression that the re-ranker reads.
        retrieved: result of the retriever.
        reranked: results of the re-ranker; None if it did not run.
        verified: results of the verifier for the first rows; None if it did not run.
        degraded: names of stages that were left out.
    """

    original_expression: str
    query: Query
    cursor: Cursor | None
    reranks: bool
    verifies: bool
    calibration: Calibration | None
    encoded: EncodedExpression | None = None
    retrieved: RetrieveResult = field(init=False)
    reranked: Sequence[RerankResult] | None = None
    verified: Sequence[VerifyResult | None] | None = None
    degraded: list[str] = field(default_factory=list)

    @property
    def last_order(self) -> Order | None:
        """The order to which the last hit of the previous page belongs; None for the first page."""
        return self.cursor.order if self.cursor else None

    @property
    def num_previous(self) -> int:
        """Number of hits on all previous pages."""
        return self.cursor.num_hits if self.cursor else 0

    @property
    def num_photos(self) -> int:
        """Number of best photos that calibration and re-ranker need."""
        # A page of the "rest" runs no re-ranker, but leaves out the photos that were re-ranked for
        # an earlier page.
        return max(
            PHOTOS if self.calibration else 0,
            RERANKED_PHOTOS if self.reranks or self.last_order == "rest" else 0,
        )

    @property
    def num_rows(self) -> int:
        """Number of rows that the page and the verifier need."""
        # All previous pages again, since a store cannot skip rows: `per_image` depends on them.
        # One row more tells whether another page follows.
        page = self.num_previous + self.query.k + 1
        return max(page, VERIFIED_HITS) if self.query.verify else page

    @property
    def pool(self) -> tuple[str, ...]:
        """Ids of the photos that the re-ranker scores, best first."""
        return tuple(row.image_id for row in self.retrieved.photos[:RERANKED_PHOTOS])

    @cached_property
    def best_scores(self) -> list[float]:
        """The scores of the best photos, best first, from which presence is computed."""
        photos = self.retrieved.photos[:PHOTOS]
        verified = self._verified_photos
        scores = {row.image_id: row.score for row in photos}
        scores |= {name: verified[name].verified for name in scores.keys() & verified.keys()}
        return sorted(scores.values(), reverse=True)

    @cached_property
    def _verified_photos(self) -> dict[str, BestInstance]:
        """The best verified row of each photo that has one, by image id."""
        best: dict[str, BestInstance] = {}
        for row, verified, colors in zip(
            self.retrieved.rows, self._verified_scores, self.verified or (), strict=False
        ):
            if row.image_id not in best or verified > best[row.image_id].verified:
                best[row.image_id] = BestInstance(verified, row.score, colors or ())
        return best

    @property
    def colors(self) -> dict[str, VerifyResult]:
        """What the pixels say about the verified instances, by instance id."""
        rows = self.retrieved.rows
        return {
            row.instance_id: found
            for row, found in zip(rows, self.verified or (), strict=False)
            if found is not None
        }

    @property
    def surprisal(self) -> float:
        """Mean surprisal of the verified rows; 0 if none were verified."""
        return mean_surprisal(self.verified or ())

    @cached_property
    def _verified_scores(self) -> list[float]:
        """Scores of the first rows after their verification; empty if it did not run."""
        verified = self.verified or ()
        rows = self.retrieved.rows[: len(verified)]
        return verified_scores([row.score for row in rows], verified)

    @cached_property
    def background(self) -> float:
        """Score of the expression on the background of the calibration; 0 without one."""
        known = self.calibration
        return known.background.score(self.retrieved.vector) if known else 0.0

    @cached_property
    def best_of_photo(self) -> dict[str, BestInstance]:
        """The best instance of each photo, by image id, from which `photo_presence` is computed."""
        best: dict[str, float] = {}
        reranked = [each.row for each in self.reranked or ()]
        for row in (*self.retrieved.photos, *self.retrieved.rows, *reranked):
            best[row.image_id] = max(row.score, best.get(row.image_id, row.score))
        plain = {name: BestInstance(score, score, ()) for name, score in best.items()}
        return plain | self._verified_photos

    @cached_property
    def comparison(self) -> Comparison:
        """What to compare hits with; nothing unless the query is a single expression."""
        return Comparison.of(self.query.expression if self.query.is_plain else "")

    @property
    def compares(self) -> bool:
        """Whether a hit can differ from the expression in a word that is compared."""
        return bool(self.comparison.noun or self.comparison.side or self.colors)

    def needs(self, stage: str) -> bool:
        """Whether an optional stage is required, because the page continues an answer of it."""
        ordering = "verify" if self.query.verify else "rerank"
        return stage == ordering and self.last_order == "pool"

    def left_ms(self, stage: str, clock: Clock) -> float | None:
        """Milliseconds of the budget that are left for a stage; None means no limit."""
        if self.query.budget_ms is None or self.needs(stage):
            return None
        return self.query.budget_ms - clock.elapsed_ms

    def page(self) -> tuple[list[RankedRow], list[RankedRow]]:
        """Return the instances of the page, and the one that follows it, if there is one."""
        ranked = self._ranked()
        start = self._start(ranked)
        end = start + self.query.k
        return ranked[start:end], ranked[end : end + 1]

    def _ranked(self) -> list[RankedRow]:
        rows = self.retrieved.rows
        if self.reranked is None and self.verified is None and self.last_order != "rest":
            return [RankedRow(row, row.score, "dual") for row in rows]
        if self.query.verify:
            return self._ranked_by_verifier(rows)
        seen = set(self.pool)
        first = [RankedRow(each.row, each.score, "pool", each) for each in self.reranked or ()]
        rest = [RankedRow(row, row.score, "rest") for row in rows if row.image_id not in seen]
        return sorted(first, key=lambda each: each.place) + rest

    def _ranked_by_verifier(self, rows: Sequence[InstanceRow]) -> list[RankedRow]:
        # A page of the "rest" runs no verifier, but leaves out the rows of its page.
        first = [
            RankedRow(row, score, "pool", verified=readings)
            for row, score, readings in zip(
                rows, self._verified_scores, self.verified or (), strict=False
            )
        ]
        rest = [RankedRow(row, row.score, "rest") for row in rows[VERIFIED_HITS:]]
        return sorted(first, key=lambda each: each.place) + rest

    def _start(self, ranked: Sequence[RankedRow]) -> int:
        """Return the position of the first hit: after the last one of the previous page."""
        last = self.cursor
        if last is None:
            return 0
        place = (last.order == "rest", -last.score, last.image_id, last.number)
        for position, each in enumerate(ranked):
            # Compared without the score, whose last bit may differ between two searches.
            if each.place[2:] == place[2:]:
                return position + 1
        # The last hit was deleted meanwhile: begin where it would have been.
        return sum(each.place <= place for each in ranked)


def pending_answer(query: Query, stages: Stages) -> PendingAnswer:
    """Check a query and start its answer."""
    checked = check_query(query)
    cursor = read_cursor(checked)
    calibration = stages.calibration if checked.is_plain else None
    if checked.min_presence and calibration is None:
        raise QueryError(
            "min_presence",
            "needs a single expression and a checkpoint with a calibration; leave it out",
        )
    exists = stages.verifies if checked.verify else stages.reranks
    if cursor is not None and cursor.order == "pool" and not exists:
        part = "color head" if checked.verify else "re-ranker"
        raise QueryError(
            "cursor",
            f"continues an answer of the {part}, but the checkpoint has none any more; leave it "
            f"out to start again",
        )
    orders = checked.expression != "" and (cursor is None or cursor.order == "pool")
    return PendingAnswer(
        original_expression=query.expression,
        query=checked,
        cursor=cursor,
        reranks=orders and checked.rerank and stages.reranks,
        verifies=(
            orders and checked.verify and stages.verifies and names_color(checked.expression)
        ),
        calibration=calibration,
    )


async def run_optional(  # noqa: PLR0913 - three of them are the answer in progress
    name: str,
    pending: Sequence[PendingAnswer],
    stages: Stages,
    clock: Clock,
    work: Callable[[Sequence[PendingAnswer], float | None], Awaitable[Sequence[T]]],
    parts: Callable[[Sequence[T]], int] = len,
) -> list[tuple[PendingAnswer, T]]:
    """Run an optional stage for the queries that have time left for it.

    The others get its name in `degraded`. A stage has time if its usual duration fits into the
    rest of the budget. A stage that fails is left out too, unless a page requires it.

    Args:
        name: of the stage.
        pending: the queries that asked for it.
        stages, clock: of the answer.
        work: runs the stage for some of the queries, within so many seconds.
        parts: returns of how many parts the work consisted, of which each costs the same and every
            query needs at least one; by default, one for each query.
    """
    # Costs are per part, and the stage runs once for all queries.
    usual_ms = stages.costs.usual_ms(name) * len(pending)
    left = [(one, one.left_ms(name, clock)) for one in pending]
    able = [one for one, ms in left if ms is None or ms > usual_ms]
    limits = [ms for _, ms in left if ms is not None and ms > usual_ms]
    done: Sequence[T] = ()
    failed = False
    started_ms = clock.elapsed_ms
    if len(able) < len(pending):
        stages.costs.note_left_out(name)
    if able:
        try:
            with clock.stage(name):
                done = await work(able, min(limits) / 1e3 if limits else None)
        except Exception as error:
            if any(one.needs(name) for one in able):
                raise
            logger.warning("stage %s failed and was left out: %r", name, error)
            # A stage that fails at once must not count as fast. One that ran out of time took at
            # least that long, which is worth noting.
            failed = not isinstance(error, TimeoutError)
        if not failed:
            num_parts = parts(done) or len(able)
            stages.costs.note(name, (clock.elapsed_ms - started_ms) / num_parts)
    answered = list(zip(able, done, strict=bool(done)))  # after a failure, nothing is `done`
    names = {id(one) for one, _ in answered}  # mutable dataclasses have no hash
    for one in pending:
        if id(one) not in names:
            one.degraded.append(name)
    return answered
