"""`InstanceStore`, which every store implements, and `ServerStore`, which a Milvus server adds.

A gallery has versions. A version is the index of one gallery by one checkpoint with fixed settings.
It has two collections: its instances, and the ledger, which has one row per image. One version of a
gallery is live. All stores give the same answers; `tests/platform/store/test_congruence.py` runs
the same tests on each of them.
"""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from reir.records import Attributes, Box, FloatArray, ImageRecord, IndexedImage, MaskRle

LEDGER_LAYOUT = 2
"""Number of the column layout of the ledger, and part of a version's settings. A release that adds
columns increments it: older galleries stay readable, and the next indexing run builds a new version
beside the old one."""


@dataclass(frozen=True, kw_only=True)
class VersionSpec:
    """What determines the vectors of a version; equal specs mean equal vectors for equal images.

    Attributes:
        dim: vector dimension.
        digest: sha256 of the checkpoint's weights.
        settings: everything else that changes the instances (e.g. num_candidates). Masks are stored
            only if the setting `masks` is true.
        encoder: where the encoder was loaded from, in the form that `reir.encoders` accepts, so
            that a search can load it too. Not compared: the same weights may be in another folder.
    """

    dim: int
    digest: str
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    encoder: str = field(default="", compare=False)

    @property
    def has_masks(self) -> bool:
        """Whether the version stores masks."""
        return bool(self.settings.get("masks", False))


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """One version, as `reir versions` lists it.

    Attributes:
        name: version name, unique in the gallery.
        live: whether searches of the gallery use it.
        num_images: number of ledger rows, including failed images.
        num_failed: number of ledger rows of failed images.
        num_instances: number of instances that searches can find.
    """

    name: str
    spec: VersionSpec
    live: bool
    num_images: int
    num_failed: int
    num_instances: int


class InstanceRow(NamedTuple):
    """One stored instance; `score` is set by `search` (inner product) and 0.0 otherwise.

    A tuple, because a search creates hundreds of them. The rows of a photo share `attributes`, so
    it must not be changed.
    """

    instance_id: str
    image_id: str
    uri: str
    box: Box
    objectness: float
    area: float
    attributes: Attributes
    score: float = 0.0
    vector: FloatArray | None = None


@dataclass(frozen=True, kw_only=True)
class StoredPhoto:
    """All instances of one photo as arrays, ordered by instance number. The arrays are read-only.

    Attributes:
        image_id, uri, attributes: those of the photo.
        boxes: (N, 4) float32.
        objectness: (N,) float32.
        vectors: (N, D) float32.
    """

    image_id: str
    uri: str
    attributes: Attributes
    boxes: FloatArray
    objectness: FloatArray
    vectors: FloatArray

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.objectness)

    def row(self, number: int, score: float = 0.0) -> InstanceRow:
        """Return one instance as a row, without its vector."""
        x1, y1, x2, y2 = self.boxes[number]
        return InstanceRow(
            instance_id=f"{self.image_id}#{number}",
            image_id=self.image_id,
            uri=self.uri,
            box=(float(x1), float(y1), float(x2), float(y2)),
            objectness=float(self.objectness[number]),
            area=float((x2 - x1) * (y2 - y1)),
            score=score,
            attributes=self.attributes,
        )


class InstanceStore(Protocol):
    """Galleries, versions, the ledger and vector search.

    All methods raise `GalleryNotFound` for an unknown gallery or version, and `StoreUnavailable`
    if the backend cannot be reached.
    """

    # --- Galleries and versions

    def galleries(self) -> list[str]:
        """Names of all galleries, sorted."""
        ...

    def versions(self, gallery: str) -> list[VersionInfo]:
        """Versions of a gallery, oldest first."""
        ...

    def live_version(self, gallery: str) -> str:
        """Name of the live version.

        Raises:
            GalleryNotFound: there is no such gallery, or none of its versions is live yet.
        """
        ...

    def create_version(self, gallery: str, version: str, spec: VersionSpec) -> None:
        """Create the version's collections. Does nothing if it exists with an equal spec.

        Raises:
            SchemaMismatch: it exists with another spec; the message gives both.
        """
        ...

    def promote(self, gallery: str, version: str) -> None:
        """Make `version` live with one atomic switch."""
        ...

    def drop_version(self, gallery: str, version: str) -> None:
        """Delete a version that is not live.

        Raises:
            StoreError: the version is live.
        """
        ...

    def drop_gallery(self, gallery: str) -> None:
        """Delete a gallery with all its versions, including the live one."""
        ...

    # --- Writing images

    def upsert_images(self, gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        """Write a batch of images, and replace everything stored under the same image ids.

        Returns when the rows survive a killed process and searches find them. In an embedded store,
        a search sees the whole batch or nothing of it. On a server, a search may see the new
        instances of an image before its old ones are gone.

        Raises:
            SchemaMismatch: a vector's dimension differs from the version's.
        """
        ...

    def touch_images(self, gallery: str, version: str, mtimes_ns: Mapping[str, int]) -> None:
        """Store new modification times of images whose content has not changed.

        Args:
            gallery: name of the gallery.
            version: name of the version.
            mtimes_ns: image id -> modification time; ids without a ledger row are ignored.
        """
        ...

    def delete_images(self, gallery: str, version: str, image_ids: Sequence[str]) -> int:
        """Delete images and their instances; return how many ledger rows were deleted."""
        ...

    # --- Reading the ledger

    def get_images(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, ImageRecord]:
        """Ledger rows by image id; ids that do not exist are left out."""
        ...

    def iter_images(
        self, gallery: str, version: str, *, status: str | None = None
    ) -> Iterator[ImageRecord]:
        """Stream all ledger rows, or those of one status, ordered by image id."""
        ...

    def unfinished_images(self, gallery: str, version: str) -> Iterator[tuple[str, str]]:
        """(image id, uri) of every image whose first write was interrupted, ordered by image id.

        No other method returns these images, but some of their instances may be stored. To clean
        up, write the image again or delete it.
        """
        ...

    def find_content(
        self, gallery: str, version: str, hashes: Collection[str]
    ) -> dict[str, list[ImageRecord]]:
        """Ledger rows of the indexed images that have one of these content hashes, by hash.

        Duplicates are included. Each list is ordered by image id.
        """
        ...

    # --- Reading instances

    def num_stored(self, gallery: str, version: str) -> int:
        """Number of stored instance rows, including rows that belong to no image.

        In an embedded store this may take seconds, and writers wait meanwhile.
        """
        ...

    def get_indexed(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, IndexedImage]:
        """Images as they were written, with vectors, image vector and masks.

        Ids that do not exist are left out. An embedded store returns all of these images as they
        were at one moment, and writers wait meanwhile. A server cannot make the writers of other
        processes wait: an image that is being written at this moment may be returned with its old
        ledger row and some of its new instances.
        """
        ...

    def get_instances(
        self, gallery: str, version: str, image_ids: Sequence[str], *, with_vectors: bool = False
    ) -> dict[str, list[InstanceRow]]:
        """All instances of these images, ordered by instance number.

        Images that do not exist are left out.
        """
        ...

    def get_photos(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """The images that have instances, as a search at this moment would see them.

        The re-ranker reads photos with this method: it is fast, and returns either the whole photo
        or nothing of it.
        """
        ...

    def get_masks(
        self, gallery: str, version: str, instance_ids: Sequence[str]
    ) -> dict[str, MaskRle]:
        """Masks by instance id; instances without a mask are left out.

        Masks are large, so `InstanceRow` does not contain them. Callers ask for the masks of their
        final hits.
        """
        ...

    # --- Search

    def search(
        self,
        gallery: str,
        version: str,
        vectors: FloatArray,
        limit: int,
        *,
        where: str | None = None,
    ) -> Sequence[Sequence[InstanceRow]]:
        """The `limit` instances of largest inner product for each query vector, best first.

        Args:
            gallery: name of the gallery.
            version: name of the version.
            vectors: (Q, D) float32.
            limit: number of instances per query, 1 to 16,384.
            where: filter over instance fields and attributes (`reir.store.filters`).

        Raises:
            FilterError: the filter cannot be parsed or names an unknown field.
            SchemaMismatch: D differs from the version's dimension.
        """
        ...

    def repair_search_copy(self, gallery: str, version: str) -> int:
        """Compare the copy that searches read with the store, bit by bit, and repair the copy.

        Only an embedded store has such a copy. This reads all vectors.

        Returns:
            Number of photos that differed, all of which have been repaired.
        """
        ...

    def compact(self, gallery: str, version: str) -> bool:
        """Remove from disk what was deleted from a version, or replaced in it, and from documents.

        Without this call, the files of a store hold deleted rows until they are merged, which may
        be never.

        Returns:
            Whether the rows are gone from disk. A server returns False: it merges its files now,
            and deletes the old ones when its own garbage collection runs.
        """
        ...

    # --- Documents

    def put_document(self, kind: str, name: str, value: Mapping[str, Any]) -> None:
        """Write a small JSON document, such as the state of a job, and replace an older one.

        Every process that uses the store sees it when the call returns.

        Args:
            kind: what the document is, e.g. "reindex".
            name: unique among the documents of this kind.
            value: JSON values.

        Raises:
            StoreError: the document is larger than 60,000 bytes.
        """
        ...

    def find_documents(self, kind: str, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Return the documents of a kind whose name starts with `prefix`, ordered by name."""
        ...

    def delete_documents(self, kind: str, names: Collection[str]) -> None:
        """Delete documents; names that do not exist are ignored."""
        ...

    # --- Closing

    def close(self) -> None:
        """Close connections, and stop using the server process of an embedded store."""
        ...


@runtime_checkable
class ServerStore(InstanceStore, Protocol):
    """What only a Milvus server can do; check for it with `isinstance`."""

    def import_images(
        self, gallery: str, version: str, images: Sequence[IndexedImage], storage: str
    ) -> None:
        """Write a large batch of images like `upsert_images`, but mostly by bulk import.

        For the server, importing a file is less work than upserts of the same rows, but the call
        takes some 20 seconds longer. Only new images are imported. Images that have a ledger row,
        finished or not, are upserted, and so are batches of few instances.

        Args:
            gallery: name of the gallery.
            version: name of the version.
            images: the batch.
            storage: a folder in the object storage of the server; see `reir.store.bulk_import`.

        Raises:
            StoreError: the storage cannot be written, or the server uses another storage.
            SchemaMismatch: a vector's dimension differs from the version's.
        """
        ...

    def wait_until_indexed(
        self, gallery: str, version: str, *, num_upserted: int, timeout_s: float
    ) -> bool:
        """Have the server build its final index over all instances, and wait for it.

        Until then, the server searches many new instances by an interim index, which misses some of
        the best hits. It builds the final index once a segment is sealed, which may take hours
        unless it is asked to.

        Args:
            gallery: name of the gallery.
            version: name of the version.
            num_upserted: number of instances that were upserted recently, or fewer.
            timeout_s: how long to wait.

        Returns:
            Whether the index is complete. If not, the server continues building it.
        """
        ...
