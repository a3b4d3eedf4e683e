"""SAM 2 as a segmenter, with a tiny random model of the library's own class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Sam2Model

from reir.errors import CheckpointError, ConfigError
from reir.images import rle
from reir.models.sam2 import BOXES_PER_PASS, Sam2Segmenter, load_sam2
from reir.models.segmenters import load_segmenter_spec
from reir.records import RgbImage
from reir_testing.pretrained import save_tiny_sam2, save_tiny_siglip

BOXES = np.array([[0.1, 0.2, 0.5, 0.9], [0.4, 0.0, 1.0, 0.6]], dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sam2(tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Sam2Segmenter:
    return load_sam2(str(folder))


def photo() -> RgbImage:
    return np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)


def test_masks_are_those_of_the_library(segmenter: Sam2Segmenter, folder: Path) -> None:
    model = Sam2Model.from_pretrained(folder).eval()
    pixels = torch.from_numpy(photo()).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    boxes = torch.from_numpy(64 * BOXES)[None]
    with torch.inference_mode():
        output = model(pixel_values=pixels, input_boxes=boxes, multimask_output=False)
    logits = F.interpolate(output.pred_masks[0], (50, 90), mode="bilinear")[:, 0]
    for found, expected in zip(segmenter.segment(photo(), BOXES), logits > 0, strict=True):
        different = rle.decode(found.mask) != expected.numpy()
        assert different.mean() < 0.005
        rows, columns = np.nonzero(rle.decode(found.mask))
        x1, y1, x2, y2 = found.box
        assert (x1 * 90, x2 * 90) == pytest.approx((columns.min(), columns.max() + 1))
        assert (y1 * 50, y2 * 50) == pytest.approx((rows.min(), rows.max() + 1))


def test_many_boxes_are_divided_and_none_is_no_error(segmenter: Sam2Segmenter) -> None:
    many = np.tile(BOXES, (BOXES_PER_PASS, 1))
    found = segmenter.segment(photo(), many)
    assert len(found) == 2 * BOXES_PER_PASS
    assert found[0] == found[-2]
    assert segmenter.segment(photo(), many[:0]) == []


def test_an_empty_mask_keeps_the_box_of_the_prompt(segmenter: Sam2Segmenter) -> None:
    class Nothing:
        device = torch.device("cpu")
        config = segmenter._model.config

        def get_image_embeddings(self, _: torch.Tensor) -> None: ...

        def __call__(self, **_: object) -> Nothing:
            self.pred_masks = torch.full((1, 1, 1, 16, 16), -1.0)
            return self

    (found,) = Sam2Segmenter(Nothing(), (0.5,) * 3, (0.2,) * 3).segment(photo(), BOXES[:1])
    assert found.box == pytest.approx(BOXES[0].tolist())
    assert rle.area_px(found.mask) == 0


def test_a_spec_loads_it_and_other_specs_are_explained(folder: Path, tmp_path: Path) -> None:
    assert isinstance(load_segmenter_spec(f"sam2:{folder}"), Sam2Segmenter)
    for spec in ("sam3:x", "sam2", "sam2:", ""):
        with pytest.raises(ConfigError, match=r"unknown segmenter .* use sam2:NAME_OR_DIR"):
            load_segmenter_spec(spec)
    save_tiny_siglip(tmp_path)
    with pytest.raises(CheckpointError, match=r"type 'siglip', but what is needed is sam2 or"):
        load_segmenter_spec(f"sam2:{tmp_path}")


def test_an_incomplete_folder_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    with pytest.raises(CheckpointError, match=r"cannot load SAM 2 .*preprocessor_config\.json"):
        load_sam2(str(tmp_path))
