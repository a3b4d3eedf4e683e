"""`EmbeddedStore`: the contract on Milvus Lite, with searches of our own.

Milvus Lite stores everything, but its search loads all vectors into one Python process and scans
them for every query. So each version also has a journal of its instances, which searches read
instead (`version_journals.py`): they take a fraction of the time, and run in every client process.
"""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from reir.records import FloatArray, IndexedImage
from reir.store import validation
from reir.store.client import MilvusConnection
from reir.store.collection import MilvusCollection
from reir.store.contract import InstanceRow, StoredPhoto, VersionSpec
from reir.store.embedded.lite_reader import LiteVersionSource
from reir.store.embedded.version_journals import VersionJournals
from reir.store.filters import parse
from reir.store.milvus import MilvusStore
from reir.store.names import instances_collection
from reir.store.rows import Row


class EmbeddedStore(MilvusStore):
    """Galleries in a directory; a write is visible to all processes as soon as it returns."""

    def __init__(
        self, connection: MilvusConnection, journals: VersionJournals, *, read_only: str = ""
    ) -> None:
        """Use a connection to Milvus Lite.

        Args:
            connection: the connection.
            journals: what searches read.
            read_only: why the store is not writable; if given, every change is refused.
        """
        super().__init__(connection)
        self._journals = journals
        self._read_only = read_only

    def get_photos(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """The images that have instances."""
        name = instances_collection(gallery, version)
        return self._journals.photos(name, self._source(gallery, version), image_ids)

    def search(
        self,
        gallery: str,
        version: str,
        vectors: FloatArray,
        limit: int,
        *,
        where: str | None = None,
    ) -> Sequence[Sequence[InstanceRow]]:
        """The `limit` instances of largest inner product for each query vector, best first."""
        queries = validation.check_queries(vectors, limit)
        query = (queries, limit, None if where is None else parse(where, added=2))
        name = instances_collection(gallery, version)
        return self._journals.search(name, self._source(gallery, version), query, version)

    def repair_search_copy(self, gallery: str, version: str) -> int:
        """Compare the journal with the store, and rebuild it; return how many photos differed."""
        name = instances_collection(gallery, version)
        return self._journals.compare(name, self._source(gallery, version))

    def compact(self, gallery: str, version: str) -> bool:
        """Rewrite the files of Milvus Lite and the journal without deleted rows."""
        self._catalog.spec(gallery, version)
        ledger, instances = self._collections(gallery, version)
        with self._writing(gallery, version):
            ledger.compact()
            instances.compact()
            self._journals.compact(instances.name, self._source(gallery, version))
        self._documents.compact()
        return True

    def close(self) -> None:
        """Close everything; the server process ends by itself once no client uses it."""
        self._journals.close()
        super().close()

    def _source(self, gallery: str, version: str) -> LiteVersionSource:
        """The version in Milvus Lite, with which the journal is compared."""
        return LiteVersionSource(gallery, version, self._catalog)

    def _num_instances(self, gallery: str, version: str) -> int:
        """Number of instances that searches can find.

        Counted in the journal. To count its rows, Milvus Lite lists every vector that is not in a
        Parquet file yet, and writers wait meanwhile.
        """
        name = instances_collection(gallery, version)
        return self._journals.count(name, self._source(gallery, version))

    def _check_writable(self) -> None:
        if self._read_only:
            raise validation.read_only_error(self._connection.address, self._read_only)

    @contextmanager
    def _writing(self, gallery: str, version: str) -> Iterator[None]:
        """Hold the write lock of the version, so that store and journal get writes in one order."""
        # What is open then is a temporary copy, in which a change would be lost.
        self._check_writable()
        with self._journals.writing(instances_collection(gallery, version)):
            yield

    def _reading(self, gallery: str, version: str) -> AbstractContextManager[None]:
        """Hold the write lock of the version, so that no image is read while it is written."""
        if self._read_only:  # what is open is a temporary copy, which has no writers
            return nullcontext()
        return self._journals.writing(instances_collection(gallery, version))

    def _create_instances(
        self, instances: MilvusCollection, spec: VersionSpec, properties: Mapping[str, str]
    ) -> None:
        # The journal comes first: the version exists as soon as its instances collection does.
        self._journals.create(instances.name, spec.dim)
        super()._create_instances(instances, spec, properties)

    def _after_upsert(
        self, instances: MilvusCollection, dim: int, images: Collection[IndexedImage]
    ) -> None:
        self._journals.put(instances.name, dim, images)

    def _after_delete(
        self, instances: MilvusCollection, dim: int, stored: Mapping[str, Row]
    ) -> None:
        self._journals.delete(instances.name, dim, list(stored))

    def _after_drop(self, instances: MilvusCollection) -> None:
        self._journals.drop(instances.name)
