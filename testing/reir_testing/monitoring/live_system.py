"""`live_system`: the whole platform on this machine, used and scraped by a real Prometheus.

All parts are started by the commands that an operator types. Photos are drawn, searches come from
several clients, and some requests are wrong, too many, or short of time, so that every metric has
something to count.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from reir.client.http_client import Client
from reir.errors import GalleryNotFound, ImageNotFound, QueryError, ServerUnavailable
from reir_testing.prometheus_server import RunningPrometheus, prometheus_server
from reir_testing.repository import ROOT
from reir_testing.scenes import Scene, make_scenes, render
from reir_testing.serving import free_port
from reir_testing.tiny_clare import tiny_training

GALLERY = "photos"
RULES = ROOT / "k8s" / "monitoring" / "rules"
JOBS = ("reir-serve", "reir-monitor", "reir-index", "haproxy", "ray-serve", "ray-batch")
"""Scrape jobs; `ray-batch` is the cluster of indexing and training."""

RATE_INTERVAL_S = 20.0
"""Four times the longest time between two scrapes."""

_RELATED_SEARCHES = 250
"""The monitor compares the presence of the last 200 searches with at least 50 before."""
_CLIENTS, _CROWD, _PAUSE_S = 3, 24, 0.2
_TIMEOUT_S = 600.0
"""A machine that other tests keep busy may take so long for one step."""


@dataclass(frozen=True, kw_only=True)
class LiveSystem:
    """A running system.

    Attributes:
        prometheus: scrapes all parts of it.
        started_s: Unix time at which the first scrape may have happened.
    """

    prometheus: RunningPrometheus
    started_s: float


@contextmanager
def live_system(folder: Path, *, num_photos: int, with_ray: bool) -> Iterator[LiveSystem]:
    """Run the platform until the end of the block, which begins when everything was used once.

    Args:
        folder: for all files; its path must be short, because Ray creates sockets in it.
        num_photos: photos of the gallery.
        with_ray: whether indexing also runs on Ray Data, and a tiny model is trained on Ray Train.

    Raises:
        ProgramMissing: Prometheus is not installed.
        RuntimeError: a command fails; the message ends with its output.
        TimeoutError: a part does not report what it should.
    """
    with ExitStack() as stack:
        ports = dict(zip(JOBS, _free_ports(len(JOBS)), strict=True))
        started_s = time.time()
        scrape = [
            {
                "job_name": job,
                "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
                "scrape_interval": (interval := "5s" if job.startswith("ray") else "1s"),
                "scrape_timeout": interval,
            }
            for job, port in ports.items()
        ]
        prometheus = stack.enter_context(
            prometheus_server(
                folder / "prometheus",
                scrape,
                rules=sorted(RULES.glob("*.yaml")),
            )
        )
        commands = Commands(folder, ports, stack)
        scenes = make_scenes(num_photos, 0)
        commands.index(scenes)
        commands.serve_and_watch()
        url = f"http://127.0.0.1:{ports['reir-serve']}"
        use(url, scenes, folder / "photos")
        stack.enter_context(_steady_searches(url, scenes))
        commands.reindex()
        if with_ray:
            commands.work_on_ray()
        prometheus.wait_for(_is_measured, _TIMEOUT_S)
        yield LiveSystem(prometheus=prometheus, started_s=started_s)


class Commands:
    """Runs `reir` commands with a home of their own."""

    def __init__(self, folder: Path, ports: dict[str, int], stack: ExitStack) -> None:
        """Prepare to run commands.

        Args:
            folder: for all files.
            ports: scrape job -> its port.
            stack: stops the processes when it is closed.
        """
        self._folder, self._ports, self._stack = folder, ports, stack
        self._environment = {
            **os.environ,
            "REIR_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports["haproxy"]),
        }

    def index(self, scenes: Sequence[Scene]) -> None:
        """Index drawn photos, a duplicate and a file that is no photo, and add canaries."""
        photos = self._folder / "photos"
        photos.mkdir()
        for scene in scenes:
            Image.fromarray(render(scene)).save(photos / scene.file_name)
        (photos / "copy.png").write_bytes((photos / scenes[0].file_name).read_bytes())
        (photos / "broken.jpg").write_bytes(b"no photo")
        batches = ("--batch-size", "4", *self._metrics_port("reir-index"))
        self._run("index", str(photos), "--gallery", GALLERY, *batches)
        canaries = self._folder / "canaries.jsonl"
        known = [
            {"expression": text, "photo": str(photos / scene.file_name)}
            for scene in scenes[:20]
            for text in _expressions(scene)[:1]
        ]
        absent = [{"expression": "the white refrigerator with magnets", "absent": True}]
        canaries.write_text("\n".join(map(json.dumps, [*known, *absent])), encoding="utf-8")
        self._run("canary", "add", GALLERY, str(canaries))

    def serve_and_watch(self) -> None:
        """Start the server, the monitor and the scheduler, with a backup every few minutes."""
        settings = self._folder / "serve.yaml"
        limits = {"max_ongoing_requests": 2, "max_queued_requests": 1}
        settings.write_text(
            yaml.safe_dump(
                {
                    "galleries": [GALLERY],
                    "port": self._ports["reir-serve"],
                    "ray_metrics_port": self._ports["ray-serve"],
                    "search_log": str(self._folder / "home" / "searches"),
                    "access_log": str(self._folder / "access.log"),
                    "limits": limits,
                }
            ),
            encoding="utf-8",
        )
        url = f"http://127.0.0.1:{self._ports['reir-serve']}"
        self._start("serve", "--config", str(settings), ready=lambda: _is_ready(url))
        backups = str(self._folder / "backups" / "{date}-{time}")
        words = ("schedule", "add", "backup", "--cron", "*/5 * * * *", "--")
        self._run(*words, "backup", GALLERY, backups)
        self._run("schedule", "run-now", "backup")
        self._start("schedule", "start")
        intervals = ("--interval-s", "2", "--deep-interval-s", "20")
        self._start("monitor", *intervals, "--port", str(self._ports["reir-monitor"]))

    def reindex(self) -> None:
        """Build a new version of the gallery, and switch to it."""
        self._run("reindex", GALLERY, *self._metrics_port("reir-index"))

    def work_on_ray(self) -> None:
        """Start a Ray cluster, index into a second gallery there, and train a tiny model."""
        address = f"127.0.0.1:{free_port()}"
        port = str(self._ports["ray-batch"])
        # Otherwise the cluster would ask for a token, but only if this user happens to have one.
        self._environment["RAY_AUTH_MODE"] = "disabled"
        options = ["--head", "--block", "--include-dashboard=false", "--disable-usage-stats"]
        options += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
        options += [f"--metrics-export-port={port}", "--num-cpus=4"]
        for name in ("ray-client-server", "dashboard-agent-listen"):
            options.append(f"--{name}-port={free_port()}")
        options += [f"--temp-dir={self._folder / 'ray'}"]
        self._start("start", *options, program="ray", ready=lambda: _listens(address))
        self._environment["RAY_ADDRESS"] = address
        photos = str(self._folder / "photos")
        batch = ("--num-workers", "1", "--batch-size", "4")
        self._run("index", photos, "--gallery", f"{GALLERY}-on-ray", "--runner", "ray", *batch)
        settings = self._folder / "train.yaml"
        values = tiny_training(self._folder, clia_epochs=4, steps_per_epoch=20)
        settings.write_text(yaml.safe_dump(values), encoding="utf-8")
        words = ("--preset", "clare-base", "--stage", "clia", "--data", str(settings))
        self._run("train", *words, "--output", str(self._folder / "run"))

    def _metrics_port(self, job: str) -> tuple[str, str]:
        return "--metrics-port", str(self._ports[job])

    def _run(self, *words: str) -> None:
        """Run a command to its end."""
        done = subprocess.run(
            [_program("reir"), *words],
            env=self._environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"reir {' '.join(words)} failed:\n{done.stdout}{done.stderr}"[-4000:]
            )

    def _start(
        self, *words: str, program: str = "reir", ready: Callable[[], bool] = lambda: True
    ) -> None:
        """Start a command that runs until the stack is closed, and wait until it is ready."""
        path = self._folder / f"{words[0]}.log"
        log = self._stack.enter_context(path.open("wb"))
        process = subprocess.Popen(
            [_program(program), *words],
            env=self._environment,
            cwd=self._folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._stack.callback(_stop, process)
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{words[0]} does not start:\n{path.read_text()[-4000:]}")
            time.sleep(0.5)


def use(url: str, scenes: Sequence[Scene], photos: Path) -> None:
    """Send the requests of many users to a server: good ones, wrong ones, and too many."""
    texts = [text for scene in scenes for text in _expressions(scene)]
    share = -(-_RELATED_SEARCHES // _CLIENTS)
    with ThreadPoolExecutor(_CROWD) as pool:
        list(pool.map(lambda part: _search(url, texts[part::_CLIENTS], share), range(_CLIENTS)))
        list(pool.map(lambda _: _search(url, texts, 2), range(_CROWD)))
    with Client(url) as client:
        for text in texts[:10]:
            hits = list(client.search(text, GALLERY, rerank=True))
            client.search(text, GALLERY, rerank=True, budget_ms=1)
            client.feedback(GALLERY, text, "right", hits[0].instance_id)
            client.feedback(GALLERY, text, "wrong", hits[-1].instance_id)
        client.feedback(GALLERY, "the white refrigerator with magnets", "absent")
        added = client.add_image(photos / scenes[0].file_name, GALLERY)
        client.delete_image(added.image_id, GALLERY)
        with suppress(GalleryNotFound):
            client.search(texts[0], "no-such-gallery")
        with suppress(QueryError):
            client.search(texts[0], GALLERY, k=-1)
        with suppress(ImageNotFound):
            client.feedback(GALLERY, texts[0], "right", "no-such-photo#1")


@contextmanager
def _steady_searches(url: str, scenes: Sequence[Scene]) -> Iterator[None]:
    """Search a few times a second until the end of the block."""
    stop = threading.Event()
    texts = [text for scene in scenes for text in _expressions(scene)]

    def search() -> None:
        for text in cycle(texts):
            if stop.wait(_PAUSE_S):
                return
            _search(url, [text], 1)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _search(url: str, texts: Sequence[str], number: int) -> None:
    with Client(url, patience_s=0) as client:
        for count in range(number):
            with suppress(ServerUnavailable):  # it is busy
                client.search(texts[count % len(texts)], GALLERY)


def _expressions(scene: Scene) -> list[str]:
    return [f"the {shape.color} {shape.form}" for shape in scene.shapes]


def _is_ready(url: str) -> bool:
    with suppress(OSError, ServerUnavailable), Client(url, patience_s=0) as client:
        return client.ready()
    return False


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def _is_measured(prometheus: RunningPrometheus) -> bool:
    """Whether the slowest checks of the monitor have ended since everything was used."""
    needed: list[Any] = [
        prometheus.query("reir_monitor_recall_ratio"),
        prometheus.query('reir_monitor_presence_mean_ratio{window="before"}'),
        prometheus.query('reir_monitor_reindex_state{state="done"}'),
    ]
    return all(needed)


def _free_ports(number: int) -> list[int]:
    found: set[int] = set()
    while len(found) < number:
        found.add(free_port())
    return list(found)


def _program(name: str) -> str:
    """Return the path of a program of this Python environment."""
    return str(Path(sys.executable).with_name(name))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a command, and its children if it does not end."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
