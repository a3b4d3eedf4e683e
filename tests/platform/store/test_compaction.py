"""Compaction changes nothing that can be read; the same in every store."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reir.records import IndexedImage
from reir.store import InstanceStore, VersionSpec

V, DIM = "v1", 8


def test_searches_and_rows_are_the_same_after_compaction(
    store: InstanceStore, gallery: str, make_image: Callable[..., IndexedImage]
) -> None:
    store.create_version(gallery, V, VersionSpec(dim=DIM, digest="ab" * 32))
    store.upsert_images(gallery, V, [make_image(f"i{n}") for n in range(20)])
    store.upsert_images(gallery, V, [make_image(f"i{n}", 2, seed=3) for n in range(5)])
    store.delete_images(gallery, V, [f"i{n}" for n in range(10, 14)])
    queries = np.random.default_rng(5).standard_normal((3, DIM)).astype(np.float32)
    rows = list(store.iter_images(gallery, V))
    hits = [[row.instance_id for row in each] for each in store.search(gallery, V, queries, 9)]
    assert isinstance(store.compact(gallery, V), bool)
    assert list(store.iter_images(gallery, V)) == rows
    after = store.search(gallery, V, queries, 9)
    assert [[row.instance_id for row in each] for each in after] == hits
    assert store.num_stored(gallery, V) == 5 * 2 + 11 * 3
