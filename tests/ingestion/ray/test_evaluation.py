"""Evaluation on real Ray workers: any number of them gives the same bits."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reir.errors import CheckpointError, ConfigError
from reir.evaluate import Encoding, evaluate_reir
from reir.models.clare.encoder import ClareEncoder
from reir.models.interfaces import InstanceEncoder
from reir_ingestion.ray.evaluation import ray_evaluation_runner
from reir_testing import FakeEncoder
from reir_testing.ingestion import CrashOnceEncoder
from reir_testing.photo_sets import draw_photo_set, random_scenes
from reir_testing.tiny import tiny_tokenizer
from reir_testing.tiny_clare import tiny_clare

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def load_clare() -> InstanceEncoder:
    return ClareEncoder(tiny_clare(num_candidates=4), tiny_tokenizer(), "d" * 64)


class AnotherEncoder(FakeEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.digest = "e" * 64


class NotingEncoder(FakeEncoder):
    """Notes in a folder which processes encode photos."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def encode_images(self, images: Any) -> Any:
        (self._folder / str(os.getpid())).touch()
        return super().encode_images(images)


def test_workers_return_the_bits_of_one_process(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(4, 11))
    runner = ray_evaluation_runner(load_clare, num_workers=2, use_gpu=False, threads=1)
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


def test_no_worker_waits_while_another_has_two_shards(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(5, 4))
    (tmp_path / "noted").mkdir()
    load = partial(NotingEncoder, tmp_path / "noted")
    runner = ray_evaluation_runner(load, num_workers=2, use_gpu=False, threads=1)
    evaluate_reir(FakeEncoder(), data, tmp_path, how=Encoding(shard_photos=2, runner=runner))
    assert len(list((tmp_path / "noted").iterdir())) == 2


def test_a_worker_that_dies_repeats_its_shards(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(5, 8))
    load = partial(CrashOnceEncoder, tmp_path / "died")
    runner = ray_evaluation_runner(load, num_workers=1, use_gpu=False, threads=1)
    found = evaluate_reir(
        FakeEncoder(), data, tmp_path, how=Encoding(shard_photos=2, runner=runner)
    )
    assert (tmp_path / "died").exists()
    assert found == evaluate_reir(FakeEncoder(), data, tmp_path)


def test_an_error_in_a_worker_is_raised_unwrapped(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(5, 2))
    runner = ray_evaluation_runner(AnotherEncoder, num_workers=1, use_gpu=False, threads=1)
    with pytest.raises(CheckpointError, match="an encoder with digest eeeeeeeeeeee"):
        evaluate_reir(FakeEncoder(), data, tmp_path, how=Encoding(runner=runner))


def test_missing_gpus_are_an_error_rather_than_a_wait(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(5, 2))
    runner = ray_evaluation_runner(FakeEncoder, num_workers=99, use_gpu=True, threads=1)
    with pytest.raises(ConfigError, match="99 workers needs 99 GPUs"):
        evaluate_reir(FakeEncoder(), data, tmp_path, how=Encoding(runner=runner))
