"""Apply a function to items in a few threads, ahead of the consumer and within bounds.

This module knows nothing about images. One parallel map may be the input of the next. The results
come in the order of the items, whatever the number of threads, so they never depend on timing.
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
    """How many threads work, and how far they may be ahead of the consumer.

    Attributes:
        num_threads: number of threads.
        max_items: maximum number of items that are in progress or wait for the consumer.
        max_bytes: no new item is started while the waiting results take more memory than this.

    Raises:
        ValueError: the number of threads or items is below 1.
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


class ParallelMap(Generic[Item, Result]):
    """Iterates over `work(item)` for each item, computed ahead; use it as a context manager.

    The threads take turns drawing items from `items`. An error of `items` or `work` is raised to
    the consumer.
    """

    def __init__(
        self,
        items: Iterator[Item],
        work: Callable[[Item], Result],
        num_bytes: Callable[[Result], int],
        bounds: Bounds,
    ) -> None:
        """Prepare the map; its threads start with the `with` block.

        Args:
            items: the items. Only one thread at a time draws from them, so a generator is fine.
            work: called in one of the threads.
            num_bytes: returns the memory that a result takes.
            bounds: number of threads, and how far ahead they may work.
        """
        self._items = items
        self._work = work
        self._num_bytes = num_bytes
        self._bounds = bounds
        self._pool = ThreadPoolExecutor(bounds.num_threads, thread_name_prefix="reir-ahead")
        self._threads: list[Future[None]] = []
        # Separate from the condition: drawing an item may take long, and meanwhile the consumer
        # must be able to take results.
        self._draw_lock = threading.Lock()
        self._changed = threading.Condition()
        # The condition guards everything below.
        self._results: dict[int, Result] = {}
        self._waiting_bytes = 0
        self._num_drawn = 0
        self._num_given = 0
        self._num_running = bounds.num_threads
        self._stopped = False

    def __enter__(self) -> ParallelMap[Item, Result]:
        """Start the threads."""
        self._threads = [self._pool.submit(self._run) for _ in range(self._bounds.num_threads)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the threads, and wait for the items in progress."""
        self._stop()
        self._pool.shutdown(wait=True)

    def num_waiting(self) -> int:
        """Return how many results wait for the consumer."""
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
                self._waiting_bytes -= self._num_bytes(result)
                self._changed.notify_all()
            yield result  # without the lock, so that the threads continue meanwhile
        for thread in self._threads:
            thread.result()  # raises the error that ended the thread

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
                self._stop()  # otherwise the other threads would wait forever
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def _work_on_next(self) -> bool:
        """Draw an item and keep its result; False if there is none, or it is time to stop."""
        with self._draw_lock:
            if not self._wait_for_room():
                return False
            try:
                item = next(self._items)
            except StopIteration:
                return False
            number = self._num_drawn
            self._num_drawn += 1
        if self._stopped:  # drawing an item may have taken long
            return False
        result = self._work(item)
        with self._changed:
            self._results[number] = result
            self._waiting_bytes += self._num_bytes(result)
            self._changed.notify_all()
        return True

    def _wait_for_room(self) -> bool:
        """Wait until an item may be drawn; False if it is time to stop.

        This cannot deadlock: items are drawn in order, so while nothing may be drawn, the result
        that the consumer waits for is in progress or ready.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room())
            return not self._stopped

    def _has_room(self) -> bool:
        in_flight = self._num_drawn - self._num_given
        bounds = self._bounds
        # The size of a result is known only once it exists, so a result may exceed the limit. If it
        # had to fit, one photo that is larger than the limit would block the run.
        return in_flight < bounds.max_items and self._waiting_bytes <= bounds.max_bytes
