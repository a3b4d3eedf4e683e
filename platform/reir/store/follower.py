"""Keeps an `ExactIndex` in step with the journal of its version, whoever writes to it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from reir.records import FloatArray
from reir.store.checks import check_dim
from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.exact import ExactIndex
from reir.store.filters import Filter
from reir.store.journal import FIRST_FRAME, Journal, JournalDamagedError, live_changes
from reir.store.locks import FileLock

COMPACT_ABOVE_ROWS = 4096


class Upstream(Protocol):
    """The store of record behind a journal."""

    def prepare(self) -> int:
        """Build the journal if it is missing, and return the dimension of its vectors.

        Raises:
            GalleryNotFound: there is no such version.
        """
        ...

    def check(self) -> None:
        """Compare the journal with the store if it has no valid stamp.

        Raises:
            JournalDamagedError: its photos are not those of the store.
        """
        ...

    def repair(self, why: str) -> None:
        """Rebuild the journal with a warning, unless another process has in the meantime."""
        ...


class JournalFollower:
    """Exact search over one version; a search sees every write acknowledged before it."""

    def __init__(self, path: Path, lock: Path, upstream: Upstream) -> None:
        """Follow the journal at `path`; `lock` is the version's write lock."""
        self._path = path
        self._lock = lock
        self._upstream = upstream
        self._mutex = threading.Lock()
        self._journal: Journal | None = None
        self._index = ExactIndex(1)
        self._offset = FIRST_FRAME

    def search(
        self, queries: FloatArray, limit: int, tree: Filter | None, version: str
    ) -> Sequence[Sequence[InstanceRow]]:
        """The `limit` instances of largest inner product for each of the (Q, D) queries."""
        with self._mutex:
            self._refresh()
            check_dim(queries.shape[1], self._index.dim, version)
            selection = self._index.select(tree)
        return selection.search(queries, limit)

    def photos(self, image_ids: Sequence[str]) -> dict[str, StoredPhoto]:
        """Those of the images that have instances."""
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
            self._drop()

    def _refresh(self) -> None:
        try:
            if self._catch_up():
                self._upstream.check()
        except JournalDamagedError as error:
            self._drop()
            self._upstream.repair(str(error))
            self._catch_up()

    def _catch_up(self) -> bool:
        """Read new frames; return whether the journal was opened (for the first time or again)."""
        journal = self._journal
        is_new = journal is None or not journal.is_current
        if journal is None or is_new:
            journal = self._open()
        elif journal.size == self._offset:
            return False
        for frame in journal.read(self._offset):
            self._index.apply(frame)
            self._offset = frame.end
        if self._index.num_dead > max(len(self._index), COMPACT_ABOVE_ROWS) and self._compact():
            self._catch_up()
        return is_new

    def _open(self) -> Journal:
        self._drop()
        dim = self._upstream.prepare()
        self._journal = Journal(self._path, dim)
        self._index = ExactIndex(dim)
        return self._journal

    def _drop(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal, self._index, self._offset = None, ExactIndex(1), FIRST_FRAME

    def _compact(self) -> bool:
        """Rewrite the journal without what was replaced, unless a writer is busy just now."""
        with FileLock(self._lock) as lock:
            journal = self._journal
            if journal is None or not lock.acquire() or not journal.is_current:
                return False
            Journal.create(self._path, self._index.dim, live_changes(journal))
            return True
