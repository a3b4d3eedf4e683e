"""Rows that are settled: searched by the index that they keep."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from reir.errors import GalleryNotFound
from reir.records import IndexedImage
from reir.store import InstanceStore, VersionSpec
from reir.store.memory import MemoryStore
from reir.store.milvus import MilvusStore
from reir.store.names import instances_collection

DIM = 8
SPEC = VersionSpec(dim=DIM, digest="d")

MakeImage = Callable[..., IndexedImage]


def test_settled_rows_are_searched_as_before(
    store: InstanceStore, gallery: str, make_image: MakeImage
) -> None:
    twin = MemoryStore()
    images = [make_image(f"i{number:02}", 4) for number in range(20)]
    for each in (store, twin):
        each.create_version(gallery, "v1", SPEC)
        each.upsert_images(gallery, "v1", images)
    assert store.settle(gallery, "v1", within_s=120.0)
    queries = np.random.default_rng(1).standard_normal((3, DIM)).astype(np.float32)
    found, wanted = (each.search(gallery, "v1", queries, 9) for each in (store, twin))
    ids = [[row.instance_id for row in rows] for rows in found]
    assert ids == [[row.instance_id for row in rows] for rows in wanted]


def test_an_unknown_version_cannot_be_settled(store: InstanceStore) -> None:
    with pytest.raises(GalleryNotFound, match="nowhere"):
        store.settle("nowhere", "v1", within_s=1.0)


@pytest.mark.milvus
def test_a_server_is_waited_for_until_it_searches_by_its_index(
    server_store: MilvusStore, make_image: MakeImage
) -> None:
    server_store.create_version("settled", "v1", SPEC)
    images = [make_image(f"i{number:04}", 20) for number in range(150)]
    server_store.upsert_images("settled", "v1", images)
    assert not server_store.settle("settled", "v1", within_s=0.0), "is it not asynchronous?"
    assert server_store.settle("settled", "v1", within_s=120.0)
    name = instances_collection("settled", "v1")
    searched = server_store._connection.call("list_loaded_segments", collection_name=name)
    assert sum(each.num_rows for each in searched) == 3000
    assert all(each.index_id for each in searched)
    server_store.drop_gallery("settled")
