"""`JournalReader`: searches one version, after it has read what is new in its journal.

Any process may append to the journal or replace it. Reading what is new costs almost nothing if
there is nothing new, so every search starts with it, and sees every write acknowledged before it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from reir.records import FloatArray
from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.embedded.exact_index import ExactIndex
from reir.store.embedded.journal import FIRST_FRAME, Journal, JournalDamagedError, live_changes
from reir.store.embedded.locks import FileLock
from reir.store.filters import Filter
from reir.store.validation import check_dim

COMPACT_ABOVE_ROWS = 4096
"""Smaller journals are not compacted, however many of their rows are dead: it would save little."""


class JournalMaintainer(Protocol):
    """Builds, verifies and repairs a journal, from the version in Milvus Lite."""

    def ensure_journal(self) -> int:
        """Build the journal if it is missing, and return the dimension of its vectors.

        Raises:
            GalleryNotFound: there is no such version.
        """
        ...

    def verify(self) -> None:
        """Compare the journal with the store, unless a valid stamp says that it is complete.

        Raises:
            JournalDamagedError: its photos are not those of the store.
        """
        ...

    def repair(self, why: str) -> None:
        """Rebuild the journal with a warning, unless another process has done so meanwhile."""
        ...


class JournalReader:
    """Exact search over one version; safe to use from several threads."""

    def __init__(self, path: Path, lock: Path, maintainer: JournalMaintainer) -> None:
        """Read the journal at `path`; `lock` is the write lock of the version."""
        self._path = path
        self._lock = lock
        self._maintainer = maintainer
        self._mutex = threading.Lock()
        self._journal: Journal | None = None
        self._index = ExactIndex(1)  # stands in until the dimension is known
        self._offset = FIRST_FRAME
        self._compact_above = COMPACT_ABOVE_ROWS

    def search(
        self, queries: FloatArray, limit: int, tree: Filter | None, version: str
    ) -> Sequence[Sequence[InstanceRow]]:
        """The `limit` instances of largest inner product for each of the (Q, D) queries."""
        with self._mutex:
            self._refresh()
            check_dim(queries.shape[1], self._index.dim, version)
            selection = self._index.select(tree)
        # Outside the mutex, so that threads search at the same time.
        return selection.search(queries, limit)

    def photos(self, image_ids: Sequence[str]) -> dict[str, StoredPhoto]:
        """The images that have instances."""
        with self._mutex:
            self._refresh()
            return self._index.photos(image_ids)

    def count(self) -> int:
        """Number of instances."""
        with self._mutex:
            self._refresh()
            return len(self._index)

    def close(self) -> None:
        """Close the journal; a later search opens it again."""
        with self._mutex:
            self._close()

    def release_replaced(self) -> bool:
        """Close the journal if it was deleted or replaced; a later search opens it again.

        Does not wait for a search, which may itself wait for a lock of the caller.

        Returns:
            Whether the journal was closed.
        """
        if not self._mutex.acquire(blocking=False):
            return False
        try:
            is_replaced = self._journal is not None and not self._journal.is_current
            if is_replaced:
                self._close()
            return is_replaced
        finally:
            self._mutex.release()

    def _refresh(self) -> None:
        journal = self._journal
        if journal is not None and journal.is_current and journal.size == self._offset:
            return  # the usual case, which has to be fast
        try:
            self._update()
        except BaseException:
            self._close()  # so that the next search opens and verifies it again
            raise

    def _update(self) -> None:
        try:
            # Only when it was opened: a comparison with the store reads the whole ledger.
            if self._catch_up():
                self._maintainer.verify()
            if self._is_mostly_dead() and self._compact():
                self._catch_up()
        except JournalDamagedError as error:
            self._close()
            self._maintainer.repair(str(error))
            self._catch_up()

    def _catch_up(self) -> bool:
        """Apply new frames; return whether the journal was opened, for the first time or again."""
        journal = self._journal
        is_new = journal is None or not journal.is_current
        if journal is None or is_new:
            journal = self._open()
        for frame in journal.read(self._offset):
            self._index.apply(frame)
            self._offset = frame.end
        return is_new

    def _is_mostly_dead(self) -> bool:
        """Whether reads cost more than twice as much memory and time as necessary."""
        return self._index.num_dead > max(len(self._index), self._compact_above)

    def _open(self) -> Journal:
        self._close()
        dim = self._maintainer.ensure_journal()
        self._journal = Journal(self._path, dim)
        self._index = ExactIndex(dim)
        return self._journal

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal, self._index, self._offset = None, ExactIndex(1), FIRST_FRAME
        self._compact_above = COMPACT_ABOVE_ROWS

    def _compact(self) -> bool:
        """Rewrite the journal without dead rows; return whether that was done.

        Not done while a writer holds the lock, since the search that called this must not wait.
        """
        journal = self._journal
        if journal is None:
            return False
        try:
            with FileLock(self._lock) as lock:
                if not lock.acquire() or not journal.is_current:
                    return False
                # The stamp of the new journal would hide that frames are missing in this one.
                if not journal.has_valid_stamp:
                    return False
                Journal.create(self._path, self._index.dim, live_changes(journal))
        except OSError:
            # The search works without it. If the disk is full, each attempt fills it for a while,
            # so the next one is made only when there is more to gain.
            self._compact_above = 2 * self._index.num_dead
            return False
        return True
