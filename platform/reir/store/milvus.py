"""`MilvusStore`: what an embedded store (Milvus Lite) and a Milvus server have in common.

Rows are always found by their keys, never by a scan. A batch of images is written in this order, so
that the next run can clean up after a writer that was killed at any point:

1. For a new image, or one that gains instances, the ledger row records its `reach`: the number of
   instances that it may have from now on.
2. The instances are written.
3. Images that keep all their instances get their final ledger rows.
4. Surplus instances of the other images are deleted.
5. Those images get their final ledger rows.

Step 3 comes before step 4 because an image of the batch may take over instances that another image
of the batch loses (`reir.store.duplicates`): they must not be deleted before they are stored again.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from reir.errors import StoreDamaged
from reir.records import ImageRecord, IndexedImage, MaskRle
from reir.store import rows, validation
from reir.store.catalog import Catalog
from reir.store.client import MilvusConnection
from reir.store.collection import MilvusCollection
from reir.store.contract import InstanceRow, VersionInfo, VersionSpec
from reir.store.documents import Documents
from reir.store.filter_milvus import quote, render_ids
from reir.store.rows import PENDING, Row, StoredVersion

_COUNTS_AT_ONCE = 16


class MilvusStore:
    """Galleries in Milvus; `EmbeddedStore` and `MilvusServerStore` add searches to this."""

    def __init__(self, connection: MilvusConnection) -> None:
        """Use a connection."""
        self._connection = connection
        self._catalog = Catalog(connection)
        self._documents = Documents(connection)

    def galleries(self) -> list[str]:
        """Names of all galleries, sorted."""
        return sorted({key.gallery for key in self._catalog.version_keys()})

    def versions(self, gallery: str) -> list[VersionInfo]:
        """Versions of a gallery, oldest first."""
        live = self._catalog.live(gallery)
        known = self._catalog.specs_by_age(gallery)
        if not known:
            raise validation.unknown_gallery_error(gallery)
        # All at once: a server takes some 200 ms for each count, which has to see every write.
        with ThreadPoolExecutor(_COUNTS_AT_ONCE) as pool:
            instances = [pool.submit(self._num_instances, gallery, name) for name in known]
            images = [self._catalog.count_images(gallery, name, pool) for name in known]
            return [
                VersionInfo(
                    name=name,
                    spec=spec,
                    live=name == live,
                    num_images=every.result() - pending.result(),
                    num_failed=failed.result(),
                    num_instances=num.result(),
                )
                for (name, spec), num, (every, pending, failed) in zip(
                    known.items(), instances, images, strict=True
                )
            ]

    def num_stored(self, gallery: str, version: str) -> int:
        """Number of stored instance rows, including rows that belong to no image."""
        self._catalog.spec(gallery, version)
        return self._catalog.instances(gallery, version).count()

    def live_version(self, gallery: str) -> str:
        """Name of the live version."""
        live = self._catalog.live(gallery)
        if live is not None:
            return live
        if not self._catalog.version_names(gallery):
            raise validation.unknown_gallery_error(gallery)
        raise validation.no_live_version_error(gallery)

    def create_version(self, gallery: str, version: str, spec: VersionSpec) -> None:
        """Create the version's collections. Does nothing if it exists with an equal spec."""
        images, instances = self._collections(gallery, version)
        with self._writing(gallery, version):
            found = self._catalog.find(gallery, version)
            if found is not None:
                validation.check_spec(found.spec, spec, version)
            else:
                images.drop()  # left over from a creation or a removal that was interrupted
                properties = StoredVersion(spec, time.time_ns()).to_properties()
                images.create(spec.dim, properties)
                # The version exists from the moment its instances collection does, so that comes
                # last.
                self._create_instances(instances, spec, properties)
            # Also if the version exists: its creation may have been interrupted at this point.
            images.ensure_ready(searched=False)
            instances.ensure_ready(searched=True)

    def promote(self, gallery: str, version: str) -> None:
        """Make `version` live with one atomic alias switch."""
        self._check_writable()
        self._catalog.spec(gallery, version)
        self._catalog.promote(gallery, version)

    def drop_version(self, gallery: str, version: str) -> None:
        """Delete a version that is not live, even if it is damaged."""
        # Dropping is how a user recovers from damage. An unknown version is still an error.
        with contextlib.suppress(StoreDamaged):
            self._catalog.spec(gallery, version)
        if self._catalog.live(gallery) == version:
            raise validation.drop_live_version_error(gallery, version)
        self._drop(gallery, version)

    def drop_gallery(self, gallery: str) -> None:
        """Delete a gallery with all its versions; before the first is deleted, none is live."""
        self._check_writable()
        versions = self._catalog.version_names(gallery)
        if not versions:
            raise validation.unknown_gallery_error(gallery)
        # If the aliases cannot be read, dropping the live version removes its alias as well.
        with contextlib.suppress(StoreDamaged):
            self._catalog.drop_alias(gallery)
        for version in versions:
            self._drop(gallery, version)

    def upsert_images(self, gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        """Write a batch of images: instances first, ledger rows last."""
        _, instances = self._collections(gallery, version)
        self._write(gallery, version, images, instances.upsert)

    def _write(
        self,
        gallery: str,
        version: str,
        images: Sequence[IndexedImage],
        put: Callable[[Iterator[Row]], None],
    ) -> None:
        """Write a batch, for which `put` writes the instances to Milvus."""
        ledger, instances = self._collections(gallery, version)
        batch = validation.latest_by_id(images)
        with self._writing(gallery, version):
            spec = self._catalog.spec(gallery, version)
            dim = spec.dim
            to_rows = partial(
                rows.instance_rows,
                with_masks=spec.has_masks,
                with_derived=self._catalog.has_derived_columns(gallery, version),
            )
            validation.check_images(batch.values(), dim, version)
            # With the vector, since rows are written back whole.
            stored = ledger.get(batch, ["*"])
            self._before_write(instances, stored)
            # The five steps that the docstring of this module lists.
            reach = _record_reach(ledger, batch, stored, dim)
            put(itertools.chain.from_iterable(map(to_rows, batch.values())))
            self._after_upsert(instances, dim, batch.values())
            surplus = {key: list(_surplus_ids(image, reach[key])) for key, image in batch.items()}
            ledger.upsert(rows.ledger_row(batch[each], dim) for each in batch if not surplus[each])
            instances.delete(itertools.chain.from_iterable(surplus.values()))
            ledger.upsert(rows.ledger_row(batch[each], dim) for each in batch if surplus[each])

    def touch_images(self, gallery: str, version: str, mtimes_ns: Mapping[str, int]) -> None:
        """Store new modification times of images whose content has not changed."""
        ledger, _ = self._collections(gallery, version)
        with self._writing(gallery, version), self._catalog.translate_errors(gallery, version):
            # All columns with the vector: an upsert replaces the whole row.
            found = _finished(ledger.get(mtimes_ns, ["*"]))
            ledger.upsert({**row, "mtime_ns": mtimes_ns[key]} for key, row in found.items())

    def delete_images(self, gallery: str, version: str, image_ids: Sequence[str]) -> int:
        """Delete images and their instances; return how many ledger rows were deleted."""
        ledger, instances = self._collections(gallery, version)
        with self._writing(gallery, version):
            dim = self._catalog.spec(gallery, version).dim
            found = ledger.get(image_ids)
            self._before_write(instances, found)
            # By `reach`, so that instances of an interrupted write are deleted, too. The ledger
            # comes last: after a kill, the next call still knows what is left to delete.
            instances.delete(rows.instance_ids(found, "reach"))
            self._after_delete(instances, dim, found)
            ledger.delete(found)
        return len(_finished(found))

    def get_images(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, ImageRecord]:
        """Ledger rows by image id; ids that do not exist are left out."""
        with self._catalog.translate_errors(gallery, version):
            found = _finished(self._catalog.images(gallery, version).get(image_ids))
        return {each: rows.record_from_row(found[each]) for each in image_ids if each in found}

    def iter_images(
        self, gallery: str, version: str, *, status: str | None = None
    ) -> Iterator[ImageRecord]:
        """Stream all ledger rows, or those of one status, ordered by image id."""
        condition = (
            f"status != {quote(PENDING)}" if status is None else f"status == {quote(status)}"
        )
        self._catalog.spec(gallery, version)
        pages = self._catalog.images(gallery, version).pages(condition)
        return map(rows.record_from_row, pages)

    def unfinished_images(self, gallery: str, version: str) -> Iterator[tuple[str, str]]:
        """(image id, uri) of every image whose first write was interrupted."""
        self._catalog.spec(gallery, version)
        pages = self._catalog.images(gallery, version).pages(f"status == {quote(PENDING)}")
        return ((row["image_id"], row["uri"]) for row in pages)

    def find_content(
        self, gallery: str, version: str, hashes: Collection[str]
    ) -> dict[str, list[ImageRecord]]:
        """Ledger rows of the indexed images that have one of these content hashes, by hash."""
        self._catalog.spec(gallery, version)
        found: dict[str, list[ImageRecord]] = {}
        if not hashes:
            return found
        wanted = f"status == {quote('indexed')} and {render_ids('content_hash', hashes)}"
        for row in self._catalog.images(gallery, version).pages(wanted):
            found.setdefault(row["content_hash"], []).append(rows.record_from_row(row))
        return found

    def get_indexed(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, IndexedImage]:
        """Images as they were written, with vectors, image vector and masks."""
        ledger, instances = self._collections(gallery, version)
        with self._reading(gallery, version), self._catalog.translate_errors(gallery, version):
            images = _finished(ledger.get(image_ids, ["*"]))
            found = instances.get(rows.instance_ids(images, "num_instances"), ["*"])
        return {
            each: rows.image_from_rows(row, rows.instances_of(found, {each: row}))
            for each, row in images.items()
        }

    def get_instances(
        self, gallery: str, version: str, image_ids: Sequence[str], *, with_vectors: bool = False
    ) -> dict[str, list[InstanceRow]]:
        """All instances of these images, ordered by instance number."""
        ledger, instances = self._collections(gallery, version)
        columns = (
            [*rows.INSTANCE_OUTPUT_FIELDS, "vector"]
            if with_vectors
            else rows.INSTANCE_OUTPUT_FIELDS
        )
        with self._catalog.translate_errors(gallery, version):
            images = _finished(ledger.get(image_ids, consistency="Session"))
            ids = rows.instance_ids(images, "num_instances")
            found = instances.get(ids, columns, consistency="Session")
        return {
            each: [*map(rows.instance_from_row, rows.instances_of(found, {each: images[each]}))]
            for each in image_ids
            if each in images
        }

    def get_masks(
        self, gallery: str, version: str, instance_ids: Sequence[str]
    ) -> dict[str, MaskRle]:
        """Masks by instance id; instances without a mask are left out."""
        if not self._catalog.spec(gallery, version).has_masks:
            return {}
        columns = ["instance_id", rows.MASK]
        with self._catalog.translate_errors(gallery, version):
            table = self._catalog.instances(gallery, version)
            found = table.get(instance_ids, columns, consistency="Session")
        masks = {each: rows.mask_from_row(found[each]) for each in instance_ids if each in found}
        return {each: mask for each, mask in masks.items() if mask is not None}

    def put_document(self, kind: str, name: str, value: Mapping[str, Any]) -> None:
        """Write a document, and replace an older one."""
        self._check_writable()
        self._documents.put(kind, name, value)

    def find_documents(self, kind: str, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Documents of a kind whose name starts with `prefix`, ordered by name."""
        return self._documents.find(kind, prefix)

    def delete_documents(self, kind: str, names: Collection[str]) -> None:
        """Delete documents; names that do not exist are ignored."""
        self._check_writable()
        self._documents.delete(kind, names)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _drop(self, gallery: str, version: str) -> None:
        instances = self._catalog.instances(gallery, version)
        with self._writing(gallery, version):
            self._catalog.clear_cache(gallery, version)
            # First, because the version exists as long as this collection does. A kill after it
            # leaves a ledger that the next version of this name replaces.
            instances.drop()
            self._catalog.drop_ledger(gallery, version)
            self._after_drop(instances)

    def _collections(self, gallery: str, version: str) -> tuple[MilvusCollection, MilvusCollection]:
        """Ledger and instances of a version."""
        return self._catalog.images(gallery, version), self._catalog.instances(gallery, version)

    def _num_instances(self, gallery: str, version: str) -> int:
        """Number of instances that searches can find."""
        return self.num_stored(gallery, version)

    # --- Steps that an embedded store or a server adds to the methods above

    def _check_writable(self) -> None:
        """Raise `StoreError` if the store cannot be changed."""

    def _writing(self, gallery: str, version: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Exclude other writers of a version if the backend cannot have several."""
        return contextlib.nullcontext()

    def _reading(self, gallery: str, version: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Exclude all writers of a version if the backend can do that."""
        return contextlib.nullcontext()

    def _create_instances(
        self, instances: MilvusCollection, spec: VersionSpec, properties: Mapping[str, str]
    ) -> None:
        """Create the instances collection of a new version."""
        instances.create(spec.dim, properties, rows.mask_columns(spec))

    def _before_write(self, instances: MilvusCollection, stored: Mapping[str, Row]) -> None:
        """Prepare for a write to images whose ledger rows, as far as they exist, are `stored`."""

    def _after_upsert(
        self, instances: MilvusCollection, dim: int, images: Collection[IndexedImage]
    ) -> None:
        """Follow up on the instances of these images, which were written just now."""

    def _after_delete(
        self, instances: MilvusCollection, dim: int, stored: Mapping[str, Row]
    ) -> None:
        """Follow up on the instances of these ledger rows, which were deleted just now."""

    def _after_drop(self, instances: MilvusCollection) -> None:
        """Follow up on a version that was dropped just now."""


def _record_reach(
    ledger: MilvusCollection, batch: Mapping[str, IndexedImage], stored: Mapping[str, Row], dim: int
) -> dict[str, int]:
    """Record in the ledger how many instances each image may have from now on; return that."""
    growing: list[Row] = []
    reach: dict[str, int] = {}
    for image_id, image in batch.items():
        # PENDING hides a new image until all of it is stored.
        first = {**rows.ledger_row(image, dim), "status": PENDING, "reach": 0}
        row = stored.get(image_id, first)
        # Never lower than before: instances of an earlier write may still be stored.
        reach[image_id] = max(row["reach"], image.record.num_instances)
        # A new image without instances gets no row here, since nothing of it could be left over.
        if reach[image_id] > row["reach"]:
            growing.append({**row, "reach": reach[image_id]})
    ledger.upsert(growing)
    return reach


def _surplus_ids(image: IndexedImage, reach: int) -> Iterator[str]:
    """Ids of surplus instances: they may be stored, but the image no longer has them."""
    for number in range(image.record.num_instances, reach):
        yield validation.instance_id(image.record.image_id, number)


def _finished(found: Mapping[str, Row]) -> dict[str, Row]:
    """Leave out the ledger rows of images that are being written for the first time."""
    return {image_id: row for image_id, row in found.items() if row["status"] != PENDING}
