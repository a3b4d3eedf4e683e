"""Photos of identical content: one holds the instances, and another takes over if it leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from reir.records import ImageRecord, IndexedImage
from reir.store import InstanceStore, VersionSpec
from reir.store.contract import ServerStore
from reir.store.duplicates import hand_over, remove_images
from reir.store.embedded.embedded_store import EmbeddedStore
from reir.store.milvus import MilvusStore

DIM = 8
SPEC = VersionSpec(dim=DIM, digest="ab" * 32)
V = "v1"

MakeImage = Callable[..., IndexedImage]


@pytest.fixture
def version(store: InstanceStore, gallery: str) -> tuple[InstanceStore, str, str]:
    store.create_version(gallery, V, SPEC)
    return store, gallery, V


def duplicate(holder: IndexedImage, image_id: str, mtime_ns: int = 5) -> IndexedImage:
    record = replace(
        holder.record,
        image_id=image_id,
        uri=f"file:///photos/{image_id}.jpg",
        num_instances=0,
        mtime_ns=mtime_ns,
        same_as=holder.record.image_id,
    )
    return IndexedImage(record, None)


def hits(
    place: tuple[InstanceStore, str, str], image: IndexedImage
) -> list[tuple[str, tuple[float, ...]]]:
    """(image id, box) of every instance, best first by the first vector of `image`."""
    assert image.instances is not None
    (found,) = place[0].search(*place[1:], image.instances.vectors[:1], 100)
    return [(hit.image_id, hit.box) for hit in found]


def same_as(place: tuple[InstanceStore, str, str]) -> dict[str, tuple[str, int]]:
    """Image id -> id of its holder, and its own number of instances."""
    return {
        row.image_id: (row.same_as, row.num_instances) for row in place[0].iter_images(*place[1:])
    }


def test_the_first_duplicate_takes_over(
    version: tuple[InstanceStore, str, str], make_image: MakeImage
) -> None:
    store = version[0]
    holder, other = make_image("b", 4, seed=1), make_image("x", 2, seed=2)
    store.upsert_images(
        *version[1:], [holder, duplicate(holder, "c", 7), duplicate(holder, "a"), other]
    )
    before = hits(version, holder)
    whole = store.get_indexed(*version[1:], ["b"])["b"]
    assert hand_over(*version, ["b", "x", "unknown"]) == {"b": "a"}
    assert same_as(version) == {"a": ("", 4), "b": ("a", 0), "c": ("a", 0), "x": ("", 2)}
    assert hits(version, holder) == [("a" if key == "b" else key, box) for key, box in before]
    heir = store.get_indexed(*version[1:], ["a"])["a"]
    assert heir.instances is not None
    assert whole.instances is not None
    for name in ("boxes", "objectness", "vectors", "image_vector"):
        np.testing.assert_array_equal(getattr(heir.instances, name), getattr(whole.instances, name))
    assert (heir.record.uri, heir.record.mtime_ns) == ("file:///photos/a.jpg", 5)
    assert store.get_images(*version[1:], ["c"])["c"].mtime_ns == 7
    (info,) = store.versions(version[1])
    assert (info.num_images, info.num_instances) == (4, 6)


def test_a_group_can_be_removed_at_once(
    version: tuple[InstanceStore, str, str], make_image: MakeImage
) -> None:
    store = version[0]
    holder = make_image("a", 3)
    copies = [duplicate(holder, each) for each in ("b", "c")]
    store.upsert_images(*version[1:], [holder, *copies])
    assert remove_images(*version, ["a", "b"]) == 2
    assert same_as(version) == {"c": ("", 3)}
    assert {key for key, _ in hits(version, holder)} == {"c"}
    assert remove_images(*version, ["c", "never there"]) == 1
    deadline_s = time.monotonic() + 10
    while hits(version, holder) and time.monotonic() < deadline_s:
        time.sleep(0.1)  # searches on a server may find deleted rows for half a second
    assert hits(version, holder) == []
    (info,) = store.versions(version[1])
    assert (info.num_images, info.num_instances) == (0, 0)


def test_a_change_of_the_former_holder_does_not_affect_the_new_one(
    version: tuple[InstanceStore, str, str], make_image: MakeImage
) -> None:
    store = version[0]
    old, new = make_image("a", 3, seed=1), make_image("a", 5, seed=2)
    store.upsert_images(*version[1:], [old, duplicate(old, "b"), make_image("c", 1)])
    assert hand_over(*version, ["a"]) == {"a": "b"}
    assert hand_over(*version, ["a"]) == {"a": "b"}
    store.upsert_images(*version[1:], [new])
    assert same_as(version) == {"a": ("", 5), "b": ("", 3), "c": ("", 1)}
    assert sorted(key for key, _ in hits(version, old)) == ["a"] * 5 + ["b"] * 3 + ["c"]
    (info,) = store.versions(version[1])
    assert info.num_instances == 9


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_an_interrupted_hand_over_is_completed_by_the_next(
    version: tuple[InstanceStore, str, str],
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
    write: int,
) -> None:
    store = version[0]
    if not isinstance(store, MilvusStore):
        pytest.skip("nothing of a memory store outlives its process")
    holder = make_image("a", 3)
    store.upsert_images(*version[1:], [holder, duplicate(holder, "b")])
    ledger, _ = store._collections(*version[1:])
    upsert = type(ledger).upsert
    calls: list[int] = []

    def die(self: object, rows: object) -> None:
        calls.append(1)
        if len(calls) == write:  # announced, instances, ledger of the heir, ledger of the holder
            raise KeyboardInterrupt
        upsert(self, rows)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(ledger), "upsert", die)
        with pytest.raises(KeyboardInterrupt):
            hand_over(*version, ["a"])
    shown = [key for key, _ in hits(version, holder)]
    # Only a server shows both for a moment.
    allowed = [["a"] * 3, ["b"] * 3]
    assert shown in allowed or (isinstance(store, ServerStore) and set(shown) == {"a", "b"})
    assert remove_images(*version, ["a"]) == 1
    assert same_as(version) == {"b": ("", 3)}
    assert {key for key, _ in hits(version, holder)} == {"b"}
    (info,) = store.versions(version[1])
    assert info.num_instances == 3


def test_every_search_sees_exactly_one_holder(
    lite_store: EmbeddedStore, make_image: MakeImage
) -> None:
    place = lite_store, "handed-over", V
    lite_store.create_version(*place[1:], SPEC)
    holder = make_image("a", 3)
    lite_store.upsert_images(*place[1:], [holder, duplicate(holder, "b")])
    seen: list[tuple[str, ...]] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(tuple(key for key, _ in hits(place, holder)))

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for _ in range(10):
            hand_over(*place, ["a"])
            hand_over(*place, ["b"])
    finally:
        over.set()
        reader.join()
        lite_store.drop_gallery(place[1])
    assert set(seen) == {("a",) * 3, ("b",) * 3}


def test_contents_are_found_with_their_duplicates(
    version: tuple[InstanceStore, str, str], make_image: MakeImage
) -> None:
    store = version[0]
    holder = make_image("b", seed=1)
    failed = ImageRecord(
        image_id="z", uri="file:///z", status="failed", reason="empty", content_hash=f"{1:064x}"
    )
    store.upsert_images(
        *version[1:],
        [holder, duplicate(holder, "a"), make_image("x", seed=2), IndexedImage(failed, None)],
    )
    found = store.find_content(*version[1:], {f"{1:064x}", f"{9:064x}"})
    assert {key: [row.image_id for row in rows] for key, rows in found.items()} == {
        f"{1:064x}": ["a", "b"]
    }
    assert store.find_content(*version[1:], set()) == {}
