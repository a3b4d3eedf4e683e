"""What surrounds a job fails: the disk is full, cannot be written, may not be, or the clock jumps.

Under true conditions: a small file system needs the right to mount one, without which those tests
are skipped; root takes the rights of another user.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from reir.cli import main
from reir.errors import ReirError
from reir.images.decode import canonical_uri, image_id
from reir.store import open_store
from reir.store.embedded.lite_server_process import SERVER_LOCK
from reir.store.embedded.locks import is_locked
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_testing import FakeEncoder
from reir_testing.ingestion import stored_rows, write_scenes

NOBODY = 65_534
IS_ROOT = os.geteuid() == 0

Command = Callable[[Path, Path], tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`reir index` in this process: its exit status and its standard error."""
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder())

    def run(photos: Path, store: Path) -> tuple[int, str]:
        place = ["--gallery", "g", "--store", str(store)]
        status = main.run(["index", str(photos), "--batch-size", "4", *place])
        return status, " ".join(capsys.readouterr().err.split())

    return run


def fresh_rows(folder: Path) -> dict[str, object]:
    store = MemoryStore()
    index(folder, "g", store, FakeEncoder())
    return stored_rows(store, "g")


def rows_of(location: Path) -> dict[str, object]:
    store = open_store(str(location))
    try:
        return stored_rows(store, "g")
    finally:
        store.close()


def stop_server(store: Path) -> None:
    """Wait until the embedded server has gone, so that its file system can be taken away."""
    record = store / "server.json"
    if record.exists():
        os.kill(json.loads(record.read_text())["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 20
    while is_locked(store / SERVER_LOCK) and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if not IS_ROOT or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_reported_and_the_same_command_continues_later(
    photos: Path, small_disk: Path, command: Command
) -> None:
    store = small_disk / "store"
    try:
        assert command(photos, store)[0] == 0
        write_scenes(photos / "more", 30, seed=5)
        fill(small_disk / "filler")
        status, message = command(photos, store)
        assert status == 1
        assert "No space left" in message
        assert "free up space on its disk" in message
        (small_disk / "filler").unlink()
        assert command(photos, store)[0] == 0
        assert rows_of(store) == fresh_rows(photos)
    finally:
        stop_server(store)


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(path).f_bavail == 0


def test_a_read_only_disk_is_reported(
    photos: Path, small_disk: Path, tmp_path: Path, command: Command
) -> None:
    assert command(photos, tmp_path / "store")[0] == 0
    stop_server(tmp_path / "store")
    shutil.copytree(tmp_path / "store", small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("store", "new"):
        status, message = command(photos, small_disk / name)
        assert status == 1
        assert "Read-only file system" in message
        assert str(small_disk / name) in message
    with closing(open_store(str(small_disk / "store"))) as held:
        (gallery,) = held.galleries()
        (version,) = held.versions(gallery)
        zero = np.zeros((1, version.spec.dim), dtype=np.float32)
        (hits,) = held.search(gallery, version.name, zero, 16_384)
        assert len(hits) == version.num_instances > 0


def test_a_store_of_another_user_is_reported(tmp_path: Path) -> None:
    """The store is opened with the rights of another user: those of root stop at nothing."""
    store = tmp_path / "store"
    with closing(open_store(str(store))):
        pass
    store.chmod(0o500)
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader) as answer:
            message = answer.read()
        os.waitpid(child, 0)
        store.chmod(0o700)
        assert message.startswith(f"StoreUnavailable: store at {store} is not reachable: ")
        assert "Permission denied" in message
        return
    try:
        if IS_ROOT:
            os.seteuid(NOBODY)
        open_store(str(store))
    except ReirError as error:
        os.write(writer, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(0)


@pytest.mark.parametrize("years", [-60, 300], ids=["before 1970", "far ahead"])
def test_files_with_times_in_the_future_or_far_past(
    store: MemoryStore, photos: Path, years: int
) -> None:
    path = photos / "000.png"
    os.utime(path, ns=(0, years * 365 * 86_400 * 10**9))
    assert index(photos, "g", store, FakeEncoder()).new == 20
    again = index(photos, "g", store, FakeEncoder())
    assert (again.unchanged, again.read) == (20, 0)
    os.utime(path)  # the clock was set right
    again = index(photos, "g", store, FakeEncoder())
    assert (again.unchanged, again.read) == (20, 1)
    key = image_id(canonical_uri(path))
    row = store.get_images("g", store.live_version("g"), [key])[key]
    assert row.mtime_ns == path.stat().st_mtime_ns


def test_a_clock_that_is_set_back_during_the_run(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_time, calls = time.time, []

    def jumping() -> float:
        calls.append(1)
        return true_time() - 3600 * len(calls)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    report = index(photos, "g", store, FakeEncoder(), options=IndexOptions(batch_size=3))
    assert calls
    assert (report.new, report.num_failed) == (20, 0)
    assert 0 <= report.seconds < 60
    assert all(seconds >= 0 for seconds in report.stage_seconds.values())
    assert index(photos, "g", store, FakeEncoder()).unchanged == 20
