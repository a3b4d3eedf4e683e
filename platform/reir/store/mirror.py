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
    """A version in the store of record, as far as its journal needs that."""

    def dim(self) -> int:
        """Dimension of its vectors."""
        ...

    def difference(self, holders: Mapping[str, JournalImage]) -> str:
        """Say how photos that a journal has instances of differ from the stored; "" if not."""
        ...

    def unfinished(self) -> Set[str]:
        """Photos whose last write was cut short: nobody knows how much of them there should be."""
        ...

    def changes(self) -> Iterable[Change]:
        """The changes that hold all of it."""
        ...


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
            with contextlib.suppress(FileNotFoundError, JournalDamagedError):  # a follower mends it
                upstream = self._upstream(collection, source)
                with contextlib.closing(Journal(upstream.path, source.dim())) as journal:
                    size = sum(image.num_instances for image in journal.images().values())
                upstream.check()
                return size
        return self._follower(collection, source).count()

    def compare(self, collection: str, source: Source) -> int:
        """Compare the journal with the store bit by bit, and write it anew where they differ.

        Returns:
            How many photos differed.
        """
        upstream = self._upstream(collection, source)
        if not upstream.differing():
            return 0
        with self.writing(collection):  # nobody writes now
            differing = upstream.differing()
            if differing:
                upstream.rewrite(f"{differing} photos differ")
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
        """Add a change; a journal that is missing or damaged is left for a reader to write anew."""
        path = self._path(collection)
        try:
            self._writer(collection, dim).append(change)
        except FileNotFoundError:
            return
        except JournalDamagedError:
            Journal.remove(path)
        except OSError as error:
            said = f"journal {path} cannot be written: {error.strerror}"
            if error.errno == errno.ENOSPC:
                raise StoreFull(f"{said}; {FREE_SPACE}") from error
            raise StoreError(said) from error

    def _writer(self, collection: str, dim: int) -> Journal:
        """The journal as it is now, kept open so that no write has to find its end again."""
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
        """Write the journal if it is missing; returns the dimension of its vectors."""
        dim = self.source.dim()
        if not self.path.exists():
            with exclusive(self.lock):
                if not self.path.exists():
                    self.rewrite("it was missing")
        return dim

    def check(self) -> None:
        """Compare the journal with the ledger, if nothing vouches for it.

        A writer may be between the two just now, so they are compared under its lock.
        """
        if self._is_vouched():
            return
        with exclusive(self.lock):
            if not self._is_vouched():  # a writer may have been about to vouch for it
                self._check_photos()

    def mend(self, why: str) -> None:
        """Write the journal anew, unless somebody has meanwhile."""
        with exclusive(self.lock):
            try:
                self._check_photos()
            except (FileNotFoundError, JournalDamagedError):
                self.rewrite(why)

    def rewrite(self, why: str) -> None:
        """Write the journal anew and say so; the caller holds the lock."""
        Journal.create(self.path, self.source.dim(), self.source.changes())
        key = parse_instances_collection(self.collection)
        what = f"version {key.version} of gallery {key.gallery}" if key else self.collection
        logger.warning(
            "the search copy of %s did not match the store and has been rebuilt (%s)",
            what,
            why,
        )

    def differing(self) -> int:
        """Number of photos that are not the same, bit by bit, in journal and store."""
        read: dict[str, int] = {}
        with (
            contextlib.suppress(FileNotFoundError, JournalDamagedError),
            contextlib.closing(Journal(self.path, self.source.dim())) as journal,
        ):
            read.update(_checksums(live_changes(journal)))
        stored = dict(_checksums(self.source.changes()))
        unequal = {key for key, _ in read.items() ^ stored.items()}
        return len(unequal - self.source.unfinished()) if unequal else 0

    def _is_vouched(self) -> bool:
        with contextlib.closing(Journal(self.path, self.source.dim())) as journal:
            return journal.is_vouched

    def _check_photos(self) -> None:
        """Compare whole, and with the ledger; the caller holds the lock."""
        with contextlib.closing(Journal(self.path, self.source.dim())) as journal:
            for _ in journal.read():  # compares all checksums
                pass
            images = journal.images()
            holders = {key: image for key, image in images.items() if image.num_instances}
            if difference := self.source.difference(holders):
                raise JournalDamagedError(difference)
            with contextlib.suppress(OSError):  # it will be compared again
                journal.vouch()


def _checksums(changes: Iterable[Change]) -> Iterator[tuple[str, int]]:
    """Id of each photo with instances, and a checksum of all that a search may show of it."""
    for change in changes:
        for image, rows in change.parts():
            if len(rows):
                shown = json.dumps([image.uri, dict(image.attributes)], sort_keys=True)
                numbers = zlib.crc32(np.ascontiguousarray(rows).data)
                yield image.image_id, zlib.crc32(shown.encode(), numbers)
