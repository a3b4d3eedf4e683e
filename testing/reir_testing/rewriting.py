"""Photos that are written again and again, in a way that shows if a reader mixed two writes.

    python -m reir_testing.rewriting STORE GALLERY VERSION NUM_PHOTOS

Everything that a photo stores follows from its content hash: the number of its instances, their
boxes, vectors and masks, and most columns of its ledger row. The modification time is the number of
the write, so it never decreases.
"""

# Shapes: N instances of one photo, D vector dimension

from __future__ import annotations

import sys
from contextlib import closing

import numpy as np

from reir.images.rle import encode
from reir.records import ImageRecord, IndexedImage, Instances
from reir.store import InstanceStore, VersionSpec, open_store
from reir.store.duplicates import hand_over, remove_images

DIM = 16
SPEC = VersionSpec(dim=DIM, digest="cd" * 32, settings={"num_candidates": 30, "masks": True})
MAX_INSTANCES = 14


def photo_id(number: int) -> str:
    """Return the id of a photo; the order of the ids is not that of the numbers."""
    return f"{number * 7919 % 10_000:04}-{number}"


def content_of(number: int, revision: int) -> str:
    """Return the content hash of a revision of a photo."""
    return f"{number:08x}{revision:056x}"


def instances_of(content: str) -> Instances:
    """Return the instances of a content."""
    rng = np.random.default_rng(int(content, 16))
    num = int(rng.integers(0, MAX_INSTANCES))
    vectors = rng.standard_normal((num + 1, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    corners = np.sort(rng.random((num, 2, 2), dtype=np.float32), axis=1)
    return Instances(
        boxes=corners.reshape(-1, 4),
        objectness=np.sort(rng.random(num, dtype=np.float32))[::-1],
        vectors=vectors[1:],
        image_vector=vectors[0],
        masks=tuple(encode(rng.random((6, 8)) < 0.5) for _ in range(num)) or None,
    )


def image_of(number: int, content: str, *, write: int = 0, same_as: str = "") -> IndexedImage:
    """Return a photo with a content; with `same_as`, it is a duplicate of another photo."""
    found = instances_of(content)
    instances = None if same_as else found
    record = ImageRecord(
        image_id=photo_id(number),
        uri=f"file:///photos/{number}.jpg",
        status="indexed",
        content_hash=content,
        size_bytes=int(content, 16) % 100_003,
        mtime_ns=write,
        width_px=640 + len(found),
        height_px=480,
        num_instances=0 if instances is None else len(instances),
        attributes={"site": f"caf\u00e9 {int(content, 16) % 7}"},
        same_as=same_as,
        perceptual_hash=content[-16:],
    )
    return IndexedImage(record, instances)


def is_mixed(image: IndexedImage) -> bool:
    """Whether a photo does not have exactly the instances and columns of its content."""
    record = image.record
    number = int(record.image_id.rpartition("-")[2])
    wanted = image_of(number, record.content_hash, write=record.mtime_ns, same_as=record.same_as)
    if record != wanted.record:
        return True
    if image.instances is None or wanted.instances is None:
        return image.instances is not wanted.instances
    return image.instances.masks != wanted.instances.masks or any(
        getattr(image.instances, name).tobytes() != getattr(wanted.instances, name).tobytes()
        for name in ("boxes", "objectness", "vectors", "image_vector")
    )


class Rewriter:
    """Writes, duplicates, touches and deletes photos at random, as indexing runs do."""

    def __init__(
        self, store: InstanceStore, gallery: str, version: str, num_photos: int, seed: int = 0
    ) -> None:
        """Write up to `num_photos` photos of a version, which must exist."""
        self._store, self._name, self._num_photos = store, (gallery, version), num_photos
        self._rng = np.random.default_rng(seed)
        self._write = 0

    def fill(self) -> None:
        """Write all photos."""
        self._rewrite(list(range(self._num_photos)))

    def step(self) -> None:
        """Change a few photos."""
        size = int(self._rng.integers(1, 6))
        numbers = self._rng.choice(self._num_photos, size, replace=False).tolist()
        kind = self._rng.random()
        if kind < 0.6:
            self._rewrite(numbers)
        elif kind < 0.8:
            self._duplicate(numbers)
        elif kind < 0.9:
            remove_images(self._store, *self._name, [photo_id(number) for number in numbers])
        else:
            self._write += 1
            self._store.touch_images(
                *self._name, {photo_id(number): self._write for number in numbers}
            )

    def _rewrite(self, numbers: list[int]) -> None:
        self._write += 1
        hand_over(self._store, *self._name, [photo_id(number) for number in numbers])
        contents = {number: content_of(number, self._write) for number in numbers}
        self._store.upsert_images(
            *self._name,
            [image_of(number, contents[number], write=self._write) for number in numbers],
        )

    def _duplicate(self, numbers: list[int]) -> None:
        """Give the content of the first of these photos to the others."""
        first, *others = numbers
        hand_over(self._store, *self._name, [photo_id(number) for number in others])
        found = self._store.get_images(*self._name, [photo_id(first)]).get(photo_id(first))
        if found is None or not found.holds_instances:
            return
        self._write += 1
        copies = [
            image_of(n, found.content_hash, write=self._write, same_as=found.image_id)
            for n in others
        ]
        self._store.upsert_images(*self._name, copies)


def main() -> None:
    """Change photos until the process is killed; print a line once all were written."""
    store, gallery, version, num_photos = sys.argv[1:]
    with closing(open_store(store)) as opened:
        opened.create_version(gallery, version, SPEC)
        rewriter = Rewriter(opened, gallery, version, int(num_photos))
        rewriter.fill()
        print("filled", flush=True)  # noqa: T201, read by the process that started this one
        while True:
            rewriter.step()


if __name__ == "__main__":
    main()
