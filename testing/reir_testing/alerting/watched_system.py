"""`WatchedSystem`: a gallery of real photos, its server, monitor and scheduler, with light traffic.

Every part is the command that an operator starts, in a process of its own, so that a fault can stop
it and start it again. The store is on a small disk of its own, so that a fault can fill it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reir.client.http_client import Client
from reir.errors import ReirError
from reir_serving.middleware.keys import new_key
from reir_testing import data_dir
from reir_testing.serving import free_port

GALLERY = "photos"
DISK_BYTES = 512 << 20
START_TIMEOUT_S = 300.0
RUN_TIMEOUT_S = 600.0
ABSENT = (
    "a walrus in a bathtub",
    "an astronaut riding a camel",
    "a purple submarine with headlights",
    "a medieval knight playing the tuba",
    "a snowman on a trampoline",
)
MAX_TEXTS = 100
_PAUSE_S = 0.5
"""Between two requests of the light traffic."""


@dataclass
class WatchedSystem:
    """The system.

    Attributes:
        folder: for all files.
        interval_s, deep_interval_s: of the monitor.
        with_server: whether the server runs as well.
        ports: "serve" and "monitor" -> port.
        environment: of all commands.
    """

    folder: Path
    interval_s: float
    deep_interval_s: float
    with_server: bool = True
    ports: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    _key: str = ""
    _texts: list[str] = field(default_factory=list)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def photos(self) -> Path:
        """Folder of the photos."""
        return self.folder / "photos"

    @property
    def disk(self) -> Path:
        """Folder where the small disk is mounted."""
        return self.folder / "disk"

    @property
    def store(self) -> Path:
        """Folder of the store."""
        return self.disk / "store"

    @property
    def keys(self) -> Path:
        """File of the API keys."""
        return self.folder / "keys.yaml"

    @property
    def search_log(self) -> Path:
        """Folder of the search log."""
        return self.folder / "home" / "searches"

    def prepare(self, num_photos: int) -> None:
        """Index photos, add canaries and schedules, and make a backup."""
        self.environment = {
            **os.environ,
            "REIR_HOME": str(self.folder / "home"),
            "REIR_STORE": str(self.store),
            "OMP_NUM_THREADS": "1",
        }
        self.ports = {"serve": free_port(), "monitor": free_port()}
        self._texts = copy_photos(self.photos, num_photos, self.folder / "canaries.jsonl")
        self._key = new_key(self.keys, read=(GALLERY,), write=())
        self.index()
        self.run("canary", "add", GALLERY, str(self.folder / "canaries.jsonl"))
        self.back_up()
        # The schedule of indexing is due in twelve hours: faults run it when they need it.
        hour = (time.localtime().tm_hour + 12) % 24
        index = ("index", str(self.photos), "--gallery", GALLERY)
        self.run("schedule", "add", "nightly", "--cron", f"0 {hour} * * *", "--", *index)
        often = ("--cron", "* * * * *", "--time-limit", "1m")
        self.run("schedule", "add", "often", *often, "--", "canary", "list", GALLERY)
        self.run("schedule", "run-now", "often")

    def run(self, *words: str, allowed: Sequence[int] = (0,)) -> None:
        """Run a `reir` command to its end.

        Raises:
            RuntimeError: it ended with another exit status than those allowed.
        """
        done = subprocess.run(
            [_reir(), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        if done.returncode not in allowed:
            output = f"{done.stdout}{done.stderr}"[-4000:]
            raise RuntimeError(f"reir {' '.join(words)} ended with {done.returncode}:\n{output}")

    def index(self, *options: str) -> None:
        """Bring the gallery up to date."""
        self.run("index", str(self.photos), "--gallery", GALLERY, *options)

    def back_up(self) -> None:
        """Make a backup."""
        self.run("backup", GALLERY, str(self.folder / "backups" / f"{time.time():.0f}"))

    def start(self, part: str) -> None:
        """Start "serve", "monitor" or "schedule", and wait until it answers."""
        with (self.folder / f"{part}.log").open("ab") as log:
            self._processes[part] = subprocess.Popen(
                [_reir(), part, *self._options(part)],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if part == "serve":
            self._wait_until_ready()

    def stop(self, part: str) -> None:
        """Stop it as Ctrl-C does."""
        process = self._processes.pop(part)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop_all(self) -> None:
        """Stop everything that runs."""
        for part in [*self._processes]:
            self.stop(part)

    def start_command(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a `reir` command, in a process group of its own."""
        return subprocess.Popen(
            [_reir(), *words],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def replicas(self) -> list[int]:
        """Return the process ids of the replicas of the server."""
        return [
            pid
            for pid, title in _titles().items()
            if "ServeReplica:reir:ingress" in title and self._is_ours(pid)
        ]

    def scrape_configs(self) -> list[dict[str, Any]]:
        """Return the scrape jobs of the parts that run."""
        return [
            {
                "job_name": f"reir-{part}",
                "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
            }
            for part, port in self.ports.items()
            if part in self._processes
        ]

    def client(self) -> Client:
        """Return a client of the server."""
        return Client(f"http://127.0.0.1:{self.ports['serve']}", key=self._key, patience_s=0)

    @contextmanager
    def traffic(self, clients: int = 1, pause_s: float = _PAUSE_S) -> Iterator[None]:
        """Let some clients search until the end of the block."""
        stop = threading.Event()

        def use(number: int) -> None:
            # In an order of its own, but always the same ones: presence must not drift by chance.
            texts = random.Random(number).sample(self._texts, len(self._texts))
            with self.client() as client:
                for text in itertools.cycle(texts):
                    if stop.wait(pause_s):
                        return
                    with suppress(ReirError, OSError):  # failures are what alerts are about
                        client.search(text, GALLERY)

        threads = [
            threading.Thread(target=use, args=(number,), daemon=True) for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _options(self, part: str) -> list[str]:
        if part == "serve":
            config = self.folder / "serve.yaml"
            replicas = {"min_replicas": 2, "max_replicas": 2}
            values = {
                "galleries": [GALLERY],
                "port": self.ports["serve"],
                "keys_file": str(self.keys),
                "search_log": str(self.search_log),
                "access_log": os.devnull,
                "ingress": replicas,
                "limits": {"max_ongoing_requests": 4, "max_queued_requests": 4},
            }
            config.write_text(yaml.safe_dump(values), encoding="utf-8")
            return ["--config", str(config)]
        if part == "monitor":
            return [
                *("--port", str(self.ports["monitor"])),
                *("--interval-s", str(self.interval_s)),
                *("--deep-interval-s", str(self.deep_interval_s)),
            ]
        return ["start"]

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        with self.client() as client:
            while time.monotonic() < deadline_s:
                with suppress(ReirError, OSError):
                    if client.ready():
                        return
                if self._processes["serve"].poll() is not None:
                    break
                time.sleep(0.5)
        end = (self.folder / "serve.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the server does not become ready; its log ends with:\n{end}")

    def _is_ours(self, pid: int) -> bool:
        with suppress(OSError):
            environment = Path("/proc", str(pid), "environ").read_bytes()
            return f"REIR_HOME={self.folder / 'home'}".encode() in environment
        return False


@contextmanager
def watched_system(
    folder: Path,
    *,
    num_photos: int,
    interval_s: float,
    deep_interval_s: float,
    with_server: bool = True,
) -> Iterator[WatchedSystem]:
    """Prepare and run the system, with light traffic, until the end of the block.

    Args:
        folder: for all files.
        num_photos: real photos of the gallery.
        interval_s, deep_interval_s: of the monitor.
        with_server: whether the server runs as well, with light traffic.

    Raises:
        RuntimeError: a command fails, or this user may not mount a disk.
    """
    system = WatchedSystem(folder, interval_s, deep_interval_s, with_server)
    with small_disk(system.disk):
        system.prepare(num_photos)
        try:
            for part in ("schedule", "monitor"):
                system.start(part)
            if with_server:
                system.start("serve")
            with system.traffic() if with_server else nullcontext():
                yield system
        finally:
            system.stop_all()


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of `DISK_BYTES` in memory.

    Raises:
        RuntimeError: this user may not.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "reir", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"no small disk could be mounted ({done.stderr.strip()}); run this as root, or under "
            f"`unshare --user --map-root-user --mount`"
        )
    try:
        yield
    finally:
        # Lazily, because the server of the store ends only some seconds after its last client.
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def copy_photos(folder: Path, number: int, canaries: Path) -> list[str]:
    """Copy real photos, write canaries about them, and return expressions to search for.

    Raises:
        FileNotFoundError: this machine has no real photos.
    """
    data = data_dir()
    if data is None:
        raise FileNotFoundError("no real photos: set REIR_DATA to the folder with photos/images")
    read = (data / "photos" / "instances.json").read_text(encoding="utf-8")
    images = {each["id"]: each for each in json.loads(read)["images"]}
    read = (data / "photos" / "expressions.json").read_text(encoding="utf-8")
    found: dict[int, list[dict[str, Any]]] = {}
    for each in json.loads(read)["expressions"]:
        if len(found) < number or each["image_id"] in found:
            found.setdefault(each["image_id"], []).append(each)
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"expression": text, "absent": True} for text in ABSENT]
    for image_id, expressions in found.items():
        image = images[image_id]
        shutil.copy(data / "photos" / "images" / image["file_name"], folder)
        x, y, w, h = expressions[0]["bbox"]
        box_px = (x, y, x + w, y + h)
        sides = (image["width"], image["height"]) * 2
        lines.append(
            {
                "expression": expressions[0]["expression"],
                "photo": str(folder / image["file_name"]),
                "box": [
                    min(1.0, max(0.0, round(each / side, 4)))
                    for each, side in zip(box_px, sides, strict=True)
                ],
            }
        )
    canaries.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    texts = [each["expression"] for expressions in found.values() for each in expressions]
    # Few, so that the last 200 searches and those before are about the same ones.
    return texts[:: -(-len(texts) // MAX_TEXTS)]


def _titles() -> dict[int, str]:
    """Return process id -> title of all processes."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    return found


def _reir() -> str:
    return str(Path(sys.executable).with_name("reir"))
