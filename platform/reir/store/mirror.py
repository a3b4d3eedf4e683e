"""What the embedded store keeps beside Milvus Lite: write locks, journals, and their readers."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from reir.errors import FREE_SPACE, StoreError
from reir.records import FloatArray, IndexedImage
from reir.store.contract import InstanceRow
from reir.store.filters import Filter
from reir.store.follower import JournalFollower
from reir.store.journal import Journal, JournalDamagedError, delete_frame, put_frame
from reir.store.locks import exclusive

Source = Callable[[], tuple[int, Iterable[bytes]]]
"""Dimension of a version, and the frames that hold all of it, from the store of record."""


class Mirror:
    """Journals of all versions of one embedded store, by the name of the instances collection."""

    def __init__(self, directory: Path) -> None:
        """Use `directory`, creating it."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._followers: dict[str, JournalFollower] = {}
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def writing(self, collection: str) -> Iterator[None]:
        """Hold the version's write lock: one writer at a time, so that all orders agree."""
        with exclusive(self._lock(collection)):
            yield

    def create(self, collection: str) -> None:
        """Begin an empty journal; the caller is `writing`."""
        Journal.create(self._path(collection))

    def drop(self, collection: str) -> None:
        """Delete the journal; the caller is `writing`."""
        self._path(collection).unlink(missing_ok=True)

    def put(self, collection: str, dim: int, images: Iterable[IndexedImage]) -> None:
        """Note that images were written; the caller is `writing`."""
        self._append(collection, dim, put_frame(images))

    def delete(self, collection: str, dim: int, image_ids: Sequence[str]) -> None:
        """Note that images were deleted; the caller is `writing`."""
        self._append(collection, dim, delete_frame(image_ids))

    def search(
        self,
        collection: str,
        source: Source,
        query: tuple[FloatArray, int, Filter | None],
        version: str,
    ) -> list[list[InstanceRow]]:
        """Search the version exactly; `query` is vectors, limit and filter."""
        return self._follower(collection, source).search(*query, version)

    def close(self) -> None:
        """Close every journal."""
        for follower in self._followers.values():
            follower.close()
        self._followers.clear()

    def _follower(self, collection: str, source: Source) -> JournalFollower:
        with self._mutex:
            if collection not in self._followers:
                self._followers[collection] = JournalFollower(
                    self._path(collection),
                    self._lock(collection),
                    lambda: self._prepare(collection, source),
                )
            return self._followers[collection]

    def _append(self, collection: str, dim: int, frame: bytes) -> None:
        """Add a frame; a journal that is missing or damaged is left for a reader to write anew."""
        path = self._path(collection)
        try:
            with contextlib.closing(Journal(path, dim)) as journal:
                journal.append(frame)
        except FileNotFoundError:
            return
        except JournalDamagedError:
            path.unlink()
        except OSError as error:
            hint = f"; {FREE_SPACE}" if error.errno == errno.ENOSPC else ""
            raise StoreError(f"journal {path} cannot be written: {error.strerror}{hint}") from error

    def _prepare(self, collection: str, source: Source) -> int:
        """Write the journal if it is missing; returns the dimension of its vectors."""
        dim, frames = source()
        path = self._path(collection)
        if not path.exists():
            with self.writing(collection):
                if not path.exists():
                    Journal.create(path, frames)
        return dim

    def _path(self, collection: str) -> Path:
        return self._directory / f"{collection}.journal"

    def _lock(self, collection: str) -> Path:
        return self._directory / f"{collection}.lock"
