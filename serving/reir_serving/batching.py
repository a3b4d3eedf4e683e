"""`Batcher`: calls that arrive while one is worked on are worked on together, next.

Nobody waits for company: a lone call starts at once, and batches grow only where work queues up.
Ray Serve's own batching forms a batch before it has a free worker, so that without a waiting time
each call becomes a batch of its own. Knows no Ray and no model.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def _ignore(_size: int, _waiting: int) -> None:
    """Take note of nothing."""


class Batcher(Generic[Item, Answer]):
    """Runs `work` on one batch at a time, in a thread of its own."""

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Answer]],
        *,
        largest: int,
        on_batch: Callable[[int, int], None] = _ignore,
    ) -> None:
        """Have `work` answer items together.

        Args:
            work: items -> one answer each, in the order given. Where it raises, each item of the
                batch is tried again alone, so that a bad one fails nobody else.
            largest: most items of a batch.
            on_batch: told the size of each batch, and how many items wait for the next one.
        """
        self._work = work
        self._largest = largest
        self._on_batch = on_batch
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Answer:
        """Answer one item; raises what `work` raises on it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = loop.create_task(self._work_off())
        return await future

    @property
    def num_waiting(self) -> int:
        """Items that are not worked on yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False)

    async def _work_off(self) -> None:
        try:
            while self._waiting:
                batch = self._next_batch()
                if batch:
                    self._on_batch(len(batch), len(self._waiting))
                    await self._answer(batch)
        finally:
            self._task = None

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        """Take what waits, without the calls that were given up."""
        count = min(len(self._waiting), self._largest)
        taken = [self._waiting.popleft() for _ in range(count)]
        return [each for each in taken if not each[1].done()]

    async def _answer(self, batch: Sequence[tuple[Item, asyncio.Future[Answer]]]) -> None:
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(self._thread, self._work, [item for item, _ in batch])
        await asyncio.wait([job])
        error = job.exception()
        if error is None:
            for (_, future), answer in zip(batch, job.result(), strict=True):
                if not future.done():
                    future.set_result(answer)
        elif len(batch) > 1:
            for each in batch:
                await self._answer([each])
        elif not batch[0][1].done():
            batch[0][1].set_exception(error)
