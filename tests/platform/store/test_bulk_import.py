"""Bulk import into a real Milvus server, and the files that it reads."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pymilvus import DataType

from reir.errors import ConfigError, StoreError, StoreUnavailable
from reir.records import IndexedImage
from reir.store import InstanceStore, VersionSpec
from reir.store.bulk_import import import_rows
from reir.store.memory import MemoryStore
from reir.store.milvus_server import MilvusServerStore
from reir.store.names import instances_collection
from reir.store.validation import require_server
from reir_testing.s3 import Bucket, local_s3

DIM = 8
SPEC = VersionSpec(dim=DIM, digest="d")
PER_IMAGE = 25
NUM_IMAGES = 220

MakeImage = Callable[..., IndexedImage]
on_a_server = [
    pytest.mark.milvus,
    pytest.mark.skipif("REIR_TEST_MILVUS" in os.environ, reason="has to share disks with Milvus"),
]


def images(make_image: MakeImage, start: int = 0, seed: int = 0) -> list[IndexedImage]:
    return [
        make_image(f"i{number:04}", PER_IMAGE, seed, {"site": number % 3})
        for number in range(start, start + NUM_IMAGES)
    ]


@dataclass(frozen=True)
class Target:
    """A gallery on a server, and a folder that server and client share."""

    store: MilvusServerStore
    gallery: str
    storage: Path

    def put(self, images: Sequence[IndexedImage]) -> None:
        self.store.import_images(self.gallery, "v1", images, str(self.storage))

    @property
    def num_rows(self) -> int:
        """Number of rows on the server; counts a key that exists twice twice."""
        return self.store._catalog.instances(self.gallery, "v1").count()

    @property
    def num_imports(self) -> int:
        name = instances_collection(self.gallery, "v1")
        call = self.store._connection.call
        return len(call("list_bulk_insert_tasks", limit=0, collection_name=name))


@pytest.fixture
def target(
    server_store: MilvusServerStore, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Target]:
    name = f"i{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**9}"
    server_store.create_version(name, "v1", SPEC)
    yield Target(server_store, name, tmp_path)
    server_store.drop_gallery(name)


def answers(store: InstanceStore, gallery: str, where: str | None) -> list[list[str]]:
    queries = np.random.default_rng(1).standard_normal((3, DIM)).astype(np.float32)
    found = store.search(gallery, "v1", queries, 9, where=where)
    return [[row.instance_id for row in rows] for rows in found]


class TestOnAServer:
    pytestmark = on_a_server

    def test_imported_images_equal_upserted_ones(
        self, target: Target, make_image: MakeImage
    ) -> None:
        twin = MemoryStore()
        twin.create_version("g", "v1", SPEC)
        written = images(make_image)
        twin.upsert_images("g", "v1", written)
        target.put(written)
        assert list(target.storage.iterdir()) == [], "the file has not been deleted"
        for where in (None, "attr.site == 1", "cx < 0.5 and neighbors > 2"):
            assert answers(target.store, target.gallery, where) == answers(twin, "g", where)
        ids = [each.record.image_id for each in written]
        read, expected = (
            each.get_indexed(name, "v1", ids)
            for each, name in ((target.store, target.gallery), (twin, "g"))
        )
        assert [each.record for each in read.values()] == [e.record for e in expected.values()]
        for image_id, image in expected.items():
            assert image.instances is not None
            instances = read[image_id].instances
            assert instances is not None
            assert np.array_equal(instances.vectors, image.instances.vectors)
            assert np.array_equal(instances.boxes, image.instances.boxes)

    def test_known_images_are_replaced_and_new_ones_added(
        self, target: Target, make_image: MakeImage
    ) -> None:
        first = images(make_image)
        target.put(first)
        changed = images(make_image, seed=1)[:10]
        batch = [*changed, *images(make_image, start=NUM_IMAGES)]
        target.put(batch)
        assert target.num_rows == 2 * NUM_IMAGES * PER_IMAGE
        found = target.store.get_indexed(target.gallery, "v1", ["i0003"])["i0003"]
        assert found.record == changed[3].record

    def test_no_row_exists_twice_after_the_importing_process_was_killed(
        self, target: Target, milvus_uri: str, make_image: MakeImage
    ) -> None:
        script = target.storage / "writer.py"
        script.write_text(_WRITER)
        for delay_s in (0.0, 1.0):  # before the server has read the file, and after
            start = int(delay_s) * NUM_IMAGES
            arguments = [milvus_uri, target.gallery, str(start), str(target.storage / "files")]
            with subprocess.Popen([sys.executable, str(script), *arguments]) as process:
                began = target.num_imports
                while target.num_imports == began:
                    assert process.poll() is None, "ended before its import began"
                    time.sleep(0.05)
                time.sleep(delay_s)
                process.send_signal(signal.SIGKILL)
            assert not target.store.get_images(target.gallery, "v1", [f"i{start:04}"])
            target.store.upsert_images(target.gallery, "v1", images(make_image, start))
            wanted = start + NUM_IMAGES
            assert target.num_rows == wanted * PER_IMAGE

    def test_the_error_names_a_storage_that_the_server_does_not_use(
        self, target: Target, make_image: MakeImage
    ) -> None:
        with local_s3("elsewhere") as bucket:
            place = f"s3://{bucket.name}/import{bucket.options}"
            with pytest.raises(StoreError, match=r"itself uses, got s3://elsewhere/import$"):
                target.store.import_images(target.gallery, "v1", images(make_image), place)
            assert parquet_files(bucket) == []


def parquet_files(bucket: Bucket) -> list[str]:
    found = bucket.client.list_objects_v2(Bucket=bucket.name).get("Contents", ())
    return [each["Key"] for each in found if each["Key"].endswith(".parquet")]


_WRITER = """
import sys
sys.path[:0] = SYS_PATH
from reir.store import open_store
from reir.store.validation import require_server
from test_bulk_import import images
from conftest import _make_image

uri, gallery, start, storage = sys.argv[1:]
store = require_server(open_store(uri))
store.import_images(gallery, "v1", images(_make_image, int(start)), storage)
""".replace("SYS_PATH", json.dumps([str(Path(__file__).parent)]))


def test_only_a_server_store_imports(store: InstanceStore) -> None:
    if isinstance(store, MilvusServerStore):
        assert require_server(store) is store
        return
    with pytest.raises(ConfigError, match=r"needs a Milvus server; the store is a \w+Store;"):
        require_server(store)


class _Reader:
    """Stands for a collection on a server, and records what it imports."""

    name, key = "reir_inst_x_v1", "instance_id"

    def __init__(self, read: Callable[[str], Any]) -> None:
        self._read = read
        self.file = ""
        self.content: list[dict[str, Any]] = []
        self.present: list[str] = []

    def stored_columns(self) -> list[tuple[str, DataType]]:
        return [
            ("instance_id", DataType.VARCHAR),
            ("area", DataType.FLOAT),
            ("attributes", DataType.JSON),
            ("vector", DataType.FLOAT_VECTOR),
        ]

    def import_file(self, file: str) -> None:
        self.file, self.content = file, pq.read_table(self._read(file)).to_pylist()

    def await_present(self, ids: list[str]) -> None:
        self.present = ids


def test_the_path_of_a_file_in_a_bucket_is_relative_to_the_bucket() -> None:
    row = {"instance_id": "a#0", "area": 0.5, "attributes": {"é": 1}, "vector": np.ones(2, "f4")}
    with local_s3("milvus-bucket") as bucket:

        def read(key: str) -> io.BytesIO:
            found = bucket.client.get_object(Bucket=bucket.name, Key=key)
            return io.BytesIO(found["Body"].read())

        table = _Reader(read)
        import_rows(table, iter([row]), f"s3://milvus-bucket/some/folder{bucket.options}")  # type: ignore[arg-type]
        assert parquet_files(bucket) == []
    assert table.file.startswith("some/folder/reir_inst_x_v1-")
    assert table.content == [{**row, "attributes": json.dumps({"é": 1}), "vector": [1.0, 1.0]}]
    assert table.present == ["a#0"]


def test_an_unreachable_server_is_not_reported_as_a_storage_problem(tmp_path: Path) -> None:
    def gone(_: str) -> None:
        raise StoreUnavailable("milvus:19530", "connection refused")

    with pytest.raises(StoreUnavailable, match="connection refused"):
        import_rows(_Reader(gone), iter([]), str(tmp_path))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_deleted_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read_and_delete(file: str) -> io.BytesIO:
        content = Path(file).read_bytes()
        Path(file).unlink()
        return io.BytesIO(content)

    table = _Reader(read_and_delete)
    import_rows(table, iter([]), str(tmp_path))  # type: ignore[arg-type]
    assert f"cannot delete the import file {table.file}" in caplog.text


def test_the_error_names_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    with pytest.raises(StoreError, match=rf"cannot write a file for bulk import into {place}: "):
        import_rows(_Reader(open), iter([]), str(place))  # type: ignore[arg-type]


def test_the_error_about_a_wrong_storage_has_no_credentials() -> None:
    with pytest.raises(StoreError, match="into s3://bucket/a b: Cannot parse URI") as caught:
        import_rows(_Reader(open), iter([]), "s3://KEY:SECRET@bucket/a b")  # type: ignore[arg-type]
    assert "SECRET" not in str(caught.value)
