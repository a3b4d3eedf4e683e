"""Workers and driver of an indexing job on Ray are killed: the rows are those of a quiet run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reir.store import open_store
from reir.testing import FakeEncoder
from reir_ingestion.pipeline import index
from reir_ingestion.testing import ray_workers, stored_rows, write_scenes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_PHOTOS = 240
CHILD = """
import sys, time
from reir.testing import FakeEncoder
from reir_ingestion.jobs import Workers, index_on_ray
from reir_ingestion.stages import IndexOptions
class Slow(FakeEncoder):
    def encode_images(self, images):
        time.sleep(0.05 * len(images))
        return super().encode_images(images)
folder, location = sys.argv[1:]
say = lambda now: print(now.done, flush=True)
options = IndexOptions(batch_size=4)
report = index_on_ray(
    folder, "killed", location, Slow, options=options, workers=Workers(most=1), progress=say
)
print("unchanged", report.unchanged, flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    paths = [str(folder / "photos"), str(folder / "store")]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *paths], stdout=subprocess.PIPE, text=True
    )


def wait_until_done(child: subprocess.Popen[str], num_photos: int) -> None:
    assert child.stdout is not None
    for line in child.stdout:  # Ray tells of killed workers here, too
        if line.strip().isdigit() and int(line) >= num_photos:
            return
    raise AssertionError("it ended before")


def kill_worker(child: subprocess.Popen[str], title: str) -> None:
    deadline = time.monotonic() + 180
    while not (found := ray_workers(child.pid, title)):
        assert time.monotonic() < deadline, f"no worker runs {title}"
    os.kill(found[0], signal.SIGKILL)


def test_killed_workers_and_a_killed_driver_lose_and_repeat_nothing(tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos", NUM_PHOTOS)
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    child = start(tmp_path)
    kill_worker(child, "read_parcel")  # readers have soon done their part, so they come first
    wait_until_done(child, 40)
    kill_worker(child, "EncodeParcel")
    wait_until_done(child, 120)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL

    again = start(tmp_path)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0
    unchanged = int(output.split()[-1])
    assert 100 <= unchanged <= NUM_PHOTOS

    store = open_store(str(tmp_path / "store"))
    index(tmp_path / "photos", "quiet", store, FakeEncoder())
    expected = stored_rows(store, "quiet")
    assert stored_rows(store, "killed") == expected
    (info,) = store.versions("killed")
    assert info.num_images == NUM_PHOTOS + 1
    assert info.num_images + info.num_instances == len(expected)
    store.close()
