"""Fixtures: stores, a folder of photos, a local Ray, and a bucket on a local S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from reir.store import InstanceStore, open_store
from reir.store.memory import MemoryStore
from reir_testing.ingestion import write_scenes
from reir_testing.s3 import Bucket, local_s3


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=["memory", "lite", pytest.param("server", marks=pytest.mark.milvus)])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InstanceStore]:
    """Each kind of store in turn, without a gallery `g`."""
    locations = {"memory": "memory:", "lite": str(tmp_path / "store")}
    if request.param == "server":
        locations["server"] = request.getfixturevalue("milvus_uri")
    store = open_store(locations[request.param])
    if "g" in store.galleries():
        store.drop_gallery("g")
    yield store
    store.close()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "photos", 20)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def local_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray of the test file's own; classes of the file are in no package, so they travel whole."""
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture(scope="session")
def s3() -> Iterator[Bucket]:
    with local_s3("photos-of-reir") as bucket:
        yield bucket


@pytest.fixture
def bucket(s3: Bucket, tmp_path: Path) -> Bucket:
    """A part of the bucket that one test has for itself."""
    return replace(s3, prefix=tmp_path.name)
