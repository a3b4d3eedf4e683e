"""`k8s/start.sh` starts copies of the RayJobs, which a later `kubectl apply -k` leaves alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from reir_k8s.manifests import K8S, Manifest, named
from reir_testing.k8s import NEEDS_KUBECTL

pytestmark = NEEDS_KUBECTL

JOBS = ("reir-index", "reir-train")
KUBECTL = """#!/bin/bash
# Takes the place of the API of Kubernetes; `kubectl patch --local` needs none.
case "$*" in
  "-n reir get rayjob "*" -o yaml") cat "$FOLDER/$5.yaml" ;;
  "create -f -") cat > "$FOLDER/created.yaml" ;;
  *) exec "$REAL" "$@" ;;
esac
"""


def start(folder: Path, *jobs: str) -> subprocess.CompletedProcess[str]:
    """Run the script, with the RayJobs of a cluster as files in a folder."""
    (folder / "kubectl").write_text(KUBECTL)
    (folder / "kubectl").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    real = shutil.which("kubectl") or ""
    return subprocess.run(
        [K8S / "start.sh", *jobs],
        env={**os.environ, "PATH": path, "FOLDER": str(folder), "REAL": real},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("job", JOBS)
def test_a_copy_runs_what_the_manifest_says(
    job: str, manifests: Sequence[Manifest], tmp_path: Path
) -> None:
    applied = named(manifests, "RayJob", job)
    metadata = {
        **applied["metadata"],
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
        "finalizers": ["ray.io/rayjob-finalizer"],
        "resourceVersion": "7",
        "uid": "1-2",
    }
    status = {"jobDeploymentStatus": "Suspended"}
    found = {**applied, "metadata": metadata, "status": status}
    (tmp_path / f"{job}.yaml").write_text(yaml.safe_dump(found))
    done = start(tmp_path, job)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "created.yaml").read_text()) == {
        **applied,
        "metadata": {**applied["metadata"], "name": f"{job}-run"},
        "spec": {**applied["spec"], "suspend": False},
    }


def test_no_manifest_has_the_name_of_a_copy(manifests: Sequence[Manifest]) -> None:
    """Applying the manifests again would suspend it, which deletes the cluster of a running job."""
    jobs = {each["metadata"]["name"]: each for each in manifests if each["kind"] == "RayJob"}
    assert jobs.keys() == {*JOBS}
    assert all(each["spec"]["suspend"] for each in jobs.values())


def test_the_documentation_starts_copies() -> None:
    text = (K8S.parent / "docs" / "kubernetes.md").read_text()
    for job in JOBS:
        assert f"`k8s/start.sh {job}`" in text
    assert '"suspend":false' not in text


@pytest.mark.parametrize("jobs", [(), JOBS])
def test_one_job_is_named(jobs: tuple[str, ...], tmp_path: Path) -> None:
    done = start(tmp_path, *jobs)
    assert (done.returncode, done.stderr) == (
        2,
        "usage: k8s/start.sh NAME; the name is reir-index or reir-train\n",
    )


def test_a_job_that_is_not_there_is_not_started(tmp_path: Path) -> None:
    assert start(tmp_path, "reir-index").returncode != 0
    assert "created.yaml" not in {each.name for each in tmp_path.iterdir() if each.stat().st_size}
