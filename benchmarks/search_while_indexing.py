"""Searching while rows arrive, and how soon after a write they can be found.

    python benchmarks/search_while_indexing.py [--server]

Four processes search without a pause, on the same two cores as the store: first alone, then while
another process writes 50, 100 and 200 rows per second in five writes per second, and alone again
after each rate. A fifth process, this one, searches once after each acknowledged write for what was
written. The time to searchable runs from the start of the write to the end of that search, so it
includes the write itself. It is reported for each rate; `p7.searchable_p95_s` is the highest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from _indexing import parser_of
from _report import write_report
from _vectors import (
    EVERYTHING,
    GALLERY,
    PER_IMAGE,
    VERSION,
    Corpus,
    add_arguments,
    fill,
    make_corpus,
    our_search,
    print_figures,
)

from reir.store import InstanceStore, open_store
from reir_testing.milvus_server import milvus_server

WRITES_A_SECOND = 5


class Child:
    """This script in another process, which reads orders line by line."""

    def __init__(self, role: str, location: str, corpus: Path) -> None:
        command = [sys.executable, sys.argv[0], "--role", role, location, str(corpus)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()

    def tell(self, *words: float) -> None:
        """Send one order."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Return the next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def orders() -> Iterator[list[float]]:
    """Report that this child is ready, then yield its orders."""
    answer("ready")
    for line in sys.stdin:
        yield [float(word) for word in line.split()]


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def run_searcher(store: InstanceStore, corpus: Corpus) -> None:
    """Search without a pause for the ordered time, and answer with the times."""
    search = our_search(store)
    search(corpus.queries[:1], EVERYTHING)
    for (seconds,) in orders():
        times_ms: list[float] = []
        until = time.monotonic() + seconds
        while (started := time.monotonic()) < until:
            number = len(times_ms) % len(corpus.queries)
            search(corpus.queries[number : number + 1], EVERYTHING)
            times_ms.append((time.monotonic() - started) * 1e3)
        answer(times_ms)


def run_writer(store: InstanceStore, corpus: Corpus) -> None:
    """Write at a constant rate for the ordered time; answer after each write and at the end."""
    images = list(corpus.images())
    for rate, seconds, first in orders():
        batch = round(rate / WRITES_A_SECOND / PER_IMAGE)
        began = time.monotonic()
        for number in range(round(seconds * WRITES_A_SECOND)):
            # Relative to the beginning, so that a slow write does not lower the rate of later ones.
            time.sleep(max(0.0, began + number / WRITES_A_SECOND - time.monotonic()))
            start = int(first) + number * batch
            started = time.monotonic()
            store.upsert_images(GALLERY, VERSION, images[start : start + batch])
            answer({"image": start + batch - 1, "started": started})
        answer(None)


def probe(writer: Child, store: InstanceStore, corpus: Corpus) -> tuple[list[float], int, float]:
    """Search for every write as soon as it is acknowledged, until the writer is done.

    Returns:
        Seconds until each write could be found, the number of failed searches, and total seconds.
    """
    search = our_search(store)
    seconds: list[float] = []
    misses = 0
    began = time.monotonic()
    while (written := writer.answer()) is not None:
        number = written["image"] * PER_IMAGE
        query = corpus.vectors[number : number + 1]
        while number not in search(query, EVERYTHING):
            misses += 1
        # Both processes read the same monotonic clock of the system.
        seconds.append(time.monotonic() - written["started"])
    return seconds, misses, time.monotonic() - began


class Searchers:
    """Several processes that search at the same time."""

    def __init__(self, children: list[Child], seconds: float) -> None:
        self._children = children
        self._seconds = seconds

    def start(self) -> None:
        for each in self._children:
            each.tell(self._seconds)

    def finish(self) -> tuple[float, float]:
        """Return searches per second of all processes, and the 99th percentile in ms."""
        times_ms = [time_ms for each in self._children for time_ms in each.answer()]
        return len(times_ms) / self._seconds, float(np.percentile(times_ms, 99))


def measure(
    arguments: argparse.Namespace, location: str, corpus: Corpus, saved: Path
) -> dict[str, Any]:
    """Measure alone and at each rate of writing; `corpus` holds the first and the later rows."""
    figures: dict[str, Any] = {}
    with ExitStack() as open_now:

        def child(role: str) -> Child:
            return open_now.enter_context(closing(Child(role, location, saved)))

        store = open_now.enter_context(closing(open_store(location)))
        fill(store, corpus.first(arguments.rows))
        children = [child("searcher") for _ in range(arguments.searchers)]
        searchers = Searchers(children, arguments.seconds)
        writer = child("writer")
        written = arguments.rows // PER_IMAGE
        searchers.start()
        before = searchers.finish()
        for rate in arguments.rates:
            searchers.start()
            writer.tell(rate, arguments.seconds, written)
            found, misses, took_s = probe(writer, store, corpus)
            busy = searchers.finish()
            # The gallery has grown, so the idle rate is the mean of before and after.
            searchers.start()
            after = searchers.finish()
            written += round(rate * arguments.seconds / PER_IMAGE)
            alone_qps = (before[0] + after[0]) / 2
            figures |= {
                f"p7.{rate}.qps": round(busy[0], 1),
                f"p7.{rate}.idle_qps": round(alone_qps, 1),
                f"p7.{rate}.qps_ratio": round(busy[0] / alone_qps, 4),
                f"p7.{rate}.p99_ms": round(busy[1], 2),
                f"p7.{rate}.idle_p99_ms": round((before[1] + after[1]) / 2, 2),
                f"p7.{rate}.searchable_p50_s": round(float(np.percentile(found, 50)), 4),
                f"p7.{rate}.searchable_p95_s": round(float(np.percentile(found, 95)), 4),
                f"p7.{rate}.not_found_at_once": misses,
                f"p7.{rate}.rate_kept": round(min(1.0, arguments.seconds / took_s), 3),
            }
            before = after
    return figures | {
        "p7.qps_ratio": min(figures[f"p7.{rate}.qps_ratio"] for rate in arguments.rates),
        "p7.searchable_p95_s": max(
            figures[f"p7.{rate}.searchable_p95_s"] for rate in arguments.rates
        ),
    }


def main() -> None:
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=30_000, help="Rows before the first search.")
    parser.add_argument(
        "--rates", type=int, nargs="+", default=[50, 100, 200], help="Rows per second."
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="Duration at each rate.")
    parser.add_argument("--searchers", type=int, default=4)
    parser.add_argument("--server", action="store_true", help="Use a Milvus server.")
    parser.add_argument("--role", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        role, location, saved = arguments.role
        corpus = Corpus(**np.load(saved))
        with closing(open_store(location)) as store:
            {"searcher": run_searcher, "writer": run_writer}[role](store, corpus)
        return
    more = sum(round(rate * arguments.seconds) for rate in arguments.rates)
    corpus = make_corpus(arguments, arguments.rows + more)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_now:
        work = Path(folder)
        location = str(work / "store")
        if arguments.server:
            location = open_now.enter_context(milvus_server(work)).uri
        saved_corpus = work / "corpus.npz"
        np.savez(saved_corpus, **vars(corpus))
        figures = measure(arguments, location, corpus, saved_corpus)
    print_figures(figures)
    write_report(
        "search_while_indexing_server" if arguments.server else "search_while_indexing", figures
    )


if __name__ == "__main__":
    main()
