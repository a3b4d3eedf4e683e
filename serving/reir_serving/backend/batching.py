"""`Batcher`: calls that arrive while a batch is processed form the next batch.

No call waits for others to fill a batch: a single call starts at once, and batches grow only if
calls queue up. `ray.serve.batch` forms a batch before a worker is free, so without a waiting time
(`batch_wait_timeout_s`) each call would become a batch of its own. The worker thread takes the next
batch from the queue itself, so it does not have to wait for an event loop that is busy with other
requests. This module depends neither on Ray nor on a model.
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
    """An item, and the future that receives its answer."""

    item: Item
    future: asyncio.Future[Answer]


class Batcher(Generic[Item, Answer]):
    """Runs `work` on one batch at a time, in its own thread, for calls from one event loop.

    The thread ends when the batcher is garbage collected.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Answer]],
        *,
        max_batch_size: int,
        on_batch: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Start the worker thread.

        Args:
            work: items -> one answer each, in the order given. If it raises, it is called again for
                each item alone, so that a bad item makes no other call fail.
            max_batch_size: maximum number of items in a batch.
            on_batch: called in the worker thread with the size of each batch, and how many items
                wait for the next one.
        """
        self._work, self._max_batch_size, self._on_batch = work, max_batch_size, on_batch
        self._waiting: SimpleQueue[_Call[Item, Answer]] = SimpleQueue()
        # An idle thread must not reference this object, nor `work`, which is often a method of the
        # object that owns this one. So each call tells the thread whose calls are waiting.
        self._called: SimpleQueue[Batcher[Item, Answer] | None] = SimpleQueue()
        arguments = (self._called,)
        threading.Thread(target=_answer_calls, args=arguments, name="batcher", daemon=True).start()
        weakref.finalize(self, self._called.put, None)

    async def __call__(self, item: Item) -> Answer:
        """Return the answer for one item; raises what `work` raises for it."""
        # The future belongs to the caller's event loop; the worker thread completes it there.
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put(_Call(item, future))
        self._called.put(self)
        return await future

    @property
    def num_waiting(self) -> int:
        """Number of items that wait for the next batch."""
        return self._waiting.qsize()

    def answer_batch(self) -> None:
        """Answer the calls that wait, up to the size of a batch; none if a batch took them all."""
        batch: list[_Call[Item, Answer]] = []
        with suppress(Empty):
            while len(batch) < self._max_batch_size:
                call = self._waiting.get_nowait()
                if not call.future.done():  # done if its caller has canceled it
                    batch.append(call)
        if batch:
            self._on_batch(len(batch), self._waiting.qsize())
            self._answer(batch)

    def _answer(self, batch: Sequence[_Call[Item, Answer]]) -> None:
        try:
            answers = self._work([call.item for call in batch])
            pairs = list(zip(batch, answers, strict=True))
        except Exception as error:  # noqa: BLE001 - the caller gets it
            if len(batch) == 1:
                _call_in_loop(batch[0].future, _set_exception, batch[0].future, error)
            else:
                # Nothing says which call is at fault, so each is tried by itself.
                for call in batch:
                    self._answer([call])
            return
        # One call into the event loop for the whole batch: each call wakes the loop's thread.
        _call_in_loop(batch[0].future, _set_results, pairs)


def _answer_calls(called: SimpleQueue[Batcher[Item, Answer] | None]) -> None:
    """Answer calls until the queue holds None; the worker thread runs this."""
    while _answer_call(called):
        pass


def _answer_call(called: SimpleQueue[Batcher[Item, Answer] | None]) -> bool:
    """Wait for a call and answer its batch; return False if there will be no more calls."""
    # A function of its own, whose end drops its reference to the batcher.
    if (batcher := called.get()) is not None:
        batcher.answer_batch()
    return batcher is not None


def _call_in_loop(
    future: asyncio.Future[Answer], function: Callable[..., None], *args: object
) -> None:
    """Call a function in the event loop of a future; futures are not safe to use in threads."""
    with suppress(RuntimeError):  # the loop is closed, so no caller waits any more
        future.get_loop().call_soon_threadsafe(function, *args)


def _set_results(pairs: Sequence[tuple[_Call[Item, Answer], Answer]]) -> None:
    for call, answer in pairs:
        if not call.future.done():  # done if the caller has canceled it
            call.future.set_result(answer)


def _set_exception(future: asyncio.Future[Answer], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
