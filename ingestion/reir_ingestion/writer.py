"""Writes batches in a thread of its own, in order, so that the store works beside the model.

Knows how long to be patient with a store that cannot be reached, and nothing of what is written.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

from reir.errors import StoreUnavailable

RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses between attempts to reach the store; after the last one the error goes to the caller."""

MAX_WAITING = 2

Answer = TypeVar("Answer")
Batch = TypeVar("Batch")

logger = logging.getLogger(__name__)


def patiently(
    call: Callable[[], Answer],
    *,
    pauses_s: Sequence[float] = RETRY_AFTER_S,
    sleep: Callable[[float], None] = time.sleep,
    passing: type[Exception] = StoreUnavailable,
) -> Answer:
    """Return `call()`, tried again after each pause while what it needs cannot be reached.

    Args:
        call: what to do.
        pauses_s: after each failed attempt.
        sleep: waits.
        passing: the error that another attempt may mend; without more, an unreachable store.

    Raises:
        Exception: the error that may pass has not, after the last pause; or any other.
    """
    for pause_s in pauses_s:
        try:
            return call()
        except passing as error:
            logger.warning("%s; next attempt in %g s", error, pause_s)
            sleep(pause_s)
    return call()


class Writer(Generic[Batch]):
    """Hands batches to `write` in a thread; use it as a context manager.

    At most `MAX_WAITING` batches wait. A failure is raised to the caller at the next `put`, or at
    the end of the block. When the block ends with an error, batches that wait are dropped: the
    next run makes them again.
    """

    def __init__(self, write: Callable[[Batch], None]) -> None:
        """Call `write` for each batch, one at a time."""
        self._write = write
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reir-write")
        self._waiting: deque[Future[None]] = deque()

    def put(self, batch: Batch) -> None:
        """Queue a batch; blocks while too many wait."""
        while len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, batch))

    def __enter__(self) -> Writer[Batch]:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait until all is written, or after an error for the batch that is being written."""
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
