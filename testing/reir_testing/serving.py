"""What tests of the server need: small galleries of drawn scenes, and free ports."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reir.images.decode import canonical_uri, content_hash, image_id
from reir.models.interfaces import InstanceEncoder
from reir.records import ImageRecord, IndexedImage
from reir.store import InstanceStore, VersionSpec
from reir_testing import FakeEncoder, draw_scene

SIZE_PX = (64, 48)
# Two photos have the same shapes on opposite sides, so only an expression with a side tells them
# apart.
SCENES = {
    "red-left": [("red", (4, 8, 20, 40)), ("blue", (40, 8, 60, 40))],
    "red-right": [("blue", (4, 8, 20, 40)), ("red", (40, 8, 60, 40))],
    "green": [("green", (20, 10, 44, 40))],
}
"""Name of each photo -> its shapes."""


def free_port() -> int:
    """Return a port of this machine that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def draw_photo(folder: Path, scene: str) -> Path:
    """Draw one of `SCENES` into a folder, and return the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scene}.png"
    Image.fromarray(draw_scene(SIZE_PX, SCENES[scene])).save(path)
    return path


def index_photos(  # noqa: PLR0913, the tests vary each of them
    store: InstanceStore,
    gallery: str,
    photos: Sequence[Path],
    version: str = "v1",
    encoder: InstanceEncoder | None = None,
    spec: str = "",
) -> None:
    """Index photos into a gallery as `reir index` would, and make the version live.

    Args:
        store: store of the gallery.
        gallery: name of the gallery; it is created if it does not exist.
        photos: paths of the photos.
        version: name of the new version.
        encoder: encoder of the photos; None for `FakeEncoder`.
        spec: name by which a search loads the encoder of the gallery.
    """
    encoder = encoder or FakeEncoder()
    version_spec = VersionSpec(dim=encoder.dim, digest=encoder.digest, encoder=spec)
    store.create_version(gallery, version, version_spec)
    store.upsert_images(gallery, version, [_indexed(encoder, path) for path in photos])
    store.promote(gallery, version)


def index_elsewhere(
    store: InstanceStore, gallery: str, photo: Path, uri: str, version: str = "v1"
) -> None:
    """Index a photo into a version as one of another source, which its URI names."""
    store.upsert_images(gallery, version, [_indexed(FakeEncoder(), photo, uri)])


def _indexed(encoder: InstanceEncoder, path: Path, uri: str = "") -> IndexedImage:
    pixels = np.asarray(Image.open(path))
    (instances,) = encoder.encode_images([pixels])
    uri = uri or canonical_uri(path)
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
