"""Shared by the benchmarks of the service: load from `wrk`, and a client with one connection.

`wrk` is a load generator in C (the Debian package of that name). It leaves nearly all of the CPU to
the server that is being measured.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

SCRIPT = Path(__file__).with_name("_load.lua")
TIMEOUT_S = 30
OPEN_CONNECTIONS = 96
"""Connections of a load at a fixed rate. A server that is further behind slows the load down."""


@dataclass(frozen=True)
class Answers:
    """The answers to one load.

    Attributes:
        seconds: how long it lasted.
        p50_ms, p95_ms, p99_ms, max_ms: at a fixed rate, times of the answers with status 2xx
            from the moment that the request was due; otherwise times of all answers.
        broken: number of connections that failed to connect, read or write.
        timeouts: requests without an answer for `TIMEOUT_S`.
        statuses: status -> answers; "no-retry-after" counts refusals that lack that header.
    """

    seconds: float
    requests: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    broken: int
    timeouts: int
    statuses: Mapping[str, int]

    @property
    def good(self) -> int:
        """Answers with status 2xx."""
        return sum(count for status, count in self.statuses.items() if status.startswith("2"))

    @property
    def good_per_s(self) -> float:
        """Answers with status 2xx per second."""
        return self.good / self.seconds

    @property
    def unexplained(self) -> int:
        """Failures without `Retry-After`, broken connections and other 5xx included."""
        other = sum(
            count
            for status, count in self.statuses.items()
            if status.startswith("5") and status != "503"
        )
        return self.broken + self.timeouts + other + self.statuses.get("no-retry-after", 0)

    @property
    def failed(self) -> int:
        """Requests that were not answered with 2xx."""
        refused = sum(
            count for status, count in self.statuses.items() if not status.startswith(("2", "no"))
        )
        return self.broken + self.timeouts + refused


class Line:
    """A client with one persistent connection, which itself takes hardly any time."""

    def __init__(self, address: str) -> None:
        """Connect to HOST:PORT."""
        host, _, port = address.rpartition(":")
        self._host = address
        self._socket = socket.create_connection((host, int(port)))
        # Otherwise, the system may hold a small request back, which would look like a slow server.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answer = self._socket.makefile("rb")

    def post(self, path: str, body: bytes) -> bytes:
        """Send JSON; returns the body of the answer.

        Raises:
            RuntimeError: the status is not 200.
        """
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, length = self._answer.readline(), 0
        while (line := self._answer.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        answer = self._answer.read(length)
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {answer.decode()}")
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._answer.close()
        self._socket.close()


def closed_load(
    url: str, connections: int, seconds: float, bodies: Sequence[Mapping[str, object]] = ()
) -> Answers:
    """Run `connections` clients that send a request as soon as they have their answer."""
    # One thread of `wrk` is enough for all of them, and leaves the cores to the server.
    return _wrk(url, 1, connections, seconds, bodies, 0.0)


def open_load(
    url: str, per_s: float, seconds: float, bodies: Sequence[Mapping[str, object]] = ()
) -> Answers:
    """Send requests at a fixed rate, however long the answers take."""
    # Each thread of `wrk` has one connection and a schedule of its own (`_load.lua`), so a slow
    # answer holds up only one of them.
    return _wrk(url, OPEN_CONNECTIONS, OPEN_CONNECTIONS, seconds, bodies, per_s)


def _wrk(  # noqa: PLR0913
    url: str,
    threads: int,
    connections: int,
    seconds: float,
    bodies: Sequence[Mapping[str, object]],
    per_s: float,
) -> Answers:
    wrk = shutil.which("wrk")
    if wrk is None:
        sys.exit("this benchmark needs the load generator wrk: apt-get install wrk")
    with _body_file(bodies) as file:
        options = [f"-t{threads}", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        options += ["--timeout", f"{TIMEOUT_S}s", "-s", str(SCRIPT), url, "--"]
        done = subprocess.run(
            [wrk, *options, file, str(per_s), str(threads)],
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise RuntimeError(f"wrk failed: {done.stdout}{done.stderr}")
    return Answers(**json.loads(lines[0].removeprefix("FIGURES ")))


@contextmanager
def _body_file(bodies: Sequence[Mapping[str, object]]) -> Iterator[str]:
    if not bodies:
        yield "-"
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "bodies"
        path.write_text("".join(json.dumps(body) + "\n" for body in bodies), encoding="utf-8")
        yield str(path)
