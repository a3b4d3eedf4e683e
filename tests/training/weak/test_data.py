"""Items, the choice of their sentences, and steps that are shared among workers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reir.errors import ConfigError
from reir_testing.scenes import make_scenes, save_scenes
from reir_training.config import DataConfig
from reir_training.data.sentence_groups import PhotoSentences
from reir_training.weak.data import WeakBatch, WeakData, WeakPhotos, all_sentences, draw_sentences

GROUPS = (
    (("a", "b", "c"), ("d",)),
    (("e", "f"),),
    (("g",), ("h", "i", "j", "k"), ("l", "m")),
)
"""The sentences of each instance of three photos."""
TEXTS = [text for photo in GROUPS for group in photo for text in group]
ITEMS = [(row, group) for row, photo in enumerate(GROUPS) for group in photo]
BATCH = 4


def photos(groups: Sequence[tuple[tuple[str, ...], ...]] = GROUPS) -> list[PhotoSentences]:
    return [
        PhotoSentences(Path(f"{row}.jpg"), "train", each, (10, 10), str(row), "")
        for row, each in enumerate(groups)
    ]


def inputs(rows: Sequence[int]) -> dict[str, Tensor]:
    """Stands for the photos: their rows, twice."""
    return {"rows": torch.tensor(rows), "twice": 2 * torch.tensor(rows)}


def make(*, per_item: int = 3, seed: int = 0) -> WeakData:
    # A loaded sentence is the place of its text.
    loaded = torch.arange(len(TEXTS))[:, None]
    return WeakData(
        photos(), inputs, loaded, sentences_per_item=per_item, batch_size=BATCH, seed=seed
    )


def load(data: WeakData, number: int, rank: int = 0, world_size: int = 1) -> WeakBatch:
    return WeakBatch.from_arrays(data.load(data.sampler.step(number, rank, world_size), rank))


def texts_of(batch: WeakBatch) -> list[tuple[str, ...]]:
    """The sentences of each item of a batch."""
    return [tuple(TEXTS[int(row)] for row in rows) for rows in batch.sentences[..., 0].T]


# ------------------------------------------------------------------------ the choice of sentences


def published_choice(num_sentences: int, primary: int) -> list[int]:
    """The three sentences that CMA takes of an item, as its loader chooses them."""
    others = [number for number in range(num_sentences) if number != primary]
    if num_sentences == 1:
        return [primary] * 3
    if num_sentences == 2:
        return [primary, others[0], primary]
    return [primary, others[0], others[1]]


@pytest.mark.parametrize("num_sentences", [1, 2, 3, 4, 7])
def test_three_sentences_are_chosen_as_published(num_sentences: int) -> None:
    rng = np.random.default_rng(0)
    rows = range(10, 10 + num_sentences)
    primaries = Counter[int]()
    for _ in range(300):
        chosen = [row - 10 for row in draw_sentences(rows, 3, rng)]
        assert chosen == published_choice(num_sentences, chosen[0])
        primaries[chosen[0]] += 1
    assert primaries.keys() == set(range(num_sentences))
    assert min(primaries.values()) > 300 / num_sentences / 2


def test_refclip_takes_one_sentence() -> None:
    rng = np.random.default_rng(0)
    assert {tuple(draw_sentences((5, 8, 9), 1, rng)) for _ in range(50)} == {(5,), (8,), (9,)}


# ------------------------------------------------------------------------------- items and steps


def test_an_item_is_what_an_annotation_says_to_be_one_instance() -> None:
    data = make()
    assert [(row, tuple(TEXTS[i] for i in rows)) for row, rows in data.items] == ITEMS
    assert data.sampler.steps_per_epoch == 2


def test_a_batch_has_the_sentences_of_its_photos() -> None:
    data = make()
    groups = {frozenset(group): row for row, group in ITEMS}
    for number in range(6):
        batch = load(data, number)
        assert batch.sentences.shape == (3, BATCH, 1)
        assert torch.equal(batch.inputs["rows"], batch.photos)
        assert torch.equal(batch.inputs["twice"], 2 * batch.photos)
        for row, texts in zip(batch.photos.tolist(), texts_of(batch), strict=True):
            (group,) = (each for each in groups if set(texts) <= each)
            assert groups[group] == row


def test_every_item_is_used_in_an_epoch() -> None:
    data = make()
    for epoch in range(3):
        used = [texts_of(load(data, 2 * epoch + step)) for step in range(2)]
        seen = {texts[0] for step in used for texts in step}
        for _, group in ITEMS:
            assert seen & set(group)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_is_the_same_for_any_number_of_workers(world_size: int) -> None:
    data = make()
    for number in range(4):
        whole = load(data, number)
        parts = [load(data, number, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.photos for part in parts]), whole.photos)
        assert torch.equal(torch.cat([part.sentences for part in parts], dim=1), whole.sentences)
        for name, value in whole.inputs.items():
            assert torch.equal(torch.cat([part.inputs[name] for part in parts]), value)


def test_a_step_is_repeatable_and_another_seed_gives_another_one() -> None:
    first, other = [], []
    for number in range(4):
        first.append(texts_of(load(make(), number)))
        assert texts_of(load(make(), number)) == first[-1]
        other.append(texts_of(load(make(seed=1), number)))
    assert first != other


def test_an_item_that_fills_a_batch_may_come_with_other_sentences() -> None:
    chosen = {texts for number in range(40) for texts in texts_of(load(make(per_item=1), number))}
    assert chosen == {(text,) for text in TEXTS}


def test_a_batch_moves_to_a_device_with_everything() -> None:
    batch = load(make(), 0).to("meta")
    tensors = [batch.photos, batch.sentences, *batch.inputs.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_photos_without_sentences_give_no_items() -> None:
    with pytest.raises(ConfigError, match="'item' has no samples"):
        WeakData(photos(((), ())), inputs, torch.zeros(0, 1), sentences_per_item=1, batch_size=2)


def test_sentences_are_listed_in_the_order_of_items() -> None:
    assert WeakPhotos(photos(), []).sentences == TEXTS
    assert WeakPhotos(photos(), []).known() == []


@pytest.mark.parametrize("more", [{}, {"split": "train"}, {"split": "train", "held_out": 1}])
def test_the_sentences_of_all_splits_are_known(tmp_path: Path, more: dict[str, Any]) -> None:
    splits = {"train": make_scenes(3, 1), "val": make_scenes(1, 2), "test": make_scenes(1, 3)}
    save_scenes(tmp_path, splits, per_instance=1)
    written = json.loads((tmp_path / "expressions.json").read_text())
    found = all_sentences(
        DataConfig.model_validate({"data": [{"format": "photos", "path": tmp_path, **more}]})
    )
    assert sorted(found) == sorted(each["expression"] for each in written["expressions"])
