"""A backend in this process, on a memory store and the fake encoder, and photos it can read."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from reir.boxes import elementwise_iou
from reir.errors import QueryError
from reir.images import canonical_uri, content_hash, decode, image_id, path_of_uri, read_bytes
from reir.query import Query
from reir.records import Attributes, FloatArray, ImageRecord, IndexedImage, SearchResult
from reir.search import Gallery
from reir.store import VersionSpec
from reir.store.contract import InstanceStore
from reir.store.memory import MemoryStore
from reir.testing import FakeEncoder, draw_scene
from reir_serving.app import create_app
from reir_serving.backend import (
    Backend,
    Box,
    GalleryImage,
    GalleryInfo,
    Localisation,
    Located,
    Readiness,
)
from reir_serving.config import LiveSettings, ServeConfig

LOCAL = "http://127.0.0.1:8000"
MAX_PIXELS = 1_000_000


def png(*shapes: tuple[str, tuple[int, int, int, int]], size: tuple[int, int] = (120, 80)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(draw_scene(size, shapes)).save(out, "PNG")
    return out.getvalue()


class PlainBackend:
    """The contract of `Backend`, as plainly as it can be kept."""

    def __init__(self, folder: Path, store: InstanceStore) -> None:
        self.folder, self.store, self.encoder = folder, store, FakeEncoder()
        self.ready, self.live = True, LiveSettings()
        self.asked: list[Query] = []
        self.error: Exception | None = None

    def index(self, gallery: str, data: bytes, name: str, attributes: Attributes) -> ImageRecord:
        photo = decode(data, max_pixels=MAX_PIXELS)
        (instances,) = self.encoder.encode_images([photo.pixels])
        path = self.folder / f"{content_hash(data)[:8]}-{name or 'photo'}"
        path.write_bytes(data)
        uri = canonical_uri(path)
        record = ImageRecord(
            image_id=image_id(uri),
            uri=uri,
            status="indexed",
            content_hash=content_hash(data),
            size_bytes=len(data),
            width_px=photo.width_px,
            height_px=photo.height_px,
            num_instances=len(instances),
            attributes=attributes,
        )
        self.store.upsert_images(gallery, "v1", [IndexedImage(record, instances)])
        return record

    async def search(self, gallery: str, queries: Sequence[Query]) -> list[SearchResult]:
        if self.error is not None:
            raise self.error
        self.asked += queries
        opened = Gallery(gallery, self.store, self.encoder)
        return [
            opened.search(query.expression or "red", query.k, query.per_image, query.where)
            for query in queries
        ]

    async def vector_of(self, gallery: str, data: bytes, box: Box | None) -> FloatArray:
        (found,) = self.encoder.encode_images([decode(data, max_pixels=MAX_PIXELS).pixels])
        if box is None:
            return found.image_vector
        overlap = elementwise_iou(found.boxes, np.tile(np.array(box, np.float32), (len(found), 1)))
        if not overlap.any():
            raise QueryError("box", f"no instance overlaps {box}")
        return np.asarray(found.vectors[int(overlap.argmax())])

    async def localise(self, data: bytes, expression: str, k: int, *, masks: bool) -> Localisation:
        photo = decode(data, max_pixels=MAX_PIXELS)
        (found,) = self.encoder.encode_images([photo.pixels])
        (vector,) = self.encoder.encode_expressions([expression])
        scores = found.vectors @ vector
        boxes = [
            Located(box=tuple(found.boxes[i].tolist()), score=float(scores[i]), presence=0.5)
            for i in np.argsort(-scores)[:k]
        ]
        return Localisation(
            expression=expression,
            width_px=photo.width_px,
            height_px=photo.height_px,
            present=bool(boxes),
            presence=0.5,
            boxes=tuple(boxes),
            timings_ms={"localise": 1.0},
        )

    async def galleries(self) -> list[GalleryInfo]:
        return [
            GalleryInfo(
                name=name,
                live=self.store.live_version(name),
                loaded=True,
                versions=tuple(self.store.versions(name)),
            )
            for name in self.store.galleries()
        ]

    async def image(self, gallery: str, image_id: str) -> GalleryImage | None:
        version = self.store.live_version(gallery)
        record = self.store.get_images(gallery, version, [image_id]).get(image_id)
        if record is None:
            return None
        rows = self.store.get_instances(gallery, version, [image_id])[image_id]
        return GalleryImage(record=record, instances=tuple(rows))

    async def photo(self, gallery: str, image_id: str) -> bytes | None:
        found = await self.image(gallery, image_id)
        return None if found is None else read_bytes(path_of_uri(found.record.uri))

    async def add_image(
        self, gallery: str, data: bytes, name: str, attributes: Attributes
    ) -> ImageRecord:
        self.store.live_version(gallery)
        return self.index(gallery, data, name, attributes)

    async def delete_image(self, gallery: str, image_id: str) -> bool:
        version = self.store.live_version(gallery)
        return self.store.delete_images(gallery, version, [image_id]) == 1

    async def readiness(self) -> Readiness:
        said = "ok" if self.ready else "cannot be reached"
        return Readiness(ready=self.ready, checks={"store": said, "model": "ok"})

    async def about(self) -> Mapping[str, Any]:
        return {"checkpoint": self.encoder.digest}


@pytest.fixture
def backend(tmp_path: Path) -> PlainBackend:
    """Galleries `photos` (a red and a blue box; a green one) and `other` (a yellow one)."""
    made = PlainBackend(tmp_path, MemoryStore())
    for gallery in ("photos", "other"):
        spec = VersionSpec(dim=made.encoder.dim, digest=made.encoder.digest)
        made.store.create_version(gallery, "v1", spec)
        made.store.promote(gallery, "v1")
    pair = png(("red", (10, 20, 40, 60)), ("blue", (70, 20, 110, 60)))
    made.index("photos", pair, "pair.png", {"camera": "X100"})
    made.index("photos", png(("green", (30, 10, 90, 70))), "green.png", {"tenant": "acme"})
    made.index("other", png(("yellow", (30, 10, 90, 70))), "yellow.png", {})
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
def client_of(backend: PlainBackend) -> MakeClient:
    """Make clients of an application with the fields of `ServeConfig` that are named."""

    def make(**fields: Any) -> TestClient:
        app = create_app(backend, ServeConfig(**fields))
        return TestClient(app, base_url=LOCAL, raise_server_exceptions=False)

    return make


@pytest.fixture
def client(client_of: MakeClient) -> TestClient:
    return client_of()
