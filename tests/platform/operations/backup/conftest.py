"""Stores with a small gallery of every kind of photo, and what tests compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reir.operations.backup.reports import BackupReport, RestoreReport
from reir.operations.backup.restore import RestoreRequest, restore_backup
from reir.operations.backup.write import write_backup
from reir.records import ImageRecord, IndexedImage
from reir.store import InstanceStore, open_store
from reir.store.memory import MemoryStore
from reir_testing.rewriting import SPEC, content_of, image_of
from reir_testing.s3 import Bucket, local_s3

G, V = "photos", "v1"

Content = dict[str, tuple[ImageRecord, bytes]]
ContentOf = Callable[..., Content]


def _every_kind() -> list[IndexedImage]:
    """Photos with and without instances, masks and attributes; failures; duplicates."""
    images = [image_of(number, content_of(number, 1), write=number) for number in range(40)]
    counts = [image.record.num_instances for image in images]
    assert 0 in counts, "a photo without instances is needed"
    odd = {
        "text": 'caf\u00e9 \u65e5\u672c "x\\y"\n',
        "emoji \U0001f600": "",
        "none": None,
        "yes": True,
        "big": 2**53 + 1,
        "small": -1.5e-300,
    }
    images[3] = replace(images[3], record=replace(images[3].record, attributes=odd))
    holder = images[5].record
    copy = replace(
        holder, image_id="copy", uri="file:///c%20d.jpg", num_instances=0, same_as=holder.image_id
    )
    bad = ImageRecord(
        image_id="bad", uri="file:///bad", status="failed", reason="truncated", detail="\u2026 end"
    )
    first = images[0].instances
    assert first is not None
    assert len(first) > 0
    # Values that a conversion by way of text or float64 could change.
    vectors = first.vectors.copy()
    vectors[0, :4] = [-0.0, 1e-45, -1e-40, np.nextafter(np.float32(0.1), 1)]
    images[0] = replace(images[0], instances=replace(first, vectors=vectors))
    return [*images, IndexedImage(copy, None), IndexedImage(bad, None)]


@pytest.fixture(scope="session")
def every_kind() -> list[IndexedImage]:
    return _every_kind()


def fill(store: InstanceStore, images: Sequence[IndexedImage]) -> None:
    store.create_version(G, V, SPEC)
    store.upsert_images(G, V, images)
    store.promote(G, V)


@pytest.fixture
def full_store(every_kind: list[IndexedImage]) -> MemoryStore:
    """A memory store with one gallery."""
    store = MemoryStore()
    fill(store, every_kind)
    return store


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[InstanceStore]:
    """An empty embedded store."""
    with closing(open_store(str(tmp_path / "embedded"))) as store:
        yield store


@pytest.fixture(scope="session")
def bucket() -> Iterator[Bucket]:
    with local_s3("backups") as found:
        yield found


def _content(store: InstanceStore, gallery: str = G, version: str = V) -> Content:
    ids = [record.image_id for record in store.iter_images(gallery, version)]
    found: Content = {}
    for image_id, image in store.get_indexed(gallery, version, ids).items():
        data = b""
        if (instances := image.instances) is not None:
            arrays = (instances.boxes, instances.objectness, instances.vectors)
            data = b"".join(array.tobytes() for array in (*arrays, instances.image_vector))
            data += repr(instances.masks or None).encode()
        found[image_id] = image.record, data
    return found


@pytest.fixture(scope="session")
def content() -> ContentOf:
    """Return everything that a version stores, as values that can be compared bit by bit."""
    return _content


def _back_up(store: InstanceStore, dest: str | Path, version: str = V) -> BackupReport:
    return write_backup(store, G, version, str(dest), lambda *_: None)


@pytest.fixture(scope="session")
def back_up() -> Callable[..., BackupReport]:
    return _back_up


def _restore(store: InstanceStore, source: str | Path, **options: Any) -> RestoreReport:
    request = RestoreRequest(source=str(source), **options)
    return restore_backup(store, request, lambda *_: None)


@pytest.fixture(scope="session")
def restore() -> Callable[..., RestoreReport]:
    return _restore
