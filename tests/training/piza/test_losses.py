"""Losses of a grounding model: each against a slow loop."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reir_training.piza.losses import (
    ENCODER,
    Grounding,
    Predictions,
    grounding_loss,
    layers_of,
    match,
)

B, Q, L = 3, 6, 5


def _random(seed: int) -> tuple[Predictions, Grounding]:
    """Return predictions with padding, and expressions of different lengths."""
    random = torch.Generator().manual_seed(seed)
    low = torch.rand(B, Q, 2, generator=random) * 0.5
    boxes = torch.cat([low, low + 0.1 + 0.4 * torch.rand(B, Q, 2, generator=random)], -1)
    target = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 0.6, 0.7], [0.0, 0.1, 0.9, 0.4]])
    # [start, words, period, padding]
    words = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]).bool()
    tokens = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    logits = 2 * torch.randn(B, Q, L, generator=random)
    logits = logits.masked_fill(~tokens[:, None], -torch.inf).requires_grad_()
    return Predictions("", logits, boxes.requires_grad_()), Grounding(target, words, tokens)


def _area(box: list[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _giou(a: list[float], b: list[float]) -> float:
    inter = _area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = _area(a) + _area(b) - inter
    hull = _area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    return inter / union - (hull - union) / hull


def _l1(a: list[float], b: list[float]) -> float:
    def center_size(box: list[float]) -> list[float]:
        return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]]

    return sum(abs(x - y) for x, y in zip(center_size(a), center_size(b), strict=True))


def _focal(logit: float, positive: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    if positive:
        return -0.25 * (1 - p) ** 2 * math.log(p)
    return -0.75 * p**2 * math.log(1 - p)


def _cheapest(predictions: Predictions, truth: Grounding, row: int) -> int:
    costs = []
    for q in range(Q):
        by_class = sum(
            _focal(predictions.logits[row, q, j].item(), bool(truth.is_word[row, j]))
            for j in range(L)
            if truth.is_token[row, j]
        )
        box, target = predictions.boxes_xyxy[row, q].tolist(), truth.boxes_xyxy[row].tolist()
        costs.append(2 * by_class + 5 * _l1(box, target) - 2 * _giou(box, target))
    return costs.index(min(costs))


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_box_is_matched_as_in_a_loop(seed: int) -> None:
    predictions, truth = _random(seed)

    found = match(predictions.logits, predictions.boxes_xyxy, truth)

    assert found.tolist() == [_cheapest(predictions, truth, row) for row in range(B)]


@pytest.mark.parametrize("seed", range(5))
def test_the_terms_are_those_of_a_loop(seed: int) -> None:
    predictions, truth = _random(seed)
    focal = l1 = giou = 0.0
    for row in range(B):
        found = _cheapest(predictions, truth, row)
        for q in range(Q):
            for j in range(L):
                if truth.is_token[row, j]:
                    positive = q == found and bool(truth.is_word[row, j])
                    focal += _focal(predictions.logits[row, q, j].item(), positive)
        box, target = predictions.boxes_xyxy[row, found].tolist(), truth.boxes_xyxy[row].tolist()
        l1, giou = l1 + _l1(box, target), giou + 1 - _giou(box, target)

    terms = grounding_loss(predictions, truth)

    expected = {"class": focal / B, "l1": 5 * l1 / B, "giou": 2 * giou / B}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_padding_has_no_gradient_and_everything_is_finite() -> None:
    predictions, truth = _random(0)

    torch.stack([*grounding_loss(predictions, truth).values()]).sum().backward()  # type: ignore[no-untyped-call]

    gradient = predictions.logits.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert not gradient[:, :, -1][~truth.is_token[:, -1]].any()
    # Each token that counts has a gradient, also those that are no words.
    assert (gradient != 0).all(1)[truth.is_token].all()


def test_a_box_without_numbers_is_never_matched() -> None:
    predictions, truth = _random(0)
    boxes = predictions.boxes_xyxy.detach().clone()
    boxes[:, 2] = torch.nan

    assert 2 not in match(predictions.logits, boxes, truth).tolist()


def _output(num_places: int) -> Any:
    random = torch.Generator().manual_seed(1)

    def layer(num: int) -> tuple[Tensor, Tensor]:
        return torch.randn(B, num, L + 3, generator=random), torch.rand(B, num, 4, generator=random)

    last, first, encoder = layer(Q), layer(Q), layer(num_places)
    return SimpleNamespace(
        logits=last[0],
        pred_boxes=last[1],
        auxiliary_outputs=[{"logits": first[0], "pred_boxes": first[1]}],
        enc_outputs_class=encoder[0],
        enc_outputs_coord_logits=encoder[1],
    )


def test_every_layer_is_trained_and_the_encoder_with_its_best_proposals() -> None:
    output = _output(num_places=9)

    last, first, encoder = layers_of(output, L, Q)

    assert [last.name, first.name, encoder.name] == ["", "layer_0_", ENCODER]
    assert all(layer.logits.shape == (B, Q, L) for layer in (last, first, encoder))
    assert torch.equal(first.logits, output.auxiliary_outputs[0]["logits"][..., :L])
    for row in range(B):
        best = sorted(range(9), key=lambda s: -float(output.enc_outputs_class[row, s].max()))[:Q]
        expected = output.enc_outputs_class[row, best, :L]
        torch.testing.assert_close(encoder.logits[row], expected)
        x, y, w, h = output.enc_outputs_coord_logits[row, best].sigmoid().unbind(-1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        torch.testing.assert_close(encoder.boxes_xyxy[row], corners)
