"""The parallel map: order, bounds, errors, early end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from reir_ingestion.parallel_map import Bounds, ParallelMap


def squares(
    items: Iterator[int], bounds: Bounds, work: object = None, size: int = 1
) -> ParallelMap[int, int]:
    return ParallelMap(items, work if callable(work) else square, lambda _: size, bounds)


def square(number: int) -> int:
    time.sleep((number * 7 % 5) / 5000)  # later items are often done first
    return number * number


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("max_items", [1, 3, 100])
@pytest.mark.parametrize("max_bytes", [0, 3, 1000])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_results_equal_those_of_a_plain_loop(
    num_threads: int, max_items: int, max_bytes: int, count: int
) -> None:
    with squares(iter(range(count)), Bounds(num_threads, max_items, max_bytes)) as results:
        assert list(results) == [number * number for number in range(count)]


def test_no_more_items_are_drawn_than_max_items_allows() -> None:
    drawn = []
    given = 0

    def items() -> Iterator[int]:
        for number in range(60):
            drawn.append(number)
            assert number - given < 5
            yield number

    with squares(items(), Bounds(4, 5, 1000)) as results:
        for number, _ in enumerate(results):
            given = number + 1
            time.sleep(0.001)
    assert drawn == list(range(60))


def test_no_item_is_drawn_while_too_many_bytes_wait() -> None:
    drawn = threading.Semaphore(0)
    num_drawn = 0

    def items() -> Iterator[int]:
        nonlocal num_drawn
        for number in range(20):
            num_drawn += 1
            drawn.release()
            yield number

    with squares(items(), Bounds(1, 100, 250), size=100) as results:
        for _ in range(3):
            assert drawn.acquire(timeout=10)
        assert not drawn.acquire(timeout=0.2)  # 300 bytes wait, more than 250
        assert num_drawn == 3
        assert len(list(results)) == 20


def test_an_item_larger_than_max_bytes_is_processed() -> None:
    with squares(iter(range(9)), Bounds(3, 10, 10), size=10**9) as results:
        assert len(list(results)) == 9


def test_work_runs_in_several_threads_at_once() -> None:
    together = threading.Barrier(3, timeout=10)

    def wait_for_the_others(number: int) -> int:
        together.wait()
        return number

    with squares(iter(range(6)), Bounds(3, 6, 100), wait_for_the_others) as results:
        assert list(results) == list(range(6))


def fail_at_five(number: int) -> int:
    if number == 5:
        raise KeyError("five")
    return number


def failing_items() -> Iterator[int]:
    yield from range(5)
    raise KeyError("five")


@pytest.mark.parametrize("num_threads", [1, 4])
def test_errors_are_raised_to_the_consumer(num_threads: int) -> None:
    seen: list[int] = []
    with (
        squares(iter(range(50)), Bounds(num_threads, 4, 99), fail_at_five) as results,
        pytest.raises(KeyError, match="five"),
    ):
        seen.extend(results)
    assert seen == [0, 1, 2, 3, 4]
    with (
        squares(failing_items(), Bounds(num_threads, 4, 99)) as results,
        pytest.raises(KeyError, match="five"),
    ):
        list(results)


def test_the_threads_end_when_the_consumer_leaves_early() -> None:
    before = threading.active_count()
    with squares(iter(range(10**9)), Bounds(4, 8, 100)) as results:
        assert next(iter(results)) == 0
    assert threading.active_count() == before


def test_bounds_below_one_raise() -> None:
    with pytest.raises(ValueError, match="must be 1 or more, got 0 and 5"):
        Bounds(0, 5, 5)
