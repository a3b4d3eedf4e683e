"""Keeps an `ExactIndex` in step with the journal of its version, whoever writes to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from reir.records import FloatArray
from reir.store.checks import check_dim
from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.exact import ExactIndex
from reir.store.filters import Filter
from reir.store.journal import FIRST_FRAME, Journal, JournalDamagedError, live_changes
from reir.store.locks import FileLock

COMPACT_ABOVE_ROWS = 4096

logger = logging.getLogger(__name__)


class JournalFollower:
    """Exact search over one version; each search sees all that was acknowledged before it."""

    def __init__(self, path: Path, lock: Path, rebuild: Callable[[], int]) -> None:
        """Follow the journal at `path`.

        Args:
            path: the journal.
            lock: the version's write lock.
            rebuild: writes the journal from the store of record if it is missing, and returns
                the version's dimension; raises `GalleryNotFound` when there is no such version.
        """
        self._path = path
        self._lock = lock
        self._rebuild = rebuild
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
            self._catch_up()
        except JournalDamagedError as error:
            logger.warning("%s; it is written anew from the store", error)
            self._drop()
            self._path.unlink(missing_ok=True)
            self._catch_up()

    def _catch_up(self) -> None:
        journal = self._journal
        if journal is None or not journal.is_current:
            journal = self._open()
        if journal.size == self._offset:
            return
        for frame in journal.read(self._offset):
            self._index.apply(frame)
            self._offset = frame.end
        if self._index.num_dead > max(len(self._index), COMPACT_ABOVE_ROWS) and self._compact():
            self._catch_up()

    def _open(self) -> Journal:
        self._drop()
        dim = self._rebuild()
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
