"""Stores to test: memory, Milvus Lite, and (marker `milvus`) a real Milvus server."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest

from reir.records import Attributes, ImageRecord, IndexedImage, Instances
from reir.store import InstanceStore, open_store
from reir.store.client import MilvusConnection
from reir.store.embedded.embedded_store import EmbeddedStore
from reir.store.embedded.lite_server import LiteServer
from reir.store.embedded.version_journals import VersionJournals
from reir.store.memory import MemoryStore

DIM = 8

MakeImage = Callable[..., IndexedImage]
OpenLite = Callable[[Path], EmbeddedStore]


def _make_image(
    image_id: str,
    num_instances: int = 3,
    seed: int = 0,
    attributes: Attributes | None = None,
    dim: int = DIM,
) -> IndexedImage:
    rng = np.random.default_rng([seed, *image_id.encode()])
    vectors = rng.standard_normal((num_instances, dim)).astype(np.float32)
    boxes = np.sort(rng.random((num_instances, 2, 2), dtype=np.float32), axis=1)
    instances = Instances(
        boxes=boxes.reshape(-1, 4),
        objectness=np.sort(rng.random(num_instances, dtype=np.float32))[::-1],
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        image_vector=rng.standard_normal(dim, dtype=np.float32),
    )
    record = ImageRecord(
        image_id=image_id,
        uri=f"file:///photos/{image_id}.jpg",
        status="indexed",
        content_hash=f"{seed:064x}",
        size_bytes=1000 + seed,
        mtime_ns=2**60 + seed,
        width_px=640,
        height_px=480,
        num_instances=num_instances,
        attributes=attributes or {},
    )
    return IndexedImage(record, instances)


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    """Build an image whose content depends on its id and a seed only."""
    return _make_image


@contextmanager
def _full_disk() -> Iterator[None]:
    """Files cannot grow beyond 100 kB: as on a full disk, writes raise `OSError`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """Let the disk be full in a block."""
    return _full_disk


def _open_lite(directory: Path) -> EmbeddedStore:
    connection = MilvusConnection(LiteServer(directory, idle_s=1.0))
    return EmbeddedStore(connection, VersionJournals(directory / "reader"))


@pytest.fixture(scope="session")
def open_lite() -> OpenLite:
    """Open an embedded store whose server ends soon after the last user."""
    return _open_lite


@pytest.fixture(scope="session")
def lite_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    store = _open_lite(tmp_path_factory.mktemp("lite"))
    yield store
    store.close()


@pytest.fixture(scope="session")
def server_store(milvus_uri: str) -> Iterator[InstanceStore]:
    store = open_store(milvus_uri)
    yield store
    store.close()


@pytest.fixture(params=["memory", "lite", pytest.param("server", marks=pytest.mark.milvus)])
def store(request: pytest.FixtureRequest) -> InstanceStore:
    """Each kind of store in turn."""
    if request.param == "memory":
        return MemoryStore()
    found: InstanceStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def gallery(request: pytest.FixtureRequest, store: InstanceStore) -> Iterator[str]:
    """A gallery name that no other test uses; removed afterwards."""
    name = f"g{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**9}"
    yield name
    if name in store.galleries():
        store.drop_gallery(name)
