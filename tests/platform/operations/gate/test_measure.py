"""Times of searches that the gate compares: medians, so that one stalled search does not count."""

import time
from typing import cast

import pytest

from reir.operations.gate.measure import TIMED_ROUNDS, latencies_p95_ms
from reir.query.search import Gallery


class TimedGallery:
    """Searches that move a clock: by a constant time, once by a longer one."""

    def __init__(self, clock: list[float], usual_s: float, stall_s: float = 0.0) -> None:
        self._clock, self._usual_s, self._stall_s = clock, usual_s, stall_s

    def search_batch(self, expressions: list[str]) -> None:
        self._clock[0] += 0.5 * len(expressions)

    def search(self, expression: str) -> None:
        assert expression
        self._clock[0] += self._usual_s + self._stall_s
        self._stall_s = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("expressions", [["a cup"], ["a cup", "a dog", "a car"]])
def test_one_stalled_search_does_not_change_the_measured_time(
    clock: list[float], expressions: list[str]
) -> None:
    galleries = [TimedGallery(clock, 0.003), TimedGallery(clock, 0.003, stall_s=0.5)]
    live, candidate = latencies_p95_ms([cast(Gallery, each) for each in galleries], expressions)
    assert (live, candidate) == pytest.approx((3.0, 3.0))
    warm_up_s = 2 * 0.5 * len(expressions[:2])
    searches_s = 2 * TIMED_ROUNDS * len(expressions) * 0.003
    assert clock[0] == pytest.approx(warm_up_s + searches_s + 0.5)


def test_a_version_that_is_always_slower_is_measured_as_slower(clock: list[float]) -> None:
    galleries = [TimedGallery(clock, 0.003), TimedGallery(clock, 0.009)]
    times = latencies_p95_ms([cast(Gallery, each) for each in galleries], ["a cup", "a dog"])
    assert times == pytest.approx([3.0, 9.0])
