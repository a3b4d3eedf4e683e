"""The candidate head compares an expression with the classes and places of candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reir.checkpoint import load_encoder
from reir.datasets.coco_classes import COCO_CLASSES
from reir.models.nano.candidate_head import (
    PLACE_FEATURES,
    SCORE_OF_LOGIT,
    CandidateHead,
    CandidateHeadConfig,
    places_of,
)
from reir.models.nano.encoder import ClareNanoEncoder

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


def test_padding_does_not_change_the_places() -> None:
    boxes, classes = row_of(5), torch.rand(5, 80)
    alone = places_of(boxes, classes)
    padded = places_of(
        torch.cat([boxes, torch.zeros(4, 4)])[None], torch.cat([classes, torch.zeros(4, 80)])[None]
    )
    torch.testing.assert_close(padded[0, :5], alone)


def test_the_parts_of_two_vectors_compare_classes_and_places() -> None:
    head, texts = random_head(), torch.randn(3, WIDTH)
    boxes, classes = row_of(5), torch.rand(5, 80)
    parts = head.express(texts), head.describe(boxes, classes)
    assert [part.shape for part in parts] == [(3, head.config.dims), (5, head.config.dims)]
    logits = head(texts, classes.expand(3, -1, -1), places_of(boxes, classes).expand(3, -1, -1))
    expected = SCORE_OF_LOGIT * logits
    torch.testing.assert_close(parts[0] @ parts[1].T, expected, rtol=1e-3, atol=1e-4)
    head.usual.copy_(parts[1].mean(0))
    centered = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(
        parts[0] @ head.describe(boxes, classes).T, centered, rtol=1e-3, atol=1e-4
    )
    assert head.describe(torch.zeros(0, 4), torch.zeros(0, 80)).shape == (0, head.config.dims)


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
    model, _ = encoder.parts
    assert model.candidate_head is not None
    asked = encoder.encode_expressions([text])[0, -encoder.candidate_dims :]
    found = model.candidate_head.describe(row_of(4), classes_of(CUP, DOG, MAN, CUP).float())
    assert (found.numpy() @ asked).argmax() == right
    assert 0.05 < np.linalg.norm(asked) < 0.9  # the rest of a vector decides, too


def test_the_head_fills_the_last_dimensions_only(encoder: ClareNanoEncoder) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    (found,) = encoder.encode_images([photo])
    rest = encoder.dim - encoder.candidate_dims
    assert found.vectors.shape[1] == encoder.dim
    np.testing.assert_allclose(np.linalg.norm(found.image_vector), 1, rtol=1e-4)
    assert not found.image_vector[rest:].any()
    vectors = encoder.encode_expressions(["a dog on the left", "the cup"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)
    model, _ = encoder.parts
    (token_encoded,) = encoder.encode_tokens(["the cup"])
    states = torch.from_numpy(token_encoded.states)[None]
    members = model.text.pool(states, torch.ones(1, states.shape[1]))[0]
    cosine = torch.nn.functional.cosine_similarity(
        members.float(), torch.from_numpy(vectors[1, : model.config.dim]), dim=0
    )
    assert cosine > 0.999
