"""The checks of `reir doctor`, each made to find what it must."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

import reir
from reir.cli import doctor
from reir.cli.doctor import installation, operations, remote, run_checks
from reir.cli.doctor.check import Check
from reir.cli.doctor.galleries import check_clock, check_galleries
from reir.errors import StoreDamaged
from reir.operations.lease import hold_lease
from reir.operations.schedule.runs import run_schedule
from reir.operations.schedule.schedules import Schedule, add_schedule, remove_schedule
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder
from reir_testing.serving import free_port

DAY_S = 86_400.0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REIR_HOME", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------------------------- this machine


def test_python_disk_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.check_python((3, 10)).status == "fail"
    assert installation.check_python((3, 11)).status == "ok"
    assert installation.nearest_folder(str(tmp_path / "a" / "b")) == tmp_path
    assert installation.nearest_folder("http://host:19530") == tmp_path
    for free, status in ((3 << 30, "ok"), (1 << 30, "warn"), (1 << 20, "fail")):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        assert installation.check_disk(tmp_path).status == status
    needs = ["no-such-thing>=1; extra == 'serving'", 'typer>=1; extra == "training"']
    monkeypatch.setattr("importlib.metadata.requires", lambda _: needs)
    assert installation.check_app("training").status == "ok"
    assert installation.check_app("serving").detail == "not installed: no-such-thing"


def test_versions_are_compared_with_those_that_were_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tested = installation.tested_versions()
    assert {"torch", "ray", "pymilvus"} <= tested.keys()
    assert installation.check_versions({"typer": "0.0.1"}).status == "warn"
    found = installation.check_versions({"no-such-thing": "1"})
    assert (found.status, found.advice) == ("ok", "")
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["typer<0.1"])
    wrong = installation.check_versions()
    assert (wrong.status, "needs <0.1" in wrong.detail) == ("fail", True)


# ------------------------------------------------------------------------- store and galleries


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    made.create_version("pets", "v1", VersionSpec(dim=4, digest="d" * 64))
    made.promote("pets", "v1")
    return made


def test_a_clock_behind_the_newest_record_is_found(store: MemoryStore, tmp_path: Path) -> None:
    assert check_clock(store, None).status == "ok"
    store.put_document("backup", "pets/1", {"ended_s": time.time() - DAY_S})
    assert check_clock(store, tmp_path).status == "ok"
    store.put_document("source", "pets/1", {"indexed_s": time.time() + 3 * DAY_S})
    found = check_clock(store, tmp_path)
    assert (found.status, "3 days behind the newest record" in found.detail) == ("warn", True)
    assert "NTP" in found.advice


def test_a_clock_behind_that_of_the_disk_is_found(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.time()
    monkeypatch.setattr("time.time", lambda: now_s - 120)
    found = check_clock(store, tmp_path)
    assert (found.status, "behind the disk of the store" in found.detail) == ("warn", True)


@pytest.mark.parametrize(
    ("weights", "status", "part"),
    [
        (None, "fail", "cannot be read"),
        (b"other", "fail", "whose weights are now d9298a10d1b0 instead of dddddddddddd"),
    ],
)
def test_a_checkpoint_that_changed_or_is_gone_is_found(
    weights: bytes | None, status: str, part: str, tmp_path: Path
) -> None:
    store, folder = MemoryStore(), tmp_path / "checkpoint"
    folder.mkdir()
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    spec = VersionSpec(dim=4, digest="d" * 64, encoder=f"clare:{folder}")
    store.create_version("pets", "v1", spec)
    store.promote("pets", "v1")
    (found,) = check_galleries(store, FakeEncoder())
    assert found.status == status
    assert part in found.detail


# -------------------------------------------------------------- jobs, backups and schedules


def test_a_stopped_reindexing_job_is_found_with_the_commands(store: MemoryStore) -> None:
    assert list(operations.check_jobs(store, "pets")) == []
    job = {"state": "indexing", "updated_s": time.time() - 7200, "error": "disk full"}
    store.put_document("reindex", "pets", job)
    (found,) = operations.check_jobs(store, "pets")
    assert found.status == "warn"
    assert "indexing since 2 hours; its error: disk full" in found.detail
    assert "`reir reindex pets` finishes it" in found.advice
    assert "`reir reindex pets --drop`" in found.advice
    with hold_lease(store, "reindex/pets"):
        (running,) = operations.check_jobs(store, "pets")
    assert (running.status, f"process {os.getpid()}" in running.detail) == ("ok", True)
    store.put_document("reindex", "pets", {**job, "state": "done"})
    assert list(operations.check_jobs(store, "pets")) == []


def test_a_stopped_restore_is_found(store: MemoryStore) -> None:
    store.put_document("restore", "pets/v2", {})
    (found,) = operations.check_jobs(store, "pets")
    assert (found.status, "pets/v2" in found.detail) == ("warn", True)
    with hold_lease(store, "restore/pets"):
        assert list(operations.check_jobs(store, "pets")) == []


def test_the_age_of_the_last_backup_counts(store: MemoryStore) -> None:
    assert operations.check_backup(store, "pets").detail == "never backed up"
    store.put_document("backup", "pets/1", {"ended_s": time.time() - 9 * DAY_S})
    old = operations.check_backup(store, "pets")
    assert (old.status, old.detail) == ("warn", "the last one is 9 days old")
    store.put_document("backup", "pets/2", {"ended_s": time.time() - 3600 * 5})
    assert operations.check_backup(store, "pets") == Check("backup pets", "ok", "5 hours ago")


def a_schedule(command: tuple[str, ...], cron: str, added_s: float) -> Schedule:
    return Schedule(command=command, cron=cron, added_s=added_s)


def test_schedules_that_failed_or_are_late_or_have_no_scheduler_are_found(home: Path) -> None:
    assert list(operations.check_schedules()) == []
    file, runs, now_s = home / "schedules.yaml", home / "schedule-runs", time.time()
    failing = a_schedule(("doctor", "--no-such-option"), "0 3 * * *", now_s)
    add_schedule(file, "failing", failing)
    run_schedule(runs, "failing", failing)
    add_schedule(file, "late", a_schedule(("doctor",), "* * * * *", now_s - DAY_S))
    add_schedule(file, "waiting", a_schedule(("doctor",), "0 0 1 1 *", now_s))
    found = {each.name: each for each in operations.check_schedules()}
    assert "reir schedule start" in found["schedules"].advice
    assert "the last run" in found["schedule failing"].detail
    assert "`reir schedule runs failing`" in found["schedule failing"].advice
    assert "no success, although it was due 24 hours ago" in found["schedule late"].detail
    assert found["schedule waiting"] == Check("schedule waiting", "ok", "not due yet")
    remove_schedule(file, "failing")
    add_schedule(file, "failing", a_schedule(("doctor",), "0 0 1 1 *", time.time()))
    found = {each.name: each for each in operations.check_schedules()}
    assert found["schedule failing"] == Check("schedule failing", "ok", "not due yet")
    (runs / "scheduler.alive").write_text("1")
    assert "schedules" not in {each.name for each in operations.check_schedules()}


WITHOUT_OPERATIONS = """
import sys
sys.modules["apscheduler"] = None
from reir.cli.doctor import operations
print(list(operations.check_schedules()))
"""


def test_without_schedules_their_packages_are_not_needed(home: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_OPERATIONS]
    environment = {**os.environ, "REIR_HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


# ------------------------------------------------------------------------- server and cluster


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """An HTTP server that answers /v1/about with the given values, late, by another clock."""
    running: list[http.server.HTTPServer] = []

    def start(about: object, seconds: float = 0.0, delay_s: float = 0.0) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(delay_s)
                self.send_response_only(200)
                self.send_header("Date", formatdate(time.time() + seconds, usegmt=True))
                self.end_headers()
                self.wfile.write(json.dumps(about).encode())

            def log_message(self, *_: object) -> None: ...

        running.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for each in running:
        each.shutdown()
        each.server_close()


def test_release_checkpoint_and_clock_of_a_server_are_compared(
    server: Callable[..., str],
) -> None:
    encoder = FakeEncoder()
    mine = {"release": reir.__version__, "checkpoints": [encoder.digest]}

    def statuses(about: object, seconds: float = 0.0) -> list[str]:
        return [each.status for each in remote.check_server(server(about, seconds), encoder)]

    assert statuses(mine) == ["ok", "ok"]
    assert statuses({**mine, "release": "0.0.9"}) == ["warn", "ok"]
    assert statuses({**mine, "checkpoints": ["f" * 64]}) == ["warn", "ok"]
    assert statuses(mine, seconds=60) == ["ok", "warn"]
    (gone,) = remote.check_server(f"http://127.0.0.1:{free_port()}", encoder)
    assert (gone.status, "does not answer" in gone.detail) == ("fail", True)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n<html>",
    ],
)
def test_what_speaks_another_protocol_does_not_answer(answer: bytes) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        (found,) = remote.check_server(f"http://127.0.0.1:{other.server_address[1]}", None)
    assert (found.status, "does not answer" in found.detail) == ("fail", True)


def test_an_address_with_a_space_does_not_answer() -> None:
    (found,) = remote.check_server("http://localhost:1/a b", None)
    assert (found.status, "does not answer" in found.detail) == ("fail", True)


@pytest.mark.parametrize("about", [{}, {"release": "1"}, {"checkpoints": []}, ["release"]])
def test_another_server_is_not_one_of_reir(server: Callable[..., str], about: object) -> None:
    (found,) = remote.check_server(server(about=about), None)
    assert (found.status, "is not a server of reir" in found.detail) == ("fail", True)


def test_a_slow_answer_is_not_a_wrong_clock(
    server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.cli.doctor.galleries.SKEW_S", 0.5)
    address = server({"release": reir.__version__, "checkpoints": []}, delay_s=2)
    assert [each.status for each in remote.check_server(address, None)] == ["ok", "ok"]


def test_a_cluster_is_checked_within_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert list(remote.check_cluster()) == []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (found,) = remote.check_cluster()
    assert found.status == "fail"
    assert "the Ray cluster at RAY_ADDRESS 127.0.0.1:1 does not answer" in found.detail
    monkeypatch.setattr(remote, "CLUSTER_TIMEOUT_S", 0.01)
    (slow,) = remote.check_cluster()
    assert (slow.status, "did not answer within 0.01 s" in slow.detail) == ("fail", True)


def test_a_cluster_without_free_cpus_is_a_warning() -> None:
    found = {"ray": "2.60.0", "nodes": 2, "total": {"CPU": 8.0, "GPU": 1.0}, "free": {"CPU": 3.0}}
    ok = remote.cluster_check("head:6379", found)
    assert ok.detail == "head:6379: 2 nodes, 3 of 8 CPUs free, 0 of 1 GPUs free; Ray 2.60.0"
    assert ok.status == "ok"
    assert remote.cluster_check("head:6379", {**found, "free": {}}).status == "warn"
    assert remote.cluster_check("head:6379", {**found, "total": {}}).status == "fail"


def test_a_damaged_store_is_to_be_restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(_: str | None) -> None:
        raise StoreDamaged("file x does not match its checksum")

    monkeypatch.setattr(doctor, "connect", refuse)
    (found,) = (each for each in run_checks(str(tmp_path), None, None) if each.name == "store")
    assert (found.status, "file x" in found.detail) == ("fail", True)
    assert "docs/operations/disaster-recovery.md" in found.advice
