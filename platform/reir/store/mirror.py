"""What the embedded store keeps beside Milvus Lite: write locks, journals, and their readers."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from reir.errors import FREE_SPACE, StoreError
from reir.records import FloatArray, IndexedImage
from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.filters import Filter
from reir.store.follower import JournalFollower
from reir.store.journal import Change, Journal, JournalDamagedError, delete_change, put_change
from reir.store.locks import exclusive

Source = Callable[[], tuple[int, Iterable[Change]]]
"""Dimension of a version, and the changes that hold all of it, from the store of record."""


class Mirror:
    """Journals of all versions of one embedded store, by the name of the instances collection."""

    def __init__(self, directory: Path) -> None:
        """Use `directory`, creating it."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._followers: dict[str, JournalFollower] = {}
        self._writers: dict[str, Journal] = {}
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def writing(self, collection: str) -> Iterator[None]:
        """Hold the version's write lock: one writer at a time, so that all orders agree."""
        with exclusive(self._lock(collection)):
            yield

    def create(self, collection: str, dim: int) -> None:
        """Begin an empty journal; the caller is `writing`."""
        Journal.create(self._path(collection), dim)

    def drop(self, collection: str) -> None:
        """Delete the journal; the caller is `writing`."""
        Journal.remove(self._path(collection))

    def put(self, collection: str, dim: int, images: Iterable[IndexedImage]) -> None:
        """Note that images were written; the caller is `writing`."""
        self._append(collection, dim, put_change(images, dim))

    def delete(self, collection: str, dim: int, image_ids: Sequence[str]) -> None:
        """Note that images were deleted; the caller is `writing`."""
        self._append(collection, dim, delete_change(image_ids, dim))

    def search(
        self,
        collection: str,
        source: Source,
        query: tuple[FloatArray, int, Filter | None],
        version: str,
    ) -> Sequence[Sequence[InstanceRow]]:
        """Search the version exactly; `query` is vectors, limit and filter."""
        return self._follower(collection, source).search(*query, version)

    def photos(
        self, collection: str, source: Source, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """Those of the images that have instances."""
        return self._follower(collection, source).photos(image_ids)

    def count(self, collection: str, source: Source) -> int:
        """Number of instances; who does not search the version reads none of their numbers."""
        if collection not in self._followers:
            try:
                with contextlib.closing(Journal(self._path(collection), source()[0])) as journal:
                    return sum(journal.sizes().values())
            except (FileNotFoundError, JournalDamagedError):
                pass  # a follower writes it anew
        return self._follower(collection, source).count()

    def close(self) -> None:
        """Close every journal."""
        for follower in self._followers.values():
            follower.close()
        for writer in self._writers.values():
            writer.close()
        self._followers.clear()
        self._writers.clear()

    def _follower(self, collection: str, source: Source) -> JournalFollower:
        with self._mutex:
            if collection not in self._followers:
                self._followers[collection] = JournalFollower(
                    self._path(collection),
                    self._lock(collection),
                    lambda: self._prepare(collection, source),
                )
            return self._followers[collection]

    def _append(self, collection: str, dim: int, change: Change) -> None:
        """Add a change; a journal that is missing or damaged is left for a reader to write anew."""
        path = self._path(collection)
        try:
            self._writer(collection, dim).append(change)
        except FileNotFoundError:
            return
        except JournalDamagedError:
            Journal.remove(path)
        except OSError as error:
            hint = f"; {FREE_SPACE}" if error.errno == errno.ENOSPC else ""
            raise StoreError(f"journal {path} cannot be written: {error.strerror}{hint}") from error

    def _writer(self, collection: str, dim: int) -> Journal:
        """The journal as it is now, kept open so that no write has to find its end again."""
        journal = self._writers.get(collection)
        if journal is None or not journal.is_current:
            if journal is not None:
                self._writers.pop(collection).close()
            journal = self._writers[collection] = Journal(self._path(collection), dim)
        return journal

    def _prepare(self, collection: str, source: Source) -> int:
        """Write the journal if it is missing; returns the dimension of its vectors."""
        dim, changes = source()
        path = self._path(collection)
        if not path.exists():
            with self.writing(collection):
                if not path.exists():
                    Journal.create(path, dim, changes)
        return dim

    def _path(self, collection: str) -> Path:
        return self._directory / f"{collection}.journal"

    def _lock(self, collection: str) -> Path:
        return self._directory / f"{collection}.lock"
