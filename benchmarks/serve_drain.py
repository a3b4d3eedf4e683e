"""Stops `reir serve` under load, repeatedly: are requests lost, and are files or processes left?

    python benchmarks/serve_drain.py

Each round starts the server with a temporary directory of its own, runs clients that send one
request after another, and after a while sends a signal: SIGTERM and SIGINT in turn, to the process
alone and to its whole process group, as a terminal does.

    serve.drain_cut          requests that were sent but got no complete answer with status 200
    serve.drain_requests     requests that were sent; refused connections do not count
    serve.drain_exit_codes   exit codes of the command, one for each round
    serve.drain_left         files in the temporary directory and processes left after the rounds
    serve.drain_s            seconds from the signal to the exit, the longest of all rounds
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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _indexing import parser_of
from _report import write_report
from _served import Server, add_arguments, bodies, fill_gallery, served

from reir_testing.serving import free_port

MARK = "REIR_DRAIN_ROUND"
"""Variable in the environment of all processes of one round, by which they are found."""

STORE_PROCESS = "reir.store.embedded.lite_server_process"
"""Process that serves the embedded store to all commands; it exits by itself when unused."""

SIGNALS = (
    (signal.SIGTERM, os.kill),
    (signal.SIGTERM, os.killpg),
    (signal.SIGINT, os.kill),
    (signal.SIGINT, os.killpg),
)


@dataclass
class Round:
    """Results of one round.

    Attributes:
        answered: number of requests with a complete answer of status 200.
        cut: failures of the other requests -> how many.
        exit_code: exit code of the command.
        seconds: time from the signal to the exit of the command.
        left: files left in the temporary directory, and processes that are still running.
    """

    answered: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    exit_code: int | None = None
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)


def main() -> None:
    """Measure, print the figures, and write them to a report."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument(
        "--requests", type=int, default=100, help="Answers before the signal, per round."
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = fill_gallery(arguments, Path(name))
        rounds = [one_round(arguments, store, number) for number in range(arguments.rounds)]
    figures = {
        "serve.drain_cut": sum(each.cut.total() for each in rounds),
        "serve.drain_requests": sum(each.answered + each.cut.total() for each in rounds),
        "serve.drain_exit_codes": [each.exit_code for each in rounds],
        "serve.drain_left": [name for each in rounds for name in each.left],
        "serve.drain_s": round(max(each.seconds for each in rounds), 2),
        "serve.drain_connections": arguments.connections,
    }
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('serve_drain', figures).name}")


def one_round(arguments: argparse.Namespace, store: str, number: int) -> Round:
    """Start the server and clients, send a signal, and record what is left after the exit."""
    number_of_signal, send = SIGNALS[number % len(SIGNALS)]
    seen = Round()
    with tempfile.TemporaryDirectory(prefix="d") as log, own_temporary_directory(number) as own:
        with served(store, Path(log), free_port()) as server:
            with asking(server, arguments, seen) as enough:
                # The signal must come in the middle of the load.
                enough.wait(120)
                started_s = time.monotonic()
                send(server.process.pid, number_of_signal)
            seen.exit_code = server.process.wait(120)
            seen.seconds = time.monotonic() - started_s
        seen.left = [*(each.name for each in own.iterdir()), *processes_of(number)]
    print(f"{number_of_signal.name} by {send.__name__}: {seen}", flush=True)
    return seen


@contextmanager
def own_temporary_directory(number: int) -> Iterator[Path]:
    """Make processes started in this context use a new temporary directory."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="t") as name:
        os.environ.update({"TMPDIR": name, MARK: str(number)})
        try:
            yield Path(name)
        finally:
            os.environ.clear()
            os.environ.update(before)


def processes_of(number: int) -> list[str]:
    """Return the command lines of one round's running processes, except the store's."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue
        mark = f"{MARK}={number}".encode() in environment
        if mark and int(entry.name) != os.getpid() and STORE_PROCESS not in command:
            found.append(command)
    return found


@contextmanager
def asking(server: Server, arguments: argparse.Namespace, seen: Round) -> Iterator[threading.Event]:
    """Run clients until their connections are refused.

    Yields:
        An event that is set once enough requests were answered.
    """
    enough, lock = threading.Event(), threading.Lock()
    sent = [json.dumps(body).encode() for body in bodies(arguments.queries)]

    def note(fault: str) -> None:
        with lock:
            seen.cut.update([fault] if fault else [])
            seen.answered += not fault
            if seen.answered >= arguments.requests:
                enough.set()

    clients = [
        threading.Thread(target=ask_until_refused, args=(server, sent[first:] + sent[:first], note))
        for first in range(arguments.connections)
    ]
    for client in clients:
        client.start()
    yield enough
    for client in clients:
        client.join(120)


def ask_until_refused(server: Server, sent: Sequence[bytes], note: Any) -> None:
    """Send requests on one connection until it is refused; reconnect when the server closes it.

    Args:
        server: the server under test.
        sent: request bodies, sent in turn.
        note: called for each request, with "" if it was answered and its failure if not.
    """
    line = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    number = 0
    while True:
        try:
            if line.sock is None:
                line.connect()
        except OSError:
            # The connection was refused, so nothing was sent that could be lost.
            return
        try:
            line.request(
                "POST",
                "/v1/search",
                sent[number % len(sent)],
                {"Content-Type": "application/json"},
            )
            answer = line.getresponse()
            whole = answer.read()
            note("" if answer.status == 200 and json.loads(whole)["hits"] else str(answer.status))
        except (OSError, http.client.HTTPException, ValueError) as error:
            note(repr(error))
            line.close()
        number += 1


if __name__ == "__main__":
    main()
