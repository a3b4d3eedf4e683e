"""How the photos and instances of a candidate version differ from those of the live version."""

# Shapes: N instances of one photo, D vector dimension

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from reir.images.boxes import elementwise_iou
from reir.operations.gate.sampling import PhotoSample
from reir.records import ImageRecord, Instances
from reir.store.contract import InstanceStore

MAX_COMPARED_PHOTOS = 1_000
"""Of larger galleries, so many photos are compared instance by instance."""

SAME_BOX_IOU, SAME_VECTOR_COSINE = 0.9, 0.99
"""Instances that agree at least so well are the same. Arithmetic differs between CPUs and batch
sizes: with bf16, cosines of .999 are usual for an unchanged photo. A difference in length counts,
too: twice the inner product of two vectors, divided by the sum of their squares, is their cosine if
they are of the same length, and less otherwise."""

_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class VersionSize:
    """Counts of one version.

    Attributes:
        photos: ledger rows, including failed ones.
        failed: photos that could not be indexed.
        instances: instances of the indexed photos.
    """

    photos: int
    failed: int
    instances: int

    @property
    def failed_share(self) -> float:
        """Share of the photos that failed; 0 without any photos."""
        return self.failed / self.photos if self.photos else 0.0

    @property
    def instances_per_photo(self) -> float:
        """Instances of an indexed photo, on average."""
        return self.instances / max(self.photos - self.failed, 1)


@dataclass(frozen=True, kw_only=True)
class VersionChanges:
    """Differences between a live version and a candidate.

    Attributes:
        live, candidate: their sizes.
        lost: indexed photos of the live version that the candidate has not indexed.
        added: indexed photos of the candidate that the live version has not indexed.
        compared: photos with the same content in both whose instances were compared.
        changed: of those, photos whose instances differ.
    """

    live: VersionSize
    candidate: VersionSize
    lost: int
    added: int
    compared: int
    changed: int

    @property
    def lost_share(self) -> float:
        """Share of the indexed photos of the live version that the candidate lacks."""
        return self.lost / max(self.live.photos - self.live.failed, 1)

    @property
    def changed_share(self) -> float | None:
        """Share of the compared photos whose instances differ; None if none were compared."""
        return self.changed / self.compared if self.compared else None


def compare_versions(
    store: InstanceStore, gallery: str, live: str, candidate: str
) -> VersionChanges:
    """Compare all ledger rows of two versions, and the instances of a sample of their photos."""
    sizes = _Counter(), _Counter()
    added = 0
    compared = PhotoSample(MAX_COMPARED_PHOTOS)
    for record, other in _side_by_side(store, gallery, candidate, live):
        sizes[1].add(record)
        is_in_live = other is not None and other.status == "indexed"
        added += record.status == "indexed" and not is_in_live
        if (
            # Only photos that should have the same instances: of a changed file others are
            # expected, and a duplicate has none of its own.
            other is not None
            and is_in_live
            and record.content_hash == other.content_hash
            and record.holds_instances
            and other.holds_instances
        ):
            compared.add(record.image_id)
    lost = 0
    for record, other in _side_by_side(store, gallery, live, candidate):
        sizes[0].add(record)
        lost += record.status == "indexed" and (other is None or other.status != "indexed")
    return VersionChanges(
        live=sizes[0].size(),
        candidate=sizes[1].size(),
        lost=lost,
        added=added,
        compared=len(compared.image_ids),
        changed=_count_changed(store, gallery, live, candidate, compared.image_ids),
    )


class _Counter:
    def __init__(self) -> None:
        self._photos = self._failed = self._instances = 0

    def add(self, record: ImageRecord) -> None:
        self._photos += 1
        self._failed += record.status == "failed"
        self._instances += record.num_instances

    def size(self) -> VersionSize:
        return VersionSize(photos=self._photos, failed=self._failed, instances=self._instances)


def _side_by_side(
    store: InstanceStore, gallery: str, version: str, other: str
) -> Iterator[tuple[ImageRecord, ImageRecord | None]]:
    """Yield each ledger row of a version with the row of the same photo in another version."""
    rows = store.iter_images(gallery, version)
    while chunk := list(islice(rows, _CHUNK)):
        others = store.get_images(gallery, other, [each.image_id for each in chunk])
        for row in chunk:
            yield row, others.get(row.image_id)


def _count_changed(
    store: InstanceStore, gallery: str, live: str, candidate: str, image_ids: Sequence[str]
) -> int:
    changed = 0
    remaining = iter(image_ids)
    while chunk := list(islice(remaining, _CHUNK)):
        before = store.get_indexed(gallery, live, chunk)
        after = store.get_indexed(gallery, candidate, chunk)
        # A photo may have been deleted from one of them since its ledger row was read.
        for each in before.keys() & after.keys():
            changed += not _is_same(before[each].instances, after[each].instances)
    return changed


def _is_same(before: Instances | None, after: Instances | None) -> bool:
    if before is None or after is None:
        return before is after
    # Also if two models have different dimensions, whose vectors cannot be multiplied below.
    if before.vectors.shape != after.vectors.shape:
        return False
    if not len(before):
        return True
    overlaps_N = elementwise_iou(before.boxes, after.boxes)
    products_N = 2 * (before.vectors * after.vectors).sum(axis=1)
    squares_N = (before.vectors**2 + after.vectors**2).sum(axis=1)
    # Multiplied and not divided, since a vector may be zero.
    are_close_N = products_N >= SAME_VECTOR_COSINE * squares_N
    return bool(np.min(overlaps_N) >= SAME_BOX_IOU and are_close_N.all())
