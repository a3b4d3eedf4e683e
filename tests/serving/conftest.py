"""The real service in this process, on a memory store and the fake encoder, and photos for it."""

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

from reir.query import Query
from reir.records import SearchResult
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir.testing import FakeEncoder, draw_scene
from reir_serving.app import create_app
from reir_serving.backend import Backend, Readiness
from reir_serving.config import Limits, ServeConfig
from reir_serving.parts import Loaded, LocalParts, Models
from reir_serving.service import Service

LOCAL = "http://127.0.0.1:8000"
MAX_PIXELS = 1_000_000


def png(*shapes: tuple[str, tuple[int, int, int, int]], size: tuple[int, int] = (120, 80)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(draw_scene(size, shapes)).save(out, "PNG")
    return out.getvalue()


class WatchedService(Service):
    """The service; a test sees what is asked of it, and can have it fail."""

    def __init__(self, folder: Path) -> None:
        config = ServeConfig(store="memory:", limits=Limits(pixels=MAX_PIXELS))
        self.store, self.encoder = MemoryStore(), FakeEncoder()
        parts = LocalParts(self.store, Models(lambda _: Loaded(self.encoder)), config.limits)
        super().__init__(config, self.store, parts, folder / "uploads")
        self.asked: list[Query] = []
        self.error: Exception | None = None
        self.ready = True

    async def search(self, gallery: str, queries: Sequence[Query]) -> list[SearchResult]:
        if self.error is not None:
            raise self.error
        self.asked += queries
        return await super().search(gallery, queries)

    async def readiness(self) -> Readiness:
        said = "ok" if self.ready else "cannot be reached"
        return Readiness(ready=self.ready, checks={"store": said, "model": "ok"})


@pytest.fixture
def backend(tmp_path: Path) -> WatchedService:
    """Galleries `photos` (a red and a blue box; a green one) and `other` (a yellow one)."""
    made = WatchedService(tmp_path)
    for gallery in ("photos", "other"):
        spec = VersionSpec(dim=made.encoder.dim, digest=made.encoder.digest)
        made.store.create_version(gallery, "v1", spec)
        made.store.promote(gallery, "v1")
    pair = png(("red", (10, 20, 40, 60)), ("blue", (70, 20, 110, 60)))
    green, yellow = (png((colour, (30, 10, 90, 70))) for colour in ("green", "yellow"))

    async def fill() -> None:
        await made.add_image("photos", pair, "pair.png", {"camera": "X100"})
        await made.add_image("photos", green, "green.png", {"tenant": "acme"})
        await made.add_image("other", yellow, "yellow.png", {})

    asyncio.run(fill())
    return made


@pytest.fixture
def pair() -> bytes:
    """A red box on the left of a blue one, as PNG."""
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
    """Serve backends over real connections; returns the address of each."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(backend: Backend, **fields: Any) -> str:
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
def client_of(backend: WatchedService) -> MakeClient:
    """Make clients of an application with the fields of `ServeConfig` that are named."""

    def make(**fields: Any) -> TestClient:
        app = create_app(backend, ServeConfig(**fields))
        return TestClient(app, base_url=LOCAL, raise_server_exceptions=False)

    return make


@pytest.fixture
def client(client_of: MakeClient) -> TestClient:
    return client_of()
