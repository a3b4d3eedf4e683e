"""Kill processes and damage files of a small gallery: is a search ever wrong without a warning?

    python benchmarks/crash_loop.py                 about 120 kills; 20 minutes on two cores
    python benchmarks/crash_loop.py --kills 10      a short run

The benchmark first builds a gallery without faults, whose search results are the reference. Then it
repeats the following round in a second store:

1. Delete some photos, and start a run that indexes them again, or sometimes a search. Send SIGKILL
   to it, to the embedded store's process or to both at a random moment.
2. Let another run complete the gallery, and search.
3. Damage or move files on disk. Then search, index and search again without disturbance.
4. If the results are still wrong, index with `repair`. If that does not help, rebuild the store.

Runs that will be killed start with a real fork while this process has the store open, because Ray
starts processes in the same way.

    audit.kills         SIGKILLs sent
    audit.corruptions   times that something was damaged or moved
    audit.silent_wrong  searches that exited with 0 but whose results differ from the reference,
                        although no run since the damage had printed a warning or an error
    audit.wrong_later   the same, except that an earlier run since the damage had printed one and
                        this search had not
    audit.self_aborts   runs that ended with a signal that was not sent, or with an error that is
                        not one of the platform's
    audit.hung          runs that did not end within 150 s and were then killed
    audit.told          corruptions that a run reported
    audit.healed        corruptions after which indexing, if necessary with `repair`, restored the
                        reference results
    audit.made_anew     corruptions after which the store had to be rebuilt
    audit.runs          runs and searches that were started
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _report import write_report

from reir.errors import ReirError
from reir.records import Instances, RgbImage
from reir.store import open_store
from reir_ingestion.pipeline import IndexOptions, index
from reir_testing import FakeEncoder
from reir_testing.ingestion import write_scenes

GALLERY = "loop"
NUM_PHOTOS = 40
FORGOTTEN = 24
"""Number of photos deleted before a run, so that the run has work to do when it is killed."""
ENCODE_S = 0.02
"""Seconds of sleep per photo, so that a kill finds the run at work."""
NUM_QUERIES = 3
TIMEOUT_S = 150.0
COUNTED = (
    *("kills", "corruptions", "silent_wrong", "wrong_later", "self_aborts", "hung"),
    *("told", "healed", "made_anew", "runs"),
)
SAID = "said:"
"""Prefix of every warning and error that a run prints."""

Answer = list[tuple[str, float]]


class PacedEncoder(FakeEncoder):
    """The fake encoder with a delay per photo."""

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        time.sleep(ENCODE_S * len(images))
        return super().encode_images(images)


def drive(job: str, photos: str, location: str) -> int:
    """Do one job in this process, printing the results of a search.

    Returns the exit code: 1 after an error of the platform, 0 otherwise.
    """
    logging.basicConfig(level=logging.WARNING, format=f"{SAID} %(message)s")
    try:
        with closing(open_store(location)) as store:
            if job == "search":
                version = store.live_version(GALLERY)
                queries = np.random.default_rng(7).standard_normal((NUM_QUERIES, FakeEncoder.dim))
                # More hits than the gallery has instances, so that the whole gallery is compared.
                found = store.search(GALLERY, version, queries.astype(np.float32), 16_384)
                print(json.dumps([_answer(rows) for rows in found]))
            else:
                options = IndexOptions(batch_size=4, repair=job == "repair")
                index(photos, GALLERY, store, PacedEncoder(), options=options)
    except ReirError as error:
        print(f"{SAID} {error}", file=sys.stderr)
        return 1
    return 0


def _answer(rows: Sequence[Any]) -> Answer:
    """Return the rows sorted by id, so that the order of equal scores does not matter."""
    return sorted((row.instance_id, round(float(row.score), 4)) for row in rows)


@dataclass
class Loop:
    """One run of the benchmark.

    Attributes:
        work: folder of the photos and the stores.
        rng: draws when to kill, which process to kill and what to damage.
        figures: the counters.
        wrong: kind of damage -> number of searches that were wrong without a warning.
        aborts: last output of the runs that hung or crashed.
        damage: kind of damage in this round.
        said: whether a run has printed a warning or an error since the damage.
    """

    work: Path
    rng: random.Random
    figures: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    aborts: list[str] = field(default_factory=list)
    damage: str = "none"
    said: bool = False

    def __post_init__(self) -> None:
        """Make the photos, the reference results and the store."""
        write_scenes(self.work / "photos", NUM_PHOTOS)
        self.store = self.work / "reference"
        assert self.run("index") == 0, "the reference gallery could not be indexed"
        self.reference = self.search()
        self.store = self.work / "store"
        self.run("index")

    def round(self) -> None:
        """Kill one process or two, damage something, and check how the store recovers."""
        self.damage, self.said = "kill alone", False
        self.killed_run()
        self.run("index")
        self.check()
        self.damage = self.rng.choice(list(DAMAGES))
        self.said = False
        DAMAGES[self.damage](self)
        self.figures["corruptions"] += 1
        self.check()
        healed = self.run("index") == 0
        healed = self.check() and healed
        if not healed:
            healed = self.run("repair") == 0 and self.check()
        self.figures["told"] += self.said
        self.figures["healed"] += healed
        if not healed:
            self.figures["made_anew"] += 1
            self.kill_lite()
            shutil.rmtree(self.store, ignore_errors=True)
            self.run("index")

    def killed_run(self) -> None:
        """Start a run, or sometimes a search, and kill it, the embedded store or both."""
        with suppress(ReirError), closing(open_store(str(self.store), patient=False)) as store:
            version = store.live_version(GALLERY)
            known = [row.image_id for row in store.iter_images(GALLERY, version)]
            forgotten = self.rng.sample(known, min(FORGOTTEN, len(known)))
            store.delete_images(GALLERY, version, forgotten)
            if self.rng.random() < 0.3:  # so that the job starts with a connection just broken
                self.kill_lite()
            job = "search" if self.rng.random() < 0.15 else "index"
            child = self.start(job)
            time.sleep(self.rng.uniform(0.3, 4.0))
            victims = self.rng.choice([("run",), ("store",), ("run", "store")])
            if "store" in victims:
                self.kill_lite()
            if "run" in victims and child.poll() is None:
                child.kill()
                self.figures["kills"] += 1
            self.finish(child, job, killed="run" in victims)

    def run(self, job: str) -> int:
        """Do a job in a child process without disturbing it; returns its exit code."""
        return self.finish(self.start(job), job)[0]

    def search(self) -> list[Answer] | None:
        """Return the search results, or None if the search failed."""
        code, output = self.finish(self.start("search"), "search")
        answers = [[(key, score) for key, score in rows] for rows in json.loads(output or "[]")]
        return answers if code == 0 else None

    def check(self) -> bool:
        """Search, and return whether the results equal the reference."""
        said_before, self.said = self.said, False
        answers = self.search()
        # A search that fails is not wrong: it does not claim to have an answer.
        wrong = answers is not None and answers != self.reference
        if wrong and not self.said:
            self.figures["wrong_later" if said_before else "silent_wrong"] += 1
            self.wrong[self.damage] += 1
        self.said = self.said or said_before
        return answers == self.reference

    def start(self, job: str) -> subprocess.Popen[str]:
        """Start a child process with a real `fork`, not `vfork`."""
        paths = [str(self.work / "photos"), str(self.store)]
        return subprocess.Popen(
            [sys.executable, __file__, "--drive", job, *paths],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # With this argument, Python forks instead of using `vfork` or `posix_spawn`.
            preexec_fn=os.setsid,
        )

    def finish(
        self, child: subprocess.Popen[str], job: str, *, killed: bool = False
    ) -> tuple[int, str]:
        """Wait for a child process and record how it ended; returns its exit code and output."""
        self.figures["runs"] += 1
        try:
            output, errors = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
            self.figures["hung"] += 1
            self.aborts.append(f"{self.damage}, {job}: hung for {TIMEOUT_S:g} s: {errors[-300:]}")
            killed = True
        self.said = self.said or SAID in errors
        code = child.returncode
        expected = code in (0, 1) or (killed and code == -signal.SIGKILL)
        if not expected or "Traceback" in errors or "Traceback" in output:
            self.figures["self_aborts"] += 1
            self.aborts.append(f"{self.damage}, {job}: {code}: {errors.strip()[-300:]}")
        return code, output

    def kill_lite(self) -> None:
        """Kill the embedded store's process, if it runs."""
        with suppress(OSError, ValueError):
            record = json.loads((self.store / "server.json").read_text())
            os.kill(record["pid"], signal.SIGKILL)
            self.figures["kills"] += 1
            time.sleep(0.1)

    def pick(self, pattern: str) -> Path | None:
        """Choose a file of the store that is not empty, or None if there is none."""
        found = [path for path in self.store.glob(pattern) if path.is_file()]
        return self.rng.choice(sorted(path for path in found if path.stat().st_size) or [None])

    def flip(self, pattern: str) -> None:
        """Flip a bit in a nonzero byte of a file, since most of a sparse file is zeros."""
        if (path := self.pick(pattern)) is None:
            return
        data = bytearray(path.read_bytes())
        places = np.flatnonzero(np.frombuffer(data, np.uint8))
        data[int(self.rng.choice(places))] ^= 1 << self.rng.randrange(8)
        with path.open("r+b") as file:
            file.write(data)

    def flip_stopped(self, pattern: str) -> None:
        """Stop the embedded store's process, and flip a bit in one of its files."""
        self.kill_lite()
        self.flip(pattern)

    def cut(self, pattern: str) -> None:
        """Truncate a file at a random offset."""
        if (path := self.pick(pattern)) is not None:
            os.truncate(path, self.rng.randrange(path.stat().st_size))

    def put_back(self) -> None:
        """Replace the reader's files with a copy from when the gallery had fewer photos."""
        copy = self.work / "copy"
        with suppress(ReirError), closing(open_store(str(self.store), patient=False)) as store:
            version = store.live_version(GALLERY)
            known = [row.image_id for row in store.iter_images(GALLERY, version)]
            store.delete_images(GALLERY, version, known[:FORGOTTEN])
        shutil.copytree(self.store / "reader", copy)
        self.run("index")
        for path in copy.iterdir():
            shutil.copyfile(path, self.store / "reader" / path.name)
        shutil.rmtree(copy)

    def move(self) -> None:
        """Rename the store's folder, search, and rename it back."""
        away = self.store.with_name("away")
        self.store.rename(away)
        self.run("search")
        shutil.rmtree(self.store, ignore_errors=True)
        away.rename(self.store)

    def stale(self) -> None:
        """Leave a `server.json` that names a process that does not exist."""
        self.kill_lite()
        (self.store / "server.json").write_text(json.dumps({"pid": 2**22 - 1, "port": 9}))


DAMAGES: dict[str, Callable[[Loop], None]] = {
    "journal cut": lambda loop: loop.cut("reader/*.journal"),
    "journal flipped": lambda loop: loop.flip("reader/*.journal"),
    "journal older": Loop.put_back,
    "rows cut": lambda loop: loop.cut("reader/*.rows"),
    "rows flipped": lambda loop: loop.flip("reader/*.rows"),
    "parquet flipped": lambda loop: loop.flip_stopped("milvus/**/*.parquet"),
    "manifest flipped": lambda loop: loop.flip_stopped("milvus/**/manifest.json"),
    "schema flipped": lambda loop: loop.flip_stopped("milvus/**/schema.json"),
    "aliases flipped": lambda loop: loop.flip_stopped("milvus/aliases.json*"),
    "log flipped": lambda loop: loop.flip_stopped("milvus/**/wal/*"),
    "folder moved": Loop.move,
    "record stale": Loop.stale,
}


def main() -> None:
    """Run the loop and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=25.0, help="Stop after this time.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", nargs=3, metavar=("JOB", "PHOTOS", "STORE"))
    arguments = parser.parse_args()
    if arguments.drive:
        sys.exit(drive(*arguments.drive))
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        loop = Loop(Path(folder), random.Random(arguments.seed))
        while loop.figures["kills"] < arguments.kills:
            if time.monotonic() - began_s > 60 * arguments.minutes:
                break
            loop.round()
            print(dict(loop.figures), dict(loop.wrong), flush=True)
        loop.kill_lite()
    for abort in loop.aborts:
        print(abort)
    figures: dict[str, Any] = {f"audit.{name}": loop.figures[name] for name in COUNTED}
    figures["audit.wrong_by_damage"] = dict(loop.wrong)
    figures["audit.seconds"] = round(time.monotonic() - began_s, 1)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    write_report("crash_loop", figures)


if __name__ == "__main__":
    main()
