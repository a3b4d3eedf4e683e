"""What the embedded store keeps beside Milvus Lite: write locks, journals, and their readers."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from reir.errors import FREE_SPACE, StoreError, StoreFull
from reir.records import FloatArray, IndexedImage
from reir.store.contract import InstanceRow, StoredPhoto
from reir.store.filters import Filter
from reir.store.follower import JournalFollower
from reir.store.journal import (
    Change,
    Journal,
    JournalDamagedError,
    JournalImage,
    delete_change,
    live_changes,
    put_change,
)
from reir.store.locks import exclusive
from reir.store.names import parse_instances_collection

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What a journal needs from its version in the store of record."""

    def dim(self) -> int:
        """Dimension of its vectors."""
        ...

    def difference(self, holders: Mapping[str, JournalImage]) -> str:
        """Describe how the photos of a journal differ from those in the store; "" if they agree.

        Args:
            holders: photos of the journal that have instances, by id.
        """
        ...

    def unfinished(self) -> Set[str]:
        """Ids of photos whose last write was interrupted, so that their instances are undefined."""
        ...

    def changes(self) -> Iterable[Change]:
        """The content of the whole version."""
        ...


class Mirror:
    """The journals of all versions of one embedded store, keyed by their instances collection."""

    def __init__(self, directory: Path) -> None:
        """Keep the journals in `directory`, which is created if it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._followers: dict[str, JournalFollower] = {}
        self._writers: dict[str, Journal] = {}
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def writing(self, collection: str) -> Iterator[None]:
        """Hold the version's write lock, so that store and journal see writes in the same order."""
        with exclusive(self._lock(collection)):
            yield

    def create(self, collection: str, dim: int) -> None:
        """Create an empty journal; the caller holds `writing`."""
        Journal.create(self._path(collection), dim)

    def drop(self, collection: str) -> None:
        """Delete the journal; the caller holds `writing`."""
        Journal.remove(self._path(collection))

    def put(self, collection: str, dim: int, images: Iterable[IndexedImage]) -> None:
        """Record that images were written; the caller holds `writing`."""
        self._append(collection, dim, put_change(images, dim))

    def delete(self, collection: str, dim: int, image_ids: Sequence[str]) -> None:
        """Record that images were deleted; the caller holds `writing`."""
        self._append(collection, dim, delete_change(image_ids, dim))

    def search(
        self,
        collection: str,
        source: Source,
        query: tuple[FloatArray, int, Filter | None],
        version: str,
    ) -> Sequence[Sequence[InstanceRow]]:
        """Search the version exactly; `query` is the vectors, the limit and the filter."""
        return self._follower(collection, source).search(*query, version)

    def photos(
        self, collection: str, source: Source, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """Return the photos of those images that have instances."""
        return self._follower(collection, source).photos(image_ids)

    def count(self, collection: str, source: Source) -> int:
        """Number of instances; their vectors are read only if this process searches the version."""
        if collection not in self._followers:
            with contextlib.suppress(
                FileNotFoundError, JournalDamagedError
            ):  # the follower rebuilds it
                upstream = self._upstream(collection, source)
                with contextlib.closing(Journal(upstream.path, source.dim())) as journal:
                    size = sum(image.num_instances for image in journal.images().values())
                upstream.check()
                return size
        return self._follower(collection, source).count()

    def compare(self, collection: str, source: Source) -> int:
        """Compare the journal with the store bit by bit, and rebuild it if they differ.

        Returns:
            Number of photos that differed.
        """
        upstream = self._upstream(collection, source)
        if not upstream.differing():
            return 0
        with self.writing(collection):  # compare again, with no writer in between
            differing = upstream.differing()
            if differing:
                upstream.rebuild(f"{differing} photos differ")
        return differing

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
                up = self._upstream(collection, source)
                self._followers[collection] = JournalFollower(up.path, up.lock, up)
            return self._followers[collection]

    def _append(self, collection: str, dim: int, change: Change) -> None:
        """Append a change; a missing or damaged journal is left for the next reader to rebuild."""
        path = self._path(collection)
        try:
            self._writer(collection, dim).append(change)
        except FileNotFoundError:
            return
        except JournalDamagedError:
            Journal.remove(path)
        except OSError as error:
            problem = f"journal {path} cannot be written: {error.strerror}"
            if error.errno == errno.ENOSPC:
                raise StoreFull(f"{problem}; {FREE_SPACE}") from error
            raise StoreError(problem) from error

    def _writer(self, collection: str, dim: int) -> Journal:
        """The current journal, kept open so that not every write has to find its end."""
        journal = self._writers.get(collection)
        if journal is None or not journal.is_current:
            if journal is not None:
                self._writers.pop(collection).close()
            journal = self._writers[collection] = Journal(
                self._path(collection), dim, to_write=True
            )
        return journal

    def _upstream(self, collection: str, source: Source) -> _Upstream:
        return _Upstream(collection, self._path(collection), self._lock(collection), source)

    def _path(self, collection: str) -> Path:
        return self._directory / f"{collection}.journal"

    def _lock(self, collection: str) -> Path:
        return self._directory / f"{collection}.lock"


@dataclass(frozen=True)
class _Upstream:
    """The store behind one journal; see `follower.Upstream`."""

    collection: str
    path: Path
    lock: Path
    source: Source

    def prepare(self) -> int:
        """Build the journal if it is missing; return the dimension of its vectors."""
        dim = self.source.dim()
        if not self.path.exists():
            with exclusive(self.lock):
                if not self.path.exists():
                    self.rebuild("it was missing")
        return dim

    def check(self) -> None:
        """Compare the journal with the ledger if it has no valid stamp.

        This takes the write lock, since a writer may have written one of the two but not the other.
        """
        if self._has_valid_stamp():
            return
        with exclusive(self.lock):
            if not self._has_valid_stamp():  # a writer may just have written it
                self._check_photos()

    def repair(self, why: str) -> None:
        """Rebuild the journal, unless another process has done so in the meantime."""
        with exclusive(self.lock):
            try:
                self._check_photos()
            except (FileNotFoundError, JournalDamagedError):
                self.rebuild(why)

    def rebuild(self, why: str) -> None:
        """Write the journal from the store and log a warning; the caller holds the lock."""
        Journal.create(self.path, self.source.dim(), self.source.changes())
        key = parse_instances_collection(self.collection)
        what = f"version {key.version} of gallery {key.gallery}" if key else self.collection
        logger.warning(
            "the search copy of %s did not match the store and has been rebuilt (%s)",
            what,
            why,
        )

    def differing(self) -> int:
        """Number of photos that are not identical, bit by bit, in journal and store."""
        read: dict[str, int] = {}
        with (
            contextlib.suppress(FileNotFoundError, JournalDamagedError),
            contextlib.closing(Journal(self.path, self.source.dim())) as journal,
        ):
            read.update(_checksums(live_changes(journal)))
        stored = dict(_checksums(self.source.changes()))
        unequal = {key for key, _ in read.items() ^ stored.items()}
        return len(unequal - self.source.unfinished()) if unequal else 0

    def _has_valid_stamp(self) -> bool:
        with contextlib.closing(Journal(self.path, self.source.dim())) as journal:
            return journal.has_valid_stamp

    def _check_photos(self) -> None:
        """Verify all checksums and compare with the ledger; the caller holds the lock.

        Raises:
            FileNotFoundError: there is no journal.
            JournalDamagedError: it is damaged, or does not match the ledger.
        """
        with contextlib.closing(Journal(self.path, self.source.dim())) as journal:
            for _ in journal.read():  # verifies all checksums
                pass
            images = journal.images()
            holders = {key: image for key, image in images.items() if image.num_instances}
            if difference := self.source.difference(holders):
                raise JournalDamagedError(difference)
            with contextlib.suppress(OSError):  # without a stamp, the next reader compares again
                journal.write_stamp()


def _checksums(changes: Iterable[Change]) -> Iterator[tuple[str, int]]:
    """Yield the id of each photo with instances, and a checksum of all that searches show of it."""
    for change in changes:
        for image, rows in change.parts():
            if len(rows):
                shown = json.dumps([image.uri, dict(image.attributes)], sort_keys=True)
                numbers = zlib.crc32(np.ascontiguousarray(rows).data)
                yield image.image_id, zlib.crc32(shown.encode(), numbers)
