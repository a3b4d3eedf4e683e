"""`reir reindex` is killed in each of its states: does every job end in the right state?

    python benchmarks/reindex_kills.py

Each round starts a re-indexing job of a small gallery with fake models, and sends SIGKILL to it at
a random moment of one state. Every third round kills the run that continues the job, too. Then the
command runs again until its end. Meanwhile another process searches the live version without a
pause, and a photo is added to the live version. Some rounds use a model that does not understand
expressions, which the check must refuse.

    reindex.kills              SIGKILLs that hit a running job
    reindex.kills_by_state     the same, by the state that the job was in
    reindex.kill_failures      rounds that ended wrongly, and searches that failed or were wrong
    reindex.kill_rounds        rounds
    reindex.searches           searches of the other process
    reindex.versions_searched  versions that they found live

A round ended wrongly if the exit status, the state of the job, the live version, the versions that
are kept, their numbers of photos and instances, the leases or the history are not what a job
without a kill leaves.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from _report import write_report

from reir.cli import main as cli
from reir.errors import ReirError
from reir.models.interfaces import InstanceEncoder
from reir.operations.canary import Canary, add_canaries
from reir.operations.lease import KIND as LEASE_KIND
from reir.operations.live_history import live_history
from reir.query.search import open_gallery
from reir.records import Instances, RgbImage
from reir.store import InstanceStore, open_store
from reir_ingestion.known_sources import known_source
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.reindex.cli import REJECTED
from reir_ingestion.reindex.job import State, load_job
from reir_ingestion.sources import SourceOptions, open_source
from reir_testing.fake_models import COLORS, FAKE_KINDS, save_photo

GALLERY = "killed"
STATES = ("indexing", "checking", "switching", "catching up", "cleaning")
REFUSED = "checking a worse model"
"""The round in which the check must refuse the new version."""

NUM_BOXES = 5
ENCODE_S = 0.02
"""Seconds of sleep per photo, so that a kill finds the job at work."""
SEARCH_PAUSE_S = 0.01
TIMEOUT_S = 120.0
_LIMITS = ("--limit", "min_canaries=8", "--limit", "latency_ratio=1000")
"""The fake models answer in less than a millisecond, so their latencies say nothing."""


def paced(make: Callable[[str], InstanceEncoder]) -> Callable[[str], InstanceEncoder]:
    """Return a loader of the same model, which sleeps for every photo."""

    def load(source: str) -> InstanceEncoder:
        encoder = make(source)
        encode = encoder.encode_images

        def encode_slowly(images: Sequence[RgbImage]) -> list[Instances]:
            time.sleep(ENCODE_S * len(images))
            return encode(images)

        encoder.encode_images = encode_slowly  # type: ignore[method-assign]
        return encoder

    return load


PACED_KINDS: Mapping[str, Callable[[str], InstanceEncoder]] = {
    name: paced(make) for name, make in FAKE_KINDS.items()
}


def read(location: str) -> None:
    """Search without a pause until the input ends; print what came out as JSON."""
    ended = threading.Thread(target=sys.stdin.read, daemon=True)
    ended.start()
    searches, problems, versions = 0, Counter[str](), set[str]()
    with open_gallery(GALLERY, store=location) as gallery:
        print("ready", flush=True)
        while ended.is_alive():
            time.sleep(SEARCH_PAUSE_S)  # leaves the cores to the jobs
            color = COLORS[searches % len(COLORS)]
            searches += 1
            try:
                found = gallery.search(f"the {color} one", k=3)
            except ReirError as error:
                problems[f"{type(error).__name__}: {error}"] += 1
                continue
            versions.add(found.version)
            if not found.hits or not found[0].uri.rpartition("/")[2].startswith(color):
                problems[f"wrong answer to {color} in version {found.version}"] += 1
    print(json.dumps({"searches": searches, "versions": len(versions), "problems": problems}))


@contextmanager
def reader(location: str, found: dict[str, Any]) -> Iterator[None]:
    """Search in another process until the block ends; then `found` has what came out."""
    command = [sys.executable, sys.argv[0], "--read", location]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the searching process did not start")
        yield
        answer, _ = process.communicate(timeout=TIMEOUT_S)
    found |= json.loads(answer) if answer else {"searches": 0, "problems": {"it died": 1}}


class Job:
    """A running `reir reindex`."""

    def __init__(self, location: str, encoder: str) -> None:
        """Start the command."""
        options = ["--encoder", encoder, "--runner", "local", "--store", location, *_LIMITS]
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], "--drive", "reindex", GALLERY, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []

    def wait_for(self, state: str) -> bool:
        """Wait until the job is in a state; return False if it ended before."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if line.strip() == f"Re-indexing {GALLERY}: {state}":
                return True
        return False

    def kill(self) -> bool:
        """Send SIGKILL; return whether the job was still running."""
        self._process.kill()
        _, rest = self._process.communicate()
        self._lines.append(rest)
        return self._process.returncode == -signal.SIGKILL

    def finish(self) -> int:
        """Wait for the end; return the exit status."""
        if self._process.returncode is None:
            _, rest = self._process.communicate(timeout=TIMEOUT_S)
            self._lines.append(rest)
        return self._process.wait()

    @property
    def messages(self) -> str:
        """What the command has printed on standard error."""
        return "".join(self._lines)


@dataclass
class Rounds:
    """The rounds of the benchmark.

    Attributes:
        store, location: the store of the gallery.
        folder: for photos.
        rng: chooses the moments.
        kills: kills by state.
        failures: what was wrong after a round.
    """

    store: InstanceStore
    location: str
    folder: Path
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _lengths_s: dict[str, float] = field(default_factory=dict)
    _num_photos: int = 0
    _uploads: int = 0
    _good: bool = False

    def fill(self) -> None:
        """Create the gallery, its source and its canaries; measure how long each state takes."""
        source = self.folder / "photos"
        source.mkdir()
        for color in COLORS:
            for number in range(NUM_BOXES):
                box = (10 + 8 * number, 10, 40 + 8 * number, 50)
                save_photo(source / f"{color}-{number}.png", color, box)
        options = IndexOptions(origin=known_source(source, SourceOptions()))
        self._index(source, "clare-nano", options)
        self._num_photos = len(COLORS) * NUM_BOXES
        canaries = [Canary(expression="a grey thing", absent=True)]
        for color in COLORS:
            uri = next(
                row.uri
                for row in self.store.iter_images(GALLERY, self.store.live_version(GALLERY))
                if f"/{color}-0" in row.uri
            )
            canaries.append(Canary(expression=f"the {color} one on the left", uri=uri))
        add_canaries(self.store, GALLERY, canaries)
        job = Job(self.location, self._next_encoder())
        times_s = {each: time.monotonic() for each in STATES if job.wait_for(each)}
        if job.finish() != 0:
            raise SystemExit(f"the first job failed: {job.messages}")
        ends_s = [*[*times_s.values()][1:], time.monotonic()]
        for (state, start_s), end_s in zip(times_s.items(), ends_s, strict=True):
            self._lengths_s[state] = end_s - start_s

    def round(self, where: str, *, kills: int) -> None:
        """Kill a job in a state, finish it, and check what it left."""
        is_worse = where == REFUSED
        encoder = "worse:x" if is_worse else self._next_encoder()
        state = "checking" if is_worse else where
        before = self.store.live_version(GALLERY)
        status: int | None = None
        for number in range(kills + 1):
            # A kill right after the end of the job leaves nothing to continue: the same command
            # then starts another job.
            if number and (last := load_job(self.store, GALLERY)) and last.state.is_end:
                before = self.store.live_version(GALLERY)
            job = Job(self.location, encoder)
            if number == kills:
                status = job.finish()
                break
            # A job that is refused does not catch up, so it may miss the photo.
            if not number and not is_worse and job.wait_for("indexing"):
                self._upload(before)
            if (state == "indexing" and not number) or job.wait_for(state):
                time.sleep(self.rng.uniform(0, self._lengths_s[state]))
            if not job.kill():  # it had passed the state before the first kill
                status = job.finish()
                break
            self.kills[where] += 1
        for problem in self._problems(before, status, is_worse=is_worse):
            self.failures.append(f"{where}: {problem}\n{job.messages[-500:]}")

    def _problems(self, before: str, status: int | None, *, is_worse: bool) -> Iterator[str]:
        """Yield everything that is not as after a job without a kill."""
        job = load_job(self.store, GALLERY)
        if job is None:
            yield "there is no job"
            return
        state = State.REJECTED if is_worse else State.DONE
        if (status, job.state) != (REJECTED if is_worse else 0, state):
            yield f"exit status {status}, state {job.state}"
        live = self.store.live_version(GALLERY)
        if live != (before if is_worse else job.candidate):
            yield f"version {live} is live, not {before if is_worse else job.candidate}"
        infos = self.store.versions(GALLERY)
        if len(infos) != (3 if is_worse else 2) or not {live, before} <= {i.name for i in infos}:
            yield f"versions are {[each.name for each in infos]}, {before} was live before"
        new = next((each for each in infos if each.name == job.candidate), None)
        wanted = self._num_photos + self._uploads
        if new is None or (new.num_images, new.num_failed, new.num_instances) != (
            wanted,
            0,
            wanted,
        ):
            yield f"the new version is {new}; it should have {wanted} photos"
        if leases := self.store.find_documents(LEASE_KIND):
            yield f"leases are left: {[*leases]}"
        history = [each.version for each in live_history(self.store, GALLERY)]
        if history[-1] != live or len(set(history[-2:])) != 2:
            yield f"the history is {history}"

    def _next_encoder(self) -> str:
        self._good = not self._good
        return "better:x" if self._good else "clare-nano"

    def _upload(self, version: str) -> None:
        """Add a photo that is in no source to the live version, while the job runs."""
        number, folder = self._uploads, self.folder / "uploads"
        folder.mkdir(exist_ok=True)
        color = COLORS[number % len(COLORS)]
        photo = folder / f"{color}-{number}.png"
        save_photo(photo, color, (12, 12, 30 + number, 52))  # every photo differs from the others
        infos = {each.name: each for each in self.store.versions(GALLERY)}
        self._index(photo, infos[version].spec.encoder or "clare-nano", IndexOptions())
        self._uploads += 1

    def _index(self, source: Path, encoder: str, options: IndexOptions) -> None:
        kind, _, name = encoder.partition(":")
        index(open_source(source), GALLERY, self.store, FAKE_KINDS[kind](name), options=options)


def main() -> None:
    """Run the rounds, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with mock.patch("reir.encoders.KINDS", PACED_KINDS):
        if arguments.drive:
            sys.exit(cli.run(arguments.drive))
        if arguments.read:
            read(arguments.read)
            return
    began_s, searched = time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        folder, location = Path(name), str(Path(name) / "store")
        with closing(open_store(location)) as store:
            rounds = Rounds(store, location, folder, random.Random(arguments.seed))
            rounds.fill()
            with reader(location, searched):
                for number in range(arguments.rounds):
                    where = (*STATES, REFUSED)[number % (len(STATES) + 1)]
                    rounds.round(where, kills=1 + (number % 3 == 2))
                    print(where, dict(rounds.kills), *rounds.failures, sep="\n  ", flush=True)
    problems = [*rounds.failures, *map(str, searched["problems"].items())]
    figures = {
        "reindex.kill_failures": len(problems),
        "reindex.kills": rounds.kills.total(),
        "reindex.kills_by_state": dict(rounds.kills),
        "reindex.kill_rounds": arguments.rounds,
        "reindex.searches": searched["searches"],
        "reindex.versions_searched": searched["versions"],
        "reindex.seconds": round(time.monotonic() - began_s, 1),
    }
    for problem in problems:
        print(problem)
    for key, value in figures.items():
        print(f"{key:28} {value}")
    print(f"figures in {write_report('reindex_kills', figures).name}")


if __name__ == "__main__":
    main()
