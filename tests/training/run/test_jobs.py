"""`reir train` on Ray with a tiny CLARE: storage, states, number of workers, metrics."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import ray
from pyarrow.fs import FileSelector
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from reir.checkpoint import load_encoder, read_config
from reir.config import load_config
from reir.errors import ConfigError
from reir_testing.tiny_clare import tiny_training
from reir_training.config import ClareTrainConfig
from reir_training.run.driver import run
from reir_training.run.engine import read_state
from reir_training.run.jobs import EvenScalingPolicy, _reraised_user_errors, _start_ray
from reir_training.run.num_workers import NumWorkers
from reir_training.run.readers import reader_limits, stream_steps
from reir_training.run.storage import open_storage


@pytest.fixture
def scraped(s3_options: str) -> Iterator[dict[str, float]]:
    """Start Ray and poll its metrics port; yields the latest training metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )
    found: dict[str, float] = {}
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.5):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    lines = answer.read().decode().splitlines()
            except OSError:  # the agent is not up yet
                continue
            for line in lines:
                if line.startswith("ray_reir_train_"):
                    name, _, value = line.rpartition(" ")
                    found[name.partition("{")[0]] = float(value)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield found
    stop.set()
    thread.join()
    ray.shutdown()


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def train(data: Path, output: Path, storage: str, *, epochs: int, num_workers: NumWorkers) -> Path:
    values = tiny_training(data, clia_epochs=epochs, accumulate_steps=2, save_every_steps=1)
    values |= {"keep_checkpoints": 1, "final": "best", "best_by": "rec_long", "max_failures": 0}
    return run(
        "clare-base",
        load_config(ClareTrainConfig, values),
        output=output,
        stage="clia",
        init=None,
        num_workers=num_workers,
        use_gpu=False,
        storage=storage,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_elsewhere_with_other_workers(
    tmp_path: Path, s3_options: str, scraped: dict[str, float]
) -> None:
    uri = f"s3://runs-of-reir/{tmp_path.name}/run{s3_options}"
    train(tmp_path, tmp_path / "first", uri, epochs=1, num_workers=1)
    checkpoint = train(tmp_path, tmp_path / "second", uri, epochs=3, num_workers=(1, 2))

    # the second machine had nothing but the bucket, and did what was left to do
    epochs = events(tmp_path / "second", "epoch")
    assert [e["epoch"] for e in epochs] == [1, 2, 3]
    assert epochs[0] == events(tmp_path / "first", "epoch")[0]
    last = events(tmp_path / "second", "progress")[-1]
    assert (last["epoch"], last["step"], last["steps"], last["photos"]) == (3, 2, 2, 8)

    # the best epoch is the one that is kept, the earliest of equals
    values = [e["rec_long"] for e in epochs]
    best = 1 + values.index(max(values))
    assert [e["best_epoch"] for e in epochs][-1] == best
    assert read_config(checkpoint)["training"]["epoch"] == best
    assert load_encoder(checkpoint).dim == 32

    storage = open_storage(uri)
    files = storage.filesystem.get_file_info(FileSelector(storage.path, recursive=True))
    names = {file.path.removeprefix(f"{storage.path}/") for file in files if file.is_file}
    assert {"metrics.jsonl", "config.yaml", "checkpoint/model.safetensors"} <= names
    assert any(name.startswith("tensorboard/events.") for name in names)
    states = sorted(name.removesuffix("/run.json") for name in names if name.endswith("/run.json"))
    assert 1 <= len(states) <= 2  # the best one and the last
    storage.pull(tmp_path / "ray")
    state = read_state(tmp_path / states[-1])
    assert (state.done.epochs, state.num_workers) == (3, 2)
    assert state.best is not None
    assert state.best.epoch == best
    assert load_encoder(tmp_path / states[-1] / "checkpoint").dim == 32

    wanted = {"loss", "step_seconds", "photos_total", "epoch", "loss_part", "held_out"}
    deadline = time.monotonic() + 5
    while not {f"ray_reir_train_{name}" for name in wanted} <= scraped.keys():
        assert time.monotonic() < deadline, f"only {sorted(scraped)}"
        time.sleep(0.2)
    assert math.isfinite(scraped["ray_reir_train_loss"])
    assert scraped["ray_reir_train_photos_total"] in (8, 16)


def test_an_unusable_storage_stops_the_run_at_once(tmp_path: Path, s3_options: str) -> None:
    with pytest.raises(ConfigError, match="no-such-bucket"):
        train(
            tmp_path,
            tmp_path / "out",
            f"s3://no-such-bucket/x{s3_options}",
            epochs=1,
            num_workers=1,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("room", "taken"), [(0, 0), (1, 1), (2, 2), (3, 2), (5, 4), (7, 4), (9, 8), (40, 8)]
)
def test_elastic_runs_use_numbers_of_workers_that_divide_a_step(room: int, taken: int) -> None:
    scaling = ray.train.ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1})
    policy = EvenScalingPolicy(scaling, lambda workers: 32 % workers == 0)
    nodes = {"a": {"CPU": room // 2}, "b": {"CPU": room - room // 2}}
    assert policy._count_possible_workers(nodes) == taken


def test_user_errors_in_a_worker_are_reraised() -> None:
    def died_of(error: Exception) -> ray.train.WorkerGroupError:
        """What Ray raises when a worker has raised an error."""
        wrapped = UserExceptionWithTraceback(error, "Traceback ...")
        return ray.train.WorkerGroupError("all of it", {1: wrapped})

    with pytest.raises(ConfigError, match="zero_stage"), _reraised_user_errors():
        raise died_of(ConfigError("zero_stage=2"))
    with pytest.raises(ray.train.WorkerGroupError), _reraised_user_errors():
        raise died_of(RuntimeError("disk full"))


def wait_a_moment(step: int) -> dict[str, npt.NDArray[np.generic]]:
    time.sleep(0.2)
    return {"step": np.array([step])}


@pytest.mark.parametrize(
    ("cpus", "workers", "readers"),
    [(3, 2, (0.5, 1)), (4, 3, (0.3333, 1)), (96, 8, (1, 8)), (13, 4, (1, 2)), (2, 2, (0, 1))],
)
def test_readers_divide_the_cpus_that_training_does_not_use(
    cpus: float, workers: int, readers: tuple[float, int]
) -> None:
    assert reader_limits(cpus, workers) == readers


@pytest.mark.slow
@pytest.mark.ray
def test_the_readers_of_one_worker_do_not_block_another() -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    before = set(threading.enumerate())
    try:
        load = partial(stream_steps, wait_a_moment, 0, 10_000, readers=reader_limits(3, 2))
        with closing(load()) as first, closing(load()) as second:
            assert [int(next(first)["step"][0]) for _ in range(3)] == [0, 1, 2]
            assert [int(next(second)["step"][0]) for _ in range(3)] == [0, 1, 2]
        # a thread that asks Ray for a block after its end would end this process
        assert set(threading.enumerate()) <= before
    finally:
        ray.shutdown()


def test_an_existing_cluster_is_joined_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not accept a number of CPUs when it connects to a cluster."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("ray.init", asked.update)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    _start_ray(2, 4, use_gpu=False)
    assert asked.keys() == {"runtime_env", "log_to_driver"}
    monkeypatch.delenv("RAY_ADDRESS")
    _start_ray(2, 4, use_gpu=False)
    assert asked["address"] == "local"
    assert asked["num_cpus"] >= 3  # two workers, and one that reads ahead
