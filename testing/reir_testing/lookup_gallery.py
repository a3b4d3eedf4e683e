"""Galleries of handwritten vectors, and an encoder that reads expression vectors from a table.

With these, a test knows the score of every instance without a model and without photos.
"""

# Shapes: N instances of one image, D = 4

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reir.models.interfaces import EncodedExpression
from reir.models.reranker import PhotoInstances, PhotoScores, Reranker, RerankerConfig
from reir.records import FloatArray, ImageRecord, IndexedImage, Instances
from reir.store import InstanceStore, VersionSpec

DIM = 4
# Unit vectors of halves and ones: their inner products have no rounding error, so that ties are
# exact.
TIED_VECTORS = np.array(
    [*np.eye(DIM), *-np.eye(DIM), *np.array(list(np.ndindex(2, 2, 2, 2))) - 0.5], dtype=np.float32
)


class LookupEncoder:
    """An encoder that returns rows of a table as expression vectors; it cannot encode images."""

    dim = DIM
    digest = "table"
    num_candidates = 30
    masks = False

    def __init__(self, vectors: FloatArray = TIED_VECTORS) -> None:
        self.vectors = vectors
        self.calls: list[list[str]] = []

    def encode_images(self, images: Sequence[object]) -> list[Instances]:
        """Raise an error: a gallery of this module has no images."""
        raise NotImplementedError(f"cannot encode images, got {len(images)}")

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """Return row 3 of the table for the expression "number 3"."""
        self.calls.append(list(expressions))
        return self.vectors[[int(each.split()[1]) for each in expressions]]


class RightmostReranker(Reranker):
    """A re-ranker that scores an instance by the left edge of its box; it can be made to fail."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(RerankerConfig(dim=DIM, text_width=4, width=4, num_heads=1, num_layers=1))
        self.fails = fails
        self.asked: list[int] = []

    def score(
        self,
        expressions: Sequence[EncodedExpression],
        photos: Sequence[Sequence[PhotoInstances]],
        *,
        explain: bool = False,
    ) -> list[list[PhotoScores]]:
        """Return the scores by position, or raise `RuntimeError` if it was made to fail."""
        if self.fails:
            raise RuntimeError("out of order")
        assert len(expressions) == len(photos)
        self.asked += [len(of_one) for of_one in photos]
        return [[_by_place(photo, explain) for photo in of_one] for of_one in photos]


def _by_place(photo: PhotoInstances, explain: bool) -> PhotoScores:
    num = len(photo.boxes)
    attention = np.tile(photo.objectness / np.float32(2), (num, 1)) if explain else None
    return PhotoScores(photo.boxes[:, 0] + 1, attention)


def indexed_image(image_id: str, vectors: FloatArray) -> IndexedImage:
    """Return an image whose instances have these vectors; their boxes lie side by side."""
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


def images_from_vectors(vectors: FloatArray, counts: Sequence[int]) -> list[IndexedImage]:
    """Divide vectors among images: the first image gets `counts[0]` of them, and so on."""
    parts = np.split(vectors, np.cumsum(counts))[:-1]
    return [indexed_image(f"img{number:03d}", part) for number, part in enumerate(parts)]


def fill_gallery(
    store: InstanceStore,
    images: Sequence[IndexedImage],
    *,
    version: str = "v1",
    spec: VersionSpec | None = None,
) -> None:
    """Write images into a version of the gallery "photos" and make it live."""
    spec = spec or VersionSpec(dim=DIM, digest="table")
    store.create_version("photos", version, spec)
    store.upsert_images("photos", version, images[::-1])  # results must not depend on the order
    store.promote("photos", version)
