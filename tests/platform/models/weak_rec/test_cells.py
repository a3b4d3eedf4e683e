"""The cells of YOLOv3 as anchors."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from reir.models.weak_rec.cells import CellAnchors, load_squares
from reir.models.weak_rec.yolov3 import Placement, letter_box, normalize_pixels
from reir_testing.weak.tiny import noise_photos, tiny_cells

NUM_CELLS, NUM_BOXES = 169, 4


def test_cells_have_fused_features_and_boxes_of_the_photo() -> None:
    source, photos = tiny_cells(), noise_photos()
    found = source(source.load(photos))
    assert found.features.shape == (3, NUM_CELLS, source.width)
    assert found.valid.all()
    assert found.valid.shape == (3, NUM_CELLS)
    assert found.class_scores.shape == (3, NUM_CELLS, 0)
    for row, photo in enumerate(photos):
        square, place = letter_box(photo)
        output = source.yolo(normalize_pixels(torch.from_numpy(square[None])))
        for together, alone in (
            (found.features[row], source.fusion(output.maps)[0]),
            (found.boxes[row], place.undo(output.boxes[0])),
            (found.confidence[row], output.confidence[0]),
        ):
            torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found.features[0], found.features[1], atol=1e-2)


def test_loading_needs_no_weights() -> None:
    loaded = load_squares(noise_photos())
    assert loaded["squares"].shape == (3, 416, 416, 3)
    assert loaded["squares"].dtype == torch.uint8
    for row, photo in enumerate(noise_photos()):
        square, place = letter_box(photo)
        np.testing.assert_array_equal(loaded["squares"][row], square)
        assert Placement(*loaded["places"][row].tolist()) == place


def test_only_the_fusion_is_trained() -> None:
    source = tiny_cells().train()
    trained = {name for name, p in source.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("fusion.") for name in trained)
    found = source(source.load(noise_photos()))
    found.features.sum().backward()
    assert all(p.grad is None for p in source.yolo.parameters())
    assert source.fusion.project.conv.weight.grad is not None


def modes(source: CellAnchors) -> dict[str, set[bool]]:
    """Whether batch norms use the statistics of the batch, in YOLOv3 and in the fusion."""
    parts = {"yolo": source.yolo, "fusion": source.fusion}
    return {
        name: {each.training for each in part.modules() if isinstance(each, nn.BatchNorm2d)}
        for name, part in parts.items()
    }


def test_yolo_stays_in_eval_mode_unless_paper_parity_is_set() -> None:
    assert modes(tiny_cells().train()) == {"yolo": {False}, "fusion": {True}}
    assert modes(tiny_cells(paper_parity=True).train()) == {"yolo": {True}, "fusion": {True}}
    assert modes(tiny_cells(paper_parity=True).train().eval()) == {
        "yolo": {False},
        "fusion": {False},
    }
