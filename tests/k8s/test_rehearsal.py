"""`k8s/rehearse.sh` passes, and leaves no processes and no files behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from reir_k8s.manifests import K8S, render
from reir_k8s.rehearsal.local_copy import LocalCopy
from reir_testing import data_dir
from reir_testing.k8s import NEEDS_KUBECTL

MARK = "REIR_TEST_MARK"
"""Variable by which the processes of a rehearsal are found: all of them inherit it."""


@pytest.fixture
def temporary_folder() -> Iterator[Path]:
    """A folder with a short path, which Ray's sockets need."""
    folder = Path(tempfile.mkdtemp(prefix="", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def processes_with(variable: str) -> list[str]:
    """Return the command lines of all processes that have a variable in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


@NEEDS_KUBECTL
def test_each_process_has_the_secrets_of_its_pod(tmp_path: Path) -> None:
    bucket = {"AWS_ACCESS_KEY_ID": "anyone"}
    local = LocalCopy.make(render("dev"), tmp_path, tmp_path, "memory:", bucket)
    reads = {
        owner: bucket.items() <= local.variables(owner).items()
        for owner in ("RayJob/reir-index head", "CronJob/reir-backup", "Deployment/reir-monitor")
    }
    assert [*reads.values()] == [True, True, False]
    assert "REIR_CONFIG" in local.variables("Deployment/reir-monitor")


@NEEDS_KUBECTL
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("store", ["--embedded", pytest.param("", marks=pytest.mark.milvus)])
def test_rehearsal(store: str, temporary_folder: Path) -> None:
    if data_dir() is None:
        pytest.skip("the shared photos are needed: set REIR_DATA")
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [K8S / "rehearse.sh", *filter(None, [store])],
        env={**os.environ, "PYTHON": sys.executable, "TMPDIR": str(temporary_folder), MARK: mark},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("passed\n")
    assert processes_with(f"{MARK}={mark}") == []
    assert list(temporary_folder.iterdir()) == []
