"""The detector keeps batch, precision and checkpoint; boxes are decoded as in a loop over cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reir.models.picodet import PicoDet, ShuffleBlock, decode_boxes

SIDE = 96


@pytest.fixture(scope="module")
def detector() -> PicoDet:
    torch.manual_seed(0)
    return PicoDet().eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 255


def test_decoding_matches_a_loop_over_cells() -> None:
    sides = [(8, 16), (4, 8), (2, 4), (1, 2)]
    num_cells = sum(height * width for height, width in sides)
    logits = torch.randn(1, num_cells, 32, generator=torch.Generator().manual_seed(0))
    expected, rows = [], iter(logits[0].double().numpy())
    for (height, width), stride in zip(sides, (8, 16, 32, 64), strict=True):
        for y in range(height):
            for x in range(width):
                shares = np.exp(next(rows).reshape(4, 8))
                left, top, right, bottom = (row @ np.arange(8) / row.sum() for row in shares)
                cx, cy = x + 0.5, y + 0.5
                box = np.array([cx - left, cy - top, cx + right, cy + bottom])
                expected.append(box * stride)
    found = decode_boxes(logits, sides)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-4)


def test_a_shuffle_block_keeps_half_of_the_channels_at_even_places() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4)
    with torch.inference_mode():
        y = ShuffleBlock(8, 6)(x)
    assert torch.equal(y[:, 0::2], x[:, :4])
    assert y.shape == x.shape


def test_detector_outputs_have_the_expected_shapes_and_ranges(
    detector: PicoDet, images: torch.Tensor
) -> None:
    with torch.inference_mode():
        output = detector(images)
    anchors = 12 * 12 + 6 * 6 + 3 * 3 + 2 * 2
    assert output.boxes.shape == (3, anchors, 4)
    assert output.class_scores.shape == (3, anchors, 80)
    assert output.features.shape == (3, anchors, 96)
    assert 0 <= output.class_scores.min() <= output.class_scores.max() <= 1
    assert (output.boxes[..., 2:] >= output.boxes[..., :2]).all()


@pytest.mark.parametrize("shape", [(3, 96, 96), (1, 1, 96, 96), (1, 3, 100, 96)])
def test_images_of_wrong_shape_are_refused(detector: PicoDet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        detector(torch.zeros(shape))


def test_an_image_gives_the_same_output_alone_and_in_a_batch(
    detector: PicoDet, images: torch.Tensor
) -> None:
    with torch.inference_mode():
        together = detector(images)
        for i in range(len(images)):
            for alone, all_of_them in zip(detector(images[i : i + 1]), together, strict=True):
                torch.testing.assert_close(alone[0], all_of_them[i], rtol=1e-4, atol=1e-5)


def test_half_precision_returns_float32_close_to_full(
    detector: PicoDet, images: torch.Tensor
) -> None:
    with torch.inference_mode():
        expected = detector(images)
        with torch.autocast("cpu", torch.bfloat16):
            found = detector(images)
    assert found.boxes.dtype == found.class_scores.dtype == torch.float32
    torch.testing.assert_close(found.class_scores, expected.class_scores, rtol=0, atol=0.02)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0.02, atol=0.01)


def test_gradients_reach_every_parameter(images: torch.Tensor) -> None:
    detector = PicoDet().train()
    output = detector(images)
    (output.boxes.square().mean() + output.class_scores.sum()).backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []


def test_a_saved_detector_is_loaded_bit_for_bit(
    detector: PicoDet, images: torch.Tensor, tmp_path: Path
) -> None:
    save_file(detector.state_dict(), tmp_path / "detector.safetensors")
    loaded = PicoDet().eval()
    loaded.load_state_dict(load_file(tmp_path / "detector.safetensors"))
    with torch.inference_mode():
        assert torch.equal(loaded(images).boxes, detector(images).boxes)
