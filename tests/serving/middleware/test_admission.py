"""Admission control: in the application, and in front of Ray Serve."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from reir_serving.config import Limits
from reir_serving.middleware import early_rejection
from reir_serving.middleware.admission import AdmissionControl, AdmissionMiddleware
from reir_serving.middleware.logs import open_logs
from reir_serving.middleware.metrics import SHARED_FOLDER_VARIABLE, Metrics

NUM = 6
SEARCH = {"type": "http", "method": "POST", "path": "/v1/search", "headers": []}


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the admission control of other tests and the metrics of other processes."""
    monkeypatch.setattr(early_rejection, "_admission_control", [])
    monkeypatch.delenv(SHARED_FOLDER_VARIABLE, raising=False)


def scope_of(path: str, method: str) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "headers": [(b"host", b"127.0.0.1")]}


async def statuses(
    path: str, limits: Limits, method: str = "POST"
) -> list[tuple[int, bytes | None]]:
    """Send requests that all run at the same time; return the status and Retry-After of each."""
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await PlainTextResponse("ok")(scope, receive, send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    middleware = AdmissionMiddleware(app, AdmissionControl(limits, Metrics()))

    async def ask() -> tuple[int, bytes | None]:
        started: list[Any] = []

        async def send(message: Any) -> None:
            started.append(message)

        await middleware(scope_of(path, method), receive, send)
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


def test_requests_beyond_the_queue_get_503_with_retry_after() -> None:
    answers = asyncio.run(
        statuses("/v1/search", Limits(max_ongoing_requests=2, max_queued_requests=1))
    )
    assert answers.count((200, None)) == 3
    rejected = [each for each in answers if each[0] != 200]
    assert len(rejected) == NUM - 3
    assert all(status == 503 and after == b"1" for status, after in rejected)


def test_requests_that_only_read_are_always_admitted() -> None:
    answers = asyncio.run(
        statuses("/v1/galleries", Limits(max_ongoing_requests=1, max_queued_requests=0), "GET")
    )
    assert answers == [(200, None)] * NUM


def test_health_and_metrics_are_always_admitted() -> None:
    answers = asyncio.run(
        statuses("/metrics", Limits(max_ongoing_requests=1, max_queued_requests=0))
    )
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
    admission = AdmissionControl(Limits(max_ongoing_requests=1, max_queued_requests=5), Metrics())
    large, small = SEARCH | {"headers": headers}, SEARCH | {"headers": [(b"content-length", b"90")]}
    with admission.admit(large):
        assert admission.is_full(large)
        assert not admission.is_full(small)
    assert not admission.is_full(large)


def app_answering(text: str) -> Starlette:
    def answer(_: object) -> PlainTextResponse:
        return PlainTextResponse(text)

    return Starlette(routes=[Route("/{rest:path}", answer, methods=["GET", "POST"])])


def test_a_rejection_has_all_parts_of_a_problem() -> None:
    admission = AdmissionControl(Limits(max_ongoing_requests=1, max_queued_requests=0), Metrics())
    client = TestClient(AdmissionMiddleware(app_answering("ours"), admission))
    with admission.admit(SEARCH):
        rejection = client.post("/v1/search", headers={"x-request-id": "from-the-client"})
    assert rejection.status_code == 503
    assert rejection.headers["content-type"] == "application/problem+json"
    assert rejection.headers["x-content-type-options"] == "nosniff"
    assert rejection.headers["x-request-id"] == "from-the-client"
    details = rejection.json()
    assert details["type"] == "/problems/overloaded"
    assert details["instance"] == "/requests/from-the-client"
    assert details["request_id"] == "from-the-client"
    assert details["status"] == 503


def test_rejections_of_one_second_are_counted_and_logged_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "access.log"
    open_logs(written)
    monkeypatch.setattr("reir_serving.middleware.admission.REPORT_EVERY_S", 0.01)
    metrics = Metrics()
    admission = AdmissionControl(Limits(max_ongoing_requests=1, max_queued_requests=0), metrics)

    async def two_rejections() -> None:
        async def send(message: object) -> None:
            del message

        await admission.reject(SEARCH, send)
        await admission.reject(SEARCH, send)
        await asyncio.sleep(0.1)

    asyncio.run(two_rejections())
    (line,) = map(json.loads, written.read_text().splitlines())
    assert (line["status"], line["problem"], line["requests"]) == (503, "overloaded", 2)
    families = {each.name: each for each in text_string_to_metric_families(metrics.text().decode())}
    counted = [each for each in families["reir_serve_problems"].samples if each.value]
    assert [(each.labels, each.value) for each in counted] == [({"problem": "overloaded"}, 2)]
    counted = [each for each in families["reir_serve_requests"].samples if each.value]
    assert [(each.labels["status"], each.value) for each in counted] == [("503", 2)]


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(app: ASGIApp) -> AsyncIterator[Connection]:
    """Connect to a server that uses the same protocol class as a replica of Ray Serve."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    config.load()
    assert config.http_protocol_class is early_rejection.EarlyRejectionProtocol
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
    yield reader, writer
    writer.close()
    server.should_exit = True
    await running


async def answer_to(connection: Connection, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send a request in pieces, and return status, headers and body of the answer."""
    reader, writer = connection
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
def admission() -> AdmissionControl:
    """Set the admission control of this process, with room for one request."""
    admission = AdmissionControl(Limits(max_ongoing_requests=1, max_queued_requests=0), Metrics())
    early_rejection.set_admission_control(admission)
    return admission


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> ASGIApp:
    """Return an application like Ray Serve's, and have uvicorn use our protocol class."""
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "")
    early_rejection.install()
    return app_answering("Ray's")


def test_a_rejection_keeps_the_connection_open(
    replica: ASGIApp, admission: AdmissionControl
) -> None:
    async def talk() -> None:
        async with connected(replica) as line:
            with admission.admit(SEARCH):
                for _ in range(2):
                    status, headers, body = await answer_to(line, POST % b"", b'{"a"', b": 1}")
                    assert (status, headers["retry-after"]) == (503, "1")
                    assert headers["content-type"] == "application/problem+json"
                    assert json.loads(body)["request_id"] == "from-the-client"
                status, _, body = await answer_to(line, b"GET /v1/x HTTP/1.1\r\nhost: x\r\n\r\n")
                assert (status, body) == (200, b"Ray's"), "requests that only read are admitted"
            status, _, body = await answer_to(line, POST % b"", b'{"a": 1}')
            assert (status, body) == (200, b"Ray's"), "there is room again"

    asyncio.run(talk())


def test_a_rejection_closes_the_connection_if_the_client_asks_for_that(
    replica: ASGIApp, admission: AdmissionControl
) -> None:
    async def talk() -> None:
        async with connected(replica) as line:
            with admission.admit(SEARCH):
                status, headers, _ = await answer_to(
                    line, POST % b"connection: close\r\n", b'{"a": 1}'
                )
            assert (status, headers["connection"]) == (503, "close")
            assert await line[0].read() == b""

    asyncio.run(talk())
