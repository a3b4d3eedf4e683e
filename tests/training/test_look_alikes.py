"""Look-alikes: who shares a batch, and that a step stays a function of its number alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reir.config import load_config
from reir.testing.tiny_clare import tiny_training
from reir_training.clare_data import GROUNDING
from reir_training.clare_task import ClareTask
from reir_training.config import ClareTrainConfig
from reir_training.leakage import training_photos
from reir_training.look_alikes import LookAlikes, likeness
from reir_training.sampling import Sampler, TaskStream

BATCH, NUM_SUBJECTS = 4, 6
SUBJECTS = [f"thing{i}" for i in range(NUM_SUBJECTS)]
TEXTS = [[f"red {subject} left of bus", "the bus"] for subject in SUBJECTS for _ in range(BATCH)]
ONE_GALLERY = [""] * len(TEXTS)


def stream(look_alikes: LookAlikes | None, alike_from: int = 0) -> TaskStream:
    wide = [True] * len(TEXTS)
    return TaskStream("grounding", wide, BATCH, 7, look_alikes=look_alikes, alike_from=alike_from)


def test_likeness_is_that_of_rare_words() -> None:
    said = likeness([["red dog"], ["a red dog"], ["red cat"], ["bird"]])
    assert said[0, 1] > said[0, 2] > said[0, 3] == 0
    np.testing.assert_allclose(np.diag(said), 1, atol=1e-6)


def test_a_word_that_all_say_makes_nobody_alike() -> None:
    np.testing.assert_array_equal(likeness([["a"], ["a"], ["a"]]), 0)


def test_a_batch_holds_those_of_whom_the_same_is_said() -> None:
    order = np.random.default_rng(0).permutation(len(TEXTS))
    grouped = LookAlikes(TEXTS, ONE_GALLERY).grouped(order, BATCH)
    assert sorted(grouped) == sorted(order)
    subjects = (grouped // BATCH).reshape(-1, BATCH)
    assert (subjects == subjects[:, :1]).all()
    assert (order // BATCH).reshape(-1, BATCH).std(axis=1).min() > 0  # chance would not do so


def test_galleries_stay_apart_as_far_as_they_fill_batches() -> None:
    galleries = ["first" if row % 2 else "second" for row in range(len(TEXTS))]
    grouped = LookAlikes(TEXTS, galleries).grouped(np.arange(len(TEXTS)), BATCH)
    of_batch = (grouped % 2).reshape(-1, BATCH)
    assert (of_batch == of_batch[:, :1]).all()


def test_chance_until_the_batch_from_which_on_they_are_asked_for() -> None:
    by_chance = stream(None)
    per_epoch = by_chance.batches_per_epoch
    later = stream(LookAlikes(TEXTS, ONE_GALLERY), alike_from=per_epoch + 1)
    for number in range(per_epoch + 1):
        np.testing.assert_array_equal(later.batch(number), by_chance.batch(number))
    next_one = later.batch(per_epoch + 1)
    assert (next_one // BATCH == next_one[0] // BATCH).all()
    third = np.stack([later.batch(2 * per_epoch + i) for i in range(per_epoch)])
    assert sorted(third.ravel()) == list(range(len(TEXTS)))
    assert (third // BATCH == third[:, :1] // BATCH).all()


def test_a_batch_depends_on_its_number_alone() -> None:
    look_alikes = LookAlikes(TEXTS, ONE_GALLERY)
    going_on, fresh = stream(look_alikes), stream(look_alikes)
    for number in range(9):
        going_on.batch(number)
    np.testing.assert_array_equal(going_on.batch(9), fresh.batch(9))


@pytest.mark.parametrize(("share", "alike_from"), [(1.0, None), (0.5, 3), (0.4, 3), (0.0, 0)])
def test_the_setting_is_a_share_of_stage_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, alike_from: int | None
) -> None:
    asked: list[object] = []

    def sampler(*arguments: Any) -> Sampler:
        asked.append(arguments)
        return asked_for(*arguments)

    config = load_config(ClareTrainConfig, tiny_training(tmp_path) | {"look_alikes_from": share})
    task = ClareTask("clare-base", config, init=None, rank=0, world_size=1)
    asked_for = task._data.sampler
    monkeypatch.setattr(task._data, "sampler", sampler)
    task._loader("clia", 6)
    task._loader("grounding", 6)
    assert asked == [((GROUNDING,), alike_from), (task._data.tasks,)]


def test_photos_know_their_gallery(tmp_path: Path) -> None:
    config = load_config(ClareTrainConfig, tiny_training(tmp_path))
    names = {photo.gallery.rpartition(":")[2] for photo in training_photos(config)}
    assert names == {"train", "val"}
