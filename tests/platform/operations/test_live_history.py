"""The history of live versions, and the way back."""

from __future__ import annotations

import pytest

from reir.errors import GalleryNotFound, StoreError
from reir.operations.live_history import live_history, make_live, roll_back
from reir.store import VersionSpec
from reir.store.memory import MemoryStore

G = "photos"


@pytest.fixture
def store() -> MemoryStore:
    opened = MemoryStore()
    for version in ("a", "b", "c"):
        opened.create_version(G, version, VersionSpec(dim=4, digest="x"))
    return opened


def test_versions_are_recorded_in_order_and_only_when_they_change(store: MemoryStore) -> None:
    assert live_history(store, G) == []
    assert make_live(store, G, "a", by="one") == ""
    assert make_live(store, G, "a", by="again") == "a"
    assert make_live(store, G, "b", by="two") == "a"
    assert [(each.version, each.by) for each in live_history(store, G)] == [
        ("a", "one"),
        ("b", "two"),
    ]
    assert store.live_version(G) == "b"


def test_going_back_twice_goes_back_two_versions(store: MemoryStore) -> None:
    for version in ("a", "b", "c"):
        make_live(store, G, version, by="test")
    assert roll_back(store, G) == ("c", "b")
    assert roll_back(store, G) == ("b", "a")
    with pytest.raises(StoreError, match=r"no version that was live before a .* it also has b, c"):
        roll_back(store, G)
    assert store.live_version(G) == "a"


def test_going_back_after_versions_took_turns_goes_back_to_each_of_them(store: MemoryStore) -> None:
    for version in ("a", "b", "a", "b"):
        make_live(store, G, version, by="test")
    assert [roll_back(store, G)[1] for _ in range(3)] == ["a", "b", "a"]
    with pytest.raises(StoreError, match="no version that was live before a is left"):
        roll_back(store, G)


def test_the_version_itself_is_skipped_if_the_one_in_between_was_deleted(
    store: MemoryStore,
) -> None:
    for version in ("c", "a", "b", "a"):
        make_live(store, G, version, by="test")
    store.drop_version(G, "b")
    assert roll_back(store, G) == ("a", "c")


def test_versions_that_were_deleted_are_skipped(store: MemoryStore) -> None:
    for version in ("a", "b", "c"):
        make_live(store, G, version, by="test")
    store.drop_version(G, "b")
    assert roll_back(store, G) == ("c", "a")


def test_a_version_that_became_live_without_a_record_can_be_left_again(store: MemoryStore) -> None:
    make_live(store, G, "a", by="test")
    store.promote(G, "b")  # as a process that was killed right after the switch leaves it
    assert [each.version for each in live_history(store, G)] == ["a", "b"]
    assert roll_back(store, G) == ("b", "a")


def test_galleries_with_similar_names_have_histories_of_their_own(store: MemoryStore) -> None:
    store.create_version("photos2", "z", VersionSpec(dim=4, digest="x"))
    make_live(store, "photos2", "z", by="test")
    assert live_history(store, G) == []
    assert [each.version for each in live_history(store, "photos2")] == ["z"]


def test_a_lone_version_cannot_be_rolled_back() -> None:
    store = MemoryStore()
    store.create_version(G, "a", VersionSpec(dim=4, digest="x"))
    make_live(store, G, "a", by="test")
    with pytest.raises(StoreError, match="it has no other version"):
        roll_back(store, G)
    with pytest.raises(GalleryNotFound):
        roll_back(store, "unknown")


def test_an_unknown_version_leaves_the_history_as_it_is(store: MemoryStore) -> None:
    make_live(store, G, "a", by="test")
    with pytest.raises(GalleryNotFound, match="has no version 'd'"):
        make_live(store, G, "d", by="test")
    assert [each.version for each in live_history(store, G)] == ["a"]
