"""Shards on real Ray workers: as many as you like, the same bits."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import NodeDiedError, RayTaskError

from reir.errors import CheckpointError, ConfigError, WorkersUnavailable
from reir.evaluate import Encoding, evaluate_reir
from reir.models.clare_encoder import ClareEncoder
from reir.models.seams import InstanceEncoder
from reir.testing import FakeEncoder
from reir.testing.photo_sets import draw_photo_set, random_scenes
from reir.testing.tiny import tiny_tokenizer
from reir.testing.tiny_clare import tiny_clare
from reir_ingestion import actors
from reir_ingestion.actors import IDLE_MS, cluster, our_errors, ray_runner
from reir_ingestion.testing import DiesOnce

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def load_clare() -> InstanceEncoder:
    return ClareEncoder(tiny_clare(num_candidates=4), tiny_tokenizer(), "d" * 64)


class AnotherEncoder(FakeEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.digest = "e" * 64


def test_workers_give_the_bits_of_one_process(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(4, 11))
    runner = ray_runner(load_clare, num_workers=2, use_gpu=False, threads=1)
    here, there = (
        evaluate_reir(
            load_clare(),
            data,
            tmp_path,
            how=Encoding(shard_photos=3, runner=each, work=tmp_path / name),
        )
        for name, each in (("here", None), ("there", runner))
    )
    assert here.leaky is not None
    assert there == here
    for shard in sorted((tmp_path / "here").glob("*/*.npz")):
        other = tmp_path / "there" / shard.relative_to(tmp_path / "here")
        with np.load(shard) as ours, np.load(other) as theirs:
            assert ours["chosen_counts"].sum() > 0
            assert ours.files == theirs.files
            for name in ours.files:
                np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_worker_that_dies_does_its_shards_again(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(5, 8))
    load = partial(DiesOnce, tmp_path / "died")
    runner = ray_runner(load, num_workers=1, use_gpu=False, threads=1)
    found = evaluate_reir(
        FakeEncoder(), data, tmp_path, how=Encoding(shard_photos=2, runner=runner)
    )
    assert (tmp_path / "died").exists()
    assert found == evaluate_reir(FakeEncoder(), data, tmp_path)


def test_errors_of_a_worker_are_those_of_one_process(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(5, 2))
    runner = ray_runner(AnotherEncoder, num_workers=1, use_gpu=False, threads=1)
    with pytest.raises(CheckpointError, match="an encoder of digest eeeeeeeeeeee"):
        evaluate_reir(FakeEncoder(), data, tmp_path, how=Encoding(runner=runner))


def test_gpus_that_are_not_there_are_not_waited_for(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(5, 2))
    runner = ray_runner(FakeEncoder, num_workers=99, use_gpu=True, threads=1)
    with pytest.raises(ConfigError, match="99 workers needs 99 GPUs"):
        evaluate_reir(FakeEncoder(), data, tmp_path, how=Encoding(runner=runner))


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (
            "",
            {
                "address": "local",
                "num_cpus": 64,
                "include_dashboard": False,
                "_system_config": {"idle_worker_killing_time_threshold_ms": IDLE_MS},
            },
        ),
        ("cluster:6379", {"address": "cluster:6379"}),
    ],
    ids=["alone", "cluster"],
)
def test_only_a_cluster_that_is_named_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, options: dict[str, object]
) -> None:
    class StopHereError(BaseException):
        pass

    def init(**given: object) -> None:
        assert given == options | {"log_to_driver": False}
        raise StopHereError

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(actors, "_check_listens", lambda _: None)
    data = draw_photo_set(tmp_path, random_scenes(5, 2))
    runner = ray_runner(FakeEncoder, num_workers=32, use_gpu=False, threads=2)
    with pytest.raises(StopHereError):
        evaluate_reir(FakeEncoder(), data, tmp_path, how=Encoding(runner=runner))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "could not start on this machine: no room. It needs .* --runner local"),
        ("cluster:1", "at RAY_ADDRESS cluster:1 does not answer: no room. .* unset RAY_ADDRESS"),
    ],
    ids=["alone", "cluster"],
)
def test_the_error_says_what_to_do_if_ray_cannot_start(
    monkeypatch: pytest.MonkeyPatch, address: str, said: str
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no room\nand a page of C++")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(actors, "_check_listens", lambda _: None)
    with pytest.raises(WorkersUnavailable, match=said) as caught, cluster(2):
        pass
    assert "C++" not in str(caught.value)


def test_a_cluster_address_that_refuses_connections_is_reported_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray itself would retry for a quarter of an hour."""
    with socket.socket() as held:  # bound but not listening, so that no other process listens there
        held.bind(("0.0.0.0", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
        said = f"{address} does not answer: .*refused.* unset RAY_ADDRESS"
        with pytest.raises(WorkersUnavailable, match=said), cluster(2):
            pass


def test_an_error_of_ray_is_explained_in_one_line() -> None:
    lost = pytest.raises(
        WorkersUnavailable, match=r"Ray lost a worker, a machine or data of this job: .*died\. What"
    )
    with lost as caught, our_errors():
        raise NodeDiedError("the node died.\nand a page of C++")
    assert "C++" not in str(caught.value)
    bug = RayTaskError("read_parcel", "trace", ValueError("a bug"))
    with pytest.raises(RayTaskError), our_errors():
        raise bug
