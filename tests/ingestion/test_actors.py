"""Shards on real Ray workers: as many as you like, the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray

from reir.errors import CheckpointError, ConfigError
from reir.evaluate import Encoding, encode_gallery, evaluate_reir
from reir.models.clare_encoder import ClareEncoder
from reir.models.seams import InstanceEncoder, RgbImage
from reir.records import Instances
from reir.testing import FakeEncoder
from reir.testing.photo_sets import draw_photo_set, random_scenes
from reir.testing.tiny import tiny_tokenizer
from reir.testing.tiny_clare import tiny_clare
from reir_ingestion.actors import ray_runner

pytestmark = pytest.mark.ray


def load_clare() -> InstanceEncoder:
    return ClareEncoder(tiny_clare(num_candidates=4), tiny_tokenizer(), "d" * 64)


class DiesOnce(FakeEncoder):
    """Kills its process at the first photo that any process is given."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self._mark = mark

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        try:
            self._mark.touch(exist_ok=False)
        except FileExistsError:
            return super().encode_images(images)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class AnotherEncoder(FakeEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.digest = "e" * 64


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    # the classes of this file are no package that a worker could import
    from ray import cloudpickle

    import_path = os.environ.get("PYTHONPATH", "")
    cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": import_path}},
    )
    yield
    ray.shutdown()


def test_workers_give_the_bits_of_one_process(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(4, 11))
    runner = ray_runner(load_clare, num_workers=2, use_gpu=False, threads=1)
    here = evaluate_reir(load_clare(), data, tmp_path, how=Encoding(shard_photos=3))
    there = evaluate_reir(load_clare(), data, tmp_path, how=Encoding(shard_photos=3, runner=runner))
    assert here.leaky is not None
    assert there == here
    galleries = [
        encode_gallery(load_clare(), data, tmp_path, how=Encoding(shard_photos=3, runner=each))
        for each in (None, runner)
    ]
    np.testing.assert_array_equal(galleries[0].arrays.vectors, galleries[1].arrays.vectors)
    np.testing.assert_array_equal(galleries[0].arrays.boxes_px, galleries[1].arrays.boxes_px)


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
