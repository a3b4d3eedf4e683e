"""The folder of an embedded store disappears while it is served, and reappears."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from reir.errors import StoreUnavailable
from reir.store import open_store
from reir_serving.backend.models import LoadedModel, ModelCache
from reir_serving.backend.service import Service
from reir_serving.backend.store_folder import folder_check
from reir_serving.backend.workers import SearchWorkers
from reir_serving.config import ServeConfig
from reir_serving.http.app import create_app
from reir_serving.ray.deployments import WorkerReplica
from reir_testing import FakeEncoder
from reir_testing.serving import draw_photo, index_photos

LOCAL = "http://127.0.0.1:8000"
ASKED = {"gallery": "g", "expression": "the green one"}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[TestClient, Path]]:
    """A client of a service with the gallery `g`, and the store's folder."""
    folder = tmp_path / "store"
    store = open_store(str(folder), patient=False)
    index_photos(store, "g", [draw_photo(tmp_path / "photos", "green")])
    config = ServeConfig(store=str(folder), galleries=("g",))
    models = ModelCache(lambda _: LoadedModel(FakeEncoder()))
    workers = SearchWorkers(store, models, config.limits, check=folder_check(config.store))
    service = Service(config, store, workers, tmp_path / "uploads")
    yield TestClient(create_app(service, config), base_url=LOCAL), folder
    store.close()


def test_requests_get_503_while_the_store_folder_is_missing(
    served: tuple[TestClient, Path], tmp_path: Path
) -> None:
    client, folder = served
    assert client.post("/v1/search", json=ASKED).status_code == 200
    assert client.get("/readyz").status_code == 200

    folder.rename(tmp_path / "elsewhere")
    for _ in range(3):
        refused = client.post("/v1/search", json=ASKED)
        assert (refused.status_code, refused.json()["type"]) == (
            503,
            "/problems/store-unavailable",
        )
        assert int(refused.headers["Retry-After"]) >= 1
        unready = client.get("/readyz")
        assert unready.status_code == 503
        assert int(unready.headers["Retry-After"]) >= 1
        time.sleep(0.6)  # in total longer than `CircuitBreaker` stays open after a failure
    assert client.get("/v1/galleries").status_code == 503
    assert not folder.exists()

    (tmp_path / "elsewhere").rename(folder)
    until_s = time.monotonic() + 10
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < until_s
        time.sleep(0.1)
    assert client.post("/v1/search", json=ASKED).json()["hits"]


def test_a_replica_does_not_create_a_missing_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no longer exists; restore it"):
        WorkerReplica({"store": str(tmp_path / "gone")})
    assert not (tmp_path / "gone").exists()


def test_only_an_embedded_store_needs_a_folder() -> None:
    folder_check("http://milvus:19530")()
    folder_check("memory:")()
