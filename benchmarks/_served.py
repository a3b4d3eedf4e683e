"""Shared by the benchmarks of the service: a gallery of many instances, and a server for it.

The gallery holds vectors as in `_vectors.py` under the digest of the shipped checkpoint, so that
the service answers with its own text encoder. Queries are expressions that people wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from _indexing import encoder_of, expressions
from _vectors import make_corpus

from reir.store import VersionSpec, open_store

GALLERY, VERSION = "vectors", "v1"
START_TIMEOUT_S = 300.0
_UPSERT_IMAGES = 256
_SERVE = "from reir.cli.main import build_app; from reir_serving.cli.serve import register; "
_SERVE += "import typer; app = typer.Typer(); app.callback()(lambda: None); register(app); app()"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options for the size of the gallery and for where it is kept."""
    parser.add_argument("--instances", type=int, default=70_000)
    parser.add_argument("--photos", type=int, default=64, help="Number of real photos to encode.")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--store", help="Where to keep the gallery for later runs.")


def fill_gallery(arguments: argparse.Namespace, folder: Path) -> str:
    """Write the gallery to a store unless it exists; return the store's location."""
    location: str = arguments.store or str(folder / "store")
    store = open_store(location)
    try:
        if GALLERY not in store.galleries():
            encoder = encoder_of(arguments)
            corpus = make_corpus(arguments, arguments.instances)
            store.create_version(
                GALLERY, VERSION, VersionSpec(dim=encoder.dim, digest=encoder.digest)
            )
            images = corpus.images()
            while batch := list(islice(images, _UPSERT_IMAGES)):
                store.upsert_images(GALLERY, VERSION, batch)
            store.promote(GALLERY, VERSION)
        (info,) = store.versions(GALLERY)
        print(f"{info.num_instances:,} instances in {location}", flush=True)
    finally:
        store.close()
    return location


def bodies(count: int, **options: object) -> list[dict[str, object]]:
    """Return bodies of requests to `/v1/search`."""
    return [{"gallery": GALLERY, "expression": text, **options} for text in expressions(count)]


@dataclass
class Server:
    """A running `reir serve`.

    Attributes:
        url: address without a slash at the end.
        process: process of the command.
    """

    url: str
    process: subprocess.Popen[str]

    def get(self, path: str) -> Any:
        """Return the JSON of an answer."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def replicas(self) -> list[int]:
        """Return the process ids of the replicas that answer HTTP."""
        return [
            pid
            for pid, title in processes(self.process.pid)
            if "ServeReplica:reir:ingress" in title
        ]


@contextmanager
def served(
    store: str, folder: Path, port: int, options: Mapping[str, Any] | None = None
) -> Iterator[Server]:
    """Run `reir serve` over a store as a user does, until the block ends.

    Args:
        store: location of the store.
        folder: folder for the log and the settings.
        port: port of the server.
        options: further settings of `ServeConfig`.
    """
    config = folder / "serve.yaml"
    settings = {"store": store, "galleries": [GALLERY], "port": port, **(options or {})}
    # Lines of the log are still formatted, but no figure depends on the speed of the disk.
    settings.setdefault("access_log", os.devnull)
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-c", _SERVE, "serve", "--config", str(config)]
    # If the benchmark is terminated, the server must not stay behind and slow down the next one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            yield Server(_ready(process, folder / "serve.log"), process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _ready(process: subprocess.Popen[str], log: Path) -> str:
    """Wait for the line with the address, and return the address."""
    assert process.stdout is not None
    started_s = time.monotonic()
    for line in process.stdout:
        if line.startswith("ready: "):
            print(f"ready after {time.monotonic() - started_s:.1f} s", flush=True)
            return line.split()[1].rstrip("/")
    raise RuntimeError(f"the server ended with {process.wait()}: {log.read_text()[-2000:]}")


def processes(pid: int) -> list[tuple[int, str]]:
    """Return the process id and title of all descendants of a process."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            titles[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
            parents[int(entry.name)] = int(fields[1])
        except OSError:
            continue
    found: list[int] = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return [(each, titles.get(each, "")) for each in found]


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    """Wait until an address answers with 200.

    Raises:
        RuntimeError: the process ended first.
        TimeoutError: there was no such answer within `START_TIMEOUT_S`.
    """
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"{url} does not answer after {START_TIMEOUT_S:g} s")
