"""Switches between two versions of a gallery while eight readers search over HTTP.

    python benchmarks/version_switch.py

Two versions hold the same vectors, but the URIs of their photos differ, so every hit tells from
which version it comes. Eight clients send a search to `reir serve` as soon as they have their
answer: first undisturbed, then while the live version is switched every two seconds, and while
`reir rollback` runs. Readers go through the service because that is what users of a large gallery
do, and because several processes then have to learn of a switch. The gallery is served from the
embedded store, and then from a Milvus server.

    p8.failed          searches that were not answered with status 200
    p8.mixed           answers with a hit of another version than the answer names, or than the
                       other hits have
    p8.p99_ratio       99th percentile of the time of a search during the switches, divided by that
                       before
    p8.rollback_s      seconds of a rollback, until the store has confirmed it; the slowest
    p8.seen_s          seconds from the start of a switch or rollback until the last search was sent
                       that the version before answered
    p8.rollback_command_s
                       seconds of the command `reir rollback`, which also starts Python; the slowest

Each is the worse of `p8.embedded.*` and `p8.server.*`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from _indexing import encoder_of, parser_of
from _load import Line
from _report import write_report
from _served import GALLERY, Server, add_arguments, bodies, served
from _vectors import Corpus, make_corpus

from reir.images.decode import image_id
from reir.operations.live_history import make_live, roll_back
from reir.records import IndexedImage
from reir.store import InstanceStore, VersionSpec, open_store
from reir_testing.milvus_server import milvus_server
from reir_testing.serving import free_port

VERSIONS = ("one", "two")
READERS = 8
_UPSERT_IMAGES = 256
_REIR = [sys.executable, "-c", "from reir.cli.main import main; main()"]
_WORST = ("failed", "mixed", "p99_ratio", "seen_s", "rollback_s", "rollback_command_s")


@dataclass(frozen=True)
class Search:
    """One search of a reader.

    Attributes:
        sent_s, answered_s: on the monotonic clock.
        version: version that the answer names; empty if the search failed.
        is_mixed: whether a hit is of another version.
        problem: why it failed.
    """

    sent_s: float
    answered_s: float
    version: str
    is_mixed: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Switch:
    """One switch: when it was begun and confirmed, and the version that it made live."""

    begun_s: float
    done_s: float
    version: str


class Readers:
    """Clients that send a search as soon as they have their answer."""

    def __init__(self, server: Server, requests: Sequence[bytes]) -> None:
        self._address = server.url.removeprefix("http://")
        self._requests = requests
        self._stop = threading.Event()
        self._found: list[list[Search]] = [[] for _ in range(READERS)]
        self._threads = [
            threading.Thread(target=self._read, args=(number,)) for number in range(READERS)
        ]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Search until the block ends."""
        for each in self._threads:
            each.start()
        try:
            yield
        finally:
            self._stop.set()
            for each in self._threads:
                each.join()

    def searches(self, since_s: float = 0.0, until_s: float = float("inf")) -> list[Search]:
        """Return the searches that were sent in a period."""
        return [
            each for one in self._found for each in list(one) if since_s <= each.sent_s < until_s
        ]

    def _read(self, number: int) -> None:
        line = Line(self._address)
        for request in islice(cycle(self._requests), number, None):
            if self._stop.is_set():
                break
            sent_s = time.monotonic()
            try:
                version, is_mixed = version_of(line.post("/v1/search", request))
                found = Search(sent_s, time.monotonic(), version, is_mixed)
            except (OSError, RuntimeError, ValueError) as error:
                found = Search(sent_s, time.monotonic(), "", problem=str(error)[:200])
                line.close()
                line = Line(self._address)
            self._found[number].append(found)
        line.close()


def version_of(answer: bytes) -> tuple[str, bool]:
    """Return the version that an answer names, and whether a hit of it is of another one."""
    values = json.loads(answer)
    if not values["hits"]:
        raise ValueError("the answer has no hits")
    hit_versions = {hit["uri"].removeprefix("file:///").partition("/")[0] for hit in values["hits"]}
    return values["version"], hit_versions != {values["version"]}


def main() -> None:
    """Measure both stores, print the figures and save them."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--every-s", type=float, default=2.0, help="Seconds between two switches.")
    parser.add_argument("--before-s", type=float, default=20.0, help="Seconds without a switch.")
    parser.add_argument(
        "--rollbacks", type=int, default=5, help="Number of rollbacks of each kind."
    )
    parser.add_argument(
        "--only", choices=("embedded", "server"), help="Measure one store only; saves nothing."
    )
    arguments = parser.parse_args()
    corpus = make_corpus(arguments, arguments.instances)
    figures: dict[str, Any] = {}
    for kind in (arguments.only,) if arguments.only else ("embedded", "server"):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
            work = Path(folder)
            location = str(work / "store")
            if kind == "server":
                location = running.enter_context(milvus_server(work)).uri
            found = measure(arguments, corpus, location, work)
        figures |= {f"p8.{kind}.{name}": value for name, value in found.items()}
        show(figures)
    if not arguments.only:
        figures |= {
            f"p8.{name}": max(figures[f"p8.{kind}.{name}"] for kind in ("embedded", "server"))
            for name in _WORST
        }
        show(figures)
        print(f"figures in {write_report('version_switch', figures).name}")


def show(figures: dict[str, Any]) -> None:
    """Print figures, one in a line."""
    for key, value in figures.items():
        print(f"{key:36} {value}", flush=True)


def measure(
    arguments: argparse.Namespace, corpus: Corpus, location: str, folder: Path
) -> dict[str, Any]:
    """Return the figures of one store, without the prefix of their keys."""
    requests = [json.dumps(body).encode() for body in bodies(arguments.queries)]
    with closing(open_store(location)) as store:
        fill(store, arguments, corpus)
        with served(location, folder, free_port()) as server:
            # Both versions are loaded, so that no figure depends on the first switch of all.
            for version in VERSIONS:
                make_live(store, GALLERY, version, by="benchmark")
                with Readers(server, requests).reading():
                    time.sleep(3.0)
            readers = Readers(server, requests)
            with readers.reading():
                began_s = time.monotonic()
                time.sleep(arguments.before_s)
                switches = switch(store, arguments.switches, arguments.every_s)
                ended_s = time.monotonic()
                rollbacks = roll_back_often(store, arguments.rollbacks, arguments.every_s)
                commands = run_rollbacks(location, arguments.rollbacks)
    everything = readers.searches()
    for problem in {each.problem for each in everything if each.problem}:
        print(f"failed: {problem}")
    before = readers.searches(began_s, switches[0].begun_s)
    during = readers.searches(switches[0].begun_s, ended_s)
    return {
        "instances": len(corpus),
        "switches": len(switches),
        "searches": len(everything),
        "failed": sum(not each.version for each in everything),
        "mixed": sum(each.is_mixed for each in everything),
        "before_per_s": round(len(before) / (switches[0].begun_s - began_s), 1),
        "during_per_s": round(len(during) / (ended_s - switches[0].begun_s), 1),
        **times_ms("before", before),
        **times_ms("during", during),
        "p99_ratio": round(percentile_ms(during, 99) / percentile_ms(before, 99), 3),
        "switch_s": longest(switches),
        "seen_s": round(max(seen_s([*switches, *rollbacks], everything)), 3),
        "rollback_s": longest(rollbacks),
        "rollback_command_s": round(max(commands), 3),
    }


def fill(store: InstanceStore, arguments: argparse.Namespace, corpus: Corpus) -> None:
    """Write both versions; the URI of each photo begins with the name of its version."""
    encoder = encoder_of(arguments)
    spec = VersionSpec(dim=encoder.dim, digest=encoder.digest)
    for version in VERSIONS:
        store.create_version(GALLERY, version, spec)
        images = (_of_version(each, version) for each in corpus.images())
        while batch := list(islice(images, _UPSERT_IMAGES)):
            store.upsert_images(GALLERY, version, batch)
        make_live(store, GALLERY, version, by="benchmark")


def _of_version(image: IndexedImage, version: str) -> IndexedImage:
    uri = image.record.uri.replace("file:///", f"file:///{version}/")
    return replace(image, record=replace(image.record, uri=uri, image_id=image_id(uri)))


def switch(store: InstanceStore, count: int, every_s: float) -> list[Switch]:
    """Make the versions live in turn."""
    done = []
    for number in range(count):
        version, begun_s = VERSIONS[number % 2], time.monotonic()
        make_live(store, GALLERY, version, by="benchmark")
        done.append(Switch(begun_s, time.monotonic(), version))
        time.sleep(every_s)
    return done


def roll_back_often(store: InstanceStore, count: int, every_s: float) -> list[Switch]:
    """Roll back, as often as wanted; the switches before have left a history to go back in."""
    done = []
    for _ in range(count):
        begun_s = time.monotonic()
        _, live = roll_back(store, GALLERY)
        done.append(Switch(begun_s, time.monotonic(), live))
        time.sleep(every_s)
    return done


def run_rollbacks(location: str, count: int) -> list[float]:
    """Run the command `reir rollback`; return the seconds that each took."""
    taken_s = []
    for _ in range(count):
        begun_s = time.monotonic()
        subprocess.run(
            [*_REIR, "rollback", GALLERY, "--store", location],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        taken_s.append(time.monotonic() - begun_s)
    return taken_s


def seen_s(switches: Sequence[Switch], searches: Sequence[Search]) -> Iterator[float]:
    """Yield, for each switch, how long afterwards searches still got the version before."""
    ends_s = [each.begun_s for each in switches[1:]] + [switches[-1].done_s + 1.0]
    for each, end_s in zip(switches, ends_s, strict=True):
        old = [
            search.sent_s - each.begun_s
            for search in searches
            if each.begun_s <= search.sent_s < end_s and search.version not in ("", each.version)
        ]
        yield max(old, default=0.0)


def longest(switches: Sequence[Switch]) -> float:
    """Return the seconds of the slowest switch."""
    return round(max(each.done_s - each.begun_s for each in switches), 4)


def times_ms(name: str, searches: Sequence[Search]) -> dict[str, float]:
    """Return percentiles of the times of searches, under keys that begin with `name`."""
    return {
        f"{name}_p{share}_ms": round(percentile_ms(searches, share), 1) for share in (50, 99, 100)
    }


def percentile_ms(searches: Sequence[Search], share: float) -> float:
    """Return a percentile of the times of searches."""
    return float(np.percentile([1e3 * (s.answered_s - s.sent_s) for s in searches], share))


if __name__ == "__main__":
    main()
