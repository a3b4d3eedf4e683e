"""Single photos of a gallery: their bytes, their instances, and adding and deleting one online.

An uploaded photo is kept in a folder of this server and indexed from there, with the settings of
the version that it goes into. Knows no Ray and no HTTP.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np

from reir.boxes import pairwise_iou
from reir.clock import Clock
from reir.errors import ImageError, ImageFailure, QueryError, StoreFull
from reir.images import canonical_uri, content_hash, decode, image_id, path_of_uri, read_bytes
from reir.localise import PixelLocaliser
from reir.models.seams import InstanceEncoder
from reir.records import Attributes, FloatArray, ImageRecord, IndexedImage, Instances
from reir.store import InstanceStore, VersionSpec
from reir.store.duplicates import hand_over, remove_images
from reir.store.names import check_name
from reir.text import validate_expression
from reir.tiling import TiledEncoder, Tiling
from reir_serving.access import TENANT
from reir_serving.backend import Box, GalleryImage, Localisation

MAX_NAME_BYTES = 120
ATTEMPTS = 100
"""How often to try to create a file in a folder that others delete whenever it is empty."""

_BUCKETS = ("s3://", "gs://")


@dataclass(frozen=True)
class Seen:
    """What a model made of a photo.

    Attributes:
        width_px, height_px: of the upright photo.
    """

    width_px: int
    height_px: int
    instances: Instances


def see(encoder: InstanceEncoder, spec: VersionSpec, data: bytes, max_pixels: int) -> Seen:
    """Decode and encode a photo as indexing into a version does.

    Raises:
        ImageError: it cannot be decoded, or has more than `max_pixels`.
    """
    at_least_px = spec.settings.get("at_least_px")
    photo = decode(
        data,
        max_pixels=max_pixels,
        at_least_px=None if at_least_px is None else int(at_least_px),
    )
    tiling = Tiling.from_settings(spec.settings)
    eye: InstanceEncoder = encoder if tiling is None else TiledEncoder(encoder, tiling)
    (instances,) = eye.encode_images([photo.pixels])
    if not spec.has_masks:
        instances = replace(instances, masks=None)
    return Seen(photo.width_px, photo.height_px, instances)


def vector_of(
    encoder: InstanceEncoder, data: bytes, box: Box | None, max_pixels: int
) -> FloatArray:
    """(D,) vector of the instance of a photo that fits a box best; None: of the whole photo.

    Raises:
        ImageError: it cannot be decoded, or has more than `max_pixels`.
        QueryError: no instance overlaps the box.
    """
    (instances,) = encoder.encode_images([decode(data, max_pixels=max_pixels).pixels])
    if box is None:
        return instances.image_vector
    overlaps = pairwise_iou([box], instances.boxes)[0] if len(instances) else np.zeros(0)
    if not overlaps.any():
        raise QueryError(
            "box", f"holds nothing that was recognised; the photo has {len(instances)} instances"
        )
    return np.asarray(instances.vectors[int(overlaps.argmax())])


def locate(
    localiser: PixelLocaliser, data: bytes, expression: str, k: int, max_pixels: int
) -> Localisation:
    """Find the instances of a photo that fit an expression.

    Raises:
        ImageError: it cannot be decoded, or has more than `max_pixels`.
        QueryError: the expression is none.
    """
    clock = Clock("decode", "localise")
    text = validate_expression(expression)
    with clock.stage("decode"):
        photo = decode(data, max_pixels=max_pixels)
    with clock.stage("localise"):
        (found,) = localiser.locate(photo.pixels, [text], k)
    return replace(
        found,
        expression=expression,
        width_px=photo.width_px,
        height_px=photo.height_px,
        timings_ms=dict(clock.ms),
    )


def without_masks(found: Localisation) -> Localisation:
    """Return where something is without its masks, which are large."""
    return replace(found, boxes=tuple(replace(each, mask=None) for each in found.boxes))


@dataclass(frozen=True)
class Photos:
    """Photos of the galleries of one store.

    Attributes:
        store: where ledger and instances are.
        uploads: folder for photos that were added online; made when the first one comes.
        max_bytes: more are not read of a photo that is shown.
    """

    store: InstanceStore
    uploads: Path
    max_bytes: int

    def get(self, gallery: str, version: str, image_id: str) -> GalleryImage | None:
        """Return a photo's ledger row and instances; those of a duplicate are of its holder."""
        record = self.store.get_images(gallery, version, [image_id]).get(image_id)
        if record is None:
            return None
        holder = record.same_as or image_id
        found = self.store.get_instances(gallery, version, [holder])
        return GalleryImage(record=record, instances=tuple(found.get(holder, ())))

    def read(self, gallery: str, version: str, image_id: str) -> bytes | None:
        """Return the bytes of a photo; None where the gallery has none under that id.

        Only the place that the ledger names is read: a local file, or an object of a bucket.

        Raises:
            ImageError: they cannot be had.
        """
        record = self.store.get_images(gallery, version, [image_id]).get(image_id)
        if record is None:
            return None
        if record.uri.startswith("file:///"):
            return read_bytes(path_of_uri(record.uri), max_bytes=self.max_bytes)
        if record.uri.startswith(_BUCKETS):
            return _read_object(record.uri, self.max_bytes)
        raise ImageError(
            ImageFailure.UNREACHABLE,
            f"photos of {record.uri.partition(':')[0]!r} are not shown; files and buckets are",
        )

    def add(
        self, place: tuple[str, str], seen: Seen, data: bytes, name: str, attributes: Attributes
    ) -> ImageRecord:
        """Store a photo and write its instances; return once searches can find it.

        The same bytes under the same name are the same photo: adding them again replaces it, but
        not the photo of another tenant. If the gallery already holds these bytes with equal
        attributes, only a ledger row is written, as after indexing.

        Args:
            place: gallery and version.
            seen: what `see` returned for the bytes.
            data: the encoded photo.
            name: file name to show to people.
            attributes: attributes for filters.

        Raises:
            OSError, StoreFull: the photo cannot be written; nothing of it is kept.
        """
        path = self._place(place[0], data, name, attributes)
        was_there = path.exists()
        try:
            _write(path, data)
            return self._note(place, path, seen, data, attributes)
        except (OSError, StoreFull):
            if not was_there:
                _discard(path)
            raise

    def _note(
        self, place: tuple[str, str], path: Path, seen: Seen, data: bytes, attributes: Attributes
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
            width_px=seen.width_px,
            height_px=seen.height_px,
            num_instances=len(seen.instances),
            attributes=attributes,
        )
        hand_over(self.store, gallery, version, [record.image_id])  # what had it as its holder
        holder = self._holder(gallery, version, record)
        image = IndexedImage(record, seen.instances)
        if holder is not None:
            duplicate = replace(record, num_instances=0, same_as=holder.image_id)
            image = IndexedImage(duplicate, None)
        self.store.upsert_images(gallery, version, [image])
        return image.record

    def _holder(self, gallery: str, version: str, record: ImageRecord) -> ImageRecord | None:
        """Return the photo that holds the content of another one with equal attributes."""
        found = self.store.find_content(gallery, version, {record.content_hash})
        return next(
            (
                row
                for row in found.get(record.content_hash, ())
                if row.holds_instances
                and row.image_id != record.image_id
                and dict(row.attributes) == dict(record.attributes)
            ),
            None,
        )

    def delete(self, gallery: str, version: str, image_id: str) -> bool:
        """Delete a photo from a gallery, and its bytes if they were uploaded; False if unknown.

        It goes from the other versions too, so that no promotion brings it back; from the one that
        is searched last, so that the call can be repeated after an error.
        """
        record = self.store.get_images(gallery, version, [image_id]).get(image_id)
        if record is None:
            return False
        others = (each.name for each in self.store.versions(gallery) if each.name != version)
        for name in (*others, version):
            gone = remove_images(self.store, gallery, name, [image_id])
        if record.uri.startswith(canonical_uri(self.uploads / gallery) + "/"):
            _discard(path_of_uri(record.uri))
        return gone > 0

    def _place(self, gallery: str, data: bytes, name: str, attributes: Attributes) -> Path:
        """Return the path for an uploaded photo; its name reveals nothing about this machine."""
        shown = quote(Path(name).name, safe=" ()-,")[-MAX_NAME_BYTES:].lstrip(".%") or "photo"
        of_tenant = str(attributes.get(TENANT, "")).encode()
        folder = content_hash(data) if not of_tenant else content_hash(of_tenant + b"/" + data)
        return self.uploads / check_name("gallery", gallery) / folder[:16] / shown


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically: completely or not at all."""
    descriptor, temporary = _temporary_file(path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _discard(path: Path) -> None:
    """Delete an uploaded photo, and the folders of the photo and the gallery if they are empty."""
    path.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent):
        with suppress(OSError):  # the folder is not empty, or was never created
            folder.rmdir()


def _temporary_file(folder: Path) -> tuple[int, str]:
    """Create a temporary file in `folder`, and `folder` too if it is missing.

    Retries, because `_discard` may delete the folder in another thread or process.
    """
    for left in reversed(range(ATTEMPTS)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(dir=folder)
        except (FileNotFoundError, FileExistsError):  # the folder was deleted in between
            if not left:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _read_object(uri: str, max_bytes: int) -> bytes:
    try:
        from reir.object_storage import STORAGE_ERRORS, open_filesystem, without_secrets
    except ImportError as error:
        raise ImageError(ImageFailure.UNREACHABLE, "buckets need pyarrow") from error
    try:
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_file(path) as file:
            if file.size() > max_bytes:
                raise ImageError(
                    ImageFailure.TOO_LARGE,
                    f"{file.size()} bytes, at most {max_bytes} are read",
                )
            return bytes(file.read())
    except STORAGE_ERRORS as error:
        place = without_secrets(uri)
        raise ImageError(ImageFailure.UNREACHABLE, f"{place} cannot be read: {error}") from error
