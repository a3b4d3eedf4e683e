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
    assert store.settle(gallery, "v1", fresh=80, within_s=120.0)
    queries = np.random.default_rng(1).standard_normal((3, DIM)).astype(np.float32)
    found, wanted = (each.search(gallery, "v1", queries, 9) for each in (store, twin))
    ids = [[row.instance_id for row in rows] for rows in found]
    assert ids == [[row.instance_id for row in rows] for rows in wanted]


def test_an_unknown_version_cannot_be_settled(store: InstanceStore) -> None:
    with pytest.raises(GalleryNotFound, match="nowhere"):
        store.settle("nowhere", "v1", fresh=1, within_s=1.0)


@pytest.mark.milvus
def test_a_server_is_waited_for_until_it_searches_by_its_index(
    server_store: MilvusStore, make_image: MakeImage
) -> None:
    def segments() -> list[tuple[int, bool]]:
        name = instances_collection("settled", "v1")
        found = server_store._connection.call("list_loaded_segments", collection_name=name)
        return [(each.num_rows, bool(each.index_id)) for each in found]

    def write(start: int, stop: int) -> int:
        images = [make_image(f"i{number:04}", 20) for number in range(start, stop)]
        server_store.upsert_images("settled", "v1", images)
        return 20 * len(images)

    def settle(fresh: int, within_s: float = 120.0) -> bool:
        return server_store.settle("settled", "v1", fresh=fresh, within_s=within_s)

    server_store.create_version("settled", "v1", SPEC)
    assert settle(write(0, 200))
    assert segments() == [], "few rows are left to be scanned"
    assert not settle(write(200, 300), within_s=0.0), "is it not asynchronous?"
    assert settle(0)
    assert segments() == [(6000, True)]
    server_store.drop_gallery("settled")
