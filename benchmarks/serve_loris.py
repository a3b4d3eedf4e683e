"""Slow clients (slowloris attacks): are other clients still answered?

    python benchmarks/serve_loris.py

Runs four attacks on a server, one after another. When the server closes a slow connection, the
attack opens a new one at once:

    headers   4,200 connections that send a request line and then a byte of a header every 2 seconds
    bodies    32 searches whose bodies are sent one byte at a time
    large     32 searches whose first 75 kB, which reach a replica, are sent at once, and the rest
              one byte at a time
    uploads   32 uploads whose photos are sent one byte at a time

During each attack, probes connect, search once, and disconnect. Every second probe comes from the
address of the attack, like a client behind the same proxy; the others come from another address.

    serve.loris_answered           share of probes answered correctly within 2 s, headers attack
    serve.loris_bodies_answered    the same, bodies attack
    serve.loris_large_answered     the same, large attack
    serve.loris_uploads_answered   the same, uploads attack
    serve.loris_open               largest number of slow connections open at once, headers attack
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from _indexing import parser_of
from _report import write_report
from _served import Server, add_arguments, bodies, fill_gallery, served

from reir_testing.serving import free_port

EVERY_S, PROBE_EVERY_S, PROBE_TIMEOUT_S = 2.0, 0.1, 2.0
# The server limits connections per address, so both kinds of client are tested.
SOURCES = ("127.0.0.1", "127.0.0.2")
_POST = "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
_SEARCH = _POST.format(path="/v1/search", kind="application/json")
_UPLOAD = _POST.format(path="/v1/localize", kind="multipart/form-data; boundary=x")
ATTACKS = {
    "": f"{_SEARCH}X-A: ",
    "bodies_": f"{_SEARCH}Content-Length: 500\r\n\r\n",
    "large_": f"{_SEARCH}Content-Length: 900000\r\n\r\n{' ' * 75_000}",
    "uploads_": f"{_UPLOAD}Content-Length: 300000\r\n\r\n",
}


def main() -> None:
    """Measure, print the figures, and write them to a report."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.set_defaults(instances=2_000)
    parser.add_argument(
        "--connections", type=int, default=4_200, help="Slow connections of the headers attack."
    )
    parser.add_argument("--slow-bodies", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=40.0, help="Duration of each attack.")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each slow connection is an open file of this process.
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with tempfile.TemporaryDirectory() as name:
        store = fill_gallery(arguments, Path(name))
        with served(store, Path(name), free_port()) as server:
            for attack, start in ATTACKS.items():
                count = arguments.slow_bodies if attack else arguments.connections
                figures |= measure(server, attack, start, count, arguments)
    for key, value in figures.items():
        print(f"{key:36} {value}")
    print(f"figures in {write_report('serve_loris', figures).name}")


def measure(
    server: Server, attack: str, start: str, count: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run one attack with probes and return its figures."""
    with attacked(server.url, start, count) as opened:
        answered, slowest_s = probed(server.url, arguments)
    return {
        f"serve.loris_{attack}answered": round(sum(answered) / len(answered), 4),
        f"serve.loris_{attack}probes": len(answered),
        f"serve.loris_{attack}slowest_s": round(slowest_s, 2),
        f"serve.loris_{attack}connections": count,
        f"serve.loris_{attack}open": opened.most,
        f"serve.loris_{attack}opened": opened.total,
    }


@dataclass
class SlowConnections:
    """Numbers of slow connections.

    Attributes:
        now: open at the moment.
        most: largest number open at once.
        total: opened in total.
    """

    now: int = 0
    most: int = 0
    total: int = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count a connection while it is open."""
        self.now, self.total = self.now + 1, self.total + 1
        self.most = max(self.most, self.now)
        try:
            yield
        finally:
            self.now -= 1


@contextmanager
def attacked(url: str, start: str, count: int) -> Iterator[SlowConnections]:
    """Keep `count` slow connections open; yields the numbers of connections."""
    opened = SlowConnections()
    stop = threading.Event()
    attack = _attack(url, start, count, opened, stop)
    thread = threading.Thread(target=asyncio.run, args=(attack,))
    thread.start()
    until_s = time.monotonic() + 60
    # Probes start only when the attack is complete.
    while opened.total < count and time.monotonic() < until_s:
        time.sleep(0.1)
    print(f"{opened.most} slow connections", flush=True)
    try:
        yield opened
    finally:
        stop.set()
        thread.join()


async def _attack(
    url: str, start: str, count: int, opened: SlowConnections, stop: threading.Event
) -> None:
    port = urlsplit(url).port or 80
    await asyncio.gather(*(_trickle(port, start, opened, stop) for _ in range(count)))


async def _trickle(port: int, start: str, opened: SlowConnections, stop: threading.Event) -> None:
    """Send `start` and then single bytes; reconnect whenever the server closes the connection."""
    while not stop.is_set():
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with opened.one(), closing(writer):
                writer.write(start.encode())
                while not (reader.at_eof() or writer.is_closing() or stop.is_set()):
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(4096), EVERY_S)
                    writer.write(b"a")
                    await writer.drain()
        await asyncio.sleep(0.05)


def probed(url: str, arguments: argparse.Namespace) -> tuple[list[bool], float]:
    """Send probes, one search for each connection.

    Returns:
        Whether each probe was answered correctly, and the longest time of a probe in seconds.
    """
    answered, slowest_s = [], 0.0
    queries, sources = cycle(bodies(arguments.queries, k=5)), cycle(SOURCES)
    until_s = time.monotonic() + arguments.seconds
    while time.monotonic() < until_s:
        started_s = time.monotonic()
        answered.append(_is_answered(url, next(queries), next(sources)))
        slowest_s = max(slowest_s, time.monotonic() - started_s)
        time.sleep(PROBE_EVERY_S)
    return answered, slowest_s


def _is_answered(url: str, body: dict[str, object], source: str) -> bool:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(
        "127.0.0.1", place.port, timeout=PROBE_TIMEOUT_S, source_address=(source, 0)
    )
    headers = {"Content-Type": "application/json"}
    with closing(connection), suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/v1/search", json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status == 200 and bool(json.loads(answer.read())["hits"])
    return False


if __name__ == "__main__":
    main()
