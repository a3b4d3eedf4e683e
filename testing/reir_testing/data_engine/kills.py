"""Kills `reir build-dataset` several times while it asks an endpoint, and lets it finish."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reir_testing.data_engine.fake_endpoint import FakeEndpoint


@dataclass(frozen=True)
class KilledBuild:
    """What the kills did.

    Attributes:
        kills: number of kills that hit a running process.
        repeated: requests for a question whose answer was on disk before the run started.
        lost: questions that were asked again because a kill lost their answer on its way.
        unaccounted: photos without exactly one line in `photos.jsonl`.
        written: photos with expressions.
    """

    kills: int
    repeated: int
    lost: int
    unaccounted: int
    written: int


def build_with_kills(
    photos: Path, out: Path, endpoint: FakeEndpoint, *, num_kills: int, seed: int = 0
) -> KilledBuild:
    """Kill a build after random numbers of requests, continue it each time, and count."""
    rng, kills, repeated = random.Random(seed), 0, 0
    for attempt in range(num_kills + 1):
        kept, before = _kept(out), len(endpoint.requests)
        goal = before + rng.randint(2, 7) if attempt < num_kills else None
        kills += _run(photos, out, endpoint, goal)
        repeated += sum(key in kept for key in endpoint.requests[before:])
    return KilledBuild(
        kills=kills,
        repeated=repeated,
        lost=len(endpoint.requests) - len(set(endpoint.requests)) - repeated,
        **_accounted(photos, out),
    )


def _run(photos: Path, out: Path, endpoint: FakeEndpoint, goal: int | None) -> bool:
    """Run the command; kill it when the endpoint has got `goal` requests. Return whether it was."""
    module = "reir_testing.data_engine.command"
    options = ["--writer", "endpoint", "--judge", "endpoint", "--endpoint", endpoint.url]
    command = [sys.executable, "-m", module, str(photos), str(out), *options, "--model", "m"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            if goal is not None and len(endpoint.requests) >= goal:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.005)
        _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the command failed: {errors.decode()[-2000:]}")
    return False


def _kept(out: Path) -> set[str]:
    return {path.stem for path in (out / "work" / "answers").rglob("[!.]*.json")}


def _accounted(photos: Path, out: Path) -> dict[str, int]:
    listed = json.loads((photos / "instances.json").read_text())["images"]
    lines = [json.loads(line) for line in (out / "photos.jsonl").read_text().splitlines()]
    names: Sequence[str] = [line["photo"] for line in lines]
    return {
        "unaccounted": sum(names.count(image["file_name"]) != 1 for image in listed),
        "written": sum(line["status"] == "written" for line in lines),
    }
