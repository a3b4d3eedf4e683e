"""The metrics that the processes of a server count together, also when one of them is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reir_serving.middleware import metrics
from reir_serving.middleware.metrics import PORT_VARIABLE, SHARED_FOLDER_VARIABLE, Metrics
from reir_testing.serving import free_port

# The Prometheus client decides by the environment of the process, so each replica is a process.
REPLICA = """
import sys
from reir_serving.middleware.metrics import Metrics
metrics = Metrics()
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "stop":
        metrics.close()
        break
    values = dict(each.rsplit(" ", 1) for each in metrics.text().decode().splitlines())
    print(values[line.strip()], flush=True)
"""


# As on macOS.
WITHOUT_PROC = """
import os, pathlib
pathlib.Path.exists = lambda path: path.parts[:2] != ("/", "proc") and os.path.exists(path)
"""


class Replica:
    """A process that counts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def value(self, metric: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{metric}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.communicate("stop\n")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "metrics"


@contextmanager
def replica(folder: Path, code: str = REPLICA, **variables: str) -> Iterator[Replica]:
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, SHARED_FOLDER_VARIABLE: str(folder), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Replica(process)
        process.kill()


def test_killed_replicas_are_counted_and_stopped_ones_are_not(folder: Path) -> None:
    running, killed = "reir_serve_replicas", "reir_serve_replicas_killed_total"
    with replica(folder) as first, replica(folder) as second, replica(folder) as third:
        assert (first.value(running), first.value(killed)) == (3, 0)
        second.stop()
        assert (first.value(running), first.value(killed)) == (2, 0)
        third.kill()
        assert (first.value(running), first.value(killed)) == (1, 1)
        with replica(folder) as fourth:
            assert (fourth.value(running), fourth.value(killed)) == (2, 1), "counted only once"
            first.kill()
            assert (fourth.value(running), fourth.value(killed)) == (1, 2)


def test_live_replicas_do_not_count_as_killed_on_a_system_without_proc(folder: Path) -> None:
    running, killed = "reir_serve_replicas", "reir_serve_replicas_killed_total"
    with replica(folder, WITHOUT_PROC + REPLICA) as first, replica(folder) as second:
        assert (first.value(running), first.value(killed)) == (2, 0)
        second.kill()
        assert (first.value(running), first.value(killed)) == (1, 1)


def test_a_scrape_is_answered_as_soon_as_the_port_is_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[bytes] = []
    monkeypatch.setattr(metrics, "serve_metrics", lambda _, text: answers.append(text()))
    monkeypatch.setenv(SHARED_FOLDER_VARIABLE, str(folder))
    monkeypatch.setenv(PORT_VARIABLE, "9090")
    Metrics()
    assert len(answers) == 1


def test_replicas_of_one_machine_share_a_port(folder: Path) -> None:
    port = str(free_port())

    def replicas() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return next(line for line in text.splitlines() if line.startswith("reir_serve_replicas "))

    with replica(folder, **{PORT_VARIABLE: port}) as first:
        with replica(folder, **{PORT_VARIABLE: port}):
            # Each connection goes to either of them.
            assert {replicas() for _ in range(8)} == {"reir_serve_replicas 2.0"}
        assert {replicas() for _ in range(8)} == {"reir_serve_replicas 1.0"}
        assert first.value("reir_serve_replicas") == 1
