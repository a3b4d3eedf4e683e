"""Two servers on one machine: does a server whose replicas die ever give the other one's answers?

    python benchmarks/serve_foreign.py

The first server requires API keys; the second, on the same machine, does not. For a minute, each
replica of the first server is killed as soon as it appears, while clients send requests without a
key to that server's port. They may only get the server's own refusal (401), or 503 with
`Retry-After`.

    serve.foreign_answers      answers other than these
    serve.foreign_cut          requests without a complete answer, as their replica was killed
    serve.foreign_requests     requests in total
    serve.foreign_killed       replicas killed

Then the HAProxy of the second server is killed repeatedly.

    serve.haproxy_back_s       seconds from a kill to the next correct answer, the longest of all
    serve.haproxy_unexplained  answers in between other than a correct one or 503 with `Retry-After`
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

from reir_serving.middleware.keys import new_key
from reir_testing.serving import free_port

CLIENTS, TIMEOUT_S, BACK_TIMEOUT_S = 4, 10.0, 60.0
PROBLEM = "application/problem+json"
CUT = "no answer: "
"""Prefix of the outcome of a request without a complete answer."""


def main() -> None:
    """Measure, print the figures, and write them to a report."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.set_defaults(instances=2_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="How long to kill replicas.")
    parser.add_argument("--kills", type=int, default=5, help="Number of kills of HAProxy.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(arguments, Path(name))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('serve_foreign', figures).name}")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both servers and return the figures."""
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
    # The second server needs no key, so its answer would be 200.
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
    """Kill every replica as soon as it appears, while clients send requests without a key.

    Returns:
        Outcomes of the requests -> how many, and the number of replicas killed.
    """
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
    """Send a request; return the status of the answer and what is wrong with it, or the failure."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return f"{answer.status}"
    except urllib.error.HTTPError as error:
        return _refusal(error)
    except (OSError, http.client.HTTPException) as error:
        return CUT + type(getattr(error, "reason", error)).__name__


def _refusal(error: urllib.error.HTTPError) -> str:
    """Return the status of an error answer, and what is wrong with it."""
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
    """Kill HAProxy repeatedly.

    Returns:
        Seconds from each kill to the next correct answer, and the number of unexplained answers.
    """
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
