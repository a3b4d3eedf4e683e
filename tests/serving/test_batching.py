"""Calls are answered together when work queues up, alone when it does not, each with its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from reir_serving.batching import Batcher


def doubled(items: Sequence[int]) -> list[int]:
    if any(item < 0 for item in items):
        raise ValueError(f"no negative numbers, got {list(items)}")
    return [2 * item for item in items]


def one_too_few(items: Sequence[int]) -> list[int]:
    return doubled(items)[1:]


class Gate:
    """Work that waits until it is let through."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[list[int]] = []

    def work(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.open.wait(10)
        return doubled(items)


async def ask_while_busy(gate: Gate, batcher: Batcher[int, int], items: Sequence[int]) -> list[int]:
    """Ask a first item alone, the others while it is worked on."""
    calls = [asyncio.create_task(batcher(items[0]))]
    while not gate.batches:
        await asyncio.sleep(0)
    calls += [asyncio.create_task(batcher(item)) for item in items[1:]]
    await asyncio.sleep(0)
    gate.open.set()
    return await asyncio.gather(*calls)


def test_what_arrives_meanwhile_is_the_next_batch() -> None:
    gate, told = Gate(), []
    batcher = Batcher(gate.work, largest=3, on_batch=lambda *sizes: told.append(sizes))
    answers = asyncio.run(ask_while_busy(gate, batcher, [1, 2, 3, 4, 5]))
    assert answers == [2, 4, 6, 8, 10]
    assert gate.batches == [[1], [2, 3, 4], [5]]
    assert told == [(1, 0), (3, 1), (1, 0)]


def test_a_bad_item_fails_alone() -> None:
    async def ask() -> list[int | BaseException]:
        batcher = Batcher(doubled, largest=8)
        return await asyncio.gather(*map(batcher, [1, -1, 3]), return_exceptions=True)

    good, bad, other = asyncio.run(ask())
    assert (good, other) == (2, 6)
    assert isinstance(bad, ValueError)
    assert str(bad) == "no negative numbers, got [-1]"


def test_calls_that_were_given_up_are_not_worked_on() -> None:
    gate = Gate()

    async def ask() -> list[int]:
        batcher = Batcher(gate.work, largest=8)
        first = asyncio.create_task(batcher(1))
        while not gate.batches:
            await asyncio.sleep(0)
        given_up, kept = asyncio.create_task(batcher(2)), asyncio.create_task(batcher(3))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        return [await first, await kept]

    assert asyncio.run(ask()) == [2, 6]
    assert gate.batches == [[1], [3]]


async def ask_one(batcher: Batcher[int, int], item: int) -> int:
    return await batcher(item)


def test_it_goes_on_after_a_pause() -> None:
    async def ask() -> list[int]:
        batcher = Batcher(doubled, largest=8)
        return [await batcher(1), await batcher(2)]

    assert asyncio.run(ask()) == [2, 4]


def test_work_that_loses_an_answer_fails_its_calls() -> None:
    async def ask() -> list[int | BaseException]:
        batcher = Batcher(one_too_few, largest=8)
        return await asyncio.gather(*map(batcher, [1, 2]), return_exceptions=True)

    assert all(isinstance(answer, ValueError) for answer in asyncio.run(ask()))


def test_the_thread_ends_with_its_batcher() -> None:
    before = set(threading.enumerate())
    batcher = Batcher(doubled, largest=8)
    assert asyncio.run(ask_one(batcher, 1)) == 2
    (thread,) = set(threading.enumerate()) - before
    del batcher
    thread.join(10)
    assert not thread.is_alive()
