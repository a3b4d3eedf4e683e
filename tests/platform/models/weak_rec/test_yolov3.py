"""Heads, decoding and modes of YOLOv3, and the letter box."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reir.models.weak_rec.yolov3 import (
    GUIDED_SIZES_PX,
    PIXEL_MEAN,
    PIXEL_STD,
    STANDARD_SIZES_PX,
    GuidedHead,
    StandardHead,
    YoloV3,
    decode,
    letter_box,
    normalize_pixels,
)

few = settings(max_examples=40, deadline=None)
sides = st.integers(1, 900)


def tiny(*, guided: bool = True, paper_parity: bool = False) -> YoloV3:
    torch.manual_seed(0)
    return YoloV3(num_classes=3, guided=guided, width=2, paper_parity=paper_parity)


# ---------------------------------------------------------------------------------- boxes of cells


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_box(numbers: list[float], column: int, row: int, size: list[float]) -> list[float]:
    """Center, size and corners in pixels of one box, in a square of 3 by 3 cells."""
    center = [(sigmoid(numbers[0]) + column) * 32, (sigmoid(numbers[1]) + row) * 32]
    half = [math.exp(numbers[i]) * size[i - 2] / 2 for i in (2, 3)]
    corners = [center[i] - half[i] for i in (0, 1)] + [center[i] + half[i] for i in (0, 1)]
    return [min(max(each / 96, 0.0), 1.0) for each in corners]


@pytest.mark.parametrize("fixed", [True, False], ids=["standard", "guided"])
def test_boxes_are_decoded_cell_by_cell(fixed: bool) -> None:
    torch.manual_seed(1)
    predicted = torch.randn(2, 3, 7, 3, 3, dtype=torch.float64)
    sizes = torch.rand(*((3, 2, 1, 1) if fixed else (2, 3, 2, 3, 3)), dtype=torch.float64) * 60
    boxes, confidence = decode(predicted, sizes)
    sizes = sizes.expand(2, 3, 2, 3, 3)
    assert boxes.shape == (2, 9, 3, 4)
    for b in range(2):
        for cell in range(9):
            row, column = divmod(cell, 3)
            for r in range(3):
                numbers = predicted[b, r, :, row, column].tolist()
                size = sizes[b, r, :, row, column].tolist()
                want = slow_box(numbers, column, row, size)
                assert boxes[b, cell, r].tolist() == pytest.approx(want)
                assert confidence[b, cell, r].item() == pytest.approx(sigmoid(numbers[4]))


def test_huge_predictions_give_boxes_within_the_square() -> None:
    predicted = torch.full((1, 3, 6, 2, 2), 1e4)
    boxes, confidence = decode(predicted, torch.full((3, 2, 1, 1), 50.0))
    assert boxes.isfinite().all()
    assert confidence.isfinite().all()
    assert boxes.min() >= 0
    assert boxes.max() <= 1


def test_guided_head_predicts_sizes_and_moves_its_taps_by_them() -> None:
    torch.manual_seed(0)
    head, x = GuidedHead(8, 3), torch.randn(2, 8, 3, 3)
    predicted, sizes = head(x)
    guide = head.guide(x)
    for r, fixed in enumerate(GUIDED_SIZES_PX):
        for i in (0, 1):
            torch.testing.assert_close(sizes[:, r, i], guide[:, 2 * r + i].exp() * fixed[i])
    adapted = head.adapt(x, head.offsets(guide))
    want = head.predict(adapted).reshape(2, 4, 8, 3, 3)
    torch.testing.assert_close(predicted, want)
    # Each group of channels is moved by the size of one box.
    changed = guide.clone()
    changed[:, 2:4] += 1
    moved = (head.offsets(changed) != head.offsets(guide)).flatten(2).any(-1)
    assert moved[0].nonzero()[:, 0].tolist() == list(range(18, 36))


def test_standard_head_starts_from_fixed_sizes() -> None:
    head, x = StandardHead(8, 3), torch.randn(2, 8, 3, 3)
    predicted, sizes = head(x)
    assert sizes.flatten(1).tolist() == [list(size) for size in STANDARD_SIZES_PX]
    torch.testing.assert_close(predicted, head.predict(x).reshape(2, 3, 8, 3, 3))


# --------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(("guided", "num_boxes"), [(True, 4), (False, 3)])
def test_shapes_at_416_pixels(guided: bool, num_boxes: int) -> None:
    output = tiny(guided=guided)(torch.randn(2, 3, 416, 416))
    assert [tuple(each.shape) for each in output.maps] == [
        (2, 64, 13, 13),
        (2, 32, 26, 26),
        (2, 16, 52, 52),
    ]
    assert output.boxes.shape == (2, 169, num_boxes, 4)
    assert output.confidence.shape == (2, 169, num_boxes)
    assert (output.boxes[..., 2:] >= output.boxes[..., :2]).all()
    assert not output.boxes.requires_grad
    assert not any(each.requires_grad for each in output.maps)


def test_published_size() -> None:
    with torch.device("meta"):
        model = YoloV3()
    assert sum(p.numel() for p in model.parameters()) == 72_336_148
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 40)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must have shape"):
        tiny()(torch.zeros(shape))


def batch_statistics(model: YoloV3) -> Tensor:
    return torch.cat([b.flatten() for n, b in model.named_buffers() if "running" in n])


def test_training_leaves_it_as_it_is() -> None:
    model, pixels = tiny(), torch.randn(2, 3, 64, 64)
    before, first = batch_statistics(model), model(pixels)
    outer = nn.Sequential(model).train()
    assert outer.training
    again = model(pixels)
    assert torch.equal(batch_statistics(model), before)
    assert torch.equal(again.boxes, first.boxes)


def test_paper_parity_uses_statistics_of_the_batch_while_training() -> None:
    model, pixels = tiny(paper_parity=True), torch.randn(2, 3, 64, 64)
    before = batch_statistics(model).clone()
    evaluated = model(pixels)
    assert torch.equal(batch_statistics(model), before)
    nn.Sequential(model).train()
    trained = model(pixels)
    assert not torch.equal(batch_statistics(model), before)
    assert not torch.equal(trained.boxes, evaluated.boxes)
    # The statistics are those of the batch: a photo depends on the others.
    assert not torch.allclose(model(pixels[:1]).boxes, trained.boxes[:1])
    model.eval()
    torch.testing.assert_close(model(pixels[:1]).boxes, model(pixels).boxes[:1])


def test_standard_weights_see_colors_from_0_to_1() -> None:
    model, seen = tiny(guided=False), []
    model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    colors = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    model(normalize_pixels(colors))
    want = colors.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(seen[0], want)


# ----------------------------------------------------------------------------------- the letter box


def test_normalized_pixels_by_hand() -> None:
    square = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    square[0, 0, 1] = torch.tensor([255, 0, 51])
    got = normalize_pixels(square)
    want = [(v - m) / s for v, m, s in zip((1, 0, 0.2), PIXEL_MEAN, PIXEL_STD, strict=True)]
    assert got.shape == (1, 3, 2, 2)
    assert got[0, :, 0, 1].tolist() == pytest.approx(want)


def test_letter_box_by_hand() -> None:
    photo = np.full((100, 200, 3), 9, np.uint8)
    square, place = letter_box(photo)
    assert square.shape == (416, 416, 3)
    assert (place.left_px, place.top_px, place.width_px, place.height_px) == (0, 104, 416, 208)
    assert (square[104:312] == 9).all()
    assert (square[:104] == 127).all()
    assert (square[312:] == 127).all()


def test_photos_are_resized_without_antialiasing() -> None:
    photo = np.zeros((40, 80, 3), np.uint8)
    # Each pixel of the square is the mean of the inner four of 4 x 4 pixels.
    photo[1::4, 1::4] = 200
    square, _ = letter_box(photo, 20)
    assert (square[5:15] == 50).all()


@given(width=sides, height=sides, side=st.integers(16, 500))
@few
def test_letter_box_keeps_aspect_and_center(width: int, height: int, side: int) -> None:
    photo = np.zeros((height, width, 3), np.uint8)
    square, place = letter_box(photo, side)
    rows = np.flatnonzero((square == 0).any(axis=(1, 2)))
    columns = np.flatnonzero((square == 0).any(axis=(0, 2)))
    inside = square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (inside == 0).all()
    assert (square == 127).sum() == square.size - inside.size
    assert (rows[0], columns[0]) == (place.top_px, place.left_px)
    assert inside.shape[:2] == (place.height_px, place.width_px)
    assert max(inside.shape) == side
    # Truncated to whole pixels, but for photos that would have none.
    assert 0 <= min(width, height) * side / max(width, height) - min(inside.shape[:2]) < 1 or (
        min(inside.shape[:2]) == 1
    )
    for before, length in zip((rows[0], columns[0]), inside.shape[:2], strict=True):
        assert 0 <= (side - before - length) - before <= 1


@given(
    width=sides,
    height=sides,
    side=st.integers(16, 500),
    box=st.tuples(*[st.floats(0, 1)] * 4),
)
@few
def test_undo_is_the_inverse(
    width: int, height: int, side: int, box: tuple[float, float, float, float]
) -> None:
    _, place = letter_box(np.zeros((height, width, 3), np.uint8), side)
    sizes, starts = (place.width_px, place.height_px), (place.left_px, place.top_px)
    placed = [(v * sizes[i % 2] + starts[i % 2]) / side for i, v in enumerate(box)]
    got = place.undo(torch.tensor([[placed]], dtype=torch.float64))
    assert got.shape == (1, 1, 4)
    assert got[0, 0].tolist() == pytest.approx(box, abs=1e-9)


def test_boxes_in_the_border_are_clipped_to_the_photo() -> None:
    _, place = letter_box(np.zeros((100, 200, 3), np.uint8))
    got = place.undo(torch.tensor([[-0.1, 0.0, 0.5, 0.5], [0.2, 0.8, 0.3, 0.9]]))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0, 0.5, 0.5], [0.2, 1, 0.3, 1]]))
