"""`Batcher`: calls that arrive while one is worked on are worked on together, next.

Nobody waits for company: a lone call starts at once, and batches grow only where work queues up.
Ray Serve's own batching forms a batch before it has a free worker, so that without a waiting time
each call becomes a batch of its own. The thread that works takes the next batch itself: between two
batches it would else wait for an event loop that is busy with other requests. Knows no Ray and no
model.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Call(NamedTuple, Generic[Item, Answer]):
    """An item, and what waits for its answer."""

    item: Item
    future: asyncio.Future[Answer]


def _ignore(_size: int, _waiting: int) -> None:
    """Take note of nothing."""


class Batcher(Generic[Item, Answer]):
    """Runs `work` on one batch at a time, in a thread of its own, for calls of one event loop."""

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
            on_batch: told the size of each batch, and how many items wait for the next one, in the
                thread that works.
        """
        self._waiting: SimpleQueue[_Call[Item, Answer] | None] = SimpleQueue()
        worker = _Worker(work, largest, on_batch, self._waiting)
        threading.Thread(target=worker.run, name="batcher", daemon=True).start()
        # the thread holds the worker and not this object, so that it ends with this object
        weakref.finalize(self, self._waiting.put, None)

    async def __call__(self, item: Item) -> Answer:
        """Answer one item; raises what `work` raises on it."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put(_Call(item, future))
        return await future

    @property
    def num_waiting(self) -> int:
        """Items that are not worked on yet."""
        return self._waiting.qsize()


class _Worker(Generic[Item, Answer]):
    """What the thread of a batcher does."""

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Answer]],
        largest: int,
        on_batch: Callable[[int, int], None],
        waiting: SimpleQueue[_Call[Item, Answer] | None],
    ) -> None:
        """Answer what `waiting` holds until a None."""
        self._work, self._largest, self._on_batch = work, largest, on_batch
        self._waiting = waiting

    def run(self) -> None:
        """Work off one batch after the other."""
        while (first := self._waiting.get()) is not None:
            batch = [call for call in [first, *self._others()] if not call.future.done()]
            if batch:
                self._on_batch(len(batch), self._waiting.qsize())
                self._answer(batch)

    def _others(self) -> list[_Call[Item, Answer]]:
        """Take what waits besides the first, as far as a batch goes."""
        found: list[_Call[Item, Answer]] = []
        with suppress(Empty):
            while len(found) < self._largest - 1:
                call = self._waiting.get_nowait()
                if call is None:
                    self._waiting.put(None)  # after this batch
                    break
                found.append(call)
        return found

    def _answer(self, batch: Sequence[_Call[Item, Answer]]) -> None:
        try:
            answers = self._work([call.item for call in batch])
            answered = list(zip(batch, answers, strict=True))
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            if len(batch) == 1:
                _at_loop(batch[0].future, _fail, batch[0].future, error)
            else:
                for call in batch:
                    self._answer([call])
            return
        _at_loop(batch[0].future, _settle, answered)


def _at_loop(future: asyncio.Future[Answer], tell: Callable[..., None], *args: object) -> None:
    """Call `tell` in the event loop of a future."""
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        future.get_loop().call_soon_threadsafe(tell, *args)


def _settle(answered: Sequence[tuple[_Call[Item, Answer], Answer]]) -> None:
    for call, answer in answered:
        if not call.future.done():  # or given up
            call.future.set_result(answer)


def _fail(future: asyncio.Future[Answer], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
