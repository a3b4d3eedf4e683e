"""`MilvusStore`: the contract on Milvus Lite and on a Milvus server.

Everything is found by its key, nothing by scanning. Before instances are written for the first
time, or more of them than before, the image's ledger row notes how far their numbers will reach;
after them, what lies beyond the new count is deleted, and the finished ledger row comes last. A
writer that dies in between leaves a `reach` from which the next run of the batch cleans up. Nothing
is deleted before the images of the batch that only gained are finished: one of them may have taken
over what another one loses (`reir.store.duplicates`).
"""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from reir.errors import FilterError, StoreDamaged, StoreError
from reir.records import FloatArray, ImageRecord, IndexedImage, MaskRle
from reir.store import checks, rows
from reir.store.catalogue import Catalogue
from reir.store.client import MilvusConnection
from reir.store.contract import InstanceRow, StoredPhoto, VersionInfo, VersionSpec
from reir.store.filter_milvus import quote, render_ids, render_milvus
from reir.store.filters import Filter, fields_of, parse
from reir.store.lite_source import LiteSource
from reir.store.mirror import Mirror, Source
from reir.store.names import instances_collection
from reir.store.planner import Planner
from reir.store.rows import PENDING, Row, StoredVersion
from reir.store.table import Table


class MilvusStore:
    """Galleries in Milvus.

    On a server, writes are seen at once by the store object that made them, and by others within
    the server's time tick (about 0.2 s). Embedded, every process sees them at once.
    """

    def __init__(
        self,
        connection: MilvusConnection,
        mirror: Mirror | None = None,
        *,
        read_only: str = "",
    ) -> None:
        """Use a connection.

        Args:
            connection: to Lite or to a server.
            mirror: given with Lite, whose own search is not used.
            read_only: why the store is not writable; if given, every change is refused.
        """
        self._read_only = read_only
        self._connection = connection
        self._catalogue = Catalogue(connection)
        self._mirror = mirror
        self._dims: dict[tuple[str, str], int] = {}
        self._planner = Planner()

    def galleries(self) -> list[str]:
        """Names of all galleries, sorted."""
        return sorted({key.gallery for key in self._catalogue.version_keys()})

    def versions(self, gallery: str) -> list[VersionInfo]:
        """Versions of a gallery, oldest first."""
        live = self._catalogue.live(gallery)
        known = self._catalogue.by_age(gallery)
        if not known:
            raise checks.no_gallery(gallery)
        return [
            self._catalogue.info(
                gallery,
                name,
                spec,
                live=name == live,
                num_instances=self._num_instances(gallery, name),
            )
            for name, spec in known.items()
        ]

    def num_stored(self, gallery: str, version: str) -> int:
        """Instance rows that Milvus holds, those that belong to no image included."""
        self._catalogue.spec(gallery, version)
        return self._catalogue.instances(gallery, version).count()

    def live_version(self, gallery: str) -> str:
        """Name of the live version."""
        live = self._catalogue.live(gallery)
        if live is not None:
            return live
        known = any(key.gallery == gallery for key in self._catalogue.version_keys())
        raise checks.no_live_version(gallery) if known else checks.no_gallery(gallery)

    def create_version(self, gallery: str, version: str, spec: VersionSpec) -> None:
        """Create the version's collections; does nothing when it exists with an equal spec."""
        images, instances = self._tables(gallery, version)
        with self._writing(gallery, version):
            found = self._catalogue.find(gallery, version)
            if found is not None:
                checks.check_spec(found.spec, spec, version)
            else:
                images.drop()  # left by a creation or a removal that was cut short
                properties = StoredVersion(spec, time.time_ns()).to_properties()
                images.create(spec.dim, properties)
                extra = rows.MASK_COLUMN if spec.has_masks else {}
                if self._mirror is not None:  # it calculates what filters ask of a box
                    self._mirror.create(instances.name, spec.dim)
                else:
                    extra = {**rows.DERIVED_COLUMNS, **extra}
                instances.create(spec.dim, properties, extra)
            images.ensure_ready(searched=False)
            instances.ensure_ready(searched=True)

    def promote(self, gallery: str, version: str) -> None:
        """Make `version` live with one atomic alias switch."""
        self._check_writable()
        self._catalogue.spec(gallery, version)
        self._catalogue.promote(gallery, version)

    def drop_version(self, gallery: str, version: str) -> None:
        """Delete a version that is not live, even if it is damaged."""
        with contextlib.suppress(StoreDamaged):
            self._catalogue.spec(gallery, version)
        if self._catalogue.live(gallery) == version:
            raise checks.live_stays(gallery, version)
        self._drop(gallery, version)

    def drop_gallery(self, gallery: str) -> None:
        """Delete a gallery with all its versions; from the first moment none of them is live."""
        self._check_writable()
        versions = self._catalogue.names(gallery)
        if not versions:
            raise checks.no_gallery(gallery)
        with contextlib.suppress(StoreDamaged):  # then dropping the versions removes the alias too
            self._catalogue.retire(gallery)
        for version in versions:
            self._drop(gallery, version)

    def upsert_images(self, gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        """Write a batch of images: instances first, ledger rows last."""
        _, instances = self._tables(gallery, version)
        self._write(gallery, version, images, instances.upsert)

    def import_images(
        self, gallery: str, version: str, images: Sequence[IndexedImage], storage: str
    ) -> None:
        """Write a batch of which the new images reach the server by a file in its storage."""
        if self._mirror is not None:
            raise checks.no_import(self._connection.address)
        from reir.store.imports import IMPORT_FROM_ROWS, import_rows

        ledger, instances = self._tables(gallery, version)
        batch = checks.latest_by_id(images)
        with self._catalogue.errors_of(gallery, version):
            known = ledger.get(batch)
        new = [batch[image_id] for image_id in batch if image_id not in known]
        if sum(image.record.num_instances for image in new) >= IMPORT_FROM_ROWS:
            by_file = partial(import_rows, instances, storage=storage)
            self._write(gallery, version, new, by_file)
            batch = {image_id: batch[image_id] for image_id in batch if image_id in known}
        self.upsert_images(gallery, version, list(batch.values()))

    def _write(
        self,
        gallery: str,
        version: str,
        images: Sequence[IndexedImage],
        put: Callable[[Iterator[Row]], None],
    ) -> None:
        """Write a batch whose instances the server gets by `put`."""
        ledger, instances = self._tables(gallery, version)
        batch = checks.latest_by_id(images)
        with self._writing(gallery, version):
            spec = self._catalogue.spec(gallery, version)
            dim = spec.dim
            to_rows = partial(
                rows.instance_rows,
                with_masks=spec.has_masks,
                with_derived=self._catalogue.has_derived(gallery, version),
            )
            checks.check_images(batch.values(), dim, version)
            stored = ledger.get(batch, ["*"])
            self._await_imports(instances, stored)
            reach = _announce(ledger, batch, stored, dim)
            put(itertools.chain.from_iterable(map(to_rows, batch.values())))
            if self._mirror is not None:
                self._mirror.put(instances.name, dim, batch.values())
            beyond = {each: list(_beyond(image, reach[each])) for each, image in batch.items()}
            ledger.upsert(rows.ledger_row(batch[each], dim) for each in batch if not beyond[each])
            instances.delete(itertools.chain.from_iterable(beyond.values()))
            ledger.upsert(rows.ledger_row(batch[each], dim) for each in batch if beyond[each])

    def settle(self, gallery: str, version: str, *, fresh: int, within_s: float) -> bool:
        """Have all rows searched by the server's lasting index; embedded, nothing to do."""
        self._catalogue.spec(gallery, version)
        if self._mirror is not None:
            return True
        with self._catalogue.errors_of(gallery, version):
            return self._catalogue.instances(gallery, version).settle(fresh, within_s)

    def touch_images(self, gallery: str, version: str, mtimes_ns: Mapping[str, int]) -> None:
        """Note new file times of images whose content is as before."""
        ledger, _ = self._tables(gallery, version)
        with self._writing(gallery, version), self._catalogue.errors_of(gallery, version):
            found = _finished(ledger.get(mtimes_ns, ["*"]))
            ledger.upsert({**row, "mtime_ns": mtimes_ns[key]} for key, row in found.items())

    def delete_images(self, gallery: str, version: str, image_ids: Sequence[str]) -> int:
        """Delete images and their instances; returns how many ledger rows went."""
        ledger, instances = self._tables(gallery, version)
        with self._writing(gallery, version):
            dim = self._catalogue.spec(gallery, version).dim
            found = ledger.get(image_ids)
            self._await_imports(instances, found)
            gone = rows.instance_ids(found, "reach")
            instances.delete(gone)
            if self._mirror is not None:
                self._mirror.delete(instances.name, dim, list(found))
            else:  # a server dates a deletion too early, so that this client's reads may miss it
                instances.get(gone[:1], [instances.key])
            ledger.delete(found)
        return len(_finished(found))

    def get_images(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, ImageRecord]:
        """Ledger rows of those ids that exist."""
        with self._catalogue.errors_of(gallery, version):
            found = _finished(self._catalogue.images(gallery, version).get(image_ids))
        return {each: rows.record_from_row(found[each]) for each in image_ids if each in found}

    def iter_images(
        self, gallery: str, version: str, *, status: str | None = None
    ) -> Iterator[ImageRecord]:
        """All ledger rows in the order of image_id, optionally of one status; streams."""
        condition = (
            f"status != {quote(PENDING)}" if status is None else f"status == {quote(status)}"
        )
        self._catalogue.spec(gallery, version)
        pages = self._catalogue.images(gallery, version).pages(condition)
        return map(rows.record_from_row, pages)

    def unfinished_images(self, gallery: str, version: str) -> Iterator[tuple[str, str]]:
        """(image id, uri) of every image whose first write was cut short."""
        self._catalogue.spec(gallery, version)
        pages = self._catalogue.images(gallery, version).pages(f"status == {quote(PENDING)}")
        return ((row["image_id"], row["uri"]) for row in pages)

    def find_content(
        self, gallery: str, version: str, hashes: Collection[str]
    ) -> dict[str, list[ImageRecord]]:
        """Ledger rows of the indexed images that have one of these contents, by content hash."""
        self._catalogue.spec(gallery, version)
        found: dict[str, list[ImageRecord]] = {}
        if not hashes:
            return found
        wanted = f"status == {quote('indexed')} and {render_ids('content_hash', hashes)}"
        for row in self._catalogue.images(gallery, version).pages(wanted):
            found.setdefault(row["content_hash"], []).append(rows.record_from_row(row))
        return found

    def get_indexed(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, IndexedImage]:
        """The images that exist as they were written: with vectors, image vector and masks."""
        ledger, instances = self._tables(gallery, version)
        with self._catalogue.errors_of(gallery, version):
            images = _finished(ledger.get(image_ids, ["*"]))
            found = instances.get(rows.instance_ids(images, "num_instances"), ["*"])
        return {
            each: rows.image_from_rows(row, rows.instances_of(found, {each: row}))
            for each, row in images.items()
        }

    def get_instances(
        self, gallery: str, version: str, image_ids: Sequence[str], *, with_vectors: bool = False
    ) -> dict[str, list[InstanceRow]]:
        """All instances of the images that exist, each list in the order of the number."""
        ledger, instances = self._tables(gallery, version)
        columns = [*rows.INSTANCE_FIELDS, "vector"] if with_vectors else rows.INSTANCE_FIELDS
        with self._catalogue.errors_of(gallery, version):
            images = _finished(ledger.get(image_ids, consistency="Session"))
            ids = rows.instance_ids(images, "num_instances")
            found = instances.get(ids, columns, consistency="Session")
        return {
            each: [*map(rows.instance_from_row, rows.instances_of(found, {each: images[each]}))]
            for each in image_ids
            if each in images
        }

    def get_photos(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """Those of the images that have instances."""
        if self._mirror is not None:
            name = instances_collection(gallery, version)
            return self._mirror.photos(name, self._source(gallery, version), image_ids)
        found = self.get_instances(gallery, version, image_ids, with_vectors=True)
        return {each: rows.photo_from_instances(of_it) for each, of_it in found.items() if of_it}

    def get_masks(
        self, gallery: str, version: str, instance_ids: Sequence[str]
    ) -> dict[str, MaskRle]:
        """Masks of those instances that have one."""
        if not self._catalogue.spec(gallery, version).has_masks:
            return {}
        columns = ["instance_id", rows.MASK]
        with self._catalogue.errors_of(gallery, version):
            table = self._catalogue.instances(gallery, version)
            found = table.get(instance_ids, columns, consistency="Session")
        masks = {each: rows.mask_from_row(found[each]) for each in instance_ids if each in found}
        return {each: mask for each, mask in masks.items() if mask is not None}

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
        queries = checks.check_queries(vectors, limit)
        tree = None if where is None else parse(where)
        if self._mirror is not None:
            name = instances_collection(gallery, version)
            query = (queries, limit, tree)
            return self._mirror.search(name, self._source(gallery, version), query, version)
        condition = "" if tree is None else self._condition(gallery, version, tree)
        return self._search_server(gallery, version, (queries, limit, condition))

    def compare_reader(self, gallery: str, version: str) -> int:
        """Compare the copy that searches read with the store; return how many photos differed."""
        if self._mirror is None:
            return 0
        name = instances_collection(gallery, version)
        return self._mirror.compare(name, self._source(gallery, version))

    def close(self) -> None:
        """Release the connection; an embedded server ends by itself when nobody uses it."""
        if self._mirror is not None:
            self._mirror.close()
        self._connection.close()

    def _drop(self, gallery: str, version: str) -> None:
        instances = self._catalogue.instances(gallery, version)
        with self._writing(gallery, version):
            self._catalogue.forget(gallery, version)
            instances.drop()
            self._catalogue.drop_ledger(gallery, version)
            if self._mirror is not None:
                self._mirror.drop(instances.name)

    def _await_imports(self, instances: Table, stored: Mapping[str, Row]) -> None:
        """If the first write of any of these images was cut short, wait for what it began.

        An import goes on without the one who asked for it, and what it brings would be there beside
        what is written meanwhile.
        """
        unfinished = any(row["status"] == PENDING for row in stored.values())
        if unfinished and self._mirror is None:
            instances.await_imports()

    def _tables(self, gallery: str, version: str) -> tuple[Table, Table]:
        """Ledger and instances of a version."""
        return self._catalogue.images(gallery, version), self._catalogue.instances(gallery, version)

    def _check_writable(self) -> None:
        if self._read_only:
            raise checks.cannot_be_written(self._connection.address, self._read_only)

    def _writing(self, gallery: str, version: str) -> AbstractContextManager[None]:
        self._check_writable()
        if self._mirror is None:
            return contextlib.nullcontext()
        return self._mirror.writing(instances_collection(gallery, version))

    def _num_instances(self, gallery: str, version: str) -> int:
        """Instances that searches find.

        Milvus Lite would make a list of every vector that is not in a file yet, and let writers
        wait meanwhile.
        """
        if self._mirror is None:
            return self.num_stored(gallery, version)
        name = instances_collection(gallery, version)
        return self._mirror.count(name, self._source(gallery, version))

    def _condition(self, gallery: str, version: str, tree: Filter) -> str:
        """The filter as the server takes it, if the version has what it names."""
        derived = rows.DERIVED_COLUMNS.keys() & {
            field.name for field in fields_of(tree) if not field.attribute
        }
        if derived and not self._catalogue.has_derived(gallery, version):
            raise FilterError(
                "filter",
                f"names {', '.join(sorted(derived))}, which version '{version}' of an earlier "
                f"release does not have; `reir index` into a new version adds it",
            )
        return render_milvus(tree)

    def _search_server(
        self, gallery: str, version: str, query: tuple[FloatArray, int, str]
    ) -> list[list[InstanceRow]]:
        self._check_dim(gallery, version, query[0].shape[1])
        if not len(query[0]):
            return []
        try:
            with self._catalogue.errors_of(gallery, version):
                found = self._search_parts(self._catalogue.instances(gallery, version), *query)
        except StoreError:
            self._dims.clear()
            self._check_dim(gallery, version, query[0].shape[1])
            raise
        return [
            [rows.instance_from_row(hit["entity"], float(hit["distance"])) for hit in hits]
            for hits in found
        ]

    def _search_parts(
        self, table: Table, queries: FloatArray, limit: int, condition: str
    ) -> list[list[Row]]:
        """Hits of each query, best first, from as many searches as the planner wants."""
        count = partial(table.count, consistency="Session")
        parts = self._planner.parts(table.name, condition, count)
        found = [table.search(queries, limit, part) for part in parts]
        if len(found) == 1:
            return list(found[0])
        return [
            sorted(itertools.chain(*hits), key=lambda hit: -hit["distance"])[:limit]
            for hits in zip(*found, strict=True)
        ]

    def _check_dim(self, gallery: str, version: str, found: int) -> None:
        """Refuse queries of another dimension; asks Milvus only once while they fit."""
        if self._dims.get((gallery, version)) != found:
            dim = self._catalogue.spec(gallery, version).dim
            checks.check_dim(found, dim, version)
            self._dims[gallery, version] = dim

    def _source(self, gallery: str, version: str) -> Source:
        """The source that a journal is compared with and rebuilt from."""
        return LiteSource(gallery, version, self._catalogue)


def _announce(
    ledger: Table, batch: Mapping[str, IndexedImage], stored: Mapping[str, Row], dim: int
) -> dict[str, int]:
    """Note in the ledger how far the instance numbers of a batch will reach; returns that."""
    rising: list[Row] = []
    reach: dict[str, int] = {}
    for image_id, image in batch.items():
        first = {**rows.ledger_row(image, dim), "status": PENDING, "reach": 0}
        row = stored.get(image_id, first)
        reach[image_id] = max(row["reach"], image.record.num_instances)
        if reach[image_id] > row["reach"]:
            rising.append({**row, "reach": reach[image_id]})
    ledger.upsert(rising)
    return reach


def _beyond(image: IndexedImage, reach: int) -> Iterator[str]:
    """Ids of instances that may be stored of this image but are no longer its own."""
    for number in range(image.record.num_instances, reach):
        yield checks.instance_id(image.record.image_id, number)


def _finished(found: Mapping[str, Row]) -> dict[str, Row]:
    """Ledger rows without those of images that are still being written for the first time."""
    return {image_id: row for image_id, row in found.items() if row["status"] != PENDING}
