"""The candidate head compares an expression with the classes and places of candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reir.checkpoint import load_candidate_head, load_encoder
from reir.datasets.coco_classes import COCO_CLASSES
from reir.models.interfaces import EncodedExpression
from reir.models.nano.candidate_head import (
    PLACE_FEATURES,
    CandidateHead,
    CandidateHeadConfig,
    places_of,
)
from reir.models.nano.encoder import ClareNanoEncoder
from reir.records import FloatArray

WIDTH = 16
ORDER = slice(9, 14)
"""Features of the order: left, top, area, bottom, height."""
CUP, DOG, MAN = (COCO_CLASSES.index(name) for name in ("cup", "dog", "person"))


def classes_of(*found: int) -> torch.Tensor:
    """(K, 80) scores of a detector that is certain of a class."""
    return torch.nn.functional.one_hot(torch.tensor(found), len(COCO_CLASSES)) * 0.9


def row_of(num: int) -> torch.Tensor:
    """(K, 4) equal boxes in a row, from left to right."""
    left = torch.arange(num) / num
    return torch.stack([left, torch.full((num,), 0.4), left + 0.1, torch.full((num,), 0.6)], dim=1)


def random_head() -> CandidateHead:
    torch.manual_seed(0)
    head = CandidateHead(CandidateHeadConfig(width=8), WIDTH).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def random_expression() -> EncodedExpression:
    states = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)
    return EncodedExpression(np.zeros(4, np.float32), states)


def test_the_order_counts_candidates_of_the_same_kind_only() -> None:
    places = places_of(row_of(4), classes_of(CUP, DOG, CUP, CUP))
    across = places[:, ORDER.start]
    assert across[0] == pytest.approx(-across[3])
    assert across[0] < -0.8  # left of all cups
    assert across[1] == 0  # the only dog
    assert across[2] == pytest.approx(0, abs=1e-6)  # between two cups
    # All lie and end equally high; their widths differ by rounding.
    assert places[:, ORDER][:, [1, 3, 4]].abs().max() == 0


def test_a_doubtful_candidate_counts_less_in_an_order() -> None:
    classes = classes_of(CUP, CUP)
    sure = places_of(row_of(2), classes)[0, ORDER.start]
    classes[1] *= 0.2
    assert sure < places_of(row_of(2), classes)[0, ORDER.start] < 0


def test_a_mirrored_photo_has_the_opposite_order_from_left_to_right() -> None:
    boxes, classes = torch.rand(6, 4).sort(dim=1).values, torch.rand(6, 80)
    x1, y1, x2, y2 = boxes.unbind(1)
    mirrored = torch.stack([1 - x2, y1, 1 - x1, y2], dim=1)
    one, other = places_of(boxes, classes), places_of(mirrored, classes)
    assert one.shape == (6, PLACE_FEATURES)
    torch.testing.assert_close(one[:, ORDER.start], -other[:, ORDER.start])
    torch.testing.assert_close(one[:, 0], -other[:, 0])
    down = [1, 3, *range(4, 9), *range(10, 14)]
    torch.testing.assert_close(one[:, down], other[:, down])
    # The thirds from left to right become those from right to left.
    torch.testing.assert_close(one[:, 14:17], other[:, 14:17].flip(1))


def test_a_score_is_that_of_a_batch_with_padding() -> None:
    head, expression = random_head(), random_expression()
    boxes, classes = row_of(5), torch.rand(5, 80)
    alone = head.score(expression, boxes.numpy(), classes.numpy())
    padded = torch.zeros(1, 9, 80), torch.zeros(1, 9, PLACE_FEATURES)
    padded[0][0, :5], padded[1][0, :5] = classes, places_of(boxes, classes)
    with torch.inference_mode():
        together = head(torch.from_numpy(expression.states.mean(0))[None], *padded)[0, :5]
    np.testing.assert_allclose(alone, together, rtol=1e-4)


def test_a_photo_without_candidates_has_no_scores() -> None:
    none = random_head().score(
        random_expression(), np.zeros((0, 4), np.float32), np.zeros((0, 80), np.float32)
    )
    assert none.shape == (0,)


@pytest.fixture(scope="module")
def encoder() -> ClareNanoEncoder:
    encoder = load_encoder()
    assert isinstance(encoder, ClareNanoEncoder)
    return encoder


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("the dog", 1),
        ("the person", 2),
        ("the cup on the far left", 0),
        ("the cup on the right", 3),
        ("the guy", 2),
    ],
)
def test_the_shipped_head_knows_classes_and_sides(
    encoder: ClareNanoEncoder, text: str, right: int
) -> None:
    head = load_candidate_head()
    assert head is not None
    (expression,) = encoder.encode_tokens([text])
    classes: FloatArray = classes_of(CUP, DOG, MAN, CUP).float().numpy()
    assert head.score(expression, row_of(4).numpy(), classes).argmax() == right
