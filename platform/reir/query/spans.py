"""Spans of an answer, made from its clock: one for the answer, and one for each of its stages."""

from __future__ import annotations

import time

from reir.query.clock import Clock
from reir.tracing import Period, is_in_span, record_span

STORE_SEARCH = "store search"
"""Name of the spans of searches in the store. They are within the stage `search`, which also waits
for the search worker, and they serve all requests that the worker answered together."""


def record_answer(clock: Clock, gallery: str, num_queries: int) -> None:
    """Record an answer that has ended, as a part of the span of its request.

    Without such a span nothing is recorded: health checks search, too.

    Args:
        clock: the clock of the answer.
        gallery: the gallery that was searched.
        num_queries: number of queries that were answered together.
    """
    if not is_in_span():
        return
    error = clock.periods[-1].error if clock.periods else ""
    answer = record_span(
        Period("answer", clock.start_ns, time.time_ns(), error),
        attributes={"reir.gallery": gallery, "reir.queries": num_queries},
    )
    parent = answer
    for period in clock.periods:
        is_inner = period.name == STORE_SEARCH
        span = record_span(period, parent=parent if is_inner else answer)
        parent = parent if is_inner else span
