"""The `InstanceStore` contract that memory, Milvus Lite and a Milvus server all keep.

A gallery has versions; a version is one immutable (gallery, checkpoint digest, settings) index and
owns two collections: instances, and images (the ledger). One version of a gallery is live. Which
store is in use must not be visible in any answer; the congruence suite holds that.
"""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from reir.records import Attributes, FloatArray, ImageRecord, IndexedImage, MaskRle

LEDGER_LAYOUT = 2
"""Goes up with the columns of the ledger and is part of a version's settings: a gallery of an
earlier release stays readable, and the next indexing run builds a new version beside it."""


@dataclass(frozen=True, kw_only=True)
class VersionSpec:
    """What makes a version what it is; equal specs mean equal vectors for equal images.

    Attributes:
        dim: vector dimension.
        digest: sha256 of the checkpoint's weights.
        settings: everything else that changes the instances (e.g. num_candidates). Masks are kept
            only where it says `masks`.
        encoder: where the encoder was found, as `reir.encoders` takes it, so that a search can load
            it by itself; the place of equal weights, so it does not count in a comparison.
    """

    dim: int
    digest: str
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    encoder: str = field(default="", compare=False)

    @property
    def has_masks(self) -> bool:
        """Whether the version keeps masks."""
        return bool(self.settings.get("masks", False))


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """One version as `reir versions` lists it.

    Attributes:
        name: version name, unique in the gallery.
        live: whether the gallery's alias points to it.
        num_images: ledger rows, failed ones included.
        num_failed: ledger rows that failed.
        num_instances: instances that searches find.
    """

    name: str
    spec: VersionSpec
    live: bool
    num_images: int
    num_failed: int
    num_instances: int


class InstanceRow(NamedTuple):
    """One stored instance; `score` is set by `search` (inner product) and 0.0 otherwise.

    A tuple, since a search makes hundreds of them. Nobody changes `attributes`, which the rows of a
    photo share.
    """

    instance_id: str
    image_id: str
    uri: str
    box: tuple[float, float, float, float]
    objectness: float
    area: float
    attributes: Attributes
    score: float = 0.0
    vector: FloatArray | None = None


@dataclass(frozen=True, kw_only=True)
class StoredPhoto:
    """All instances of one photo as arrays, in the order of their number.

    Attributes:
        image_id, uri, attributes: of the photo.
        boxes: (N, 4) float32.
        objectness: (N,) float32.
        vectors: (N, D) float32. None of the three may be written to.
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
    """Galleries, versions, ledger and vector search.

    All methods raise `GalleryNotFound` for an unknown gallery or version and `StoreUnavailable`
    when the backend cannot be reached.
    """

    def galleries(self) -> list[str]:
        """Names of all galleries, sorted."""
        ...

    def versions(self, gallery: str) -> list[VersionInfo]:
        """Versions of a gallery, oldest first."""
        ...

    def num_stored(self, gallery: str, version: str) -> int:
        """Instance rows that there are, those that belong to no image included.

        Embedded this may take seconds, during which writers wait.
        """
        ...

    def live_version(self, gallery: str) -> str:
        """Name of the live version.

        Raises:
            GalleryNotFound: no such gallery, or none of its versions is live yet.
        """
        ...

    def create_version(self, gallery: str, version: str, spec: VersionSpec) -> None:
        """Create the version's collections; does nothing when it exists with an equal spec.

        Raises:
            SchemaMismatch: it exists with another spec; the message gives both.
        """
        ...

    def promote(self, gallery: str, version: str) -> None:
        """Make `version` live with one atomic alias switch."""
        ...

    def drop_version(self, gallery: str, version: str) -> None:
        """Delete a version that is not live.

        Raises:
            StoreError: the version is live.
        """
        ...

    def drop_gallery(self, gallery: str) -> None:
        """Delete a gallery with all its versions, the live one too; searches of it then fail."""
        ...

    def upsert_images(self, gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        """Write a batch of images: instances first, ledger rows last.

        Replaces whatever is stored under the same image ids (also where the new image has fewer
        instances). Returns when the rows are durable against a killed process and searchable.
        Embedded, a search sees the whole batch or nothing of it; on a server, new instances are
        seen before those that go are gone.

        Raises:
            SchemaMismatch: a vector's dimension differs from the version's.
        """
        ...

    def import_images(
        self, gallery: str, version: str, images: Sequence[IndexedImage], storage: str
    ) -> None:
        """Write a large batch of images as `upsert_images`, most of it by a file.

        A Milvus server takes a file in with less work than upserts, some 20 seconds later. Images
        that the ledger knows, finished or not, and batches of few instances are upserted all the
        same.

        Args:
            gallery: name.
            version: name.
            images: the batch.
            storage: a folder in the storage of the server; see `reir.store.imports`.

        Raises:
            ConfigError: the store is not a Milvus server.
            StoreError: the storage cannot be written, or is not that of the server.
            SchemaMismatch: a vector's dimension differs from the version's.
        """
        ...

    def settle(self, gallery: str, version: str, *, fresh: int, within_s: float) -> bool:
        """Have all instances searched as well as they are going to be.

        A Milvus server searches fresh ones by an interim index, if they are many, which misses some
        of the best; it makes the lasting one when they are sealed, which may take it hours if
        nobody asks for it. Other stores have nothing to do.

        Args:
            gallery: name.
            version: name.
            fresh: instances upserted lately, at least.
            within_s: how long to wait.

        Returns:
            Whether it is done. If not, the server goes on by itself.
        """
        ...

    def touch_images(self, gallery: str, version: str, mtimes_ns: Mapping[str, int]) -> None:
        """Note new file times of images whose content is as before; nothing else changes.

        Args:
            gallery: name.
            version: name.
            mtimes_ns: image id -> time; ids without a ledger row are left out.
        """
        ...

    def delete_images(self, gallery: str, version: str, image_ids: Sequence[str]) -> int:
        """Delete images and their instances; returns how many ledger rows went."""
        ...

    def get_images(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, ImageRecord]:
        """Ledger rows of those ids that exist."""
        ...

    def iter_images(
        self, gallery: str, version: str, *, status: str | None = None
    ) -> Iterator[ImageRecord]:
        """All ledger rows in the order of image_id, optionally of one status; streams."""
        ...

    def unfinished_images(self, gallery: str, version: str) -> Iterator[tuple[str, str]]:
        """(image id, uri) of every image whose first write was cut short, in the order of the id.

        No other method knows them, but some of their instances may be stored; writing the image
        again or deleting it mends that.
        """
        ...

    def find_content(
        self, gallery: str, version: str, hashes: Collection[str]
    ) -> dict[str, list[ImageRecord]]:
        """Ledger rows of the indexed images that have one of these contents, by content hash.

        Duplicates are among them; each list is in the order of image_id.
        """
        ...

    def get_indexed(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, IndexedImage]:
        """The images that exist as they were written: with vectors, image vector and masks."""
        ...

    def get_instances(
        self, gallery: str, version: str, image_ids: Sequence[str], *, with_vectors: bool = False
    ) -> dict[str, list[InstanceRow]]:
        """All instances of the images that exist, each list in the order of the instance number."""
        ...

    def get_photos(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, StoredPhoto]:
        """Those of the images that have instances, as a search just now would see them.

        What the re-ranker reads: fast, and the whole photo or nothing of it.
        """
        ...

    def get_masks(
        self, gallery: str, version: str, instance_ids: Sequence[str]
    ) -> dict[str, MaskRle]:
        """Masks of those instances that have one, by instance id.

        Masks are large, so no row carries them: they are asked for when hits are known.
        """
        ...

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
            gallery: name.
            version: name.
            vectors: (Q, D) float32.
            limit: rows a query, 1 to 16,384.
            where: filter over instance fields and attributes (`reir.store.filters`).

        Raises:
            FilterError: the filter cannot be parsed or names an unknown field.
            SchemaMismatch: D differs from the version's dimension.
        """
        ...

    def compare_reader(self, gallery: str, version: str) -> int:
        """Compare the copy that searches read with the store, bit by bit, and repair it.

        Only an embedded store keeps a copy of its instances for searches. This reads everything.

        Returns:
            Number of photos that differed; all of them have been repaired.
        """
        ...

    def close(self) -> None:
        """Release connections and the child server, if this store started one."""
        ...
