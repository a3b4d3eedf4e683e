"""GroundingDINO and MM-GroundingDINO of `transformers` as a localizer.

Sources: Liu et al. 2023, "Grounding DINO: Marrying DINO with Grounded Pre-Training for Open-Set
Object Detection", and Zhao et al. 2024, "An Open and Comprehensive Pipeline for Unified Object
Grounding and Detection".

The model computes a logit for each of its boxes and each token of a caption. The caption is the
expression as a whole, as in the published evaluations of referring expression comprehension, and
the score of a box is the sigmoid of its largest logit over the tokens of the expression.
"""

# Shapes: N photos, L tokens, T tokens of the logits, Q boxes, H x W pixels of a prepared photo

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection

from reir.models.interfaces import FoundBoxes
from reir.models.pretrained import PretrainedModel, load_pretrained
from reir.records import RgbImage
from reir.text import normalize_expression

MODEL_TYPES = ("grounding-dino", "mm-grounding-dino")
BATCH = 4
"""Photos in one pass; at the published size, each needs about a gigabyte."""

DELIMITERS = ".?"
"""The model's text encoder reads what is between them separately."""

MAX_RATIO, STRETCHED_PX = 16, 1333
"""A photo that is more than so many times as long as wide is stretched, to this longer side: at the
published size, there would not be as many places in it as the model has boxes."""


def load_grounding_dino(source: str) -> GroundingDinoLocalizer:
    """Load a localizer, on a GPU if there is one; source and errors are those of `load_pretrained`.

    The model computes in float32: it is tested for equal results in batches of any size.
    """
    model_class = AutoModelForZeroShotObjectDetection
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return GroundingDinoLocalizer(load_pretrained(source, model_class, MODEL_TYPES, device=device))


@dataclass(frozen=True)
class Captions:
    """Expressions as the model reads them, padded to the longest one.

    Attributes:
        input_ids: (N, L) ids of the tokens.
        attention_mask: (N, L) 1 for tokens, 0 for padding.
        is_word: (N, L) whether a token belongs to the expression; the tokens for start and end, the
            delimiters and the padding do not.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_word: Tensor

    def to(self, device: str) -> Captions:
        """Return the same captions on a device."""
        return Captions(
            *(each.to(device) for each in (self.input_ids, self.attention_mask, self.is_word))
        )


def captions_of(tokenizer: Any, expressions: Sequence[str], max_tokens: int) -> Captions:
    """Return expressions as captions, each of which ends with a period.

    Args:
        tokenizer: that of the model.
        expressions: one for each photo.
        max_tokens: tokens that the model reads; the rest of a longer expression is ignored.
    """
    texts = [normalize_expression(text).rstrip(f" {DELIMITERS}") for text in expressions]
    words = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    start, end, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    period, *_ = delimiters = tokenizer.convert_tokens_to_ids([*DELIMITERS])
    # The period is never cut off: without it, the text encoder would let no token see another one.
    rows = [[start, *each[: max_tokens - 3], period, end] for each in words]
    longest = max(map(len, rows), default=0)
    input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    special = torch.tensor([start, end, pad, *delimiters])
    # By length, not by id: padding may have the id of a token that occurs in expressions.
    lengths = torch.tensor([[len(row)] for row in rows])
    attention_mask = (torch.arange(longest) < lengths).long()
    return Captions(input_ids, attention_mask, ~torch.isin(input_ids, special))


def found_boxes(logits: Tensor, pred_boxes: Tensor, is_word: Tensor) -> list[FoundBoxes]:
    """Return the boxes of each photo, best first.

    Args:
        logits: (N, Q, T) of the model; -inf for padding.
        pred_boxes: (N, Q, 4) center, width and height in [0, 1].
        is_word: (N, L) tokens of the expression, L at most T.
    """
    is_word = F.pad(is_word, (0, logits.shape[-1] - is_word.shape[-1]))
    # An expression without any word gets -inf, which is a score of 0.
    best = logits.float().masked_fill(~is_word[:, None], -torch.inf).amax(dim=-1)
    center, half = pred_boxes[..., :2].float(), pred_boxes[..., 2:].float() / 2
    boxes = torch.cat([center - half, center + half], dim=-1)
    # On a GPU, a logit of a damaged photo may be no number; such a box must not come first.
    usable = boxes.isfinite().all(dim=-1) & ~best.isnan()
    scores = best.sigmoid().where(usable, 0.0)
    boxes = boxes.where(usable[..., None], 0.0).clamp(0, 1)
    order = scores.argsort(dim=1, descending=True, stable=True)
    boxes = boxes.take_along_dim(order[..., None], dim=1).cpu()
    scores = scores.take_along_dim(order, dim=1).cpu()
    return [FoundBoxes(*each) for each in zip(boxes.numpy(), scores.numpy(), strict=True)]


class GroundingDinoLocalizer:
    """Finds what expressions describe; thread-safe after construction.

    Args:
        parts: the model with its tokenizer and image processor.
    """

    def __init__(self, parts: PretrainedModel) -> None:
        self._parts, self._model = parts, parts.model
        config = parts.model.config
        self._max_tokens = min(config.max_text_len, config.text_config.max_position_embeddings)

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        return self._parts.digest

    @torch.inference_mode()
    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        """Return all boxes of each photo, best first; see `ExpressionLocalizer.localize`."""
        if len(images) != len(expressions):
            raise ValueError(
                f"each photo needs one expression, got {len(images)} and {len(expressions)}"
            )
        found: dict[int, FoundBoxes] = {}
        for rows in batches_of_equal_size(images):
            captions = captions_of(
                self._parts.tokenizer, [expressions[row] for row in rows], self._max_tokens
            ).to(self._parts.device)
            output = self._model(
                pixel_values=self._pixels([images[row] for row in rows]),
                input_ids=captions.input_ids,
                attention_mask=captions.attention_mask,
            )
            boxes = found_boxes(output.logits, output.pred_boxes, captions.is_word)
            found.update(zip(rows, boxes, strict=True))
        return [found[row] for row in range(len(images))]

    def _pixels(self, images: Sequence[RgbImage]) -> Tensor:
        """Prepare photos of equal size as (N, 3, H, W); a photo that is given again, only once."""
        unique = {id(image): image for image in images}
        pixels = self._parts.pixels([stretched(image) for image in unique.values()])
        place = {key: number for number, key in enumerate(unique)}
        return pixels["pixel_values"][[place[id(image)] for image in images]]


def batches_of_equal_size(images: Sequence[RgbImage]) -> Iterator[list[int]]:
    """Yield the rows of at most `BATCH` photos that have equal sizes, until each was yielded."""
    # Photos of different sizes would be padded, and padding changes results: the backbone reads
    # windows that reach into it, and the norms behind the backbone average over it.
    rows_of_size: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, image in enumerate(images):
        rows_of_size[image.shape].append(row)
    for rows in rows_of_size.values():
        for start in range(0, len(rows), BATCH):
            yield rows[start : start + BATCH]


def stretched(image: RgbImage) -> RgbImage:
    """Return the photo, stretched across if it is more than `MAX_RATIO` times as long as wide."""
    height, width = image.shape[:2]
    if max(height, width) <= MAX_RATIO * min(height, width):
        return image
    across = STRETCHED_PX // MAX_RATIO
    size = (STRETCHED_PX, across) if width > height else (across, STRETCHED_PX)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
