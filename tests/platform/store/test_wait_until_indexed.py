"""Waiting until a Milvus server searches all rows by their final index."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from reir.errors import GalleryNotFound
from reir.records import IndexedImage
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir.store.milvus_server import MilvusServerStore
from reir.store.names import instances_collection

pytestmark = pytest.mark.milvus
DIM = 8
SPEC = VersionSpec(dim=DIM, digest="d")
GALLERY = "waiting"

MakeImage = Callable[..., IndexedImage]


def wait(store: MilvusServerStore, num_upserted: int, timeout_s: float = 120.0) -> bool:
    return store.wait_until_indexed(GALLERY, "v1", num_upserted=num_upserted, timeout_s=timeout_s)


def test_searches_give_the_same_results_after_waiting(
    server_store: MilvusServerStore, make_image: MakeImage
) -> None:
    twin = MemoryStore()
    images = [make_image(f"i{number:02}", 4) for number in range(20)]
    for store in (server_store, twin):
        store.create_version(GALLERY, "v1", SPEC)
        store.upsert_images(GALLERY, "v1", images)
    assert wait(server_store, 80)
    queries = np.random.default_rng(1).standard_normal((3, DIM)).astype(np.float32)
    found, wanted = (store.search(GALLERY, "v1", queries, 9) for store in (server_store, twin))
    ids = [[row.instance_id for row in rows] for rows in found]
    assert ids == [[row.instance_id for row in rows] for rows in wanted]
    server_store.drop_gallery(GALLERY)


def test_an_unknown_version_raises_an_error(server_store: MilvusServerStore) -> None:
    with pytest.raises(GalleryNotFound, match="nowhere"):
        server_store.wait_until_indexed("nowhere", "v1", num_upserted=1, timeout_s=1.0)


def test_it_returns_once_the_final_index_is_used(
    server_store: MilvusServerStore, make_image: MakeImage
) -> None:
    def segments() -> list[tuple[int, bool]]:
        name = instances_collection(GALLERY, "v1")
        found = server_store._connection.call("list_loaded_segments", collection_name=name)
        return [(each.num_rows, bool(each.index_id)) for each in found]

    def write(start: int, stop: int) -> int:
        images = [make_image(f"i{number:04}", 20) for number in range(start, stop)]
        server_store.upsert_images(GALLERY, "v1", images)
        return 20 * len(images)

    server_store.create_version(GALLERY, "v1", SPEC)
    assert wait(server_store, write(0, 200))
    assert segments() == [], "few rows stay unsealed, and are scanned"
    assert not wait(server_store, write(200, 300), timeout_s=0.0), "the build takes longer than 0 s"
    assert wait(server_store, 0)
    assert segments() == [(6000, True)]
    server_store.drop_gallery(GALLERY)
