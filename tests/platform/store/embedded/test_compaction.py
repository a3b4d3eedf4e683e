"""Compaction removes deleted photos from the disk, and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from reir.records import IndexedImage
from reir.store import VersionSpec
from reir.store.embedded.embedded_store import EmbeddedStore

G, V = "g", "v1"
SPEC = VersionSpec(dim=8, digest="ab" * 32)


@pytest.fixture
def store(tmp_path: Path, open_lite: Callable[[Path], EmbeddedStore]) -> Iterator[EmbeddedStore]:
    opened = open_lite(tmp_path / "store")
    opened.create_version(G, V, SPEC)
    yield opened
    opened.close()


def files_with(folder: Path, text: bytes) -> list[str]:
    """Names of the files below a folder that contain a text."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and text in path.read_bytes()
    )


def fill(store: EmbeddedStore, make_image: Callable[..., IndexedImage], number: int) -> None:
    for first in range(0, number, 10):
        store.upsert_images(G, V, [make_image(f"photo{i}x") for i in range(first, first + 10)])


def test_nothing_of_a_deleted_photo_stays_in_the_folder(
    tmp_path: Path, store: EmbeddedStore, make_image: Callable[..., IndexedImage]
) -> None:
    folder = tmp_path / "store"
    fill(store, make_image, 60)
    gone, kept = make_image("photo7x"), make_image("photo8x")
    assert gone.instances is not None
    vector = gone.instances.vectors[0].tobytes()
    store.upsert_images(G, V, [make_image("photo7x", seed=1)])  # written twice, then deleted
    store.compact(G, V)  # moves it from the log to a file
    store.upsert_images(G, V, [gone])
    store.delete_images(G, V, ["photo7x"])
    assert files_with(folder, b"photo7x"), "deleting alone leaves the rows in the files"
    assert store.compact(G, V)
    assert files_with(folder, b"photo7x") == []
    assert files_with(folder, vector) == []
    assert files_with(folder, b"photo8x")
    assert store.get_indexed(G, V, ["photo7x"]) == {}
    found = store.get_indexed(G, V, ["photo8x"])["photo8x"]
    assert found.record == kept.record


def test_searches_and_rows_are_the_same_after_compaction_and_a_restart(
    tmp_path: Path,
    store: EmbeddedStore,
    open_lite: Callable[[Path], EmbeddedStore],
    make_image: Callable[..., IndexedImage],
) -> None:
    fill(store, make_image, 40)
    store.upsert_images(G, V, [make_image(f"photo{i}x", 2, seed=5) for i in range(5)])
    store.delete_images(G, V, [f"photo{i}x" for i in range(30, 40)])
    queries = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    before = [list(hits) for hits in store.search(G, V, queries, 200)]
    rows = {record.image_id: record for record in store.iter_images(G, V)}
    store.compact(G, V)
    again = open_lite(tmp_path / "store")
    for each in (store, again):
        assert [list(hits) for hits in each.search(G, V, queries, 200)] == before
        assert {record.image_id: record for record in each.iter_images(G, V)} == rows
        assert each.num_stored(G, V) == 5 * 2 + 25 * 3
        assert each.repair_search_copy(G, V) == 0
    again.close()
    store.upsert_images(G, V, [make_image("photo39x")])  # deleted before, and written again
    assert list(store.get_images(G, V, ["photo39x"])) == ["photo39x"]
    assert store.num_stored(G, V) == 5 * 2 + 26 * 3


def test_compaction_of_an_empty_version_does_nothing(store: EmbeddedStore) -> None:
    assert store.compact(G, V)
    assert store.num_stored(G, V) == 0
