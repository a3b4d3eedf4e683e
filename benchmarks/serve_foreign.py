"""Two servers on one machine, one without replicas: whose answers does its port give?

    python benchmarks/serve_foreign.py

One server wants keys; the other, beside it, serves everybody of this machine. For a minute each
replica of the first is killed as soon as it is there, while clients without a key ask its port. All
that they may get is its own refusal (401) or 503 with `Retry-After`.

    serve.foreign_answers      answers that were anything else
    serve.foreign_cut          requests without a whole answer, whose replica was killed at it
    serve.foreign_requests     answers in all
    serve.foreign_killed       replicas killed

Then HAProxy itself is killed, again and again.

    serve.haproxy_back_s       from the kill to the next right answer, the longest of all
    serve.haproxy_unexplained  answers meanwhile that were neither right nor 503 with `Retry-After`
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from _indexing import parser_of
from _report import write_report
from _served import GALLERY, Server, add_arguments, fill_gallery, processes, served

from reir_serving.environment import free_port
from reir_serving.keys import new_key

CLIENTS, TIMEOUT_S, BACK_TIMEOUT_S = 4, 10.0, 60.0
PROBLEM = "application/problem+json"
CUT = "no answer: "
"""Begins what is counted where nobody listens, or where who answers is killed at it."""


def main() -> None:
    """Measure, print and keep the figures."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.set_defaults(instances=2_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the killing of replicas")
    parser.add_argument("--kills", type=int, default=5, help="of HAProxy")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(arguments, Path(name))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('serve_foreign', figures).name}")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both servers."""
    store = fill_gallery(arguments, folder)
    one, other = folder / "one", folder / "other"
    one.mkdir()
    other.mkdir()
    new_key(one / "keys.yaml", read=(GALLERY,), write=())
    keys = {"keys_file": str(one / "keys.yaml")}
    with (
        served(store, one, free_port(), keys) as server,
        served(store, other, free_port()) as beside,
    ):
        found, killed = without_replicas(server, arguments.seconds)
        back_s, unexplained = without_haproxy(beside, arguments.kills)
    allowed = {"401", "503"}
    cut = {what for what in found if what.startswith(CUT)}
    return {
        "serve.foreign_answers": sum(n for what, n in found.items() if what not in allowed | cut),
        "serve.foreign_cut": sum(found[what] for what in cut),
        "serve.foreign_requests": found.total(),
        "serve.foreign_statuses": dict(found),
        "serve.foreign_killed": killed,
        "serve.haproxy_back_s": round(max(back_s), 2),
        "serve.haproxy_kills": len(back_s),
        "serve.haproxy_unexplained": unexplained,
    }


def without_replicas(server: Server, seconds: float) -> tuple[Counter[str], int]:
    """Kill every replica as it comes, and ask without a key."""
    until_s, found = time.monotonic() + seconds, Counter[str]()

    def ask() -> None:
        while time.monotonic() < until_s:
            found[answer_of(f"{server.url}/v1/galleries")] += 1
            time.sleep(0.01)

    clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    killed = set()
    while time.monotonic() < until_s:
        for pid in server.replicas():
            killed.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    for client in clients:
        client.join()
    return found, len(killed)


def answer_of(url: str) -> str:
    """Return the status of an answer, with what is wrong about it, or how there was none."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return f"{answer.status}"
    except urllib.error.HTTPError as error:
        return _refusal(error)
    except (OSError, http.client.HTTPException) as error:
        return CUT + type(getattr(error, "reason", error)).__name__


def _refusal(error: urllib.error.HTTPError) -> str:
    """Return the status of a refusal, with what is wrong about it."""
    try:
        said = error.read()
    except http.client.HTTPException as cut:
        return CUT + type(cut).__name__
    if error.headers["content-type"] != PROBLEM or json.loads(said)["status"] != error.code:
        return f"{error.code} without a problem"
    if error.code == 503 and not error.headers["retry-after"]:
        return "503 without Retry-After"
    return f"{error.code}"


def without_haproxy(server: Server, kills: int) -> tuple[list[float], int]:
    """Kill HAProxy now and then; the seconds until each right answer, and what was said wrongly."""
    back_s, unexplained = [], 0
    for _ in range(kills):
        (pid,) = [pid for pid, title in processes(server.process.pid) if "bin/haproxy -" in title]
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        while (answer := answer_of(f"{server.url}/v1/galleries")) != "200":
            unexplained += answer != "503" and not answer.startswith(CUT)
            if time.monotonic() > killed_s + BACK_TIMEOUT_S:
                break
            time.sleep(0.01)
        back_s.append(time.monotonic() - killed_s)
        time.sleep(2.0)
    return back_s, unexplained


if __name__ == "__main__":
    main()
