"""Advisory file locks, which the kernel releases when a process ends, even if it is killed."""

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
    """A lock on a file, which is created if it is missing.

    Two objects exclude each other even within one process. Not reentrant.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` without locking it."""
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, *, shared: bool = False, timeout_s: float | None = 0.0) -> bool:
        """Take the lock; return whether this succeeded.

        Args:
            shared: allow other shared locks at the same time, but no exclusive one.
            timeout_s: how long to wait; None waits without limit.
        """
        # `flock` and not `lockf`, whose locks belong to the process, so that two stores in one
        # process would not exclude each other.
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        if timeout_s is None:
            fcntl.flock(self._handle, mode)
            return True
        # The system call has no time limit, so it is tried again and again.
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
        """Release the lock. Does nothing if it is not held."""
        fcntl.flock(self._handle, fcntl.LOCK_UN)

    @property
    def is_current(self) -> bool:
        """Whether the open file is still at its path, and was not deleted, replaced or moved."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return False

    def close(self) -> None:
        """Release the lock and close the file. A second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> FileLock:
        """Return the lock itself; the end of the block closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the lock."""
        self.close()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the exclusive lock on `path` during a block; wait for it without limit."""
    with FileLock(path) as lock:
        lock.acquire(timeout_s=None)
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the exclusive lock."""
    # A shared lock, so that processes that ask at the same time do not see each other.
    with FileLock(path) as lock:
        return not lock.acquire(shared=True)
