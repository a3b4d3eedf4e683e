"""`CircuitBreaker`: stops calling a store that has just failed to answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from reir.errors import StoreUnavailable

OPEN_FOR_S = 1.0
"""Seconds for which calls fail at once after the store did not answer."""

T = TypeVar("T")


class CircuitBreaker:
    """Calls a store. If a call fails, all calls fail at once for the next `OPEN_FOR_S` seconds.

    A store's client retries for seconds before it gives up. Without the breaker, each request would
    wait that long, and the queue of waiting requests would still be there when the store is back.

    Threads share a breaker without a lock: at worst, a few more calls reach a store that is down.
    """

    def __init__(
        self,
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a breaker that is closed, which means that it lets calls through.

        Args:
            check: called before each call; raises `StoreUnavailable` if the store does not exist.
            clock: returns the time in seconds.
        """
        self._check, self._clock = check, clock
        self._failure: StoreUnavailable | None = None
        self._open_until_s = 0.0

    def call(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, unless the store failed a moment ago.

        Raises:
            StoreUnavailable: the store does not answer, or did not less than `OPEN_FOR_S` ago.
        """
        if self._failure is not None and self._clock() < self._open_until_s:
            # A new error, because several threads may raise one at the same time.
            raise StoreUnavailable(self._failure.address, self._failure.detail)
        try:
            answer = self._checked(work)
        except StoreUnavailable as error:
            self._failure, self._open_until_s = error, self._clock() + OPEN_FOR_S
            raise
        self._failure = None
        return answer

    def _checked(self, work: Callable[[], T]) -> T:
        self._check()
        try:
            return work()
        except Exception:
            self._check()  # if the store has disappeared meanwhile, report that instead
            raise
