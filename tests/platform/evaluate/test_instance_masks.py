"""Masks of chosen instances: those of the encoder for the same boxes."""

from __future__ import annotations

import numpy as np
import pytest

from reir.evaluate.instance_masks import instance_masks
from reir.models.clare.encoder import ClareEncoder
from reir_testing import FakeEncoder, draw_scene
from reir_testing.tiny import tiny_tokenizer
from reir_testing.tiny_clare import tiny_clare

IMAGE = draw_scene((120, 80), [("red", (10, 10, 50, 70)), ("blue", (70, 20, 110, 60))])


def test_masks_belong_to_the_boxes_in_their_order() -> None:
    encoder = ClareEncoder(tiny_clare(masks=True), tiny_tokenizer(), "d" * 64, masks=True)
    (found,) = encoder.encode_images([IMAGE])
    assert found.masks is not None
    assert len(set(found.masks)) > 1
    rows = [2, 0, 1]
    # In pixels and back, which rounds.
    boxes = (found.boxes[rows] * np.float32(641)) / np.float32(641)
    assert instance_masks(encoder, IMAGE, boxes) == [found.masks[row] for row in rows]


def test_an_encoder_without_masks_is_refused() -> None:
    with pytest.raises(ValueError, match="FakeEncoder gave no masks, although it says that it"):
        instance_masks(FakeEncoder(), IMAGE, np.array([[0.1, 0.1, 0.4, 0.9]], dtype=np.float32))
