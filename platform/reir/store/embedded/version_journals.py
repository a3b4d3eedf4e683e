"""The journals of all versions of an embedded store: written, searched, verified and rebuilt.

Milvus Lite is the store of record; a journal is the copy of its instances that searches read. The
two can diverge: a writer may be killed between writing the one and the other, a power failure may
lose the end of a file, or somebody may restore an older file from a backup. So a journal that is
not known to be complete is compared with Milvus Lite before it is used, and rebuilt if necessary.
"""

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
from reir.store.embedded.journal import (
    Change,
    Journal,
    JournalDamagedError,
    JournalImage,
    delete_change,
    live_changes,
    put_change,
)
from reir.store.embedded.journal_reader import JournalReader
from reir.store.embedded.locks import exclusive
from reir.store.filters import Filter
from reir.store.names import parse_instances_collection

logger = logging.getLogger(__name__)


class VersionSource(Protocol):
    """Reads a version from Milvus Lite, to verify or rebuild its journal."""

    def dim(self) -> int:
        """Dimension of the vectors."""
        ...

    def difference(self, holders: Mapping[str, JournalImage]) -> str:
        """Describe how the photos of a journal differ from those in the store; "" if they agree.

        Args:
            holders: photos in the journal that have instances, by id.
        """
        ...

    def unfinished(self) -> Set[str]:
        """Ids of photos whose last write was interrupted.

        The store may have any part of their instances, so they are not compared.
        """
        ...

    def changes(self) -> Iterable[Change]:
        """All photos of the version, as the changes of a new journal."""
        ...


class VersionJournals:
    """The journals of one embedded store, by the name of their instances collection."""

    def __init__(self, directory: Path) -> None:
        """Keep the journals in `directory`, which is created if it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._readers: dict[str, JournalReader] = {}
        self._writers: dict[str, Journal] = {}
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def writing(self, collection: str) -> Iterator[None]:
        """Hold the write lock of a version: store and journal must get writes in the same order."""
        with exclusive(self._lock(collection)):
            yield

    def create(self, collection: str, dim: int) -> None:
        """Create an empty journal; the caller holds `writing`."""
        Journal.create(self._path(collection), dim)

    def drop(self, collection: str) -> None:
        """Delete the journal; the caller holds `writing`."""
        Journal.remove(self._path(collection))
        with self._mutex:
            self._release_replaced()

    def put(self, collection: str, dim: int, images: Iterable[IndexedImage]) -> None:
        """Record that images were written; the caller holds `writing`."""
        self._append(collection, dim, put_change(images, dim))

    def delete(self, collection: str, dim: int, image_ids: Sequence[str]) -> None:
        """Record that images were deleted; the caller holds `writing`."""
        self._append(collection, dim, delete_change(image_ids, dim))

    def search(
        self,
        collection: str,
        source: VersionSource,
        query: tuple[FloatArray, int, Filter | None],
        version: str,
    ) -> Sequence[Sequence[InstanceRow]]:
        """Search the version exactly; `query` is the vectors, the limit and the filter."""
        return self._reader(collection, source).search(*query, version)

    def photos(
        self, collection: str, source: VersionSource, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """Return the photos of those images that have instances."""
        return self._reader(collection, source).photos(image_ids)

    def count(self, collection: str, source: VersionSource) -> int:
        """Number of instances.

        If this process has not searched the version yet, the count comes from the journal without
        reading its vectors.
        """
        if collection not in self._readers:
            # A missing or damaged journal is rebuilt by the reader below.
            with contextlib.suppress(FileNotFoundError, JournalDamagedError):
                maintainer = self._maintainer(collection, source)
                with contextlib.closing(Journal(maintainer.path, source.dim())) as journal:
                    size = sum(image.num_instances for image in journal.images().values())
                # If the journal lacks something, this raises, and the reader below repairs it.
                maintainer.verify()
                return size
        return self._reader(collection, source).count()

    def compare(self, collection: str, source: VersionSource) -> int:
        """Compare the journal with the store bit by bit, and rebuild it if they differ.

        Returns:
            Number of photos that differed.
        """
        maintainer = self._maintainer(collection, source)
        # First without the lock, since reading everything takes long and writers would wait.
        if not maintainer.count_differences():
            return 0
        with self.writing(collection):  # compare again, while no writer can change anything
            num_different = maintainer.count_differences()
            if num_different:
                maintainer.rebuild(f"{num_different} photos differ")
        return num_different

    def compact(self, collection: str, source: VersionSource) -> None:
        """Rewrite the journal without replaced and deleted rows; the caller holds `writing`."""
        maintainer = self._maintainer(collection, source)
        try:
            with contextlib.closing(Journal(maintainer.path, source.dim())) as journal:
                # The stamp of the new journal would hide that frames are missing in this one.
                if not journal.has_valid_stamp:
                    maintainer.check_photos()
                Journal.create(maintainer.path, source.dim(), live_changes(journal))
        except FileNotFoundError:
            pass  # the next reader builds it from the store
        except JournalDamagedError as error:
            maintainer.rebuild(str(error))

    def close(self) -> None:
        """Close every journal."""
        for reader in self._readers.values():
            reader.close()
        for writer in self._writers.values():
            writer.close()
        self._readers.clear()
        self._writers.clear()

    def _reader(self, collection: str, source: VersionSource) -> JournalReader:
        with self._mutex:
            if collection not in self._readers:
                # Other processes drop versions, too, and most often after they have made a new one.
                self._release_replaced()
                maintainer = self._maintainer(collection, source)
                self._readers[collection] = JournalReader(
                    maintainer.path, maintainer.lock, maintainer
                )
            return self._readers[collection]

    def _append(self, collection: str, dim: int, change: Change) -> None:
        """Append a change.

        If the journal is missing or damaged, nothing is appended: the write is safe in Milvus Lite,
        from which the next reader rebuilds the journal.
        """
        path = self._path(collection)
        try:
            self._writer(collection, dim).append(change)
        except FileNotFoundError:
            return
        except JournalDamagedError:
            Journal.remove(path)  # so that all processes rebuild it, and none reads it any more
        except OSError as error:
            problem = f"journal {path} cannot be written: {error.strerror}"
            if error.errno == errno.ENOSPC:
                raise StoreFull(f"{problem}; {FREE_SPACE}") from error
            raise StoreError(problem) from error

    def _writer(self, collection: str, dim: int) -> Journal:
        """The current journal, which stays open so that not every write has to find its end."""
        with self._mutex:
            journal = self._writers.get(collection)
            if journal is None or not journal.is_current:
                self._release_replaced()
                journal = self._writers[collection] = Journal(
                    self._path(collection), dim, to_write=True
                )
            return journal

    def _release_replaced(self) -> None:
        """Close journals that were deleted or replaced, which take up memory and disk.

        The caller holds the mutex.
        """
        # No thread writes to such a journal: writers hold the lock under which it was replaced.
        for collection, writer in list(self._writers.items()):
            if not writer.is_current:
                self._writers.pop(collection).close()
        for collection, reader in list(self._readers.items()):
            # If only replaced, the reader is kept, since a search may be about to use it.
            if reader.release_replaced() and not self._path(collection).exists():
                del self._readers[collection]

    def _maintainer(self, collection: str, source: VersionSource) -> _Maintainer:
        return _Maintainer(collection, self._path(collection), self._lock(collection), source)

    def _path(self, collection: str) -> Path:
        return self._directory / f"{collection}.journal"

    def _lock(self, collection: str) -> Path:
        return self._directory / f"{collection}.lock"


@dataclass(frozen=True)
class _Maintainer:
    """Verifies and rebuilds one journal; implements `journal_reader.JournalMaintainer`."""

    collection: str
    path: Path
    lock: Path
    source: VersionSource

    def ensure_journal(self) -> int:
        """Build the journal if it is missing; return the dimension of its vectors."""
        dim = self.source.dim()
        # Asked again under the lock, which another process may have held to do the same.
        if not self.path.exists():
            with exclusive(self.lock):
                if not self.path.exists():
                    self.rebuild("it was missing")
        return dim

    def verify(self) -> None:
        """Compare the journal with the ledger if it has no valid stamp.

        Under the write lock: otherwise a writer that is between its two writes, to Milvus Lite and
        to the journal, would look like a difference.
        """
        if self._has_valid_stamp():
            return
        with exclusive(self.lock):
            if not self._has_valid_stamp():  # a writer may have written it while we waited
                self.check_photos()

    def repair(self, why: str) -> None:
        """Rebuild the journal, unless another process has done so in the meantime."""
        with exclusive(self.lock):
            # Checked again: the process that held the lock before may have rebuilt the journal.
            try:
                self.check_photos()
            except (FileNotFoundError, JournalDamagedError):
                self.rebuild(why)

    def rebuild(self, why: str) -> None:
        """Write the journal anew from the store, with a warning; the caller holds the lock."""
        Journal.create(self.path, self.source.dim(), self.source.changes())
        key = parse_instances_collection(self.collection)
        what = f"version {key.version} of gallery {key.gallery}" if key else self.collection
        logger.warning(
            "the search copy of %s did not match the store and has been rebuilt (%s)",
            what,
            why,
        )

    def count_differences(self) -> int:
        """Number of photos that are not identical in journal and store, bit by bit."""
        read: dict[str, int] = {}
        with (
            contextlib.suppress(FileNotFoundError, JournalDamagedError),
            contextlib.closing(Journal(self.path, self.source.dim())) as journal,
        ):
            read.update(_checksums(live_changes(journal)))
        stored = dict(_checksums(self.source.changes()))
        unequal = {key for key, _ in read.items() ^ stored.items()}
        return len(unequal - self.source.unfinished()) if unequal else 0

    def check_photos(self) -> None:
        """Verify all checksums, and compare with the ledger; the caller holds the lock.

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
            # If the stamp cannot be written, the next reader compares again.
            with contextlib.suppress(OSError):
                journal.write_stamp()

    def _has_valid_stamp(self) -> bool:
        with contextlib.closing(Journal(self.path, self.source.dim())) as journal:
            return journal.has_valid_stamp


def _checksums(changes: Iterable[Change]) -> Iterator[tuple[str, int]]:
    """Yield id and checksum of each photo with instances; covers all that a search returns."""
    for change in changes:
        for image, rows in change.parts():
            if len(rows):
                shown = json.dumps([image.uri, dict(image.attributes)], sort_keys=True)
                numbers = zlib.crc32(np.ascontiguousarray(rows).data)
                yield image.image_id, zlib.crc32(shown.encode(), numbers)
