"""Documents: the same in every store."""

from __future__ import annotations

import os

import pytest

from reir.errors import StoreError
from reir.store import InstanceStore, documents
from reir.store.documents import Documents
from reir.store.milvus import MilvusStore
from reir.store.validation import MAX_DOCUMENT_BYTES


def test_documents_are_found_by_kind_and_start_of_the_name(
    store: InstanceStore, gallery: str
) -> None:
    kind = f"test-{gallery}"
    assert store.find_documents(kind) == {}
    store.put_document(kind, "b/2", {"n": 2, "list": [1.5, None, "ä'\"\\"]})
    store.put_document(kind, "a/1", {"n": 1})
    store.put_document(kind, "b/1", {})
    store.put_document(f"{kind}-other", "b/1", {"other": True})
    assert list(store.find_documents(kind)) == ["a/1", "b/1", "b/2"]
    assert store.find_documents(kind, "b/") == {
        "b/1": {},
        "b/2": {"n": 2, "list": [1.5, None, "ä'\"\\"]},
    }


def test_a_later_document_replaces_an_earlier_one(store: InstanceStore, gallery: str) -> None:
    kind = f"test-{gallery}"
    store.put_document(kind, "job", {"state": "indexing", "progress": 3})
    store.put_document(kind, "job", {"state": "done"})
    assert store.find_documents(kind) == {"job": {"state": "done"}}


def test_deleted_documents_are_gone_and_unknown_names_are_ignored(
    store: InstanceStore, gallery: str
) -> None:
    kind = f"test-{gallery}"
    store.delete_documents(kind, ["never"])
    store.put_document(kind, "one", {"n": 1})
    store.put_document(kind, "two", {"n": 2})
    store.delete_documents(kind, ["one", "never"])
    assert store.find_documents(kind) == {"two": {"n": 2}}


def test_a_document_that_does_not_fit_into_a_row_is_refused(
    store: InstanceStore, gallery: str
) -> None:
    with pytest.raises(StoreError, match=f"document {gallery}/big has .* at most 60,000 are"):
        store.put_document(gallery, "big", {"text": "x" * MAX_DOCUMENT_BYTES})
    store.put_document(gallery, "fits", {"text": "x" * (MAX_DOCUMENT_BYTES - 12)})
    assert list(store.find_documents(gallery)) == ["fits"]


def test_documents_are_not_galleries(store: InstanceStore, gallery: str) -> None:
    before = store.galleries()
    store.put_document("reindex", gallery, {})
    assert store.galleries() == before


@pytest.mark.parametrize(
    "kind", ["lite_store", pytest.param("server_store", marks=pytest.mark.milvus)]
)
def test_a_collection_whose_creator_was_killed_is_completed(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server does not load a collection that has no index yet."""
    store: MilvusStore = request.getfixturevalue(kind)
    # Nobody drops the real collection, which other tests use.
    monkeypatch.setattr(documents, "COLLECTION", f"killed_{os.getpid()}")
    table = Documents(store._connection)._table
    table.create(2, {})  # and no index, because the process ended here
    try:
        assert Documents(store._connection).find("test", "") == {}
        assert store._connection.call("list_indexes", collection_name=table.name) == ["vector"]
        Documents(store._connection).put("test", "one", {"n": 1})
        assert Documents(store._connection).find("test", "") == {"one": {"n": 1}}
    finally:
        table.drop()
