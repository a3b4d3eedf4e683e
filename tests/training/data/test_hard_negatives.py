"""Hard negatives: which samples share a batch, and that a step depends only on its number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reir.config import load_config
from reir_testing.tiny_clare import tiny_training
from reir_training.clare.data import GROUNDING
from reir_training.clare.task import ClareTask
from reir_training.config import ClareTrainConfig
from reir_training.data.hard_negatives import (
    HardNegativeBatches,
    beside_look_alikes,
    text_similarity,
)
from reir_training.data.leakage import training_photos
from reir_training.data.sampling import Sampler, TaskStream

BATCH, NUM_SUBJECTS = 4, 6
SUBJECTS = [f"thing{i}" for i in range(NUM_SUBJECTS)]
TEXTS = [[f"red {subject} left of bus", "the bus"] for subject in SUBJECTS for _ in range(BATCH)]
ONE_GALLERY = [""] * len(TEXTS)


def stream(hard_negatives: HardNegativeBatches | None, first_hard_batch: int = 0) -> TaskStream:
    wide = [True] * len(TEXTS)
    return TaskStream(
        "grounding",
        wide,
        BATCH,
        7,
        hard_negatives=hard_negatives,
        first_hard_batch=first_hard_batch,
    )


def test_a_photo_is_followed_by_one_of_its_look_alikes_that_is_left() -> None:
    look_alikes = {0: [3, 5], 1: [3], 2: [4], 4: [2]}
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = beside_look_alikes(np.array([0, 1, 2, 3, 4, 5]), look_alikes, rng).tolist()
        assert sorted(found) == [0, 1, 2, 3, 4, 5]
        other = found[1]
        seen.add(other)
        rest = [1, 3, 2, 4] if other == 5 else [1, 2, 4, 5]
        assert found == [0, other, *rest]
    assert seen == {3, 5}
    order = np.array([2, 0, 1])
    assert beside_look_alikes(order, {}, np.random.default_rng(0)).tolist() == [2, 0, 1]


def test_similarity_depends_on_rare_words() -> None:
    said = text_similarity([["red dog"], ["a red dog"], ["red cat"], ["bird"]])
    assert said[0, 1] > said[0, 2] > said[0, 3] == 0
    np.testing.assert_allclose(np.diag(said), 1, atol=1e-6)


def test_a_word_in_all_expressions_adds_no_similarity() -> None:
    np.testing.assert_array_equal(text_similarity([["a"], ["a"], ["a"]]), 0)


def test_a_batch_contains_photos_with_similar_expressions() -> None:
    order = np.random.default_rng(0).permutation(len(TEXTS))
    grouped = HardNegativeBatches(TEXTS, ONE_GALLERY).grouped(order, BATCH)
    assert sorted(grouped) == sorted(order)
    subjects = (grouped // BATCH).reshape(-1, BATCH)
    assert (subjects == subjects[:, :1]).all()
    assert (order // BATCH).reshape(-1, BATCH).std(axis=1).min() > 0  # chance would not do so


def test_batches_do_not_mix_galleries_unless_one_runs_out() -> None:
    galleries = ["first" if row % 2 else "second" for row in range(len(TEXTS))]
    grouped = HardNegativeBatches(TEXTS, galleries).grouped(np.arange(len(TEXTS)), BATCH)
    of_batch = (grouped % 2).reshape(-1, BATCH)
    assert (of_batch == of_batch[:, :1]).all()


def test_batches_are_random_before_the_first_hard_batch() -> None:
    by_chance = stream(None)
    per_epoch = by_chance.batches_per_epoch
    later = stream(HardNegativeBatches(TEXTS, ONE_GALLERY), first_hard_batch=per_epoch + 1)
    for number in range(per_epoch + 1):
        np.testing.assert_array_equal(later.batch(number), by_chance.batch(number))
    next_one = later.batch(per_epoch + 1)
    assert (next_one // BATCH == next_one[0] // BATCH).all()
    third = np.stack([later.batch(2 * per_epoch + i) for i in range(per_epoch)])
    assert sorted(third.ravel()) == list(range(len(TEXTS)))
    assert (third // BATCH == third[:, :1] // BATCH).all()


def test_a_batch_depends_only_on_its_number() -> None:
    hard_negatives = HardNegativeBatches(TEXTS, ONE_GALLERY)
    going_on, fresh = stream(hard_negatives), stream(hard_negatives)
    for number in range(9):
        going_on.batch(number)
    np.testing.assert_array_equal(going_on.batch(9), fresh.batch(9))


@pytest.mark.parametrize(("share", "first_hard_batch"), [(1.0, None), (0.5, 3), (0.4, 3), (0.0, 0)])
def test_hard_negatives_from_is_a_fraction_of_stage_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, first_hard_batch: int | None
) -> None:
    asked: list[object] = []

    def sampler(*arguments: Any) -> Sampler:
        asked.append(arguments)
        return asked_for(*arguments)

    config = load_config(ClareTrainConfig, tiny_training(tmp_path) | {"hard_negatives_from": share})
    task = ClareTask("clare-base", config, init=None, rank=0, world_size=1)
    asked_for = task._data.sampler
    monkeypatch.setattr(task._data, "sampler", sampler)
    task._loader("clia", 6)
    task._loader("grounding", 6)
    assert asked == [((GROUNDING,), first_hard_batch), (task._data.tasks,)]


def test_photos_have_the_gallery_of_their_smallest_split(tmp_path: Path) -> None:
    config = load_config(ClareTrainConfig, tiny_training(tmp_path))
    names = {photo.gallery.rpartition(":")[2] for photo in training_photos(config)}
    assert names == {"train", "val"}
