"""Galleries of drawn scenes for tests of the service: small, instant, with right answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reir.images import canonical_uri, content_hash, image_id
from reir.models.seams import InstanceEncoder
from reir.records import ImageRecord, IndexedImage
from reir.store import InstanceStore, VersionSpec
from reir.testing import FakeEncoder, draw_scene

SIZE_PX = (64, 48)
SCENES = {
    "red-left": [("red", (4, 8, 20, 40)), ("blue", (40, 8, 60, 40))],
    "red-right": [("blue", (4, 8, 20, 40)), ("red", (40, 8, 60, 40))],
    "green": [("green", (20, 10, 44, 40))],
}
"""Names of photos, and the shapes on them."""


def draw(folder: Path, scene: str) -> Path:
    """Draw one of `SCENES`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scene}.png"
    Image.fromarray(draw_scene(SIZE_PX, SCENES[scene])).save(path)
    return path


def put(  # noqa: PLR0913 - the place, and how it was made
    store: InstanceStore,
    gallery: str,
    photos: Sequence[Path],
    version: str = "v1",
    encoder: InstanceEncoder | None = None,
    spec: str = "",
) -> None:
    """Index photos into a gallery as `reir index` would, and make the version live.

    Args:
        store: where.
        gallery: name.
        photos: files.
        version: name.
        encoder: None is the fake one.
        spec: by which a search loads the encoder.
    """
    encoder = encoder or FakeEncoder()
    made = VersionSpec(dim=encoder.dim, digest=encoder.digest, encoder=spec)
    store.create_version(gallery, version, made)
    store.upsert_images(gallery, version, [_indexed(encoder, path) for path in photos])
    store.promote(gallery, version)


def _indexed(encoder: InstanceEncoder, path: Path) -> IndexedImage:
    pixels = np.asarray(Image.open(path))
    (instances,) = encoder.encode_images([pixels])
    uri = canonical_uri(path)
    record = ImageRecord(
        image_id=image_id(uri),
        uri=uri,
        status="indexed",
        content_hash=content_hash(path.read_bytes()),
        width_px=pixels.shape[1],
        height_px=pixels.shape[0],
        num_instances=len(instances),
        attributes={"name": path.stem},
    )
    return IndexedImage(record, instances)
