"""Reads photos while others write them, so that no photo is a mixture of two writes.

An embedded store keeps writers out while it reads. A server cannot, so there each photo is read
twice, and counts only if both reads agree. The second read is at least a second later: a writer
stores the instances of a photo first and its ledger row last, and two reads in quick succession
would agree in between.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from reir.records import IndexedImage
from reir.store.contract import InstanceStore, ServerStore

INTERVAL_S = 1.0
_MAX_WAITING = 64
"""Number of batches that may wait for their second read."""


@dataclass(frozen=True)
class Reading:
    """What was read of one batch.

    Attributes:
        images: the photos that exist, each as it was at one moment, in the order of the batch.
        unsettled: ids of photos that were written in the meantime and have to be read again.
    """

    images: list[IndexedImage]
    unsettled: list[str]


@dataclass(frozen=True)
class _FirstRead:
    image_ids: list[str]
    # Not the photos themselves, whose vectors would take far more memory while they wait.
    digests: dict[str, bytes]
    again_at_s: float


def read_photos(
    store: InstanceStore, gallery: str, version: str, batches: Iterable[list[str]]
) -> Iterator[Reading]:
    """Read batches of image ids, in their order.

    Raises:
        GalleryNotFound: the version is gone.
    """
    if isinstance(store, ServerStore):
        return _read_twice(store, gallery, version, batches)
    return (Reading(_read(store, gallery, version, each), []) for each in batches)


def _read(
    store: InstanceStore, gallery: str, version: str, image_ids: list[str]
) -> list[IndexedImage]:
    found = store.get_indexed(gallery, version, image_ids)
    return [found[each] for each in image_ids if each in found]


def _read_twice(
    store: InstanceStore, gallery: str, version: str, batches: Iterable[list[str]]
) -> Iterator[Reading]:
    """Read the next batches for the first time while others wait for their second read."""
    waiting: deque[_FirstRead] = deque()

    def second_read() -> Reading:
        first = waiting.popleft()
        time.sleep(max(0.0, first.again_at_s - time.monotonic()))
        found = _read(store, gallery, version, first.image_ids)
        digests = {each.record.image_id: _digest(each) for each in found}
        # An id that is missing in both reads is that of a photo that was deleted.
        changed = {each for each in first.image_ids if first.digests.get(each) != digests.get(each)}
        settled = [each for each in found if each.record.image_id not in changed]
        return Reading(settled, [each for each in first.image_ids if each in changed])

    for batch in batches:
        digests = {
            each.record.image_id: _digest(each) for each in _read(store, gallery, version, batch)
        }
        waiting.append(_FirstRead(batch, digests, time.monotonic() + INTERVAL_S))
        # Too many waiting batches make `second_read` sleep, so a fast store cannot fill the memory.
        while waiting[0].again_at_s <= time.monotonic() or len(waiting) > _MAX_WAITING:
            yield second_read()
            if not waiting:
                break
    while waiting:
        yield second_read()


def _digest(image: IndexedImage) -> bytes:
    """Return a checksum of everything that is stored about an image."""
    found = hashlib.sha256(json.dumps(asdict(image.record), sort_keys=True).encode())
    if (instances := image.instances) is not None:
        for array in (
            instances.boxes,
            instances.objectness,
            instances.vectors,
            instances.image_vector,
        ):
            found.update(array.data)
        found.update(repr(instances.masks).encode())
    return found.digest()
