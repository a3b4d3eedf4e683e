"""`reir serve` on the command line: the answers of the library, also while replicas are killed."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import reir
from reir.checkpoint import load_encoder, save_checkpoint
from reir.errors import ReirError
from reir.store import open_store
from reir_testing.serving import SCENES, draw_photo, free_port, index_photos
from reir_testing.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.ray

TEXTS = ("the red one on the left", "a green dog", "the blue car")
CHILD = """
import typer
from reir_serving.cli.serve import register
app = typer.Typer()
app.callback()(lambda: None)
register(app)
app()
"""


def make_gallery(folder: Path) -> None:
    """Make a checkpoint of random weights and an embedded store with the gallery `g`."""
    save_checkpoint(folder / "tiny", tiny_model(), tiny_tokenizer(), {})
    store = open_store(str(folder / "store"))
    photos = [draw_photo(folder / "photos", scene) for scene in SCENES]
    encoder = load_encoder(folder / "tiny")
    index_photos(store, "g", photos, encoder=encoder, spec=f"clare:{folder / 'tiny'}")
    store.close()


@contextmanager
def serving(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the command, and reload its settings while it starts; yields address and process."""
    (folder / "serve.yaml").write_text(yaml.safe_dump({**settings, "live": {"k": 1}}))
    command = [sys.executable, "-c", CHILD, "serve", "--config", str(folder / "serve.yaml")]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            eventually(lambda: any("ray.server" in each for each in below(process.pid).values()))
            (folder / "serve.yaml").write_text(yaml.safe_dump(settings))
            process.send_signal(signal.SIGHUP)
            line = process.stdout.readline()
            assert line.startswith("ready: "), (folder / "log").read_text()
            yield line.split()[1].rstrip("/"), process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def ask(url: str, text: str) -> dict[str, Any]:
    body = json.dumps({"gallery": "g", "expression": text, "k": 3}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/search", body, headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def get(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path, timeout=20) as answer:
        text = answer.read().decode()
    return json.loads(text) if text.startswith("{") else text


def replicas(parent: int) -> list[int]:
    """Process ids of the replicas of a server: children of its raylet."""
    return [
        pid
        for pid, command in below(parent).items()
        if command.startswith("ray::ServeReplica:reir:ingress")
    ]


def below(parent: int) -> dict[int, str]:
    """Return the commands of a process and of those below it, by process id."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    found = {parent}
    for _ in range(4):
        found |= {int(row[0]) for row in rows if int(row[1]) in found}
    return {int(row[0]): row[2] for row in rows if int(row[0]) in found}


def search_for(url: str, seconds: float) -> list[Exception]:
    """Let three clients search for some seconds; return the errors.

    They are instances of `reir.Client`, which repeats a request whose connection was closed:
    HAProxy may close one when it takes over the list of replicas. `benchmarks/serve_kill.py` counts
    the errors without that.
    """
    errors: list[Exception] = []
    until_s = time.monotonic() + seconds

    def client(text: str) -> None:
        with reir.Client(url) as searching:
            while time.monotonic() < until_s:
                try:
                    searching.search(text, "g", k=3)
                except ReirError as error:
                    errors.append(error)

    threads = [threading.Thread(target=client, args=(text,)) for text in TEXTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def eventually(check: Any, within_s: float = 15.0) -> None:
    until_s = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < until_s
        time.sleep(0.2)


@contextmanager
def searching_clients(url: str) -> Iterator[list[str]]:
    """Run clients that search until their connections are refused; yields the failed requests."""
    failed, first_answers = list[str](), threading.Barrier(len(TEXTS) + 1)

    def client(text: str) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        body = json.dumps({"gallery": "g", "expression": text, "k": 3})
        for number in itertools.count():
            try:
                if connection.sock is None:
                    connection.connect()
            except OSError:
                return
            try:
                connection.request("POST", "/v1/search", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                whole = json.loads(answer.read())
                failed.extend([] if answer.status == 200 else [str(whole)])
            except (OSError, http.client.HTTPException, ValueError) as error:
                failed.append(repr(error))
                connection.close()
            if number == 0:
                first_answers.wait()

    threads = [threading.Thread(target=client, args=(text,)) for text in TEXTS]
    for thread in threads:
        thread.start()
    first_answers.wait()
    yield failed
    for thread in threads:
        thread.join()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory for the server; its path is short because it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


def test_serving_survives_a_killed_replica_reloads_settings_and_drains(
    tmp_path: Path, temporary: Path
) -> None:
    make_gallery(tmp_path)
    settings: dict[str, Any] = {
        "store": str(tmp_path / "store"),
        "galleries": ["g"],
        "port": free_port(),
        "uploads": str(tmp_path / "uploads"),
        "access_log": str(tmp_path / "access.log"),
        "ingress": {"min_replicas": 2, "max_replicas": 2},
        "live": {"k": 6},
    }
    with serving(tmp_path, settings) as (url, process):
        assert get(url, "/readyz")["status"] == "ready"
        eventually(lambda: all(get(url, "/v1/about")["k"] == 6 for _ in range(30)))
        with reir.open("g", store=str(tmp_path / "store")) as gallery:
            for text in TEXTS:
                expected = [hit.instance_id for hit in gallery.search(text, k=3).hits]
                assert [hit["instance_id"] for hit in ask(url, text)["hits"]] == expected

        before = replicas(process.pid)
        assert len(before) == 2
        killer = threading.Timer(1.0, os.kill, (before[0], signal.SIGKILL))
        killer.start()
        assert search_for(url, 4.0) == []
        assert before[0] not in replicas(process.pid)

        with reir.Client(url) as client:
            client.add_image(draw_photo(tmp_path / "mine", "green"), "g", attributes={"shelf": 3})
            for _ in range(6):  # both replicas must find it
                assert client.search("green", "g", where="attr.shelf == 3").hits

        eventually(lambda: len(replicas(process.pid)) == 2)
        running = replicas(process.pid)
        settings["live"] = {"k": 7, "budget_ms": 900}
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))
        process.send_signal(signal.SIGHUP)
        eventually(lambda: all(get(url, "/v1/about")["k"] == 7 for _ in range(30)))
        assert replicas(process.pid) == running  # live settings need no restart

        assert "reir_serve_worker_batch" in get(url, "/metrics")
        with searching_clients(url) as failed:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        assert process.wait(60) == 0
        assert process.stdout is not None
        printed = process.stdout.read()
    assert failed == []
    assert list(temporary.iterdir()) == []
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "Task " not in log + printed
    assert printed == "", "Ray must not print to stdout, which carries only the address"
    with pytest.raises(OSError, match="refused"):
        get(url, "/healthz")
