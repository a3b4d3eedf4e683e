"""`ClareEncoder`: a trained CLARE behind the `InstanceEncoder` seam; its query-free candidates."""

# Shapes: B photos, H x W pixels of the padded batch, N queries, k candidates, D dimension,
#         M texts, J tokens a text

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from reir.models.clare import Clare, ClareConfig, ClareOutput
from reir.models.seams import RgbImage
from reir.models.yolox import greedy_nms
from reir.records import FloatArray, Instances
from reir.text import normalise_expression

TEXT_BATCH = 128
MIN_SIDE = 1e-3  # thinner boxes, as a share of the photo, are no candidates
_DROPPED = str.maketrans("-/", "  ", ".,'!?\"()*#:;")


@dataclass(frozen=True)
class ClareCandidates:
    """Instances of B photos, best objectness first; only the first `counts` rows are real.

    Attributes:
        boxes: (B, k, 4) xyxy in [0, 1].
        objectness: (B, k) in [0, 1].
        vectors: (B, k, D) of the last layer.
        counts: (B,) int64.
    """

    boxes: Tensor
    objectness: Tensor
    vectors: Tensor
    counts: Tensor


def candidates(output: ClareOutput, num: int, nms_iou: float) -> ClareCandidates:
    """Choose the instances of each photo without any expression.

    Ranked by the class-agnostic objectness of each query's proposal; of last-layer boxes that
    overlap by more than `nms_iou` the best is kept.

    Args:
        output: of `Clare`.
        num: keep at most so many a photo.
        nms_iou: class-agnostic NMS threshold.

    Raises:
        ValueError: `num` is below 1.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    boxes = output.boxes[-1].clamp(0, 1)
    usable = (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(dim=-1)
    scores = torch.where(usable, output.proposal_logits.sigmoid(), 0.0)
    picks, counts = greedy_nms(boxes, scores, num, nms_iou)
    rows = picks[..., None]
    return ClareCandidates(
        boxes=boxes.gather(1, rows.expand(-1, -1, 4)),
        objectness=scores.gather(1, picks),
        vectors=output.objects[-1].gather(1, rows.expand(-1, -1, output.objects.shape[-1])),
        counts=counts,
    )


# -------------------------------------------------------------------------------- photos, texts


def target_size(image: RgbImage, config: ClareConfig) -> tuple[int, int]:
    """(height, width) in pixels that a photo is resized to, its aspect kept.

    The shorter side becomes `shortest_side_px`, unless the longer one would pass
    `longest_side_px`. A side is never less than one pixel.

    Raises:
        ValueError: the photo is empty or not (H, W, 3) uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
        raise ValueError(
            f"image must have shape (H, W, 3) uint8, not empty, got {image.shape} {image.dtype}"
        )
    height_px, width_px = image.shape[:2]
    shorter, longer = sorted((height_px, width_px))
    scale = min(config.shortest_side_px / shorter, config.longest_side_px / longer)
    return max(round(height_px * scale), 1), max(round(width_px * scale), 1)


def preprocess(image: RgbImage, config: ClareConfig) -> Tensor:
    """Resize and normalise one photo; (3, h, w) float32, not padded; errors as `target_size`."""
    height, width = target_size(image, config)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in config.pixel_mean_std)
    return (pixels - mean) / std


def pad_batch(photos: Sequence[Tensor], multiple_px: int) -> tuple[Tensor, Tensor]:
    """Put photos of different sizes into one batch, padded on the right and bottom.

    Args:
        photos: (3, h, w) each, at least one.
        multiple_px: sides of the batch are multiples of it.

    Returns:
        (B, 3, H, W) with 0 in the padding, and (B, H, W) bool, True in the padding.
    """
    height, width = (
        -(-max(photo.shape[axis] for photo in photos) // multiple_px) * multiple_px
        for axis in (1, 2)
    )
    pixels = photos[0].new_zeros(len(photos), 3, height, width)
    mask = torch.ones(len(photos), height, width, dtype=torch.bool, device=pixels.device)
    for i, photo in enumerate(photos):
        pixels[i, :, : photo.shape[1], : photo.shape[2]] = photo
        mask[i, : photo.shape[1], : photo.shape[2]] = False
    return pixels, mask


def clean_expression(text: str) -> str:
    """Normalise an expression and take out punctuation (clare.md 3.5): "-" and "/" are spaces."""
    return " ".join(normalise_expression(text).translate(_DROPPED).split())


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], config: ClareConfig) -> Tensor:
    """(M, max_tokens) int64 ids; of longer texts the last token, the end mark, is kept."""
    ids = torch.full((len(texts), config.max_tokens), config.pad_token, dtype=torch.long)
    for row, encoded in enumerate(tokenizer.encode_batch([clean_expression(t) for t in texts])):
        kept = encoded.ids
        if len(kept) > config.max_tokens:
            kept = [*kept[: config.max_tokens - 1], kept[-1]]
        ids[row, : len(kept)] = torch.tensor(kept)
    return ids


# -------------------------------------------------------------------------------------- encoder


class ClareEncoder:
    """Encodes photos and expressions; thread-safe, since nothing is written after construction.

    Vectors are unit length. Under `paper_parity` they are raw, since the released ranking is by
    the raw inner product.

    Args:
        model: trained model, where it is to run; is put into eval mode.
        tokenizer: of the text tower, without padding or truncation.
        digest: sha256 of the weights file.
        num_candidates: instances kept of a photo; None takes the checkpoint's own number.
        batch_size: photos that go through the model together; those of like shape are put
            together, since the rest of a batch is padding.
        half: run the model under bf16 autocast.

    Raises:
        ValueError: `num_candidates` or `batch_size` is below 1.
    """

    def __init__(  # noqa: PLR0913 - all but the three parts are by name
        self,
        model: Clare,
        tokenizer: Tokenizer,
        digest: str,
        *,
        num_candidates: int | None = None,
        batch_size: int = 4,
        half: bool = False,
    ) -> None:
        kept = model.config.num_candidates if num_candidates is None else num_candidates
        for name, value in (("num_candidates", kept), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._model = model.eval().requires_grad_(False)
        self._tokenizer, self._digest = tokenizer, digest
        self._num_candidates, self._batch_size, self._half = kept, batch_size, half

    @property
    def dim(self) -> int:
        """Dimension D of both kinds of vector."""
        return self._model.config.dim

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        return self._digest

    @property
    def num_candidates(self) -> int:
        """The most instances kept of one photo."""
        return self._num_candidates

    @property
    def _device(self) -> torch.device:
        return self._model.queries.weight.device

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Instances of each photo, best objectness first; a photo may have none.

        Raises:
            ValueError: a photo is empty or not (H, W, 3) uint8.
        """
        config = self._model.config
        order = sorted(range(len(images)), key=lambda i: target_size(images[i], config))
        found: dict[int, Instances] = {}
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            photos = [preprocess(images[i], config) for i in rows]
            found.update(zip(rows, self._encode_batch(photos), strict=True))
        return [found[i] for i in range(len(images))]

    def _encode_batch(self, photos: Sequence[Tensor]) -> list[Instances]:
        config = self._model.config
        pixels, mask = (x.to(self._device) for x in pad_batch(photos, config.side_multiple_px))
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._half),
        ):
            output = self._model(pixels, mask)
        chosen = candidates(output, self._num_candidates, config.nms_iou)
        return [
            instances_of(boxes[:count], objectness[:count], vectors[:count])
            for boxes, objectness, vectors, count in zip(
                chosen.boxes.cpu(),
                chosen.objectness.cpu(),
                chosen.vectors.cpu(),
                chosen.counts.tolist(),
                strict=True,
            )
        ]

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """(M, D) float32 vectors of the last layer, in the order given."""
        vectors = np.zeros((len(expressions), self.dim), dtype=np.float32)
        for start in range(0, len(expressions), TEXT_BATCH):
            texts = expressions[start : start + TEXT_BATCH]
            ids = tokenise(self._tokenizer, texts, self._model.config).to(self._device)
            with (
                torch.inference_mode(),
                torch.autocast(self._device.type, torch.bfloat16, enabled=self._half),
            ):
                vectors[start : start + len(texts)] = self._model.text(ids)[-1].cpu().numpy()
        return vectors


def instances_of(boxes_k4: Tensor, objectness_k: Tensor, vectors_kD: Tensor) -> Instances:
    """Return the record of one photo; its vector is the candidates' mean, weighed by objectness."""
    whole_D = F.normalize((objectness_k[:, None] * vectors_kD).sum(dim=0), dim=0)
    return Instances(
        boxes=boxes_k4.numpy(),
        objectness=objectness_k.numpy(),
        vectors=vectors_kD.numpy(),
        image_vector=whole_D.numpy(),
    )
