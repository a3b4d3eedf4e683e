"""Backups of one store restored into another have the same content, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reir.errors import ConfigError, DataError
from reir.images.decode import path_of_uri
from reir.operations.backup import pairs
from reir.operations.backup.reports import BackupReport, RestoreReport
from reir.operations.backup.write import recorded_backups
from reir.operations.canary import Canary, add_canaries, canaries_of
from reir.operations.erase.tombstones import Tombstones
from reir.records import IndexedImage
from reir.store import InstanceStore, VersionSpec, open_store
from reir.store.memory import MemoryStore
from reir_testing.operations.gcs import local_gcs
from reir_testing.rewriting import SPEC
from reir_testing.s3 import Bucket

G, V = "photos", "v1"

BackUp = Callable[..., BackupReport]
Restore = Callable[..., RestoreReport]
ContentOf = Callable[..., dict[str, object]]


def test_memory_to_embedded_to_memory(
    full_store: MemoryStore,
    embedded: InstanceStore,
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
) -> None:
    report = back_up(full_store, tmp_path / "one")
    assert (report.counts.photos, report.read_again, report.recorded) == (42, 0, True)
    restored = restore(embedded, tmp_path / "one")
    assert restored.problems == ()
    assert (restored.written, restored.recall, restored.live) == (42, 1.0, True)
    assert content(embedded) == content(full_store)
    (info,) = embedded.versions(G)
    assert info.spec == SPEC
    assert info.spec.encoder == SPEC.encoder
    back_up(embedded, tmp_path / "two")
    memory = MemoryStore()
    restore(memory, tmp_path / "two")
    assert content(memory) == content(full_store)
    files = [
        [path.read_bytes() for path in sorted((tmp_path / name).glob("*.parquet"))]
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


@pytest.mark.milvus
def test_memory_to_server_to_memory(
    full_store: MemoryStore,
    milvus_uri: str,
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
) -> None:
    back_up(full_store, tmp_path / "one")
    with closing(open_store(milvus_uri)) as server:
        try:
            restored = restore(server, tmp_path / "one")
            assert (restored.problems, restored.live) == ((), True)
            assert content(server) == content(full_store)
            back_up(server, tmp_path / "two")
        finally:
            server.drop_gallery(G)
    memory = MemoryStore()
    restore(memory, tmp_path / "two")
    assert content(memory) == content(full_store)


def test_many_small_files(
    full_store: MemoryStore,
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "FILE_BYTES", 1)
    monkeypatch.setattr("reir.operations.backup.sweeps._BATCH_PHOTOS", 3)
    back_up(full_store, tmp_path / "b")
    assert len(list((tmp_path / "b").glob("photos-*.parquet"))) == 14
    memory = MemoryStore()
    restore(memory, tmp_path / "b")
    assert content(memory) == content(full_store)


def test_an_empty_gallery(tmp_path: Path, back_up: BackUp, restore: Restore) -> None:
    store, other = MemoryStore(), MemoryStore()
    store.create_version(G, V, VersionSpec(dim=3, digest="x", encoder="clare:/models/a"))
    assert back_up(store, tmp_path / "b").num_bytes == 0
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["manifest.json"]
    restored = restore(other, tmp_path / "b")
    assert (restored.problems, restored.queries, restored.live) == ((), 0, True)
    (info,) = other.versions(G)
    assert (info.num_images, info.spec.encoder) == (0, "clare:/models/a")


def test_a_version_without_masks(
    every_kind: list[IndexedImage],
    embedded: InstanceStore,
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
) -> None:
    store = MemoryStore()
    store.create_version(G, V, replace(SPEC, settings={"num_candidates": 30, "ratio": 1.0}))
    store.upsert_images(G, V, every_kind)
    assert back_up(store, tmp_path / "b").counts.masks == 0
    restore(embedded, tmp_path / "b")
    assert content(embedded) == content(store)
    (info,) = embedded.versions(G)
    assert [*map(type, info.spec.settings.values())] == [int, float]


def test_a_bucket(
    full_store: MemoryStore,
    bucket: Bucket,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
) -> None:
    report = back_up(full_store, bucket.source("{date}-{time}"))
    folder = report.dest.rpartition("/")[2]
    assert report.dest == f"s3://{bucket.name}/{bucket.prefix}/{folder}", "has secrets"
    (recorded,) = recorded_backups(full_store, G)
    assert recorded["dest"] == report.dest
    memory = MemoryStore()
    restored = restore(memory, bucket.source(folder))
    assert (restored.problems, restored.source) == ((), report.dest)
    assert content(memory) == content(full_store)


def test_google_cloud_storage(
    full_store: MemoryStore,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "FILE_BYTES", 1)
    with local_gcs("backups") as options:
        place = f"gs://anonymous@backups/reir/one{options}"
        report = back_up(full_store, place)
        assert report.dest == "gs://backups/reir/one"
        with pytest.raises(ConfigError, match="gs://backups/reir/one already contains a backup"):
            back_up(full_store, place)
        memory = MemoryStore()
        restored = restore(memory, place)
        assert (restored.problems, restored.source) == ((), report.dest)
        assert content(memory) == content(full_store)
        with pytest.raises(DataError, match="no finished backup in gs://backups/reir/two"):
            restore(MemoryStore(), place.replace("/one", "/two"))


def test_the_files_can_be_read_by_any_program(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp
) -> None:
    report = back_up(full_store, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["format"], manifest["gallery"], manifest["version"]) == (1, G, V)
    assert manifest["begun_s"] <= manifest["ended_s"]
    assert manifest["counts"]["instances"] == report.counts.instances
    photos = pq.read_table(tmp_path / "photos-00000.parquet")
    assert photos.num_rows == 42
    assert json.loads(photos["attributes"][0].as_py()).keys() == {"site"}
    instances = pq.read_table(tmp_path / "instances-00000.parquet")
    assert instances["vector"].type.list_size == SPEC.dim
    found = full_store.get_indexed(G, V, instances["image_id"][:1].to_pylist())
    (image,) = found.values()
    assert image.instances is not None
    assert instances["vector"][0].as_py() == image.instances.vectors[0].tolist()


def test_documents_of_the_gallery_come_back_with_it(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp, restore: Restore
) -> None:
    canaries = [Canary(expression="a giraffe", absent=True), Canary(expression="caf\u00e9")]
    add_canaries(full_store, G, canaries)
    add_canaries(full_store, f"{G}2", [Canary(expression="of another gallery")])
    full_store.put_document("source", f"{G}/1f", {"text": "/data"})
    erased = next(full_store.iter_images(G, V))
    Tombstones(full_store, G).add([erased])
    back_up(full_store, tmp_path / "b")
    other = MemoryStore()
    assert restore(other, tmp_path / "b", gallery="copy").documents == 4
    assert {each.expression for each in canaries_of(other, "copy")} == {"a giraffe", "caf\u00e9"}
    assert other.find_documents("source") == {"copy/1f": {"text": "/data"}}
    assert Tombstones(other, "copy").covers(erased)
    # The gallery exists now, and may have other canaries.
    other.delete_documents("canary", list(other.find_documents("canary")))
    restored = restore(other, tmp_path / "b", gallery="copy", version="again")
    assert (restored.documents, restored.live) == (0, False)


def test_erased_photos_stay_out(
    full_store: MemoryStore,
    embedded: InstanceStore,
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
) -> None:
    back_up(full_store, tmp_path / "b")
    (copy,) = full_store.get_images(G, V, ["copy"]).values()
    # Its content is erased, too, which another photo holds.
    Tombstones(embedded, G).add([copy])
    restored = restore(embedded, tmp_path / "b")
    assert (restored.problems, restored.erased, restored.written) == ((), 2, 40)
    assert embedded.get_images(G, V, ["copy", copy.same_as]) == {}


def test_canaries_and_sources_that_are_erased_photos_stay_out(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp, restore: Restore
) -> None:
    gone, kept = islice(full_store.iter_images(G, V), 2)
    texts = [gone.uri, str(path_of_uri(gone.uri)), "/data", kept.uri]
    for number, text in enumerate(texts):
        full_store.put_document("source", f"{G}/{number}", {"text": text})
    canaries = [Canary(expression=each.uri, uri=each.uri) for each in (gone, kept)]
    add_canaries(full_store, G, [*canaries, Canary(expression="a giraffe", absent=True)])
    back_up(full_store, tmp_path / "b")
    store = MemoryStore()
    Tombstones(store, G).add([gone])
    assert restore(store, tmp_path / "b").erased == 1
    assert {each["text"] for each in store.find_documents("source").values()} == {"/data", kept.uri}
    assert {each.uri for each in canaries_of(store, G)} == {kept.uri, ""}


def test_what_was_erased_in_either_store_stays_out(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp, restore: Restore
) -> None:
    """A gallery moves to another store and back, and photos are erased in both."""
    first, second, third, other = islice(full_store.iter_images(G, V), 4)
    Tombstones(full_store, G).add([first])
    back_up(full_store, tmp_path / "there")
    server = MemoryStore()
    restore(server, tmp_path / "there")
    Tombstones(server, G).add([second])
    Tombstones(server, "unrelated").add([other])
    back_up(server, tmp_path / "back")
    Tombstones(full_store, G).add([third])
    assert restore(full_store, tmp_path / "back", version="back").documents == 1
    erased = Tombstones(full_store, G)
    assert [erased.covers(each) for each in (first, second, third, other)] == [True] * 3 + [False]
    assert restore(full_store, tmp_path / "back", version="back").documents == 0
    # A gallery that has never had a key in common with the backup.
    stranger = MemoryStore()
    Tombstones(stranger, G).add([third])
    restore(stranger, tmp_path / "there")
    erased = Tombstones(stranger, G)
    assert [erased.covers_uri(each.uri) for each in (first, second, third)] == [True, False, True]
    erased.remove([first, third])
    assert not any(Tombstones(stranger, G).covers(each) for each in (first, third))
