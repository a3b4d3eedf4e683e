"""The background writer: order, bounded queue, errors."""

from __future__ import annotations

import threading

import pytest

from reir.errors import StoreError
from reir_ingestion.threads import MAX_WAITING, BackgroundWriter


def test_all_batches_are_written_in_order_before_the_block_ends() -> None:
    written: list[int] = []
    with BackgroundWriter(written.append) as writer:
        for number in range(50):
            writer.put(number)
    assert written == list(range(50))


def test_put_returns_before_the_write_and_blocks_when_the_queue_is_full() -> None:
    gate = threading.Event()
    written: list[int] = []

    def write(number: int) -> None:
        assert gate.wait(10)
        written.append(number)

    with BackgroundWriter(write) as writer:
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


def fail(number: int) -> None:
    raise StoreError(f"batch {number}")


def write_all(writer: BackgroundWriter[int], count: int) -> None:
    with writer:
        for number in range(count):
            writer.put(number)


@pytest.mark.parametrize("count", [1, MAX_WAITING + 1, 20])
def test_an_error_is_raised_at_a_later_put_or_at_the_end(count: int) -> None:
    with pytest.raises(StoreError, match="batch 0"):
        write_all(BackgroundWriter(fail), count)


def test_an_error_in_the_block_drops_the_waiting_batches_and_is_raised() -> None:
    gate = threading.Event()
    written: list[int] = []

    def write(number: int) -> None:
        gate.wait(10)
        written.append(number)

    def run() -> None:
        with BackgroundWriter(write) as writer:
            writer.put(0)
            writer.put(1)
            threading.Timer(0.05, gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == [0]
