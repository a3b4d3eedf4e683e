"""Killed at random moments and run again, indexing ends with the rows of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reir.store import InstanceStore, open_store
from reir_testing.ingestion import stored_rows, write_scenes

NUM_PHOTOS = 100
CHILD = """
import sys
from reir.store import open_store
from reir_testing import FakeEncoder
from reir_ingestion.pipeline import IndexOptions, index
folder, location, gallery = sys.argv[1:]
store = open_store(location)
say = lambda now: print(now.done, flush=True)
index(folder, gallery, store, FakeEncoder(), options=IndexOptions(batch_size=4), progress=say)
store.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    write_scenes(folder / "photos", NUM_PHOTOS)
    (folder / "photos" / "bad.jpg").write_bytes(b"no image")
    finish(start(folder, "whole"))
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[InstanceStore]:
    store = open_store(str(folder / "store"))
    yield store
    store.close()


def start(folder: Path, gallery: str) -> subprocess.Popen[str]:
    paths = [str(folder / "photos"), str(folder / "store")]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *paths, gallery], stdout=subprocess.PIPE, text=True
    )


def finish(child: subprocess.Popen[str]) -> None:
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output


def kill_after(child: subprocess.Popen[str], num_done: int, delay_s: float) -> None:
    """Kill the run a moment after it has written so many photos."""
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= num_done:
            break
    time.sleep(delay_s)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "it had ended before"


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_rerun_completes_a_killed_run(folder: Path, store: InstanceStore, seed: int) -> None:
    rng = random.Random(seed)
    gallery = f"killed-{seed}"
    for _ in range(2):  # the second run is killed too
        kill_after(start(folder, gallery), rng.randrange(NUM_PHOTOS // 3), rng.uniform(0, 0.02))
        if seed % 2:
            record = json.loads((folder / "store" / "server.json").read_text())
            os.kill(record["pid"], signal.SIGKILL)
    finish(start(folder, gallery))
    expected = stored_rows(store, "whole")
    assert stored_rows(store, gallery) == expected
    (info,) = store.versions(gallery)
    assert info.num_images == NUM_PHOTOS + 1
    assert info.num_images + store.num_stored(gallery, info.name) == len(expected)
