"""A small gallery of drawn photos to erase from."""

from __future__ import annotations

from reir.images.decode import image_id
from reir.operations.erase.erase import erase
from reir.operations.erase.places import ErasePlaces
from reir.operations.erase.receipts import Receipt
from reir.operations.erase.selection import EraseScope
from reir.operations.erase.verify import verify_receipt
from reir.records import Attributes, ImageRecord, IndexedImage
from reir.store import InstanceStore, VersionSpec
from reir_testing.fakes import FakeEncoder, draw_scene

GALLERY = "photos"
SCENES = {
    "party.jpg": [("red", (10, 10, 40, 90))],
    "mug.jpg": [("blue", (10, 10, 40, 90)), ("green", (60, 10, 90, 90))],
    "dog.jpg": [("yellow", (30, 10, 70, 90))],
}
"""Name of each photo -> its shapes."""


def uri(name: str) -> str:
    """Return the URI of a photo."""
    return f"file:///data/me/{name}"


def photo(
    name: str,
    scene: str = "",
    *,
    attributes: Attributes | None = None,
    same_as: str = "",
    location: str = "",
) -> IndexedImage:
    """Return a photo with its instances.

    Args:
        name: its name.
        scene: what it shows, and so its content; empty for the scene of its name.
        attributes: its attributes.
        same_as: makes it a duplicate.
        location: its URI; empty for that of its name.
    """
    (instances,) = FakeEncoder().encode_images([draw_scene((100, 100), SCENES[scene or name])])
    place = location or uri(name)
    record = ImageRecord(
        image_id=image_id(place),
        uri=place,
        status="indexed",
        content_hash=image_id(f"content of {scene or name}") * 3,
        num_instances=0 if same_as else len(instances),
        attributes=attributes or {},
        same_as=same_as,
    )
    return IndexedImage(record, None if same_as else instances)


def fill(store: InstanceStore, *versions: str) -> None:
    """Create versions with all photos; the last one becomes live."""
    encoder = FakeEncoder()
    for version in versions:
        store.create_version(GALLERY, version, VersionSpec(dim=encoder.dim, digest=encoder.digest))
        store.upsert_images(GALLERY, version, [photo(name) for name in SCENES])
    store.promote(GALLERY, versions[-1])


def erase_now(store: InstanceStore, places: ErasePlaces, **scope: object) -> Receipt:
    """Erase without waiting for indexing runs, of which there are none."""
    return erase(store, GALLERY, EraseScope(**scope), places, settle_s=0)  # type: ignore[arg-type]


def names_in(store: InstanceStore, version: str) -> set[str]:
    """Return the names of the photos of a version."""
    return {row.uri.rpartition("/")[2] for row in store.iter_images(GALLERY, version)}


def findings(store: InstanceStore, receipt: Receipt, places: ErasePlaces) -> list[str]:
    """Return what is wrong with a receipt."""
    return [each.what for each in verify_receipt(store, receipt, places)]
