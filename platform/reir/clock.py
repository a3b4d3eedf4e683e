"""How long each stage of an answer took, and what a stage usually costs."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

REMEMBERED = 33
"""Durations that a running median is taken of."""

LEAST_KNOWN = 3
"""Durations without which nothing is known: the first one loads and warms up."""


class Clock:
    """Milliseconds of each stage since it was made; a stage that comes again adds up.

    Attributes:
        ms: stage -> milliseconds, in the order of the first mention.
    """

    def __init__(self, *stages: str) -> None:
        """Start now; `stages` are listed even where they take no time."""
        self.ms = dict.fromkeys(stages, 0.0)
        self._started_s = time.perf_counter()

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the start."""
        return (time.perf_counter() - self._started_s) * 1e3

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter() - started_s) * 1e3)

    def add(self, name: str, ms: float) -> None:
        """Add time that was measured elsewhere."""
        self.ms[name] = self.ms.get(name, 0.0) + ms


class Costs:
    """What stages usually cost: the running median of their last durations."""

    def __init__(self) -> None:
        """Start knowing nothing."""
        self._seen: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def note(self, stage: str, ms: float) -> None:
        """Remember how long a stage took for one query."""
        self._seen[stage].append(ms)

    def note_left_out(self, stage: str) -> None:
        """Forget the oldest duration, so that a stage that was slow is tried again some time."""
        if seen := self._seen[stage]:
            seen.popleft()

    def usual_ms(self, stage: str) -> float:
        """What a stage costs one query; 0 while nothing is known."""
        seen = tuple(self._seen[stage])
        return statistics.median(seen) if len(seen) >= LEAST_KNOWN else 0.0
