"""What is refused before Ray Serve spends anything on it."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from reir_serving import early
from reir_serving.config import Limits
from reir_serving.gate import Places

SEARCH = {"type": "http", "method": "POST", "path": "/v1/search", "headers": []}
EVERY_WAY = ["GET", "POST"]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Starlette:
    """An application with room for one request, that says who it is."""
    monkeypatch.setattr(early, "_of_this_process", [])
    app = Starlette(
        routes=[Route("/{rest:path}", lambda _: PlainTextResponse("ours"), methods=EVERY_WAY)]
    )
    app.state.places = Places(Limits(ongoing=1, queued=0))
    return app


@pytest.fixture
def asked() -> TestClient:
    """What Serve would listen with: our layer before an application that stands for Ray's."""
    routes = [Route("/{rest:path}", lambda _: PlainTextResponse("Ray's"), methods=EVERY_WAY)]
    (layer,) = early.middlewares()
    return TestClient(layer.cls(Starlette(routes=routes), *layer.args, **layer.kwargs))


def test_requests_go_to_ray_while_there_is_room(own: Starlette, asked: TestClient) -> None:
    early.stand_before(own)
    assert asked.post("/v1/search").text == "Ray's"


def test_what_finds_no_room_never_reaches_ray(own: Starlette, asked: TestClient) -> None:
    early.stand_before(own)
    with own.state.places.take(SEARCH, Headers(scope=SEARCH)):
        assert asked.post("/v1/search").text == "ours"
        assert asked.get("/v1/galleries").text == "Ray's", "reading needs no room"
        assert asked.get("/-/healthz").text == "Ray's"
    assert asked.post("/v1/search").text == "Ray's", "there is room again"


def test_a_proxy_has_no_application_and_passes_everything_on(asked: TestClient) -> None:
    assert asked.post("/v1/search").text == "Ray's"
    assert asyncio.run(_lifespan()) == "lifespan"


async def _lifespan() -> str:
    """What is no request goes on as it came."""
    seen: list[str] = []

    async def app(scope: dict[str, str], receive: object, send: object) -> None:
        seen.append(scope["type"])

    await early.RefuseEarly(app)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    return seen[0]
