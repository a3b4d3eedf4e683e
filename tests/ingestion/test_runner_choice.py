"""The choice of the runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir.errors import ConfigError
from reir_ingestion import runner_choice
from reir_ingestion.runner_choice import RunnerName, choose_runner
from reir_ingestion.sources import open_source

AUTO, LOCAL, RAY = RunnerName.AUTO, RunnerName.LOCAL, RunnerName.RAY


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(runner_choice, "LARGE_SOURCE", 20)


@pytest.mark.parametrize(
    ("cores", "gpus", "address", "num_files", "expected", "reason"),
    [
        (2, 0, "", 20, LOCAL, "at most one GPU"),
        (2, 1, "", 20, LOCAL, "at most one GPU"),
        (2, 2, "", 20, RAY, "2 GPUs"),
        (8, 0, "", 20, RAY, "8 cores and at least 20 files"),
        (8, 0, "", 19, LOCAL, "at most one GPU"),
        (7, 0, "", 20, LOCAL, "at most one GPU"),
        (2, 0, "head:6379", 1, RAY, "RAY_ADDRESS is head:6379"),
    ],
)
def test_auto_chooses_by_cores_gpus_files_and_cluster(
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    gpus: int,
    address: str,
    num_files: int,
    expected: RunnerName,
    reason: str,
) -> None:
    for path in sorted(photos.iterdir())[num_files:]:
        path.unlink()
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    choice = choose_runner(AUTO, open_source(photos), cores=cores, gpus=lambda: gpus)
    assert choice.name is expected
    assert reason in str(choice)


def test_a_requested_runner_is_used(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    source = open_source(photos)
    assert choose_runner(LOCAL, source).name is LOCAL
    assert choose_runner(RAY, source).name is RAY


def test_without_ray_auto_chooses_this_process(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else name)
    source = open_source(photos)
    choice = choose_runner(AUTO, source, cores=64, gpus=lambda: 8)
    assert (choice.name, choice.reason) == (LOCAL, "Ray is not installed")
    with pytest.raises(ConfigError, match=r"reir-platform\[ingestion\]"):
        choose_runner(RAY, source)
