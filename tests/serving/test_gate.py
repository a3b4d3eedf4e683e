"""What the layer before the routes lets in at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from reir_serving.config import Limits
from reir_serving.gate import Gate, Places
from reir_serving.notes import Notes, put_notes

NUM = 6


def scope_of(path: str, method: str) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
    }
    put_notes(scope, Notes("request-1"))
    return scope


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

    gate = Gate(app, None, limits, Places(limits))

    async def ask() -> tuple[int, bytes | None]:
        started: list[Any] = []

        async def send(message: Any) -> None:
            started.append(message)

        await gate(scope_of(path, method), receive, send)
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
