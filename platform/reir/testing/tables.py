"""Galleries without photos: instances whose vectors a test writes down, and an encoder to match."""

# Shapes: N instances of one image, D = 4

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reir.records import FloatArray, ImageRecord, IndexedImage, Instances
from reir.store import InstanceStore, VersionSpec

DIM = 4
# Halves and ones: unit vectors whose inner products are exact, so that equal means equal.
TIED_VECTORS = np.array(
    [*np.eye(DIM), *-np.eye(DIM), *np.array(list(np.ndindex(2, 2, 2, 2))) - 0.5], dtype=np.float32
)


class TableEncoder:
    """Looks expression vectors up; no images."""

    dim = DIM
    digest = "table"
    num_candidates = 30
    masks = False

    def __init__(self, vectors: FloatArray = TIED_VECTORS) -> None:
        self.vectors = vectors
        self.calls: list[list[str]] = []

    def encode_images(self, images: Sequence[object]) -> list[Instances]:
        """Refuse: there are none."""
        raise NotImplementedError(f"not needed for {len(images)} images")

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """The vector of 'number 3' is row 3 of the table."""
        self.calls.append(list(expressions))
        return self.vectors[[int(each.split()[1]) for each in expressions]]


def indexed(image_id: str, vectors: FloatArray) -> IndexedImage:
    """An image whose instances have these vectors, one box beside the other."""
    num = len(vectors)
    edges = np.linspace(0, 1, num + 1, dtype=np.float32)
    boxes = np.stack([edges[:-1], 0 * edges[1:], edges[1:], 0 * edges[1:] + 1], axis=1)
    record = ImageRecord(
        image_id=image_id,
        uri=f"file:///photos/{image_id}.jpg",
        status="indexed",
        num_instances=num,
        attributes={"parity": ord(image_id[-1]) % 2},
    )
    objectness = np.linspace(1, 0.5, num, dtype=np.float32)
    whole = np.ones(vectors.shape[1], dtype=np.float32)
    instances = Instances(boxes, objectness, vectors, whole)
    return IndexedImage(record, instances)


def images_of(vectors: FloatArray, counts: Sequence[int]) -> list[IndexedImage]:
    """Share vectors out to images: the first takes counts[0], and so on."""
    parts = np.split(vectors, np.cumsum(counts))[:-1]
    return [indexed(f"img{number:03d}", part) for number, part in enumerate(parts)]


def fill(
    store: InstanceStore,
    images: Sequence[IndexedImage],
    *,
    version: str = "v1",
    spec: VersionSpec | None = None,
) -> None:
    """Write images into a version of the gallery "photos" and make it live."""
    spec = spec or VersionSpec(dim=DIM, digest="table")
    store.create_version("photos", version, spec)
    store.upsert_images("photos", version, images[::-1])  # the order of writing must not count
    store.promote("photos", version)
