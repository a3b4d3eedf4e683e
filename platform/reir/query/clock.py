"""Measures how long each stage of an answer takes, and remembers how long it usually takes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from reir.tracing import Period

NUM_DURATIONS = 33
"""Number of durations in the running median."""

MIN_DURATIONS = 3
"""The median counts from this many durations on, because the first call loads the model."""


class Clock:
    """Milliseconds that each stage took; a stage that runs twice adds up.

    Attributes:
        ms: stage -> milliseconds, in the order of the first mention.
        start_ns: Unix time of the start, in nanoseconds.
        periods: when stages ran, in the order in which they ended.
    """

    def __init__(self, *stages: str) -> None:
        """Start now; `stages` are listed even if they take no time."""
        self.ms = dict.fromkeys(stages, 0.0)
        self.start_ns = time.time_ns()
        self.periods: list[Period] = []
        # Not `time.time`: changes of the system clock would falsify the budget of a query.
        self._started_s = time.perf_counter()

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the start."""
        return (time.perf_counter() - self._started_s) * 1e3

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        start_ns, started_s, error = time.time_ns(), time.perf_counter(), ""
        try:
            yield
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            # Also if the block raises: a failed optional stage has taken time, too.
            spent_s = time.perf_counter() - started_s
            self.add(name, spent_s * 1e3)
            self.periods.append(Period(name, start_ns, start_ns + round(spent_s * 1e9), error))

    def add(self, name: str, ms: float) -> None:
        """Add time that was measured elsewhere."""
        self.ms[name] = self.ms.get(name, 0.0) + ms


class StageCosts:
    """How long stages usually take: the running median of their last durations."""

    def __init__(self) -> None:
        """Start without any durations."""
        # Only the last ones, so that the median follows the load of the machine; a median, so that
        # one slow call does not count.
        self._durations: defaultdict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=NUM_DURATIONS)
        )

    def note(self, stage: str, ms: float) -> None:
        """Record how long a stage took for one query."""
        self._durations[stage].append(ms)

    def note_left_out(self, stage: str) -> None:
        """Drop the oldest duration, so that a stage that was slow for a while is tried again."""
        if durations := self._durations[stage]:
            durations.popleft()

    def usual_ms(self, stage: str) -> float:
        """Milliseconds that a stage usually takes for one query; 0 while that is not known.

        So a stage of unknown duration runs as long as any time is left.
        """
        durations = tuple(self._durations[stage])
        return statistics.median(durations) if len(durations) >= MIN_DURATIONS else 0.0
