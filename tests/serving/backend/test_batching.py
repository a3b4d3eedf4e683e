"""Calls that queue up are answered in one batch, single calls at once; each gets its own answer."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Sequence

import pytest

from reir_serving.backend.batching import Batcher


def doubled(items: Sequence[int]) -> list[int]:
    if any(item < 0 for item in items):
        raise ValueError(f"no negative numbers, got {list(items)}")
    return [2 * item for item in items]


def one_too_few(items: Sequence[int]) -> list[int]:
    return doubled(items)[1:]


class Gate:
    """Work that waits until a test opens the gate."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[list[int]] = []

    def work(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.open.wait(10)
        return doubled(items)


async def ask_while_busy(gate: Gate, batcher: Batcher[int, int], items: Sequence[int]) -> list[int]:
    """Send a first item alone, and the others while it is processed."""
    calls = [asyncio.create_task(batcher(items[0]))]
    while not gate.batches:
        await asyncio.sleep(0)
    calls += [asyncio.create_task(batcher(item)) for item in items[1:]]
    await asyncio.sleep(0)
    gate.open.set()
    return await asyncio.gather(*calls)


def test_calls_that_arrive_during_a_batch_form_the_next_one() -> None:
    gate, sizes = Gate(), []
    batcher = Batcher(gate.work, max_batch_size=3, on_batch=lambda *size: sizes.append(size))
    answers = asyncio.run(ask_while_busy(gate, batcher, [1, 2, 3, 4, 5]))
    assert answers == [2, 4, 6, 8, 10]
    assert gate.batches == [[1], [2, 3, 4], [5]]
    assert sizes == [(1, 0), (3, 1), (1, 0)]


def test_a_bad_item_makes_no_other_call_fail() -> None:
    async def ask() -> list[int | BaseException]:
        batcher = Batcher(doubled, max_batch_size=8)
        return await asyncio.gather(*map(batcher, [1, -1, 3]), return_exceptions=True)

    good, bad, other = asyncio.run(ask())
    assert (good, other) == (2, 6)
    assert isinstance(bad, ValueError)
    assert str(bad) == "no negative numbers, got [-1]"


def test_canceled_calls_are_not_processed() -> None:
    gate = Gate()

    async def ask() -> list[int]:
        batcher = Batcher(gate.work, max_batch_size=8)
        first = asyncio.create_task(batcher(1))
        while not gate.batches:
            await asyncio.sleep(0)
        canceled, kept = asyncio.create_task(batcher(2)), asyncio.create_task(batcher(3))
        await asyncio.sleep(0)
        canceled.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await canceled
        return [await first, await kept]

    assert asyncio.run(ask()) == [2, 6]
    assert gate.batches == [[1], [3]]


async def ask_one(batcher: Batcher[int, int], item: int) -> int:
    return await batcher(item)


def test_the_worker_continues_after_an_idle_time() -> None:
    async def ask() -> list[int]:
        batcher = Batcher(doubled, max_batch_size=8)
        return [await batcher(1), await batcher(2)]

    assert asyncio.run(ask()) == [2, 4]


def test_calls_fail_if_the_work_returns_too_few_answers() -> None:
    async def ask() -> list[int | BaseException]:
        batcher = Batcher(one_too_few, max_batch_size=8)
        return await asyncio.gather(*map(batcher, [1, 2]), return_exceptions=True)

    assert all(isinstance(answer, ValueError) for answer in asyncio.run(ask()))


class Owner:
    """Has a batcher whose work is a method of it."""

    def __init__(self) -> None:
        self.batcher = Batcher(self.doubled, max_batch_size=8)

    def doubled(self, items: Sequence[int]) -> list[int]:
        return doubled(items)


def test_the_thread_ends_with_the_owner_of_its_batcher() -> None:
    before = set(threading.enumerate())
    owner = Owner()
    assert asyncio.run(ask_one(owner.batcher, 1)) == 2
    (thread,) = set(threading.enumerate()) - before
    del owner
    # The thread may still hold the batcher for a moment after the answer has arrived.
    give_up_s = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < give_up_s:
        gc.collect()
        thread.join(0.1)
    assert not thread.is_alive()
