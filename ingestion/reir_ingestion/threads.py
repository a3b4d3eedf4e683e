"""Helpers for threads: a background writer, a background thread, and cores shared by threads."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

MAX_WAITING = 2
"""Number of batches that may wait for the writer. With only one, the writer would be idle while the
next batch is made."""

Batch = TypeVar("Batch")


class BackgroundWriter(Generic[Batch]):
    """Passes batches to `write` in a thread of its own; use it as a context manager.

    At most `MAX_WAITING` batches wait. If `write` raises an error, the caller gets it from a later
    `put` or at the end of the `with` block. If the block itself ends with an error, the waiting
    batches are dropped, because the next run makes them again.
    """

    def __init__(self, write: Callable[[Batch], None]) -> None:
        """Call `write` for each batch, one at a time and in order."""
        self._write = write
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reir-write")
        self._waiting: deque[Future[None]] = deque()

    def put(self, batch: Batch) -> None:
        """Queue a batch; blocks while too many wait."""
        while len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, batch))

    def __enter__(self) -> BackgroundWriter[Batch]:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for all batches; after an error, only for the one that is being written."""
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def background_thread(name: str, work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread while the `with` block runs.

    When the block ends, the event that `work` gets is set, and the thread is waited for.
    """
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def share_cores(num_threads: int) -> Iterator[None]:
    """Limit torch to a fair share of the cores in each of `num_threads` threads."""
    # Importing torch takes seconds; an encoder that does not use it should not pay for that.
    torch = sys.modules.get("torch")
    if torch is None or num_threads == 1:
        yield
        return
    before = torch.get_num_threads()
    # Otherwise every thread would start as many torch threads as there are cores, and they would
    # slow each other down. The setting also applies to threads that start later.
    torch.set_num_threads(max(1, before // num_threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)
