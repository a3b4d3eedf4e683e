"""`CellAnchors`: the cells of YOLOv3 as anchors, whose features fuse three of its maps.

This is the visual stream of RefCLIP (docs/weak-rec.md, sections 3.1 and 3.2).
"""

# Shapes: B photos, A = 169 anchors, R boxes of a cell, S side of the square input

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from reir.models.weak_rec.anchors import Anchors
from reir.models.weak_rec.fusion import MultiScaleFusion
from reir.models.weak_rec.yolov3 import Placement, YoloV3, letter_box, normalize_pixels
from reir.records import RgbImage


class CellAnchors(nn.Module):
    """Photos -> the cells of a frozen YOLOv3, with trained features.

    Args:
        yolo: frozen. The fused features are as wide as its coarsest map.
    """

    def __init__(self, yolo: YoloV3) -> None:
        super().__init__()
        self.yolo = yolo
        self.width = yolo.expand.conv.out_channels
        maps = (self.width, self.width // 2, self.width // 4)
        self.fusion = MultiScaleFusion(maps, self.width)

    def load(self, photos: Sequence[RgbImage]) -> dict[str, Tensor]:
        """See `load_squares`."""
        return load_squares(photos)

    def forward(self, inputs: Mapping[str, Tensor]) -> Anchors:
        """Return the cells of the photos; all of them are valid."""
        found = self.yolo(normalize_pixels(inputs["squares"]))
        places = [Placement(*place) for place in inputs["places"].tolist()]
        boxes = torch.stack([p.undo(b) for p, b in zip(places, found.boxes, strict=True)])
        features = self.fusion(found.maps)
        return Anchors(
            features=features,
            boxes=boxes,
            confidence=found.confidence,
            class_scores=features.new_zeros(*features.shape[:2], 0),
            valid=features.new_ones(features.shape[:2], dtype=torch.bool),
        )


def load_squares(photos: Sequence[RgbImage]) -> dict[str, Tensor]:
    """Return the letter-boxed photos, (B, S, S, 3) uint8, and where each lies, (B, 5).

    It needs no weights, so processes that only load photos can do without the model.
    """
    boxed = [letter_box(photo) for photo in photos]
    places = [(p.side_px, p.left_px, p.top_px, p.width_px, p.height_px) for _, p in boxed]
    return {
        "squares": torch.from_numpy(np.stack([square for square, _ in boxed])),
        "places": torch.tensor(places),
    }
