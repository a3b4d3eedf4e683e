"""What is let in at a time, and how the rest is sent away: behind Ray Serve, and before it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from reir_serving import early
from reir_serving.config import Limits
from reir_serving.door import Door, Entrance
from reir_serving.metrics import SHARED, Metrics

NUM = 6
SEARCH = {"type": "http", "method": "POST", "path": "/v1/search", "headers": []}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No door of another test, no figures of another process."""
    monkeypatch.setattr(early, "_of_this_process", [])
    monkeypatch.delenv(SHARED, raising=False)


def scope_of(path: str, method: str) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "headers": [(b"host", b"127.0.0.1")]}


async def statuses(
    path: str, limits: Limits, method: str = "POST"
) -> list[tuple[int, bytes | None]]:
    """Send requests of which none ends before all have come; status and Retry-After of each."""
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await PlainTextResponse("ok")(scope, receive, send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    entrance = Entrance(app, Door(limits, Metrics()))

    async def ask() -> tuple[int, bytes | None]:
        started: list[Any] = []

        async def send(message: Any) -> None:
            started.append(message)

        await entrance(scope_of(path, method), receive, send)
        return started[0]["status"], dict(started[0]["headers"]).get(b"retry-after")

    calls = [asyncio.create_task(ask()) for _ in range(NUM)]
    await asyncio.sleep(0)
    go_on.set()
    answers = await asyncio.gather(*calls)
    go_on.clear()
    again = asyncio.create_task(ask())
    await asyncio.sleep(0)
    go_on.set()
    assert (await again)[0] == 200, "there is room again"
    return answers


def test_requests_beyond_the_queue_are_told_when_to_come_again() -> None:
    answers = asyncio.run(statuses("/v1/search", Limits(ongoing=2, queued=1)))
    assert answers.count((200, None)) == 3
    refused = [each for each in answers if each[0] != 200]
    assert len(refused) == NUM - 3
    assert all(status == 503 and after == b"1" for status, after in refused)


def test_what_only_reads_always_finds_room() -> None:
    answers = asyncio.run(statuses("/v1/galleries", Limits(ongoing=1, queued=0), "GET"))
    assert answers == [(200, None)] * NUM


def test_health_and_metrics_always_find_room() -> None:
    answers = asyncio.run(statuses("/metrics", Limits(ongoing=1, queued=0)))
    assert answers == [(200, None)] * NUM


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-type", b"multipart/form-data; boundary=x")],
        [(b"content-length", b"900000")],
        [(b"transfer-encoding", b"chunked")],
        [(b"content-length", b"30000"), (b"x-filler", b"x" * 40_000)],
    ],
)
def test_large_requests_have_a_lower_limit_than_small_ones(
    headers: list[tuple[bytes, bytes]],
) -> None:
    door = Door(Limits(ongoing=1, queued=5), Metrics())
    large, small = SEARCH | {"headers": headers}, SEARCH | {"headers": [(b"content-length", b"90")]}
    with door.inside(large):
        assert door.is_full(large)
        assert not door.is_full(small)
    assert not door.is_full(large)


def saying(who: str) -> Starlette:
    def answer(_: object) -> PlainTextResponse:
        return PlainTextResponse(who)

    return Starlette(routes=[Route("/{rest:path}", answer, methods=["GET", "POST"])])


def before(app: ASGIApp) -> TestClient:
    """What Serve would listen with: our layer before its own."""
    (layer,) = early.middlewares()
    return TestClient(layer.cls(app, *layer.args, **layer.kwargs))


def test_a_refusal_says_all_that_every_other_problem_says() -> None:
    door = Door(Limits(ongoing=1, queued=0), Metrics())
    client = TestClient(Entrance(saying("ours"), door))
    with door.inside(SEARCH):
        refused = client.post("/v1/search", headers={"x-request-id": "from-the-client"})
    assert refused.status_code == 503
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["x-content-type-options"] == "nosniff"
    assert refused.headers["x-request-id"] == "from-the-client"
    details = refused.json()
    assert details["type"] == "/problems/overloaded"
    assert details["instance"] == "/requests/from-the-client"
    assert details["request_id"] == "from-the-client"
    assert details["status"] == 503


def test_refusals_of_a_second_are_counted_and_logged_together(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("reir_serving.access"), "propagate", True)
    caplog.set_level(logging.INFO, "reir_serving.access")
    monkeypatch.setattr("reir_serving.door.TELL_EVERY_S", 0.01)
    metrics = Metrics()
    door = Door(Limits(ongoing=1, queued=0), metrics)

    async def two_refusals() -> None:
        async def send(message: object) -> None:
            del message

        await door.refuse(SEARCH, send)
        await door.refuse(SEARCH, send)
        await asyncio.sleep(0.1)

    asyncio.run(two_refusals())
    (line,) = [json.loads(record.message) for record in caplog.records]
    assert (line["status"], line["problem"], line["requests"]) == (503, "overloaded", 2)
    families = {each.name: each for each in text_string_to_metric_families(metrics.text().decode())}
    (sample,) = families["reir_serve_problems"].samples
    assert (sample.labels, sample.value) == ({"problem": "overloaded"}, 2)
    (sample,) = families["reir_serve_requests"].samples
    assert (sample.labels["status"], sample.value) == ("503", 2)


def test_what_finds_no_room_never_reaches_ray() -> None:
    door = Door(Limits(ongoing=1, queued=0), Metrics())
    early.stand_at(door)
    client = before(saying("Ray's"))
    assert client.post("/v1/search").text == "Ray's"
    with door.inside(SEARCH):
        assert client.post("/v1/search").status_code == 503
        assert client.get("/v1/galleries").text == "Ray's", "reading needs no room"
        assert client.get("/-/healthz").text == "Ray's"
    assert client.post("/v1/search").text == "Ray's", "there is room again"


def test_a_proxy_has_no_door_and_passes_everything_on() -> None:
    assert before(saying("Ray's")).post("/v1/search").text == "Ray's"


def test_what_is_no_request_goes_to_ray() -> None:
    early.stand_at(Door(Limits(ongoing=1, queued=0), Metrics()))
    with before(saying("Ray's")) as client:  # starts and ends a lifespan
        assert client.get("/").text == "Ray's"


Talk = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(app: ASGIApp) -> AsyncIterator[Talk]:
    """A connection to a server that speaks as a replica of Ray Serve does."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    config.load()
    assert config.http_protocol_class is early.RefusingProtocol
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
    yield reader, writer
    writer.close()
    server.should_exit = True
    await running


async def answer_to(talk: Talk, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send a request in pieces; returns status, headers and body of the answer."""
    reader, writer = talk
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.02)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, body


POST = (
    b"POST /v1/search HTTP/1.1\r\nhost: x\r\nx-request-id: from-the-client\r\n%s"
    b"content-length: 8\r\n\r\n"
)


@pytest.fixture
def door() -> Door:
    """The door of this process, with room for one."""
    door = Door(Limits(ongoing=1, queued=0), Metrics())
    early.stand_at(door)
    return door


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> ASGIApp:
    """An application behind all that Ray Serve puts before it."""
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "")
    early.middlewares()
    return early.RefuseEarly(saying("Ray's"))


def test_a_refusal_is_written_at_once_and_the_connection_goes_on(
    replica: ASGIApp, door: Door
) -> None:
    async def talk() -> None:
        async with connected(replica) as line:
            with door.inside(SEARCH):
                for _ in range(2):
                    status, headers, body = await answer_to(line, POST % b"", b'{"a"', b": 1}")
                    assert (status, headers["retry-after"]) == (503, "1")
                    assert headers["content-type"] == "application/problem+json"
                    assert json.loads(body)["request_id"] == "from-the-client"
                status, _, body = await answer_to(line, b"GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n")
                assert (status, body) == (200, b"Ray's"), "reading needs no room"
            status, _, body = await answer_to(line, POST % b"", b'{"a": 1}')
            assert (status, body) == (200, b"Ray's"), "there is room again"

    asyncio.run(talk())


def test_a_refusal_closes_a_connection_that_is_not_to_be_kept(replica: ASGIApp, door: Door) -> None:
    async def talk() -> None:
        async with connected(replica) as line:
            with door.inside(SEARCH):
                status, headers, _ = await answer_to(
                    line, POST % b"connection: close\r\n", b'{"a": 1}'
                )
            assert (status, headers["connection"]) == (503, "close")
            assert await line[0].read() == b""

    asyncio.run(talk())
