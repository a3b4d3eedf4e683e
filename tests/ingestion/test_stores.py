"""The life of a gallery on every store: filled, unchanged, changed, pruned, another model."""

from __future__ import annotations

import os
from pathlib import Path

from reir.images.decode import canonical_uri, image_id
from reir.store import InstanceStore
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_testing import FakeEncoder
from reir_testing.ingestion import stored_rows, write_hostile_files, write_scenes


def fresh_rows(folder: Path) -> dict[str, object]:
    """The rows that a gallery indexed from nothing has."""
    store = MemoryStore()
    index(folder, "g", store, FakeEncoder())
    return stored_rows(store, "g")


def test_the_life_of_a_gallery(any_store: InstanceStore, tmp_path: Path) -> None:
    store = any_store
    folder = tmp_path / "photos"
    paths = write_scenes(folder, 24)
    hostile = write_hostile_files(folder, 20)
    options = IndexOptions(batch_size=7, prune=True)

    first = index(folder, "g", store, FakeEncoder(), options=options)
    assert (first.new, first.num_listed, first.num_images) == (29, 44, 44)
    assert stored_rows(store, "g") == fresh_rows(folder)

    again = index(folder, "g", store, FakeEncoder(), options=options)
    assert (again.unchanged, again.num_failed, again.instances) == (29, 15, 0)
    assert stored_rows(store, "g") == fresh_rows(folder)

    os.utime(paths[3], ns=(1, 10**18))
    touched = index(folder, "g", store, FakeEncoder(), options=options)
    assert (touched.unchanged, touched.instances) == (29, 0)
    assert stored_rows(store, "g") == fresh_rows(folder)

    others = write_scenes(tmp_path / "others", 2, seed=9)
    paths[0].write_bytes(others[0].read_bytes())
    paths[1].unlink()
    paths[2].write_bytes(b"")
    Path(hostile[0].path).write_bytes(others[1].read_bytes())
    write_scenes(folder / "more", 3, seed=8)
    third = index(folder, "g", store, FakeEncoder(), options=options)
    assert (third.new, third.changed, third.removed, third.num_images) == (3, 2, 1, 46)
    expected = fresh_rows(folder)
    assert stored_rows(store, "g") == expected
    (info,) = store.versions("g")
    assert info.num_images + store.num_stored("g", info.name) == len(expected)

    other = index(folder, "g", store, FakeEncoder(num_candidates=1), options=options)
    assert other.kept_versions == {first.version: 46}
    assert store.live_version("g") == other.version


def test_photos_are_found_as_soon_as_they_are_indexed(
    any_store: InstanceStore, tmp_path: Path
) -> None:
    store = any_store
    write_scenes(tmp_path / "photos", 10)
    encoder = FakeEncoder()
    index(tmp_path / "photos", "g", store, encoder)
    version = store.live_version("g")
    for number in range(10, 13):
        (path,) = write_scenes(tmp_path / "one", 1, seed=number)
        moved = path.rename(tmp_path / "photos" / f"{number:03}.png")
        index(moved, "g", store, encoder)
        key = image_id(canonical_uri(moved))
        (row, *_) = store.get_instances("g", version, [key], with_vectors=True)[key]
        assert row.vector is not None
        (hits,) = store.search("g", version, row.vector[None], 100)
        assert row.instance_id in {hit.instance_id for hit in hits}
