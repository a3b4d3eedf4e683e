"""The mask branch: against one instance at a time, padding, precision, gradients."""

# Shapes: B photos, P instances, h x w cells of stride 8, S = channels + 2

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reir.models.clare.masks import (
    CHANNELS,
    LEAST_SIDE,
    NUM_WEIGHTS,
    convolve,
    repeat_edges,
    split_weights,
)
from reir.models.clare.model import Clare
from reir_testing.tiny_clare import tiny_clare, tiny_clare_config, tiny_photos


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_boxes(*shape: int, seed: int = 0) -> Tensor:
    points = torch.rand(*shape, 2, 2, generator=torch.Generator().manual_seed(seed))
    return points.sort(dim=-2).values.flatten(-2)


def some_maps(photos: int, height: int, width: int) -> Tensor:
    """Random channels, and the true centers of the cells of photos that fill the map."""
    y, x = (torch.arange(n) + 0.5 for n in (height, width))
    centers = torch.stack(torch.meshgrid(x / width, y / height, indexing="xy"))
    return torch.cat(
        [random(photos, CHANNELS, height, width), centers.expand(photos, -1, -1, -1)], 1
    )


def slow_mask(maps_Shw: Tensor, weights_W: Tensor, box_4: Tensor) -> Tensor:
    """(h, w) logits of one instance: explicit relative places, three plain convolutions."""
    height, width = maps_Shw.shape[1:]
    cell = (1 / width, 1 / height)
    places = []
    for axis in (0, 1):
        side = max(float(box_4[axis + 2] - box_4[axis]), LEAST_SIDE * cell[axis])
        center = float(box_4[axis] + box_4[axis + 2]) / 2
        places.append((maps_Shw[CHANNELS + axis] - center) / side)
    x, start = torch.cat([maps_Shw[:CHANNELS], torch.stack(places)])[None], 0
    for inputs, outputs in ((10, 8), (8, 8), (8, 1)):
        weight = weights_W[start : start + inputs * outputs].view(outputs, inputs, 1, 1)
        start += inputs * outputs
        bias = weights_W[start : start + outputs]
        start += outputs
        x = F.conv2d(x, weight, bias)
        x = x.relu() if outputs > 1 else x
    assert start == len(weights_W) == 169
    return x[0, 0]


@pytest.mark.parametrize("size", [(20, 28), (3, 5), (1, 1)])
def test_masks_of_a_batch_equal_those_of_single_instances(size: tuple[int, int]) -> None:
    maps, weights, boxes = some_maps(2, *size), random(2, 5, NUM_WEIGHTS), some_boxes(2, 5)
    boxes[0, 0, 2:] = boxes[0, 0, :2]  # a box without area
    got = convolve(maps, weights, boxes)
    for b in range(2):
        for p in range(5):
            want = slow_mask(maps[b], weights[b, p], boxes[b, p])
            torch.testing.assert_close(got[b, p], want, rtol=1e-4, atol=1e-4)


def test_a_mask_by_hand() -> None:
    """One live path, `relu(0.25 - x)`: an instance of the cells left of x = 0.25."""
    weights = torch.zeros(1, 1, NUM_WEIGHTS)
    (first, first_bias), (second, _), (third, third_bias) = split_weights(weights)
    first[..., 0, CHANNELS], first_bias[..., 0] = -1.0, 0.25
    second[..., 0, 0] = third[..., 0, 0] = 1.0
    third_bias[...] = -0.125
    got = convolve(some_maps(1, 4, 16), weights, torch.tensor([[[0.25, 0.0, 0.75, 1.0]]]))
    x = ((torch.arange(16) + 0.5) / 16 - 0.5) / 0.5
    want = (0.25 - x).clamp(min=0) - 0.125
    torch.testing.assert_close(got[0, 0], want.expand(4, -1))
    assert split_weights(random(1, 2, NUM_WEIGHTS))[2][1].shape == (1, 2, 1)


def test_cells_in_the_padding_repeat_the_edge() -> None:
    maps, valid = random(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.bool)
    valid[0, :2, :3] = valid[1] = True
    got = repeat_edges(maps, valid)
    assert torch.equal(got[1], maps[1])
    assert torch.equal(got[0, :, :2, :3], maps[0, :, :2, :3])
    assert torch.equal(got[0, :, 3, :3], maps[0, :, 1, :3])
    assert torch.equal(got[0, :, 1, 4], maps[0, :, 1, 2])
    assert torch.equal(got[0, :, 3, 4], maps[0, :, 1, 2])


# ---------------------------------------------------------------------------------- in the model


def masks_of(model: Clare, pixels: Tensor, padding: Tensor) -> Tensor:
    """(B, N, H / 4, W / 4) of the last layer."""
    output = model(pixels, padding)
    assert output.masks is not None
    logits: Tensor = model.masks(output.masks.maps, output.masks.states[-1], output.boxes[-1])
    return logits


@pytest.mark.parametrize("paper_parity", [False, True])
def test_masks_have_a_quarter_of_the_resolution_of_the_batch(paper_parity: bool) -> None:
    model = tiny_clare(masks=True, paper_parity=paper_parity)
    with torch.no_grad():
        assert masks_of(model, *tiny_photos([(64, 96), (50, 64)])).shape == (2, 20, 16, 24)


@torch.no_grad()
def test_a_photo_has_the_same_masks_alone_and_in_a_padded_batch() -> None:
    model, size = tiny_clare(masks=True), (50, 71)
    alone = masks_of(model, *tiny_photos([size]))
    together = masks_of(model, *tiny_photos([size, (128, 120)]))
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    assert alone.std() > 1e-2
    torch.testing.assert_close(
        together[0, :, :rows, :columns], alone[0, :, :rows, :columns], rtol=1e-3, atol=1e-4
    )


def test_the_mask_branch_does_not_change_the_other_outputs() -> None:
    with_masks, without = tiny_clare(masks=True), tiny_clare()
    report = with_masks.load_state_dict(without.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert all(name.startswith("masks.") for name in report.missing_keys)
    photos = tiny_photos([(64, 96)])
    with torch.no_grad():
        one, other = with_masks(*photos), without(*photos)
    assert torch.equal(one.objects, other.objects)
    assert torch.equal(one.boxes, other.boxes)
    assert other.masks is None


def test_gradients_of_masks_reach_every_weight_of_the_branch_and_no_boxes() -> None:
    model = tiny_clare(masks=True)
    output = model(*tiny_photos([(64, 96)]))
    boxes = output.boxes[-1].detach().requires_grad_()
    model.masks(output.masks.maps, output.masks.states[-1], boxes).square().mean().backward()
    assert boxes.grad is None
    for name, parameter in model.masks.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any(), name
    assert model.pyramid.upsample.weight.grad is not None


@torch.no_grad()
def test_half_precision_masks_are_close_to_full_precision() -> None:
    model, photos = tiny_clare(masks=True), tiny_photos([(64, 96)])
    want = model(*photos)
    full = model.masks(want.masks.maps, want.masks.states[-1], want.boxes[-1])
    with torch.autocast("cpu", torch.bfloat16):
        half = model.masks(want.masks.maps, want.masks.states[-1], want.boxes[-1])
    assert half.dtype == torch.float32
    assert ((half > 0) == (full > 0)).float().mean() > 0.95


def test_a_patch_size_that_masks_cannot_divide_is_refused() -> None:
    assert tiny_clare_config(patch_px=14).masks is False
    with pytest.raises(ValueError, match="patch_px must be a multiple of 4"):
        tiny_clare_config(patch_px=14, masks=True)
