"""The segmenter gives each box the mask and the box that the head finds in its crop."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from reir.checkpoint import SHIPPED, load_encoder, load_segmenter, save_mask_head
from reir.errors import CheckpointError
from reir.images import rle
from reir.models.nano.crop_network import CropNetwork
from reir.models.nano.mask_head import MaskHead, MaskHeadConfig, MaskOutput, prompt_map
from reir.models.nano.segmenter import NanoSegmenter
from reir.records import FloatArray, RgbImage

CONFIG = MaskHeadConfig(width=8, crop_px=64)


def network() -> CropNetwork:
    torch.manual_seed(0)
    return CropNetwork("efficientnet_lite0").eval()


class WhitePixels(MaskHead):
    """A head whose mask is the bright part of the crop, and whose box is the prompt."""

    def __init__(self) -> None:
        super().__init__(CONFIG, network().level_channels)

    def forward(self, levels: Sequence[torch.Tensor], boxes_N4: torch.Tensor) -> MaskOutput:
        # The "network" below hands on the crop itself.
        bright = levels[0].mean(1) - 128
        at = (torch.arange(64) + 0.5) / 64
        return MaskOutput(bright, -5e3 * (at - boxes_N4[:, :, None]).square())


class Pixels(CropNetwork):
    """A crop network whose only level is the crop at half of its size."""

    def __init__(self) -> None:
        super().__init__("efficientnet_lite0")

    def levels(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.avg_pool2d(images, 2)]


def scene() -> RgbImage:
    """A black photo with a white square and a white bar."""
    photo = np.zeros((120, 200, 3), dtype=np.uint8)
    photo[20:60, 40:80] = 255
    photo[90:110, 100:200] = 255
    return photo


BOXES = np.array([[0.2, 20 / 120, 0.4, 0.5], [0.5, 0.75, 1.0, 110 / 120]], dtype=np.float32)


def test_masks_and_boxes_are_those_of_the_photo() -> None:
    segmenter = NanoSegmenter(Pixels(), WhitePixels(), torch.float32)
    square, bar = segmenter.segment(scene(), BOXES)
    for found, box, rows, columns in (
        (square, BOXES[0], (20, 60), (40, 80)),
        (bar, BOXES[1], (90, 110), (100, 200)),
    ):
        truth = np.zeros((120, 200), dtype=bool)
        truth[slice(*rows), slice(*columns)] = True
        assert rle.pairwise_iou([found.mask], [rle.encode(truth)])[0, 0] > 0.93
        assert found.box == pytest.approx(box.tolist(), abs=0.01)


def test_no_box_and_boxes_without_area_are_no_error() -> None:
    segmenter = NanoSegmenter(network(), MaskHead(CONFIG, network().level_channels), torch.float32)
    assert segmenter.segment(scene(), np.zeros((0, 4), dtype=np.float32)) == []
    flat = np.array([[0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=np.float32)
    for each in segmenter.segment(scene(), flat):
        assert each.mask.size == (120, 200)
        assert 0 <= each.box[0] <= each.box[2] <= 1
        assert 0 <= each.box[1] <= each.box[3] <= 1


def test_a_batch_gives_what_single_boxes_give() -> None:
    segmenter = NanoSegmenter(network(), MaskHead(CONFIG, network().level_channels), torch.float32)
    together = segmenter.segment(scene(), BOXES)
    alone = [segmenter.segment(scene(), box[None])[0] for box in BOXES]
    for one, other in zip(together, alone, strict=True):
        assert one.box == pytest.approx(other.box, abs=1e-4)
        assert rle.area_px(one.mask) == pytest.approx(rle.area_px(other.mask), abs=20)


def test_the_prompt_map_is_the_distance_to_the_edges_in_box_sides() -> None:
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    left, right, top, bottom = prompt_map(box, 4)[0]
    # Cells have their centers at .125, .375, .625 and .875.
    assert left[0].tolist() == pytest.approx([-0.25, 0.25, 0.75, 1.25])
    assert right[0].tolist() == pytest.approx([1.25, 0.75, 0.25, -0.25])
    assert top[:, 0].tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75])
    assert bottom[:, 0].tolist() == pytest.approx([1.75, 1.25, 0.75, 0.25])


def test_a_box_is_the_mean_position_of_each_edge() -> None:
    edges = torch.full((1, 4, 8), -50.0)
    for edge, position in enumerate((1, 2, 5, 7)):
        edges[0, edge, position] = 0
    edges[0, 0, 2] = 0  # as likely as position 1
    boxes = MaskOutput(torch.zeros(1, 16, 16), edges).boxes()
    assert boxes[0].tolist() == pytest.approx([2 / 8, 2.5 / 8, 5.5 / 8, 7.5 / 8])


def test_an_untrained_head_keeps_the_box_of_the_prompt() -> None:
    head = MaskHead(CONFIG, network().level_channels)
    for parameter in head.edges.parameters():
        torch.nn.init.zeros_(parameter)
    prompts = torch.tensor([[0.3, 0.3, 0.7, 0.7]])
    levels = network().levels(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(head(levels, prompts).boxes(), prompts, atol=0.01, rtol=0)


def iou_of_ellipses(segmenter: NanoSegmenter, boxes: FloatArray) -> float:
    photo = np.full((160, 240, 3), (90, 140, 80), dtype=np.uint8)
    rows, columns = np.mgrid[:160, :240]
    overlaps = []
    for x1, y1, x2, y2 in boxes * np.array([240, 160, 240, 160]):
        wide, high = (x2 - x1) / 2, (y2 - y1) / 2
        inside = ((columns - x1 - wide) / wide) ** 2 + ((rows - y1 - high) / high) ** 2 <= 1
        photo[inside] = (220, 60, 40)
        overlaps.append(rle.encode(inside))
    found = segmenter.segment(photo, boxes)
    ious = rle.pairwise_iou([each.mask for each in found], overlaps)
    return float(np.diagonal(ious).mean())


def test_the_shipped_head_finds_ellipses() -> None:
    segmenter = load_segmenter()
    assert segmenter is not None
    boxes = np.array([[0.1, 0.2, 0.4, 0.8], [0.55, 0.3, 0.95, 0.7]], dtype=np.float32)
    assert iou_of_ellipses(segmenter, boxes) > 0.85  # filling the boxes gives .79


def test_a_checkpoint_without_mask_head_has_no_segmenter(tmp_path: Path) -> None:
    assert load_segmenter(tmp_path) is None


def test_masks_of_a_checkpoint_without_mask_head_are_refused(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(SHIPPED / name, tmp_path / name)
    assert not load_encoder(tmp_path).masks
    with pytest.raises(CheckpointError, match=r"has no mask head; .*reir train --stage masks"):
        load_encoder(tmp_path, masks=True)


def test_a_head_of_another_crop_network_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(SHIPPED, folder)
    save_mask_head(folder, MaskHead(CONFIG, network().level_channels), network(), {})
    with pytest.raises(CheckpointError, match=r"mask head in .* was trained on the crop network"):
        load_segmenter(folder)
