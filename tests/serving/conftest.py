"""The real service in this process, with a memory store, the fake encoder and drawn photos."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from reir.query.photo_curve import PhotoCurve
from reir.query.presence import (
    Calibration,
)
from reir.query.request import Query
from reir.query.search import CheckpointExtras
from reir.results import SearchResult
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir_serving.backend.models import LoadedModel, ModelCache
from reir_serving.backend.service import Readiness, Service
from reir_serving.backend.workers import SearchWorkers
from reir_serving.config import Limits, ServeConfig
from reir_serving.http.app import create_app
from reir_testing import FakeEncoder, draw_scene
from reir_testing.evaluation.calibrations import score_calibration

LOCAL = "http://127.0.0.1:8000"
MAX_PIXELS = 1_000_000
CALIBRATION = score_calibration(
    *(FakeEncoder().digest, 10, -5),
    photo_curve=PhotoCurve(thresholds=(0.3, 0.9), recalls=(0.9, 0.5), false_alarms=(0.1, 0.01)),
)


def png(*shapes: tuple[str, tuple[int, int, int, int]], size: tuple[int, int] = (120, 80)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(draw_scene(size, shapes)).save(out, "PNG")
    return out.getvalue()


class RecordingService(Service):
    """A service that records its queries, and that a test can make fail."""

    def __init__(self, folder: Path) -> None:
        config = ServeConfig(store="memory:", limits=Limits(pixels=MAX_PIXELS))
        self.store, self.encoder = MemoryStore(), FakeEncoder()
        workers = SearchWorkers(
            self.store, ModelCache(lambda _: LoadedModel(self.encoder)), config.limits
        )
        super().__init__(config, self.store, workers, folder / "uploads")
        self.queries: list[Query] = []
        self.error: Exception | None = None
        self.ready = True

    async def search(self, gallery: str, queries: Sequence[Query]) -> list[SearchResult]:
        if self.error is not None:
            raise self.error
        self.queries += queries
        return await super().search(gallery, queries)

    async def readiness(self) -> Readiness:
        store = "ok" if self.ready else "cannot be reached"
        return Readiness(ready=self.ready, checks={"store": store, "model": "ok"})


@pytest.fixture
def backend(tmp_path: Path) -> RecordingService:
    """Return a service with two galleries.

    `photos` has a photo with a red and a blue box and one with a green box; `other` has a photo
    with a yellow box.
    """
    made = RecordingService(tmp_path)
    for gallery in ("photos", "other"):
        spec = VersionSpec(dim=made.encoder.dim, digest=made.encoder.digest)
        made.store.create_version(gallery, "v1", spec)
        made.store.promote(gallery, "v1")
    pair = png(("red", (10, 20, 40, 60)), ("blue", (70, 20, 110, 60)))
    green, yellow = (png((color, (30, 10, 90, 70))) for color in ("green", "yellow"))

    async def fill() -> None:
        await made.add_image("photos", pair, "pair.png", {"camera": "X100"})
        await made.add_image("photos", green, "green.png", {"tenant": "acme"})
        await made.add_image("other", yellow, "yellow.png", {})

    asyncio.run(fill())
    return made


@pytest.fixture
def calibrated(backend: RecordingService) -> Calibration:
    """Give the model of the service a calibration, and return it."""
    extras = CheckpointExtras(calibration=CALIBRATION)
    models = ModelCache(lambda _: LoadedModel(backend.encoder, extras))
    backend._workers = SearchWorkers(backend.store, models, backend._config.limits)
    backend._stages_of.clear()
    return CALIBRATION


@pytest.fixture
def pair() -> bytes:
    """Return a PNG with a red box on the left of a blue one."""
    return png(("red", (10, 20, 40, 60)), ("blue", (70, 20, 110, 60)))


@pytest.fixture
def green_box() -> bytes:
    return png(("green", (30, 10, 90, 70)))


@pytest.fixture
def magenta_box() -> bytes:
    return png(("magenta", (20, 20, 60, 60)))


@pytest.fixture
def three_boxes() -> bytes:
    return png(*(("magenta", (10 + 40 * n, 20, 30 + 40 * n, 60)) for n in range(3)))


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serve services over real connections; the fixture returns the address of each."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(backend: Service, **fields: Any) -> str:
        app = create_app(backend, ServeConfig(**fields))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        bound = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{bound.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


MakeClient = Callable[..., TestClient]


@pytest.fixture
def client_of(backend: RecordingService) -> MakeClient:
    """Create clients of an application; the arguments are fields of `ServeConfig`."""

    def make(**fields: Any) -> TestClient:
        app = create_app(backend, ServeConfig(**fields))
        return TestClient(app, base_url=LOCAL, raise_server_exceptions=False)

    return make


@pytest.fixture
def client(client_of: MakeClient) -> TestClient:
    return client_of()
