"""The model: scores of anchors, what training starts from, and settings that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reir.config import load_config
from reir.errors import ConfigError
from reir.models.weak_rec.anchors import Anchors
from reir.models.weak_rec.model import WeakRec, WeakRecConfig
from reir_testing.tiny import tiny_batch
from reir_testing.weak.tiny import (
    COMBINATIONS,
    SENTENCES,
    make_random,
    noise_photos,
    tiny_weak_rec,
)

NUM_CANDIDATES = 6
every_combination = pytest.mark.parametrize(("anchors", "language"), COMBINATIONS)


def found_in(model: WeakRec) -> Anchors:
    """The anchors of three photos; candidates have padding in the second one."""
    if model.config.anchors == "yolov3":
        return model.anchors(model.source.load(noise_photos()))
    batch = tiny_batch(3, NUM_CANDIDATES)
    batch.valid[1, 2:] = False
    return model.anchors(batch.tensors())


def sentences_of(model: WeakRec) -> Tensor:
    return model.language.load(SENTENCES[:3])


@every_combination
@pytest.mark.parametrize("attention", [False, True])
def test_scores_are_inner_products_of_what_is_encoded(
    anchors: str, language: str, attention: bool
) -> None:
    model = tiny_weak_rec(anchors=anchors, language=language, attention=attention)
    make_random(model)
    found, loaded = found_in(model), sentences_of(model)
    scores = model.score(found, loaded)
    sentences = model.encode_sentences(loaded)
    vectors = model.encode_anchors(found, sentences)
    assert scores.shape == (3, model.config.num_anchors)
    for photo in range(3):
        for row in range(model.config.num_anchors):
            if found.valid[photo, row]:
                products = (vectors[photo, row] * sentences.vectors[photo]).tolist()
                assert scores[photo, row].item() == pytest.approx(sum(products), abs=1e-4, rel=1e-4)
            else:
                assert scores[photo, row].item() == -math.inf
    assert scores[0].std() > 1e-3


def test_padding_does_not_change_the_scores_of_real_anchors() -> None:
    for attention in (False, True):
        model = tiny_weak_rec(attention=attention)
        make_random(model)
        found, loaded = found_in(model), sentences_of(model)
        before = model.score(found, loaded)
        padding = ~found.valid[..., None]
        changed = found._replace(features=found.features + 5 * padding)
        assert torch.equal(model.score(changed, loaded), before)
        assert (before[1, 2:] == -math.inf).all()
        assert before[1, :2].isfinite().all()


def test_the_similarity_of_classes_is_part_of_the_score() -> None:
    model = tiny_weak_rec(class_weight=2.5)
    make_random(model)
    found, loaded = found_in(model), sentences_of(model)
    plain = tiny_weak_rec(class_weight=0.0)
    plain.load_state_dict(model.state_dict())
    classes = torch.einsum("bac,bc->ba", found.class_scores, model.language.classes(loaded))
    valid = found.valid
    difference = model.score(found, loaded)[valid] - plain.score(found, loaded)[valid]
    torch.testing.assert_close(difference, 2.5 * classes[valid], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("attention", [False, True])
def test_training_starts_from_the_class_alone(attention: bool) -> None:
    model = tiny_weak_rec(class_weight=2.0, attention=attention)
    found, loaded = found_in(model), sentences_of(model)
    classes = torch.einsum("bac,bc->ba", found.class_scores, model.language.classes(loaded))
    valid = found.valid
    torch.testing.assert_close(model.score(found, loaded)[valid], 2 * classes[valid])
    # Zero is a start, and no end: the projection of sentences has a gradient.
    torch.autograd.backward(model.score(found, loaded)[valid].sum())
    gradient = model.project_texts.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@every_combination
@pytest.mark.parametrize("paper_parity", [False, True])
def test_attention_is_a_projection_at_first_and_then_reads_the_sentence(
    anchors: str, language: str, paper_parity: bool
) -> None:
    model = tiny_weak_rec(
        anchors=anchors, language=language, attention=True, paper_parity=paper_parity
    )
    assert model.attention is not None
    assert model.project_anchors is None
    found = found_in(model)
    one, other = (model.encode_sentences(model.language.load([t] * 3)) for t in SENTENCES[:2])
    width, valid = model.config.dim, found.valid
    before = model.encode_anchors(found, one)[..., :width]
    projected = found.features @ model.attention.project.weight.T
    torch.testing.assert_close(before[valid], projected[valid], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.encode_anchors(found, other)[..., :width], before)
    make_random(model)
    after = [model.encode_anchors(found, each)[valid] for each in (one, other)]
    assert (after[0] - after[1]).abs().max() > 1e-2


def test_without_attention_anchors_do_not_depend_on_the_sentence() -> None:
    model = tiny_weak_rec()
    make_random(model)
    found = found_in(model)
    one, other = (model.encode_sentences(model.language.load([t] * 3)) for t in SENTENCES[:2])
    assert torch.equal(model.encode_anchors(found, one), model.encode_anchors(found, other))
    assert not torch.allclose(one.vectors, other.vectors)


def test_only_the_most_confident_anchors_can_be_chosen() -> None:
    model = tiny_weak_rec(num_anchors=2)
    batch = tiny_batch(3, NUM_CANDIDATES)
    found = model.anchors(batch.tensors())
    assert found.valid.shape == (3, 2)
    # Candidates are ordered by their objectness.
    assert torch.equal(found.answers(), batch.boxes[:, :2])


def test_dropout_is_that_of_the_settings_and_only_in_training() -> None:
    model = tiny_weak_rec(anchor_dropout=0.9, text_dropout=0.9)
    make_random(model)
    found, loaded = found_in(model), sentences_of(model)
    assert torch.equal(model.score(found, loaded), model.score(found, loaded))
    model.train()
    torch.manual_seed(0)
    features = model.drop_anchors(torch.ones(10_000))
    assert (features == 0).float().mean().item() == pytest.approx(0.9, abs=0.02)
    valid = found.valid
    assert not torch.equal(model.score(found, loaded)[valid], model.score(found, loaded)[valid])
    still = tiny_weak_rec().train()
    make_random(still)
    assert torch.equal(still.score(found, loaded), still.score(found, loaded))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"anchors": "yolov3", "language": "gru"}, "got yolov3 and gru; set class_weight: 0"),
        ({"language": "gru"}, "got candidates and gru; set class_weight: 0"),
        ({"anchors": "yolov3"}, "got yolov3 and phrase; set class_weight: 0"),
        ({"anchors": "boxes"}, "candidates"),
        ({"dim": 12}, "multiple of 8"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"anchor_dropout": 1.0}, "anchor_dropout"),
        ({"num_anchor": 3}, "num_anchor"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(WeakRecConfig, {"class_weight": 1.0} | changes)
