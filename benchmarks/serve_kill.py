"""Replicas are killed under load, and then the store: do clients notice?

    python benchmarks/serve_kill.py

First part: three replicas, clients that send a request as soon as they have their answer, and
SIGKILL every 5 seconds for a randomly chosen replica, even if it is the last one.

    serve.kill_failed      requests without an answer of status 2xx
    serve.kill_killed      replicas killed

Second part: one replica with a store in a separate server (Milvus Lite behind a port, which
`reir serve` uses like a Milvus server). That server is killed under load and started again.

    serve.outage_unexplained   answers that were neither correct nor 503 with `Retry-After`
    serve.outage_refused       answers with 503
    serve.outage_recovery_s    from the server's return to the first correct answer
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _indexing import parser_of
from _load import Answers, closed_load
from _report import write_report
from _served import Server, add_arguments, bodies, fill_gallery, served

from reir_testing.serving import free_port

EVERY_S = 5.0
REPLICAS = 3
CLIENTS = 4
AWAY_S = 8.0
OUTAGE_INSTANCES = 2_000
_STORE_SERVER = """
import sys
from milvus_lite.adapter.grpc.server import start_server_in_thread
kept = start_server_in_thread(sys.argv[1], "127.0.0.1", int(sys.argv[2]), max_workers=4)
print("ready", flush=True)
sys.stdin.read()
"""


def main() -> None:
    """Measure, print and save the figures."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=300.0, help="Duration of part one.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = killed_replicas(arguments, Path(name))
    with tempfile.TemporaryDirectory() as name:
        figures |= killed_store(arguments, Path(name))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('serve_kill', figures).name}")


def killed_replicas(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill replicas under load."""
    replicas = {"ingress": {"min_replicas": REPLICAS, "max_replicas": REPLICAS}}
    store = fill_gallery(arguments, folder)
    with served(store, folder, free_port(), replicas) as server:
        stop, killed = threading.Event(), list[int]()
        killer = threading.Thread(target=_kill_now_and_then, args=(server, stop, killed))
        killer.start()
        answers = closed_load(
            f"{server.url}/v1/search", CLIENTS, arguments.seconds, bodies(arguments.queries)
        )
        stop.set()
        killer.join()
    return _figures("serve.kill", answers) | {"serve.kill_killed": len(killed)}


def _kill_now_and_then(server: Server, stop: threading.Event, killed: list[int]) -> None:
    rng = random.Random(0)
    while not stop.wait(EVERY_S):
        # No replica is spared: a client must also survive the death of the last one.
        if alive := server.replicas():
            killed.append(rng.choice(alive))
            os.kill(killed[-1], signal.SIGKILL)


def killed_store(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill the store under load, and start it again."""
    port = free_port()
    arguments.instances, arguments.store = OUTAGE_INSTANCES, f"http://127.0.0.1:{port}"
    options = {"ingress": {"min_replicas": 1, "max_replicas": 1}}
    with store_server(folder, port) as first:
        fill_gallery(arguments, folder)
        with served(arguments.store, folder, free_port(), options) as server:
            url = f"{server.url}/v1/search"
            # Everything is loaded before the outage, so that only the outage is measured.
            closed_load(url, CLIENTS, 3, bodies(arguments.queries))
            before = server.replicas()
            first.kill()
            first.wait()
            away = closed_load(url, CLIENTS, AWAY_S, bodies(arguments.queries))
            with store_server(folder, port):
                recovery_s = _seconds_to_the_first_answer(url)
                after = closed_load(url, CLIENTS, 3, bodies(arguments.queries))
            same = server.replicas() == before
    return {
        **_figures("serve.outage", away),
        "serve.outage_unexplained": away.unexplained + after.failed,
        "serve.outage_refused": away.statuses.get("503", 0),
        "serve.outage_recovery_s": round(recovery_s, 2),
        "serve.outage_same_replicas": same,
    }


@contextmanager
def store_server(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Run a store server at a port; its data stays in the folder."""
    command = [sys.executable, "-c", _STORE_SERVER, str(folder / "server"), str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the store server did not start")
        try:
            yield process
        finally:
            process.kill()


def _seconds_to_the_first_answer(url: str) -> float:
    (body,) = bodies(1)
    data = json.dumps(body).encode()
    started_s = time.monotonic()
    while time.monotonic() < started_s + 60:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except urllib.error.HTTPError:
            time.sleep(0.05)
        else:
            return time.monotonic() - started_s
    return float("inf")


def _figures(name: str, answers: Answers) -> dict[str, Any]:
    return {
        f"{name}_requests": answers.requests,
        f"{name}_failed": answers.failed,
        f"{name}_broken": answers.broken + answers.timeouts,
        f"{name}_statuses": dict(answers.statuses),
        f"{name}_p50_ms": answers.p50_ms,
        f"{name}_p99_ms": answers.p99_ms,
        f"{name}_max_ms": answers.max_ms,
    }


if __name__ == "__main__":
    main()
