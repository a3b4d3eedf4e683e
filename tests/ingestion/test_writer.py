"""Writing in a thread: order, bound, errors, patience."""

from __future__ import annotations

import threading

import pytest

from reir.errors import StoreError, StoreUnavailable
from reir_ingestion.writer import MAX_WAITING, RETRY_AFTER_S, Writer, patiently


def test_batches_are_written_in_order_and_all_before_the_end() -> None:
    written: list[int] = []
    with Writer(written.append) as writer:
        for number in range(50):
            writer.put(number)
    assert written == list(range(50))


def test_writing_overlaps_and_the_queue_is_bounded() -> None:
    gate = threading.Event()
    written: list[int] = []

    def write(number: int) -> None:
        assert gate.wait(10)
        written.append(number)

    with Writer(write) as writer:
        for number in range(MAX_WAITING):
            writer.put(number)  # returns although nothing can be written
        assert written == []
        blocked = threading.Thread(target=writer.put, args=(MAX_WAITING,))
        blocked.start()
        blocked.join(0.1)
        assert blocked.is_alive()
        gate.set()
        blocked.join(10)
        assert not blocked.is_alive()
    assert written == list(range(MAX_WAITING + 1))


def refuse(number: int) -> None:
    raise StoreError(f"batch {number}")


def write_all(writer: Writer[int], count: int) -> None:
    with writer:
        for number in range(count):
            writer.put(number)


@pytest.mark.parametrize("count", [1, MAX_WAITING + 1, 20])
def test_a_failure_is_raised_at_a_later_put_or_at_the_end(count: int) -> None:
    with pytest.raises(StoreError, match="batch 0"):
        write_all(Writer(refuse), count)


def test_after_an_error_waiting_batches_are_dropped_and_the_error_stays() -> None:
    gate = threading.Event()
    written: list[int] = []

    def write(number: int) -> None:
        gate.wait(10)
        written.append(number)

    def run() -> None:
        with Writer(write) as writer:
            writer.put(0)
            writer.put(1)
            threading.Timer(0.05, gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == [0]


class Flaky:
    """Cannot be reached for the first `failures` calls."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def __call__(self) -> str:
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("milvus:19530", "connection refused")
        return "answer"


@pytest.mark.parametrize("failures", [0, 1, len(RETRY_AFTER_S)])
def test_patience_with_a_store_that_comes_back(failures: int) -> None:
    pauses: list[float] = []
    assert patiently(Flaky(failures), sleep=pauses.append) == "answer"
    assert pauses == list(RETRY_AFTER_S[:failures])


def test_patience_ends_with_the_address() -> None:
    pauses: list[float] = []
    with pytest.raises(StoreUnavailable, match="milvus:19530"):
        patiently(Flaky(len(RETRY_AFTER_S) + 1), sleep=pauses.append)
    assert pauses == list(RETRY_AFTER_S)


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def refuse_once() -> None:
        calls.append(1)
        raise StoreError("no such collection")

    with pytest.raises(StoreError, match="no such collection"):
        patiently(refuse_once, sleep=lambda _: pytest.fail("must not wait"))
    assert calls == [1]
