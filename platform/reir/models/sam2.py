"""`Sam2Segmenter`: SAM 2 of `transformers` as a segmenter, prompted by boxes.

Source: Ravi et al. 2024, "SAM 2: Segment Anything in Images and Videos". The pictures are prepared
here, since the library's own image processor of this model needs torchvision.
"""

# Shapes: N boxes of a photo, s side of the model's input, H x W pixels of the photo

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from reir.errors import CheckpointError
from reir.images import rle
from reir.models.interfaces import Segment
from reir.models.pretrained import check_type, check_weights, fetch, no_progress_bars
from reir.records import Box, FloatArray, RgbImage

PREPROCESSING = "preprocessor_config.json"
MODEL_TYPES = ("sam2", "sam2_video")
"""The published checkpoints are for videos, of which pictures need a part."""
BOXES_PER_PASS = 32
"""Boxes that the mask decoder sees at once; each needs some megabytes."""


class Sam2Segmenter:
    """Segments the instance in each box, with one pass of the image tower for a photo.

    Args:
        model: a `Sam2Model` in eval mode.
        mean, std: of RGB values in [0, 1], as the model was trained.
    """

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self._model = model
        self._side = int(model.config.prompt_encoder_config.image_size)
        self._mean, self._std = (torch.tensor(each)[:, None, None] for each in (mean, std))

    def segment(self, image: RgbImage, boxes: FloatArray) -> list[Segment]:
        """Return the segment of each box; see `Segmenter.segment`."""
        if not len(boxes):
            return []
        found: list[Segment] = []
        with torch.inference_mode():
            embeddings = self._model.get_image_embeddings(self._pixels(image))
            for start in range(0, len(boxes), BOXES_PER_PASS):
                some = boxes[start : start + BOXES_PER_PASS]
                # In pixels of the square that the photo is stretched to: one factor for both axes.
                prompts = torch.from_numpy(some * self._side)[None].to(self._model.device)
                output = self._model(
                    image_embeddings=embeddings, input_boxes=prompts, multimask_output=False
                )
                logits = output.pred_masks[0, :, 0].float().cpu()
                found += [
                    _segment(each, tuple(box), image.shape[:2])
                    for each, box in zip(logits, some.tolist(), strict=True)
                ]
        return found

    def _pixels(self, image: RgbImage) -> Tensor:
        """(H, W, 3) -> (1, 3, s, s), stretched to a square."""
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
        size = (self._side, self._side)
        square = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)
        return ((square - self._mean) / self._std).to(self._model.device)


def _segment(logits: Tensor, box: Box, size_px: tuple[int, int]) -> Segment:
    """Return the segment of mask logits, with the box of the prompt if the mask is empty."""
    # Logits are interpolated before they are compared with 0, which gives smoother edges than
    # enlarging a mask.
    mask = F.interpolate(logits[None, None], size_px, mode="bilinear")[0, 0].numpy() > 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows):
        height, width = size_px
        first, last = (columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)
        box = (
            *(float(first[0] / width), float(first[1] / height)),
            *(float(last[0] / width), float(last[1] / height)),
        )
    return Segment(box, rle.encode(mask))


def load_sam2(source: str) -> Sam2Segmenter:
    """Load a checkpoint of SAM 2, on a GPU if there is one.

    Args:
        source: directory that `save_pretrained` wrote, or hub name, such as
            facebook/sam2.1-hiera-tiny, `NAME@REVISION` for a certain revision.

    Raises:
        CheckpointError: it does not exist, is incomplete, or is a model of another type.
        ImportError: `transformers` is not installed.
    """
    from transformers import Sam2Model

    folder = fetch(source)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        check_type(source, config["model_type"], MODEL_TYPES)
        with no_progress_bars():
            model, report = Sam2Model.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        settings = json.loads((folder / PREPROCESSING).read_text(encoding="utf-8"))
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load SAM 2 from {source}: {str(error).splitlines()[0]}; the folder must "
            f"contain config.json, model.safetensors and {PREPROCESSING} of a Sam2Model"
        ) from error
    check_weights(source, report, "Sam2Model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Sam2Segmenter(model.eval().requires_grad_(False).to(device), mean, std)
