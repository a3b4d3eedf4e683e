"""`MilvusServerStore`: the contract on a Milvus server, which also imports files."""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

from reir.errors import FilterError, StoreError
from reir.records import FloatArray, IndexedImage
from reir.store import rows, validation
from reir.store.client import MilvusConnection
from reir.store.collection import MilvusCollection
from reir.store.contract import InstanceRow, StoredPhoto, VersionSpec
from reir.store.filter_milvus import render_milvus
from reir.store.filters import Filter, fields_of, parse
from reir.store.milvus import MilvusStore
from reir.store.planner import SearchPlanner
from reir.store.rows import PENDING, Row


class MilvusServerStore(MilvusStore):
    """Galleries on a Milvus server.

    The store object that made a write sees it at once. Others see it within the server's time tick
    (about 0.2 s).
    """

    def __init__(self, connection: MilvusConnection) -> None:
        """Use a connection to a server."""
        super().__init__(connection)
        self._planner = SearchPlanner()
        self._dims: dict[tuple[str, str], int] = {}
        """Vector dimensions that are known from earlier searches."""

    def import_images(
        self, gallery: str, version: str, images: Sequence[IndexedImage], storage: str
    ) -> None:
        """Write a batch of images; new ones reach the server as a file in its storage."""
        # Only here: pyarrow takes time to load, and few processes import.
        from reir.store.bulk_import import IMPORT_FROM_ROWS, import_rows

        ledger, instances = self._collections(gallery, version)
        batch = validation.latest_by_id(images)
        with self._catalog.translate_errors(gallery, version):
            known = ledger.get(batch)
        # An import does not check keys, so images that may have rows already are upserted.
        new = [batch[image_id] for image_id in batch if image_id not in known]
        if sum(image.record.num_instances for image in new) >= IMPORT_FROM_ROWS:
            by_file = partial(import_rows, instances, storage=storage)
            self._write(gallery, version, new, by_file)
            batch = {image_id: batch[image_id] for image_id in batch if image_id in known}
        self.upsert_images(gallery, version, list(batch.values()))

    def wait_until_indexed(
        self, gallery: str, version: str, *, num_upserted: int, timeout_s: float
    ) -> bool:
        """Have the server build its final index over all instances, and wait for it."""
        self._catalog.spec(gallery, version)
        with self._catalog.translate_errors(gallery, version):
            instances = self._catalog.instances(gallery, version)
            return instances.wait_until_indexed(num_upserted, timeout_s)

    def get_photos(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """The images that have instances."""
        found = self.get_instances(gallery, version, image_ids, with_vectors=True)
        return {each: rows.photo_from_instances(of_it) for each, of_it in found.items() if of_it}

    def search(
        self,
        gallery: str,
        version: str,
        vectors: FloatArray,
        limit: int,
        *,
        where: str | None = None,
    ) -> list[list[InstanceRow]]:
        """The `limit` instances of largest inner product for each query vector, best first."""
        queries = validation.check_queries(vectors, limit)
        condition = (
            "" if where is None else self._condition(gallery, version, parse(where, added=2))
        )
        self._check_dim(gallery, version, queries.shape[1])
        if not len(queries):
            return []
        instances = self._catalog.instances(gallery, version)
        try:
            with self._catalog.translate_errors(gallery, version):
                found = self._search_parts(instances, queries, limit, condition)
        except StoreError:
            # The version may have been created anew with another dimension since the last search.
            self._dims.clear()
            self._check_dim(gallery, version, queries.shape[1])
            raise
        return [
            [rows.instance_from_row(hit["entity"], float(hit["distance"])) for hit in hits]
            for hits in found
        ]

    def repair_search_copy(self, gallery: str, version: str) -> int:
        """Return 0: searches read the store itself, not a copy."""
        self._catalog.spec(gallery, version)
        return 0

    def compact(self, gallery: str, version: str) -> bool:
        """Have the server merge its files without deleted rows; it deletes the old files later."""
        self._catalog.spec(gallery, version)
        for collection in self._collections(gallery, version):
            collection.compact()
        self._documents.compact()
        return False

    def _condition(self, gallery: str, version: str, tree: Filter) -> str:
        """Return the filter as a Milvus expression.

        Raises:
            FilterError: it names a field for which the version has no column.
        """
        derived = rows.DERIVED_COLUMNS.keys() & {
            field.name for field in fields_of(tree) if not field.attribute
        }
        if derived and not self._catalog.has_derived_columns(gallery, version):
            raise FilterError(
                "filter",
                f"names {', '.join(sorted(derived))}, but version '{version}' was indexed by an "
                f"earlier release and has no such columns; run `reir index` into a new version",
            )
        return render_milvus(tree)

    def _search_parts(
        self, instances: MilvusCollection, queries: FloatArray, limit: int, condition: str
    ) -> list[list[Row]]:
        """Hits of each query, best first, merged from all parts that the planner returns."""
        count = partial(instances.count, consistency="Session")
        parts = self._planner.parts(instances.name, condition, count)
        # Each part is asked for all of `limit`, because all of the best rows may be in one part.
        found = [instances.search(queries, limit, part) for part in parts]
        if len(found) == 1:
            return list(found[0])
        return [
            sorted(itertools.chain(*hits), key=lambda hit: -hit["distance"])[:limit]
            for hits in zip(*found, strict=True)
        ]

    def _check_dim(self, gallery: str, version: str, found: int) -> None:
        """Refuse queries of another dimension; asks Milvus only once as long as they fit."""
        if self._dims.get((gallery, version)) != found:
            dim = self._catalog.spec(gallery, version).dim
            validation.check_dim(found, dim, version)
            self._dims[gallery, version] = dim

    def _create_instances(
        self, instances: MilvusCollection, spec: VersionSpec, properties: Mapping[str, str]
    ) -> None:
        """Create the collection with the columns that Milvus cannot compute in a filter."""
        extra = {**rows.DERIVED_COLUMNS, **rows.mask_columns(spec)}
        instances.create(spec.dim, properties, extra)

    def _before_write(self, instances: MilvusCollection, stored: Mapping[str, Row]) -> None:
        """Wait for imports by an earlier writer of any of these images that was interrupted.

        An import continues without the process that started it. What it adds would then be stored
        next to the rows that are written now, under the same keys.
        """
        if any(row["status"] == PENDING for row in stored.values()):
            instances.await_imports()

    def _after_delete(
        self,
        instances: MilvusCollection,
        dim: int,  # noqa: ARG002 - the embedded store needs it
        stored: Mapping[str, Row],
    ) -> None:
        """Read one of the deleted rows.

        The server gives a deletion an early timestamp, so without this read, the next reads of this
        client may still return the deleted rows.
        """
        deleted = rows.instance_ids(stored, "reach")
        instances.get(deleted[:1], [instances.key])
