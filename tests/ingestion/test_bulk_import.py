"""New photos by bulk import: the same rows, in few large writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from reir import cli
from reir.models.seams import RgbImage
from reir.records import IndexedImage, Instances
from reir.store import open_store
from reir.store.memory import MemoryStore
from reir.store.milvus import MilvusStore
from reir.store.names import instances_collection
from reir.testing import FakeEncoder
from reir_ingestion import stages
from reir_ingestion.jobs import index_on_ray
from reir_ingestion.parcels import Parcel, joined_parcels
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.report import Tally
from reir_ingestion.stages import Encoded
from reir_ingestion.testing import stored_rows, write_hostile_files, write_scenes

PER_IMAGE = 40


class Importing(MemoryStore):
    """Takes imports as if it were a server, and notes how many images each brought."""

    def __init__(self) -> None:
        super().__init__()
        self.imported: list[int] = []

    def import_images(
        self, gallery: str, version: str, images: Sequence[IndexedImage], storage: str
    ) -> None:
        assert storage == "s3://bucket/import"
        self.imported.append(len(images))
        self.upsert_images(gallery, version, images)


class Many(FakeEncoder):
    """Sees so many things in every photo that few photos are worth an import."""

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


def test_photos_are_written_in_few_large_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    paths = write_scenes(folder, 24)
    write_hostile_files(folder, 20)
    shutil.copy(paths[3], folder / "twin.jpg")
    monkeypatch.setattr(stages, "IMPORT_IMAGES", 16)
    plain, store = MemoryStore(), Importing()
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


def test_parcels_are_joined_with_their_counts() -> None:
    def parcel(number: int) -> Parcel:
        tally = Tally()
        tally.listed(number)
        return Parcel(Encoded([], [], [], [float(number)]), tally)

    joined = list(joined_parcels(map(parcel, range(5)), 2))
    assert [each.items.listed_s for each in joined] == [[0.0, 1.0], [2.0, 3.0], [4.0]]


def test_an_embedded_store_is_refused_before_the_model_is_loaded(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "store")
    command = ["index", str(photos), "--store", place, "--checkpoint", "/nowhere"]
    assert cli.run([*command, "--bulk-import", "s3://bucket/folder"]) == 2
    assert f"bulk import needs a Milvus server; the store is {place}" in capsys.readouterr().err


@pytest.mark.milvus
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.skipif("REIR_TEST_MILVUS" in os.environ, reason="has to share disks with Milvus")
class TestOnAServer:
    @pytest.fixture
    def server(self, milvus_uri: str) -> Iterator[MilvusStore]:
        store = open_store(milvus_uri)
        assert isinstance(store, MilvusStore)
        yield store
        for gallery in ("bulk-here", "bulk-there"):
            store.drop_gallery(gallery)
        store.close()

    def test_both_runners_import(
        self, server: MilvusStore, milvus_uri: str, tmp_path: Path
    ) -> None:
        folder = tmp_path / "photos"
        paths = write_scenes(folder, 180)
        write_hostile_files(folder, 20)
        shutil.copy(paths[3], folder / "twin.jpg")
        plain = MemoryStore()
        wanted = index(folder, "g", plain, Many())
        options = IndexOptions(batch_size=8, bulk_import=str(tmp_path / "storage"))
        here = index(folder, "bulk-here", server, Many(), options=options)
        there = index_on_ray(folder, "bulk-there", milvus_uri, Many, options=options)
        for report in (here, there):
            assert (report.new, report.instances) == (wanted.new, wanted.instances)
            assert stored_rows(server, report.gallery) == stored_rows(plain, "g")
            assert num_imports(server, report.gallery) == 1
            again = index(folder, report.gallery, server, Many(), options=options)
            assert (again.new, again.changed, again.unchanged) == (0, 0, wanted.new)


def num_imports(store: MilvusStore, gallery: str) -> int:
    name = instances_collection(gallery, store.live_version(gallery))
    return len(store._connection.call("list_bulk_insert_tasks", limit=0, collection_name=name))
