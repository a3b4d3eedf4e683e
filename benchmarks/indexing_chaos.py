"""Indexing while processes are killed at random: nothing is lost, nothing is written twice.

    python benchmarks/indexing_chaos.py                  Ray Data, embedded store; 30 minutes
    python benchmarks/indexing_chaos.py --milvus         Ray Data, Milvus server
    python benchmarks/indexing_chaos.py --runner local   one process, embedded store

Every 5 seconds, with a probability of .3, one process of a randomly chosen role gets SIGKILL: a
reader, an encoder, a writer, the driver, or the store. The benchmark restarts a driver with the
same command, and a killed Milvus server; everything else has to recover by itself. The encoder
sleeps, so that the photos last for the whole time. When a gallery is complete, the next one begins;
the last one is completed without kills. Then the rows of every gallery are compared with those of
an undisturbed run.

    p9.missing      photos that the ledger once listed as indexed, and whose row or instances are
                    missing at the end
    p9.duplicates   rows at the end that nothing refers to, or that the undisturbed run lacks
    p9.redone       photos encoded more than once, as a share of all photos
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
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _report import write_report

from reir.errors import StoreError
from reir.records import Instances, RgbImage
from reir.store import InstanceStore, open_store
from reir_ingestion.pipeline import index
from reir_ingestion.stages import IndexOptions
from reir_testing import FakeEncoder
from reir_testing.ingestion import ray_workers, stored_rows, write_scenes

if TYPE_CHECKING:
    from reir_testing.milvus_server import RunningServer

TITLES = {"reader": "read_batch", "encoder": "BatchEncoder", "writer": "Write"}
"""Ray's titles of the processes of a role."""

ROLES = {"ray": ("reader", "encoder", "writer", "driver", "store"), "local": ("driver", "store")}
NUM_ENCODERS = 2
PHOTO_SCALE = 4
"""640 x 480 pixels: more than can be in flight at once, so that readers live long."""
CATCH_S = 3.0
"""How long to look for a process of a role; writers live only for moments."""
SHARE_OF_TIME = 0.7
"""Share of the time that the encoders sleep when nothing is killed."""


class PacedEncoder(FakeEncoder):
    """A slow fake encoder that logs the photos that it has encoded.

    Args:
        log: gets one byte per photo.
        seconds: sleep for each photo.
    """

    def __init__(self, log: Path, seconds: float) -> None:
        super().__init__()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._seconds = seconds

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        found = []
        for image in images:
            time.sleep(self._seconds)
            found += super().encode_images([image])
            # A single byte is written at once, so a kill cannot lose or split an entry.
            os.write(self._log, b".")
        return found


def drive(arguments: argparse.Namespace) -> None:
    """Index as `--drive` asks, in this process or with Ray."""
    source, location, gallery, log, seconds = arguments.drive
    load = partial(PacedEncoder, Path(log), float(seconds))
    options = IndexOptions(batch_size=arguments.batch_size, num_encoders=NUM_ENCODERS)
    if arguments.runner == "local":
        store = open_store(location)
        index(source, gallery, store, load(), options=options)
        store.close()
        return
    from reir_ingestion.ray.runner import EncoderPoolOptions, index_on_ray

    pool = EncoderPoolOptions(max_encoders=NUM_ENCODERS)
    index_on_ray(source, gallery, location, load, options=options, pool=pool)


class Lite:
    """The embedded store, whose process is restarted by whoever needs it.

    Args:
        location: folder of the store.
    """

    def __init__(self, location: Path) -> None:
        self.location = str(location)

    def kill(self) -> None:
        """Kill its process if it runs."""
        with suppress(FileNotFoundError, ProcessLookupError):
            record = json.loads((Path(self.location) / "server.json").read_text())
            os.kill(record["pid"], signal.SIGKILL)


class Milvus:
    """A Milvus server, which is restarted as a supervisor would.

    Args:
        running: its process.
    """

    def __init__(self, running: RunningServer) -> None:
        self.location, self._pid = running.uri, running.pid
        entry = Path("/proc") / str(running.pid)
        self._command = (entry / "cmdline").read_text().rstrip("\0").split("\0")
        pairs = (entry / "environ").read_text().rstrip("\0").split("\0")
        self._environment = dict(pair.split("=", 1) for pair in pairs)
        self._folder = os.readlink(entry / "cwd")
        self._restarted: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """Kill its process and start another one."""
        self.end()
        self._restarted = subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> None:
        """Kill its process and wait until it is dead."""
        if self._restarted is not None:
            self._restarted.kill()
            self._restarted.wait()
            return
        os.kill(self._pid, signal.SIGKILL)
        state = Path("/proc") / str(self._pid) / "stat"
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.05)


@contextmanager
def serving(work: Path, *, milvus: bool) -> Iterator[Lite | Milvus]:
    """Yield the store of the experiment; a Milvus server stops with the block."""
    if not milvus:
        yield Lite(work / "store")
        return
    from reir_testing.milvus_server import milvus_server

    (work / "milvus").mkdir()
    with milvus_server(work / "milvus") as running:
        server = Milvus(running)
        try:
            yield server
        finally:
            server.end()


@dataclass
class Chaos:
    """One experiment.

    Attributes:
        arguments: of the command line.
        source: the photos.
        server: holds the store.
        log: of the encoders.
        rng: chooses moments and roles.
    """

    arguments: argparse.Namespace
    source: Path
    server: Lite | Milvus
    log: Path
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[str, set[str]] = field(default_factory=dict)
    num_drivers: int = 0

    def run(self) -> None:
        """Kill processes for the given time, then let the last gallery be completed."""
        arguments = self.arguments
        deadline = time.monotonic() + arguments.minutes * 60
        pace = SHARE_OF_TIME * arguments.minutes * 60 * NUM_ENCODERS / arguments.images
        while time.monotonic() < deadline:
            gallery = f"round-{len(self.acknowledged)}"
            self.acknowledged[gallery] = set()
            self._disturb(gallery, pace, deadline)
        # Completed without kills, because a row that is only not written yet is not lost.
        for gallery in self.acknowledged:
            last = self._start(gallery, 0.0)
            if last.wait():
                raise SystemExit(f"the undisturbed run into {gallery} ended with {last.returncode}")

    def _disturb(self, gallery: str, pace: float, deadline: float) -> None:
        """Index into a gallery and kill processes, until it is complete or the time is over."""
        driver = self._start(gallery, pace)
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                driver.wait(self.arguments.every)
            self._look(gallery)
            if driver.poll() == 0:
                return
            if driver.poll() is not None:
                driver = self._start(gallery, pace)
            elif self.rng.random() < self.arguments.probability:
                self._kill(driver)
        driver.kill()
        driver.wait()

    def _start(self, gallery: str, pace: float) -> subprocess.Popen[bytes]:
        self.num_drivers += 1
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ["--runner", self.arguments.runner]
        command += ["--batch-size", str(self.arguments.batch_size), "--drive", str(self.source)]
        command += [self.server.location, gallery, str(self.log), str(pace)]
        with (self.log.parent / "driver.log").open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output)

    def _kill(self, driver: subprocess.Popen[bytes]) -> None:
        """Kill one process of a role."""
        role = self.rng.choice(ROLES[self.arguments.runner])
        if role == "driver":
            driver.kill()
            driver.wait()
        elif role == "store":
            self.server.kill()
        else:
            pid = self._catch(driver, TITLES[role])
            if pid is None:
                self.kills[f"{role}_not_there"] += 1
                return
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kills[role] += 1
        print(f"killed: {dict(self.kills)}", flush=True)

    def _catch(self, driver: subprocess.Popen[bytes], title: str) -> int | None:
        """Wait a little for workers with this title, and return one of them."""
        deadline = time.monotonic() + CATCH_S
        while time.monotonic() < deadline:
            if found := ray_workers(driver.pid, title):
                return self.rng.choice(found)
        return None

    def _look(self, gallery: str) -> None:
        """Record what the ledger lists as indexed; skip this if the store is down."""
        store = open_store(self.server.location)
        with suppress(StoreError):
            version = store.live_version(gallery)
            # What was acknowledged once must still be there at the end.
            ids = {record.image_id for record in store.iter_images(gallery, version)}
            self.acknowledged[gallery] |= ids
        store.close()


def compare(
    store: InstanceStore, gallery: str, expected: dict[str, object], acknowledged: set[str]
) -> Counter[str]:
    """Compare the rows of a gallery with those of the undisturbed one."""
    found = stored_rows(store, gallery)
    (info,) = store.versions(gallery)
    lost = {key.partition("#")[0] for key in expected.keys() - found.keys()}
    # Rows in the store that no ledger row refers to, which `stored_rows` does not return.
    unseen = info.num_images + store.num_stored(gallery, info.name) - len(found)
    return Counter(
        missing=len(acknowledged & lost),
        incomplete=len(lost),
        duplicates=len(found.keys() - expected.keys()) + unseen,
        different=sum(expected[key] != found[key] for key in expected.keys() & found.keys()),
    )


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the experiment and return its figures."""
    source = work / "photos"
    write_scenes(source, arguments.images, seed=arguments.seed, scale=PHOTO_SCALE)
    sums: Counter[str] = Counter()
    with serving(work, milvus=arguments.milvus) as server:
        rng = random.Random(arguments.seed)
        chaos = Chaos(arguments, source, server, work / "encoded", rng)
        chaos.run()
        store = open_store(server.location)
        index(source, "whole", store, FakeEncoder())
        expected = stored_rows(store, "whole")
        for gallery, acknowledged in chaos.acknowledged.items():
            for name, count in compare(store, gallery, expected, acknowledged).items():
                sums[name] += count
        store.close()
    photos = arguments.images * len(chaos.acknowledged)
    encoded = chaos.log.stat().st_size
    return {
        "p9.runner": arguments.runner,
        "p9.store": "milvus" if arguments.milvus else "lite",
        "p9.minutes": arguments.minutes,
        "p9.photos": photos,
        "p9.batch_size": arguments.batch_size,
        "p9.kills": sum(chaos.kills[role] for role in ROLES[arguments.runner]),
        **{f"p9.kills_{role}": count for role, count in sorted(chaos.kills.items())},
        "p9.drivers": chaos.num_drivers,
        **{f"p9.{name}": count for name, count in sums.items()},
        "p9.redone": round(encoded / photos - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--every", type=float, default=5.0, help="Seconds between possible kills.")
    parser.add_argument("--probability", type=float, default=0.3, help="Probability of each.")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--runner", choices=sorted(ROLES), default="ray")
    parser.add_argument("--milvus", action="store_true", help="Use a Milvus server.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", nargs=5, metavar=("SOURCE", "STORE", "GALLERY", "LOG", "PACE"))
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    suffix = "_milvus" if arguments.milvus else ""
    write_report(f"indexing_chaos_{arguments.runner}{suffix}", figures)


if __name__ == "__main__":
    main()
