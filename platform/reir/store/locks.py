"""Advisory file locks; the kernel releases them when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_POLL_S = 0.02


class FileLock:
    """A lock on a file that is created when missing.

    Every object is a holder of its own, also within one process. Not reentrant.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`; takes no lock yet."""
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, *, shared: bool = False, timeout_s: float | None = 0.0) -> bool:
        """Take the lock and return whether that worked.

        Args:
            shared: many shared holders go together, an exclusive one goes alone.
            timeout_s: how long to wait; None waits for as long as it takes.
        """
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        if timeout_s is None:
            fcntl.flock(self._handle, mode)
            return True
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self._handle, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_S)
            else:
                return True

    def release(self) -> None:
        """Let go of the lock; does nothing when it is not held."""
        fcntl.flock(self._handle, fcntl.LOCK_UN)

    @property
    def is_current(self) -> bool:
        """Whether the open file is still the one at its path: not deleted, replaced or moved."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the lock and of the file; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> FileLock:
        """Return the lock itself, to close it at the end of a block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the exclusive lock on `path` for a block, waiting for it as long as it takes."""
    with FileLock(path) as lock:
        lock.acquire(timeout_s=None)
        yield


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock exclusively."""
    with FileLock(path) as lock:
        return not lock.acquire(shared=True)
