"""`Photos`: shows, adds and deletes single photos of a gallery.

An uploaded photo is saved in a folder of this server and indexed from there, with the settings of
the version that it is added to. This module depends neither on Ray nor on HTTP.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from reir.attributes import tenant_of
from reir.errors import PhotoErased, StoreFull
from reir.images.decode import (
    canonical_uri,
    content_hash,
    decode,
    image_id,
    path_of_uri,
)
from reir.images.large_photos import views_of, with_views
from reir.images.photo_files import delete_upload, read_photo
from reir.models.interfaces import InstanceEncoder
from reir.operations.erase.tombstones import tombstones_of
from reir.records import Attributes, ImageRecord, IndexedImage, Instances
from reir.store import InstanceStore, VersionSpec
from reir.store.contract import InstanceRow
from reir.store.duplicates import hand_over, remove_shared_image
from reir.store.names import check_name

MAX_NAME_BYTES = 120
MAX_SAMPLED = 1000
"""Number of ledger rows from which a sample of a gallery's photos is taken."""
ATTEMPTS = 100
"""Maximum number of attempts to create a file in a folder that other threads or processes delete
when it is empty."""


@dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """One photo of a gallery: its ledger row and its instances, without vectors."""

    record: ImageRecord
    instances: tuple[InstanceRow, ...]


@dataclass(frozen=True)
class EncodedPhoto:
    """The instances that a model found in a photo.

    Attributes:
        width_px, height_px: size of the upright photo.
        instances: the instances.
    """

    width_px: int
    height_px: int
    instances: Instances


def encode_photo(
    encoder: InstanceEncoder, spec: VersionSpec, data: bytes, max_pixels: int
) -> EncodedPhoto:
    """Decode and encode a photo in the same way as `reir index` does for a version.

    Raises:
        ImageError: the photo cannot be decoded, or has more than `max_pixels`.
    """
    at_least_px = spec.settings.get("at_least_px")
    photo = decode(
        data,
        max_pixels=max_pixels,
        at_least_px=None if at_least_px is None else int(at_least_px),
    )
    photo_encoder = with_views(encoder, views_of(spec.settings))
    (instances,) = photo_encoder.encode_images([photo.pixels])
    # The model may predict masks although the version stores none.
    if not spec.has_masks:
        instances = replace(instances, masks=None)
    return EncodedPhoto(photo.width_px, photo.height_px, instances)


@dataclass(frozen=True)
class Photos:
    """Photos of the galleries of one store.

    Attributes:
        store: holds the ledger and the instances.
        uploads: folder of uploaded photos; created for the first one.
        max_bytes: maximum size of a photo that is shown.
    """

    store: InstanceStore
    uploads: Path
    max_bytes: int

    def get(self, gallery: str, version: str, image_id: str) -> GalleryImage | None:
        """Return a photo's ledger row and instances; None if the gallery does not have the photo.

        The store keeps the instances of equal photos once. For a duplicate, the instances are those
        of the photo that holds them.
        """
        record = self.store.get_images(gallery, version, [image_id]).get(image_id)
        if record is None:
            return None
        holder = record.same_as or image_id
        found = self.store.get_instances(gallery, version, [holder])
        return GalleryImage(record=record, instances=tuple(found.get(holder, ())))

    def some(
        self, gallery: str, version: str, number: int, shown: Callable[[ImageRecord], bool]
    ) -> list[ImageRecord]:
        """Return the ledger rows of up to `number` indexed photos for which `shown` is true.

        Image ids are hashes, so the first ones are a sample. Only the first `MAX_SAMPLED` rows are
        read: a tenant whose photos are few in a large gallery may get fewer of them.
        """
        rows = self.store.iter_images(gallery, version, status="indexed")
        return list(islice(filter(shown, islice(rows, MAX_SAMPLED)), number))

    def read(self, gallery: str, version: str, image_id: str) -> bytes | None:
        """Return the bytes of a photo; None if the gallery does not have the photo.

        Only the place that the ledger names is read: a local file, or an object of a bucket.

        Raises:
            ImageError: the photo is missing or cannot be read.
        """
        record = self.store.get_images(gallery, version, [image_id]).get(image_id)
        if record is None:
            return None
        return read_photo(record.uri, max_bytes=self.max_bytes)

    def add(
        self,
        place: tuple[str, str],
        encoded: EncodedPhoto,
        data: bytes,
        name: str,
        attributes: Attributes,
    ) -> ImageRecord:
        """Store a photo and write its instances; return once searches can find it.

        The same bytes under the same name are the same photo: adding them again replaces it, but
        not the photo of another tenant. If the gallery already has a photo with these bytes and
        equal attributes, only a ledger row is written, as when `reir index` finds a duplicate.

        Args:
            place: gallery and version.
            encoded: what `encode_photo` returned for the bytes.
            data: the encoded photo.
            name: file name to show to people.
            attributes: attributes for filters.

        Raises:
            OSError, StoreFull: the photo cannot be written; nothing of it is kept.
            PhotoErased: the photo was erased from the gallery; nothing of it is kept.
        """
        path = self._upload_path(place[0], data, name, attributes)
        existed = path.exists()
        try:
            # The file first, so that the ledger never names a file that does not exist.
            _write_atomically(path, data)
            return self._write_to_store(place, path, encoded, data, attributes)
        # After any other error, such as a store that no longer answers, the row that names the file
        # may have been written, so the file stays.
        except (OSError, StoreFull, PhotoErased):
            if not existed:  # the gallery may hold the photo from an earlier upload
                delete_upload(path)
            raise

    def _write_to_store(
        self,
        place: tuple[str, str],
        path: Path,
        encoded: EncodedPhoto,
        data: bytes,
        attributes: Attributes,
    ) -> ImageRecord:
        """Write a photo's instances and its ledger row to the store."""
        gallery, version = place
        uri = canonical_uri(path)
        record = ImageRecord(
            image_id=image_id(uri),
            uri=uri,
            status="indexed",
            content_hash=content_hash(data),
            size_bytes=len(data),
            width_px=encoded.width_px,
            height_px=encoded.height_px,
            num_instances=len(encoded.instances),
            attributes=attributes,
        )
        if tombstones_of(self.store, gallery).covers(record):
            raise PhotoErased(
                f"this photo was erased from gallery '{gallery}'; whoever operates the server can "
                f"admit it again with `reir index FILE --gallery {gallery} --include-erased`"
            )
        # If this photo is in the gallery with other attributes, its duplicates keep those, so one
        # of them has to take over the instances.
        hand_over(self.store, gallery, version, [record.image_id])
        holder = self._holder(gallery, version, record)
        while holder:
            duplicate = replace(record, num_instances=0, same_as=holder)
            self.store.upsert_images(gallery, version, [IndexedImage(duplicate, None)])
            # The holder may have been deleted before it could hand over to this duplicate.
            named, holder = holder, self._holder(gallery, version, record)
            if holder == named:
                return duplicate
        self.store.upsert_images(gallery, version, [IndexedImage(record, encoded.instances)])
        return record

    def _holder(self, gallery: str, version: str, record: ImageRecord) -> str:
        """Return the id of the photo that holds the content of another one with equal attributes.

        It is empty if there is none.
        """
        found = self.store.find_content(gallery, version, {record.content_hash})
        return next(
            (
                row.image_id
                for row in found.get(record.content_hash, ())
                if row.holds_instances
                and row.image_id != record.image_id
                and dict(row.attributes) == dict(record.attributes)
            ),
            "",
        )

    def delete(self, gallery: str, version: str, image_id: str) -> bool:
        """Delete a photo from a gallery, and its file if it was uploaded; return False if unknown.

        The photo is deleted from all versions, so that no promotion brings it back. `version`, the
        one that is searched, comes last, so that the call can be repeated after an error.
        """
        record = self.store.get_images(gallery, version, [image_id]).get(image_id)
        if record is None:
            return False
        others = (each.name for each in self.store.versions(gallery) if each.name != version)
        for name in (*others, version):
            # The last number counts: that of the version that is searched.
            gone = remove_shared_image(self.store, gallery, name, image_id)
        # A file elsewhere belongs to the user, who indexed it with `reir index`.
        if record.uri.startswith(canonical_uri(self.uploads / gallery) + "/"):
            delete_upload(path_of_uri(record.uri))
        return gone > 0

    def _upload_path(self, gallery: str, data: bytes, name: str, attributes: Attributes) -> Path:
        """Return the path for an uploaded photo.

        The folder is named after the content, so the same photo gets the same path again. The
        tenant is part of the hash, so two tenants never share a file.
        """
        # `name` comes from a client: only its last part counts, and no character may have a meaning
        # in a path. The end is kept for its suffix, in whole characters and not in parts of their
        # escapes ("%C3%A9").
        kept = Path(name).name[-MAX_NAME_BYTES:]
        while len(shown := quote(kept, safe=" ()-,").lstrip(".") or "photo") > MAX_NAME_BYTES:
            kept = kept[1:]
        tenant = tenant_of(attributes).encode()
        folder = content_hash(tenant + b"/" + data if tenant else data)
        return self.uploads / check_name("gallery", gallery) / folder[:16] / shown


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: completely or not at all."""
    # `os.replace` is atomic only within one file system, hence a file in the same folder.
    descriptor, temporary = _temporary_file(path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _temporary_file(folder: Path) -> tuple[int, str]:
    """Create a temporary file in `folder`, and `folder` too if it is missing.

    Retries, because `delete_upload` may delete the folder in another thread or process.
    """
    for left in reversed(range(ATTEMPTS)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(dir=folder)
        except (FileNotFoundError, FileExistsError):  # the folder was deleted in between
            if not left:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")
