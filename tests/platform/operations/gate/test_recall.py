"""Recall of a store's search, compared with an exact scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from reir.operations.gate import recall
from reir.operations.gate.recall import search_recall
from reir.operations.gate.sampling import PhotoSample
from reir.records import FloatArray, ImageRecord, IndexedImage, Instances
from reir.store import InstanceRow, VersionSpec
from reir.store.memory import MemoryStore

G, V, DIM = "photos", "v1", 8


def unit(rows: npt.NDArray[np.floating]) -> FloatArray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=np.float32)


def fill(store: MemoryStore, num_photos: int, per_photo: int = 3) -> MemoryStore:
    random = np.random.default_rng(3)
    store.create_version(G, V, VersionSpec(dim=DIM, digest="x"))
    for n in range(num_photos):
        vectors = unit(random.standard_normal((per_photo, DIM)))
        boxes = np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (per_photo, 1))
        instances = Instances(
            boxes, np.ones(per_photo, np.float32), vectors, np.ones(DIM, np.float32)
        )
        record = ImageRecord(
            image_id=f"i{n}", uri=f"file:///{n}", status="indexed", num_instances=per_photo
        )
        store.upsert_images(G, V, [IndexedImage(record, instances)])
    return store


def queries(number: int = 5) -> FloatArray:
    return unit(np.random.default_rng(4).standard_normal((number, DIM)))


class Missing(MemoryStore):
    """Its search misses those of the nearest instances whose places are in `places`."""

    places: Sequence[int] = ()

    def search(
        self,
        gallery: str,
        version: str,
        vectors: FloatArray,
        limit: int,
        *,
        where: str | None = None,
    ) -> list[list[InstanceRow]]:
        found = super().search(gallery, version, vectors, limit + 10, where=where)
        kept = [[row for n, row in enumerate(rows) if n not in self.places] for rows in found]
        return [rows[:limit] for rows in kept]


class Noisy(MemoryStore):
    """Its search reads vectors that are not those of record."""

    def search(
        self,
        gallery: str,
        version: str,
        vectors: FloatArray,
        limit: int,
        *,
        where: str | None = None,
    ) -> list[list[InstanceRow]]:
        wrong = unit(np.stack([vector + 0.5 * np.roll(vector, 1) for vector in vectors]))
        return super().search(gallery, version, wrong, limit, where=where)


def reference(store: MemoryStore, query: FloatArray) -> float:
    """The slow way: sort everything, and compare ids."""
    ids = [row.image_id for row in store.iter_images(G, V)]
    rows = [
        (float(query @ vector), f"{image_id}#{n}")
        for image_id, image in store.get_indexed(G, V, ids).items()
        if image.instances is not None
        for n, vector in enumerate(image.instances.vectors)
    ]
    wanted = {name for _, name in sorted(rows, reverse=True)[:10]}
    found = store.search(G, V, query[None], 10)[0]
    return len(wanted & {row.instance_id for row in found}) / len(wanted)


@pytest.mark.parametrize("photos", [1, 3, 4, 40])
def test_an_exact_search_has_recall_1(photos: int) -> None:
    assert search_recall(fill(MemoryStore(), photos), G, V, queries()) == [1.0] * 5


def test_an_empty_version_has_recall_1() -> None:
    store = MemoryStore()
    store.create_version(G, V, VersionSpec(dim=DIM, digest="x"))
    assert search_recall(store, G, V, queries()) == [1.0] * 5


@pytest.mark.parametrize("places", [(0,), (3,), (9,), (0, 1, 2), tuple(range(10))])
def test_instances_that_the_search_misses_lower_the_recall(places: tuple[int, ...]) -> None:
    store = Missing()
    store.places = places
    fill(store, 40)
    assert search_recall(store, G, V, queries()) == pytest.approx([1 - len(places) / 10] * 5)


def test_a_search_in_wrong_vectors_is_compared_with_those_of_record() -> None:
    store = fill(Noisy(), 60)
    found = search_recall(store, G, V, queries(20))
    assert found == pytest.approx([reference(store, query) for query in queries(20)])
    assert np.mean(found) < 0.8


def test_a_search_that_returns_too_few_is_noticed() -> None:
    store = Missing()
    store.places = tuple(range(4, 20))
    assert search_recall(fill(store, 20), G, V, queries()) == pytest.approx([0.4] * 5)


def test_a_sample_gives_nearly_the_recall_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_CHUNK", 64)
    store = Missing()
    store.places = (2, 5)
    fill(store, 600)
    everything = np.mean(search_recall(store, G, V, queries(60)))
    sampled = np.mean(search_recall(store, G, V, queries(60), max_photos=200))
    assert everything == pytest.approx(0.8)
    assert sampled == pytest.approx(everything, abs=0.06)


def test_a_sample_does_not_depend_on_the_order() -> None:
    one, other = PhotoSample(20), PhotoSample(20)
    for n in range(100):
        one.add(f"i{n}")
        other.add(f"i{99 - n}")
    assert one.image_ids == other.image_ids
    assert (len(one.image_ids), one.num_added, one.share) == (20, 100, 0.2)
    assert PhotoSample(5).share == 1.0
