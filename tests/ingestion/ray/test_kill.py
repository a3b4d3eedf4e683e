"""Killed workers and a killed driver of a Ray job leave the rows of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reir.store import open_store
from reir_ingestion.pipeline import index
from reir_testing import FakeEncoder
from reir_testing.ingestion import ray_workers, stored_rows, write_scenes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_PHOTOS = 240
CHILD = """
import sys, time
from reir_testing import FakeEncoder
from reir_ingestion.ray.runner import EncoderPoolOptions, index_on_ray
from reir_ingestion.stages import IndexOptions
class SlowEncoder(FakeEncoder):
    def encode_images(self, images):
        time.sleep(0.05 * len(images))
        return super().encode_images(images)
folder, location = sys.argv[1:]
say = lambda now: print(now.done, flush=True)
options = IndexOptions(batch_size=4)
pool = EncoderPoolOptions(max_encoders=1)
report = index_on_ray(
    folder, "killed", location, SlowEncoder, options=options, pool=pool, progress=say
)
print("unchanged", report.unchanged, flush=True)
"""


@contextmanager
def started(folder: Path, *, stderr: int | None = None) -> Iterator[subprocess.Popen[str]]:
    paths = [str(folder / "photos"), str(folder / "store")]
    command = [sys.executable, "-c", CHILD, *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def wait_until_done(child: subprocess.Popen[str], num_photos: int) -> None:
    assert child.stdout is not None
    for line in child.stdout:  # Ray tells of killed workers here, too
        if line.strip().isdigit() and int(line) >= num_photos:
            return
    raise AssertionError("it ended before")


def kill_worker(child: subprocess.Popen[str], title: str) -> None:
    while not (found := ray_workers(child.pid, title)):
        assert child.poll() is None, f"it ended before a worker ran {title}"
        time.sleep(0.02)
    os.kill(found[0], signal.SIGKILL)


def test_killed_workers_and_a_killed_driver_leave_the_same_rows(tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos", NUM_PHOTOS)
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    with started(tmp_path) as child:
        kill_worker(child, "read_batch")  # readers have soon done their part, so they come first
        wait_until_done(child, 40)
        kill_worker(child, "BatchEncoder")
        wait_until_done(child, 120)

    with started(tmp_path) as again:
        output, _ = again.communicate()
        assert again.returncode == 0
    unchanged = int(output.split()[-1])
    assert 100 <= unchanged <= NUM_PHOTOS

    store = open_store(str(tmp_path / "store"))
    index(tmp_path / "photos", "quiet", store, FakeEncoder())
    expected = stored_rows(store, "quiet")
    assert stored_rows(store, "killed") == expected
    (info,) = store.versions("killed")
    assert info.num_images == NUM_PHOTOS + 1
    assert info.num_images + store.num_stored("killed", info.name) == len(expected)
    store.close()


def test_a_killed_raylet_is_reported_in_plain_words(tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos", NUM_PHOTOS)
    with started(tmp_path, stderr=subprocess.PIPE) as child:
        wait_until_done(child, 4)
        kill_worker(child, "raylet/raylet")
        _, message = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "Ray's process raylet has died" in message
    assert "run the same command again to continue" in message
    assert "Traceback" not in message
