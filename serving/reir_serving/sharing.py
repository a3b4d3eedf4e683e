"""Who computes on how many cores: a call that is alone may have all of them, others one each.

One expression takes the text model a fifth less time on two cores. Where calls are under way beside
each other, or batches form, every core has work, and threads would only wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from reir.cores import num_cores

MOST_THREADS = 4
"""One sentence gives no more of them enough to do."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class SharedCores:
    """Knows what is under way in one process; every method may be called from any thread."""

    def __init__(self, most: int | None = None) -> None:
        """Give a lone call `most` threads; None takes what there is, up to `MOST_THREADS`."""
        self._most = min(MOST_THREADS, num_cores()) if most is None else most
        self._under_way = 0
        self._mutex = threading.Lock()
        self._of_thread = threading.local()

    def among(
        self, work: Callable[[list[Item]], Sequence[Answer]], *, gains: bool = False
    ) -> Callable[[list[Item]], Sequence[Answer]]:
        """Return `work` on a batch, on as many threads of torch as suits just then.

        Args:
            work: items -> one answer each.
            gains: whether a lone call gains from more threads than one.
        """

        def shared(batch: list[Item]) -> Sequence[Answer]:
            with self._mutex:
                self._under_way += 1
                alone = gains and self._under_way == 1 and len(batch) == 1
            try:
                self._use(self._most if alone else 1)
                return work(batch)
            finally:
                with self._mutex:
                    self._under_way -= 1

        return shared

    def _use(self, num_threads: int) -> None:
        """Set the threads of torch, which holds for the calling thread; each change takes time."""
        if getattr(self._of_thread, "num", None) != num_threads:
            torch.get_num_threads()  # a new thread takes the last number of any other first
            torch.set_num_threads(num_threads)
            self._of_thread.num = num_threads
