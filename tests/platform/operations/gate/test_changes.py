"""Differences between the photos and instances of two versions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reir.operations.gate import changes
from reir.operations.gate.changes import compare_versions
from reir.records import ImageRecord, IndexedImage, Instances
from reir.store import VersionSpec
from reir.store.memory import MemoryStore

G, DIM = "photos", 4


def image(name: str, *, seed: int = 0, content: str = "", per_photo: int = 2) -> IndexedImage:
    random = np.random.default_rng([seed, *name.encode()])
    vectors = random.standard_normal((per_photo, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    corners = np.sort(random.random((per_photo, 2, 2), dtype=np.float32), axis=1)
    instances = Instances(
        corners.reshape(-1, 4), np.ones(per_photo, np.float32), vectors, np.ones(DIM, np.float32)
    )
    record = ImageRecord(
        image_id=name,
        uri=f"file:///{name}",
        status="indexed",
        content_hash=content or name,
        num_instances=per_photo,
    )
    return IndexedImage(record, instances)


def failed(name: str) -> IndexedImage:
    return IndexedImage(
        ImageRecord(image_id=name, uri=f"file:///{name}", status="failed", reason="empty"), None
    )


def store_of(live: list[IndexedImage], candidate: list[IndexedImage]) -> MemoryStore:
    store = MemoryStore()
    for version, images in (("live", live), ("new", candidate)):
        store.create_version(G, version, VersionSpec(dim=DIM, digest="x"))
        store.upsert_images(G, version, images)
    return store


def test_equal_versions_have_no_differences() -> None:
    images = [*(image(f"i{n}") for n in range(9)), failed("bad")]
    found = compare_versions(store_of(images, images), G, "live", "new")
    assert (found.lost, found.added, found.compared, found.changed) == (0, 0, 9, 0)
    assert found.live == found.candidate
    assert (found.live.photos, found.live.failed, found.live.instances) == (10, 1, 18)
    assert (found.lost_share, found.changed_share) == (0.0, 0.0)
    assert (found.live.failed_share, found.live.instances_per_photo) == (0.1, 2.0)


def test_lost_added_and_failed_photos_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_CHUNK", 2)
    live = [image("kept"), image("gone"), image("breaks"), failed("mended")]
    candidate = [image("kept"), image("new"), failed("breaks"), image("mended"), failed("worse")]
    found = compare_versions(store_of(live, candidate), G, "live", "new")
    assert (found.lost, found.added) == (2, 2)
    assert found.lost_share == pytest.approx(2 / 3)
    assert (found.live.failed, found.candidate.failed) == (1, 2)


def test_only_photos_with_the_same_content_are_compared() -> None:
    live = [image("same"), image("edited", content="old"), image("moved")]
    moved = image("moved", seed=1)
    candidate = [image("same"), image("edited", content="new", seed=1), moved]
    found = compare_versions(store_of(live, candidate), G, "live", "new")
    assert (found.compared, found.changed, found.changed_share) == (2, 1, 0.5)


def test_small_differences_of_arithmetic_do_not_count() -> None:
    before = image("a")
    assert before.instances is not None
    vectors = before.instances.vectors + np.float32(1e-3)
    near = replace(before.instances, vectors=vectors / np.linalg.norm(vectors, axis=1)[:, None])
    store = store_of([before], [IndexedImage(before.record, near)])
    assert compare_versions(store, G, "live", "new").changed == 0
    moved = replace(before.instances, boxes=np.clip(before.instances.boxes + 0.3, 0, 1))
    store = store_of([before], [IndexedImage(before.record, moved)])
    assert compare_versions(store, G, "live", "new").changed == 1


@pytest.mark.parametrize(
    ("degrees", "lengths", "changed"),
    [
        (0, (0.8, 0.8), 0),
        (0, (1.2, 1.2), 0),
        (7, (0.8, 0.8), 0),
        (20, (1.2, 1.2), 1),
        (0, (1.0, 1.1), 0),
        (0, (1.0, 2.0), 1),
        (0, (2.0, 1.0), 1),
        (0, (0.0, 0.0), 0),
        (0, (0.0, 1.0), 1),
    ],
)
def test_vectors_may_have_any_length(
    degrees: float, lengths: tuple[float, float], changed: int
) -> None:
    before = image("a", per_photo=1)
    assert before.instances is not None
    angles = np.deg2rad([0.0, degrees])
    vectors = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], axis=1)
    vectors = (vectors * np.asarray(lengths)[:, None]).astype(np.float32)
    live, candidate = (
        IndexedImage(before.record, replace(before.instances, vectors=each[None]))
        for each in vectors
    )
    assert compare_versions(store_of([live], [candidate]), G, "live", "new").changed == changed


def test_another_number_of_instances_is_a_change() -> None:
    store = store_of([image("a"), image("b", per_photo=0)], [image("a", per_photo=3), image("b")])
    assert compare_versions(store, G, "live", "new").changed == 2


def test_empty_versions_can_be_compared() -> None:
    found = compare_versions(store_of([], []), G, "live", "new")
    assert (found.lost_share, found.changed_share, found.live.instances_per_photo) == (0, None, 0)


def test_of_many_photos_a_sample_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_COMPARED_PHOTOS", 7)
    images = [image(f"i{n}") for n in range(20)]
    assert compare_versions(store_of(images, images), G, "live", "new").compared == 7
