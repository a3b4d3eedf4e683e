"""Work on items in a few threads, ahead of the consumer, within a bound of items and of bytes.

Knows nothing of images; one stage of a pipeline may be the items of the next. Results come in the
order of the items whatever the number of threads, so what is made of them never depends on timing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Bounds:
    """How far ahead to work.

    Attributes:
        num_threads: threads that work.
        max_items: at most so many items are in work or wait for the consumer.
        max_bytes: no new item is drawn while the waiting results hold more than this.

    Raises:
        ValueError: a number of threads or items below 1.
    """

    num_threads: int
    max_items: int
    max_bytes: int = sys.maxsize

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.num_threads, self.max_items) < 1:
            raise ValueError(
                f"num_threads and max_items must be 1 or more, "
                f"got {self.num_threads} and {self.max_items}"
            )


class ReadAhead(Generic[Item, Result]):
    """Iterate over `work(item)` for each item, computed ahead; use it as a context manager.

    The items are drawn within the threads, one at a time. What `items` or `work` raises is raised
    to the consumer.
    """

    def __init__(
        self,
        items: Iterator[Item],
        work: Callable[[Item], Result],
        num_bytes: Callable[[Result], int],
        bounds: Bounds,
    ) -> None:
        """Set up; threads start with the `with` block.

        Args:
            items: what to work on.
            work: called in one of the threads.
            num_bytes: memory that a result holds.
            bounds: threads, and how far they may be ahead.
        """
        self._items = items
        self._work = work
        self._num_bytes = num_bytes
        self._bounds = bounds
        self._pool = ThreadPoolExecutor(bounds.num_threads, thread_name_prefix="reir-ahead")
        self._threads: list[Future[None]] = []
        self._drawing = threading.Lock()
        self._changed = threading.Condition()
        # all below are guarded by `_changed`
        self._results: dict[int, Result] = {}
        self._held_bytes = 0
        self._num_drawn = 0
        self._num_given = 0
        self._num_running = bounds.num_threads
        self._stopped = False

    def __enter__(self) -> ReadAhead[Item, Result]:
        """Start the threads."""
        self._threads = [self._pool.submit(self._run) for _ in range(self._bounds.num_threads)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the threads and wait for the items in work."""
        self._stop()
        self._pool.shutdown(wait=True)

    def num_waiting(self) -> int:
        """How many results wait for the consumer."""
        with self._changed:
            return len(self._results)

    def __iter__(self) -> Iterator[Result]:
        """Yield the results in the order of the items."""
        while True:
            with self._changed:
                self._changed.wait_for(self._is_ready)
                if self._num_given not in self._results:
                    break
                result = self._results.pop(self._num_given)
                self._num_given += 1
                self._held_bytes -= self._num_bytes(result)
                self._changed.notify_all()
            yield result
        for thread in self._threads:
            thread.result()  # raises what ended it

    def _is_ready(self) -> bool:
        return self._num_given in self._results or not self._num_running

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        finished = False
        try:
            while self._work_on_next():
                pass
            finished = True
        finally:
            if not finished:
                self._stop()  # the other threads would wait for ever
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def _work_on_next(self) -> bool:
        """Draw an item and keep its result; False when there is none or it is time to stop."""
        with self._drawing:
            if not self._wait_for_room():
                return False
            try:
                item = next(self._items)
            except StopIteration:
                return False
            number = self._num_drawn
            self._num_drawn += 1
        if self._stopped:  # drawing may have taken long
            return False
        result = self._work(item)
        with self._changed:
            self._results[number] = result
            self._held_bytes += self._num_bytes(result)
            self._changed.notify_all()
        return True

    def _wait_for_room(self) -> bool:
        """Wait until an item may be drawn; False when it is time to stop.

        The next result due is always in work or kept when nothing may be drawn, so this ends.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room())
            return not self._stopped

    def _has_room(self) -> bool:
        in_flight = self._num_drawn - self._num_given
        bounds = self._bounds
        return in_flight < bounds.max_items and self._held_bytes <= bounds.max_bytes
