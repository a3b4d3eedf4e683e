"""`MemoryStore`: a store in dictionaries and numpy arrays, with which tests compare the others."""

# Shapes: Q queries, N instances, D vector dimension

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reir.records import FloatArray, ImageRecord, IndexedImage, Instances, MaskRle
from reir.store.contract import InstanceRow, StoredPhoto, VersionInfo, VersionSpec
from reir.store.filter_numpy import evaluate, row_column
from reir.store.filters import parse
from reir.store.names import check_name
from reir.store.validation import (
    check_dim,
    check_images,
    check_queries,
    check_spec,
    drop_live_version_error,
    encode_document,
    instance_id,
    latest_by_id,
    no_live_version_error,
    unknown_gallery_error,
    unknown_version_error,
)


@dataclass
class _Version:
    """One version: ledger rows, instances as they were given, and instance rows, by image id."""

    spec: VersionSpec
    records: dict[str, ImageRecord] = field(default_factory=dict)
    instances: dict[str, Instances | None] = field(default_factory=dict)
    rows: dict[str, list[InstanceRow]] = field(default_factory=dict)

    def masks(self, image_id: str) -> tuple[MaskRle, ...]:
        """Masks of an image's instances; empty if the version has no masks."""
        instances = self.instances.get(image_id)
        return () if instances is None else instances.masks or ()


class MemoryStore:
    """Galleries in the memory of this process."""

    def __init__(self) -> None:
        """Start empty."""
        self._galleries: dict[str, dict[str, _Version]] = {}
        self._live: dict[str, str] = {}
        self._documents: dict[tuple[str, str], str] = {}

    def galleries(self) -> list[str]:
        """Names of all galleries, sorted."""
        return sorted(self._galleries)

    def versions(self, gallery: str) -> list[VersionInfo]:
        """Versions of a gallery, oldest first."""
        return [
            VersionInfo(
                name=name,
                spec=version.spec,
                live=self._live.get(gallery) == name,
                num_images=len(version.records),
                num_failed=sum(row.status == "failed" for row in version.records.values()),
                num_instances=self.num_stored(gallery, name),
            )
            for name, version in self._gallery(gallery).items()
        ]

    def num_stored(self, gallery: str, version: str) -> int:
        """Number of stored instance rows."""
        return sum(map(len, self._version(gallery, version).rows.values()))

    def live_version(self, gallery: str) -> str:
        """Name of the live version."""
        self._gallery(gallery)
        if gallery not in self._live:
            raise no_live_version_error(gallery)
        return self._live[gallery]

    def create_version(self, gallery: str, version: str, spec: VersionSpec) -> None:
        """Create the version. Does nothing if it exists with an equal spec."""
        check_name("gallery", gallery)
        check_name("version", version)
        versions = self._galleries.setdefault(gallery, {})
        check_spec(versions.setdefault(version, _Version(spec)).spec, spec, version)

    def promote(self, gallery: str, version: str) -> None:
        """Make `version` live."""
        self._version(gallery, version)
        self._live[gallery] = version

    def drop_version(self, gallery: str, version: str) -> None:
        """Delete a version that is not live."""
        self._version(gallery, version)
        if self._live.get(gallery) == version:
            raise drop_live_version_error(gallery, version)
        del self._galleries[gallery][version]
        # As in Milvus, where a gallery exists as long as it has a version.
        if not self._galleries[gallery]:
            del self._galleries[gallery]

    def drop_gallery(self, gallery: str) -> None:
        """Delete a gallery with all its versions."""
        self._gallery(gallery)
        del self._galleries[gallery]
        self._live.pop(gallery, None)

    def upsert_images(self, gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        """Write a batch of images, and replace what is stored under the same ids."""
        stored = self._version(gallery, version)
        batch = latest_by_id(images)
        # The whole batch is checked before its first image is written, so a refused one changes
        # nothing.
        check_images(batch.values(), stored.spec.dim, version)
        for image_id, image in batch.items():
            instances = image.instances
            if instances is not None and not stored.spec.has_masks:
                instances = replace(instances, masks=None)
            stored.instances[image_id] = instances
            stored.rows[image_id] = _instance_rows(image)
            stored.records[image_id] = image.record

    def touch_images(self, gallery: str, version: str, mtimes_ns: Mapping[str, int]) -> None:
        """Store new modification times of images whose content has not changed."""
        records = self._version(gallery, version).records
        for image_id in mtimes_ns.keys() & records.keys():
            records[image_id] = replace(records[image_id], mtime_ns=mtimes_ns[image_id])

    def delete_images(self, gallery: str, version: str, image_ids: Sequence[str]) -> int:
        """Delete images and their instances; return how many ledger rows were deleted."""
        stored = self._version(gallery, version)
        found = set(image_ids) & stored.records.keys()
        for image_id in found:
            del stored.records[image_id], stored.rows[image_id], stored.instances[image_id]
        return len(found)

    def get_images(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, ImageRecord]:
        """Ledger rows by image id; ids that do not exist are left out."""
        records = self._version(gallery, version).records
        return {each: records[each] for each in image_ids if each in records}

    def iter_images(
        self, gallery: str, version: str, *, status: str | None = None
    ) -> Iterator[ImageRecord]:
        """All ledger rows, or those of one status, ordered by image id."""
        records = self._version(gallery, version).records
        # No `yield`, so that an unknown version is an error at the call, as in the other stores,
        # and not only when the first row is taken.
        return (records[each] for each in sorted(records) if status in (None, records[each].status))

    def unfinished_images(self, gallery: str, version: str) -> Iterator[tuple[str, str]]:
        """Nothing: an interrupted write ends the process, and the store with it."""
        self._version(gallery, version)
        return iter(())

    def find_content(
        self, gallery: str, version: str, hashes: Collection[str]
    ) -> dict[str, list[ImageRecord]]:
        """Ledger rows of the indexed images that have one of these content hashes, by hash."""
        found: dict[str, list[ImageRecord]] = {}
        for record in self.iter_images(gallery, version, status="indexed"):
            if record.content_hash in hashes:
                found.setdefault(record.content_hash, []).append(record)
        return found

    def get_indexed(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, IndexedImage]:
        """Images as they were written, with vectors, image vector and masks."""
        stored = self._version(gallery, version)
        return {
            each: IndexedImage(stored.records[each], stored.instances[each])
            for each in image_ids
            if each in stored.records
        }

    def get_instances(
        self, gallery: str, version: str, image_ids: Sequence[str], *, with_vectors: bool = False
    ) -> dict[str, list[InstanceRow]]:
        """All instances of these images, ordered by instance number."""
        rows = self._version(gallery, version).rows
        return {
            each: [row if with_vectors else row._replace(vector=None) for row in rows[each]]
            for each in image_ids
            if each in rows
        }

    def get_photos(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """The images that have instances."""
        stored = self._version(gallery, version)
        found: dict[str, StoredPhoto] = {}
        for image_id in image_ids:
            instances = stored.instances.get(image_id)
            if instances is not None and len(instances):
                record = stored.records[image_id]
                found[image_id] = StoredPhoto(
                    image_id=image_id,
                    uri=record.uri,
                    attributes=dict(record.attributes),
                    boxes=instances.boxes,
                    objectness=instances.objectness,
                    vectors=instances.vectors,
                )
        return found

    def get_masks(
        self, gallery: str, version: str, instance_ids: Sequence[str]
    ) -> dict[str, MaskRle]:
        """Masks by instance id; instances without a mask are left out."""
        stored = self._version(gallery, version)
        known = {
            instance_id(image_id, number): mask
            for image_id in {each.rpartition("#")[0] for each in instance_ids}
            for number, mask in enumerate(stored.masks(image_id))
        }
        return {each: known[each] for each in instance_ids if each in known}

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
        stored = self._version(gallery, version)
        queries = check_queries(vectors, limit)
        check_dim(queries.shape[1], stored.spec.dim, version)
        rows = [row for image_rows in stored.rows.values() for row in image_rows]
        if where is not None:
            mask = evaluate(parse(where, added=2), lambda field: row_column(rows, field))
            rows = [row for row, kept in zip(rows, mask, strict=True) if kept]
        if not rows:
            return [[] for _ in queries]
        scores_QN = queries @ np.stack([_vector(row) for row in rows]).T
        return [_best(rows, scores_N, limit) for scores_N in scores_QN]

    def repair_search_copy(self, gallery: str, version: str) -> int:
        """Return 0: searches read the store itself, not a copy."""
        self._version(gallery, version)
        return 0

    def compact(self, gallery: str, version: str) -> bool:
        """Return True: what is deleted is gone at once."""
        self._version(gallery, version)
        return True

    def put_document(self, kind: str, name: str, value: Mapping[str, Any]) -> None:
        """Write a document."""
        self._documents[kind, name] = encode_document(kind, name, value)

    def find_documents(self, kind: str, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Documents of a kind whose name starts with `prefix`, ordered by name."""
        return {
            name: json.loads(self._documents[each, name])
            for each, name in sorted(self._documents)
            if each == kind and name.startswith(prefix)
        }

    def delete_documents(self, kind: str, names: Collection[str]) -> None:
        """Delete documents; names that do not exist are ignored."""
        for name in names:
            self._documents.pop((kind, name), None)

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def _gallery(self, gallery: str) -> dict[str, _Version]:
        if gallery not in self._galleries:
            raise unknown_gallery_error(gallery)
        return self._galleries[gallery]

    def _version(self, gallery: str, version: str) -> _Version:
        versions = self._gallery(gallery)
        if version not in versions:
            raise unknown_version_error(gallery, version, versions)
        return versions[version]


def _instance_rows(image: IndexedImage) -> list[InstanceRow]:
    instances, record = image.instances, image.record
    if instances is None:
        return []
    return [
        InstanceRow(
            instance_id=instance_id(record.image_id, number),
            image_id=record.image_id,
            uri=record.uri,
            box=tuple(instances.boxes[number].tolist()),
            objectness=float(instances.objectness[number]),
            area=area,
            vector=instances.vectors[number].copy(),
            attributes=dict(record.attributes),
        )
        for number, area in enumerate(instances.areas.tolist())
    ]


def _vector(row: InstanceRow) -> FloatArray:
    assert row.vector is not None, "every stored row has its vector"
    return row.vector


def _best(rows: list[InstanceRow], scores_N: FloatArray, limit: int) -> list[InstanceRow]:
    # Stable, so that equal scores stay in the order in which the images were first written.
    order = np.argsort(-scores_N, kind="stable")[:limit]
    return [rows[i]._replace(score=float(scores_N[i]), vector=None) for i in order]
