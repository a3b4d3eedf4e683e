"""New photos by bulk import: the same rows, in few large writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from reir.cli import main
from reir.records import IndexedImage, Instances, RgbImage
from reir.store import open_store
from reir.store.memory import MemoryStore
from reir.store.milvus_server import MilvusServerStore
from reir.store.names import instances_collection
from reir_ingestion import stages
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.ray.blocks import Batch, join_batches
from reir_ingestion.ray.runner import index_on_ray
from reir_ingestion.report import RunCounters
from reir_ingestion.stages import EncodedBatch
from reir_testing import FakeEncoder
from reir_testing.ingestion import stored_rows, write_hostile_files, write_scenes

PER_IMAGE = 40


class ImportingStore(MemoryStore):
    """A store with bulk imports, which records the number of images in each."""

    def __init__(self) -> None:
        super().__init__()
        self.imported: list[int] = []

    def import_images(
        self, gallery: str, version: str, images: Sequence[IndexedImage], storage: str
    ) -> None:
        assert storage == "s3://bucket/import"
        self.imported.append(len(images))
        self.upsert_images(gallery, version, images)

    def wait_until_indexed(self, gallery: str, version: str, **_: float) -> bool:
        return bool(self.versions(gallery)) and bool(version)


class ManyInstancesEncoder(FakeEncoder):
    """Finds so many instances in every photo that a few photos suffice for an import."""

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        return [self._many(image) for image in images]

    def _many(self, image: RgbImage) -> Instances:
        rng = np.random.default_rng(image.sum(dtype=np.int64))
        corners = np.sort(rng.random((PER_IMAGE, 2, 2), dtype=np.float32), axis=1)
        return Instances(
            boxes=corners.reshape(-1, 4),
            objectness=np.sort(rng.random(PER_IMAGE, dtype=np.float32))[::-1],
            vectors=rng.standard_normal((PER_IMAGE, self.dim)).astype(np.float32),
            image_vector=np.ones(self.dim, np.float32),
        )


def test_bulk_import_writes_few_large_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    paths = write_scenes(folder, 24)
    write_hostile_files(folder, 20)
    shutil.copy(paths[3], folder / "twin.jpg")
    monkeypatch.setattr(stages, "IMPORT_IMAGES", 16)
    plain, store = MemoryStore(), ImportingStore()
    options = IndexOptions(batch_size=4, bulk_import="s3://bucket/import")
    wanted = index(folder, "g", plain, FakeEncoder())
    report = index(folder, "g", store, FakeEncoder(), options=options)
    assert stored_rows(store, "g") == stored_rows(plain, "g")
    assert (report.new, report.num_failed, report.duplicates) == (
        wanted.new,
        wanted.num_failed,
        wanted.duplicates,
    )
    assert max(store.imported) >= 15, "16 photos at a time, the twin apart"
    assert len(store.imported) <= 8

    paths[0].unlink()
    again = index(folder, "g", store, FakeEncoder(), options=options)
    assert (again.new, again.changed, again.unchanged) == (0, 0, wanted.new - 1)


def test_batches_are_joined_with_their_counts() -> None:
    def batch(number: int) -> Batch:
        counters = RunCounters()
        counters.set_total(number)
        return Batch(EncodedBatch([], [], [], [float(number)]), counters)

    joined = list(join_batches(map(batch, range(5)), 2))
    assert [each.items.listed_s for each in joined] == [[0.0, 1.0], [2.0, 3.0], [4.0]]


def test_an_embedded_store_is_refused_before_the_model_is_loaded(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "store")
    command = ["index", str(photos), "--store", place, "--checkpoint", "/nowhere"]
    assert main.run([*command, "--bulk-import", "s3://bucket/folder"]) == 2
    assert f"bulk import needs a Milvus server; the store is {place}" in capsys.readouterr().err


@pytest.mark.milvus
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.skipif("REIR_TEST_MILVUS" in os.environ, reason="has to share disks with Milvus")
class TestOnAServer:
    @pytest.fixture
    def server(self, milvus_uri: str) -> Iterator[MilvusServerStore]:
        store = open_store(milvus_uri)
        assert isinstance(store, MilvusServerStore)
        yield store
        for gallery in ("bulk-here", "bulk-there"):
            store.drop_gallery(gallery)
        store.close()

    def test_both_runners_import(
        self, server: MilvusServerStore, milvus_uri: str, tmp_path: Path
    ) -> None:
        folder = tmp_path / "photos"
        paths = write_scenes(folder, 180)
        write_hostile_files(folder, 20)
        shutil.copy(paths[3], folder / "twin.jpg")
        plain = MemoryStore()
        wanted = index(folder, "g", plain, ManyInstancesEncoder())
        options = IndexOptions(batch_size=8, bulk_import=str(tmp_path / "storage"))
        here = index(folder, "bulk-here", server, ManyInstancesEncoder(), options=options)
        there = index_on_ray(
            folder, "bulk-there", milvus_uri, ManyInstancesEncoder, options=options
        )
        for report in (here, there):
            assert (report.new, report.instances) == (wanted.new, wanted.instances)
            assert stored_rows(server, report.gallery) == stored_rows(plain, "g")
            assert num_imports(server, report.gallery) == 1
            again = index(folder, report.gallery, server, ManyInstancesEncoder(), options=options)
            assert (again.new, again.changed, again.unchanged) == (0, 0, wanted.new)


def num_imports(store: MilvusServerStore, gallery: str) -> int:
    name = instances_collection(gallery, store.live_version(gallery))
    return len(store._connection.call("list_bulk_insert_tasks", limit=0, collection_name=name))
