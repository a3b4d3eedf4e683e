"""`ClareEncoder`: a trained CLARE as an `InstanceEncoder`, with query-free candidates."""

# Shapes: B photos, H x W pixels of the padded batch, N queries, k candidates, D dimension,
#         M texts, J tokens per text

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from reir.images.decode import fitted_size, pad_and_stack
from reir.images.rle import encode
from reir.models.clare.config import ClareConfig
from reir.models.clare.masks import MaskInputs, paint
from reir.models.clare.model import Clare, ClareOutput
from reir.models.interfaces import InstanceChoices
from reir.models.proposals import greedy_nms
from reir.records import FloatArray, Instances, MaskRle, RgbImage
from reir.text import normalize_expression

TEXT_BATCH = 128
MIN_SIDE = 1e-3  # boxes with a thinner side, as a fraction of the photo, are not candidates
# The released code trains with these characters removed (docs/clare.md, section 3.5).
_DROPPED = str.maketrans("-/", "  ", ".,'!?\"()*#:;")


@dataclass(frozen=True)
class ClareCandidates:
    """The candidates of B photos, by descending objectness, padded to the same number.

    Attributes:
        boxes: (B, k, 4) xyxy in [0, 1].
        objectness: (B, k) in [0, 1].
        vectors: (B, k, D) instance vectors of the last layer.
        counts: (B,) int64, number of candidates; further rows are padding.
        queries: (B, k) int64, number of the query that each candidate comes from.
    """

    boxes: Tensor
    objectness: Tensor
    vectors: Tensor
    counts: Tensor
    queries: Tensor


def candidates(output: ClareOutput, num: int, nms_iou: float) -> ClareCandidates:
    """Choose the candidates of each photo without any expression.

    Queries are ranked by the class-agnostic objectness of their proposals. Of last-layer boxes that
    overlap by more than `nms_iou`, only the best one is kept.

    Args:
        output: output of `Clare`.
        num: maximum number of candidates per photo.
        nms_iou: threshold of the class-agnostic NMS.

    Raises:
        ValueError: `num` is below 1.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    boxes = output.boxes[-1].clamp(0, 1)
    usable = (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(dim=-1)
    # `greedy_nms` never keeps a score of 0, and needs no sorting: proposals are sorted already.
    scores = torch.where(usable, output.proposal_logits.sigmoid(), 0.0)
    picks, counts = greedy_nms(boxes, scores, num, nms_iou)
    rows = picks[..., None]
    return ClareCandidates(
        boxes=boxes.gather(1, rows.expand(-1, -1, 4)),
        objectness=scores.gather(1, picks),
        vectors=output.objects[-1].gather(1, rows.expand(-1, -1, output.objects.shape[-1])),
        counts=counts,
        queries=picks,
    )


def scored_by(output: ClareOutput, expression_BD: Tensor) -> ClareOutput:
    """Rank the queries of each photo by their score with an expression instead of by objectness.

    Args:
        output: output of `Clare`.
        expression_BD: one expression vector per photo.

    Returns:
        The last layer only, with the scores as `proposal_logits`, best first.
    """
    last = output.objects[-1]
    logits, order = torch.einsum("bnd,bd->bn", last, expression_BD.to(last)).sort(
        dim=1, descending=True, stable=True
    )
    rows = order[None, :, :, None]
    return output._replace(
        objects=output.objects[-1:].take_along_dim(rows, dim=2),
        boxes=output.boxes[-1:].take_along_dim(rows, dim=2),
        proposal_logits=logits,
    )


# -------------------------------------------------------------------------------- photos, texts


def target_size(image: RgbImage, config: ClareConfig) -> tuple[int, int]:
    """Return the (height, width) in pixels to which a photo is resized; its aspect ratio is kept.

    The shorter side becomes `shortest_side_px`, unless the longer one would exceed
    `longest_side_px`. A side has at least one pixel.

    Raises:
        ValueError: the photo is empty or not (H, W, 3) uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
        raise ValueError(
            f"image must have shape (H, W, 3) uint8, not empty, got {image.shape} {image.dtype}"
        )
    width, height = fitted_size(
        image.shape[1], image.shape[0], config.shortest_side_px, config.longest_side_px
    )
    return height, width


def resized(image: RgbImage, config: ClareConfig) -> RgbImage:
    """Return a photo resized to `target_size`, (h, w, 3) uint8; errors as there."""
    height, width = target_size(image, config)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def model_input(
    pixels_B3HW: Tensor, size_px_B2: Tensor, config: ClareConfig
) -> tuple[Tensor, Tensor]:
    """Normalize a padded batch, and pad it further to sides that the model accepts.

    Args:
        pixels_B3HW: uint8 RGB, each photo in the top left corner.
        size_px_B2: height and width of each photo.
        config: configuration of the model.

    Returns:
        (B, 3, H', W') float32 with 0 in the padding, and (B, H', W') bool, True in the padding.
    """
    height, width = pixels_B3HW.shape[2:]
    below, right = -height % config.side_multiple_px, -width % config.side_multiple_px
    device = pixels_B3HW.device
    rows = torch.arange(height + below, device=device)
    columns = torch.arange(width + right, device=device)
    mask = (rows[:, None] >= size_px_B2[:, :1, None]) | (columns >= size_px_B2[:, 1:, None])
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in config.pixel_mean_std)
    pixels = (F.pad(pixels_B3HW, (0, right, 0, below)).float() / 255 - mean) / std
    # Normalization turns the zeros of the padding into other values.
    return pixels.masked_fill(mask[:, None], 0.0), mask


def clean_expression(text: str) -> str:
    """Normalize an expression and remove punctuation, as in docs/clare.md, section 3.5."""
    return " ".join(normalize_expression(text).translate(_DROPPED).split())


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], config: ClareConfig) -> Tensor:
    """Return (M, max_tokens) int64 ids; truncated texts keep their end-of-sequence token."""
    ids = torch.full((len(texts), config.max_tokens), config.pad_token, dtype=torch.long)
    for row, encoded in enumerate(tokenizer.encode_batch([clean_expression(t) for t in texts])):
        kept = encoded.ids
        if len(kept) > config.max_tokens:
            # The text tower reads its output from the last position, so the end token stays there.
            kept = [*kept[: config.max_tokens - 1], kept[-1]]
        ids[row, : len(kept)] = torch.tensor(kept)
    return ids


# -------------------------------------------------------------------------------------- encoder


class ClareEncoder:
    """Encodes photos and expressions; thread-safe, since nothing is written after construction.

    Vectors are of unit length. With `paper_parity` they are raw, since the released code ranks by
    the raw inner product.

    Args:
        model: trained model, on the device where it is to run; it is put into eval mode.
        tokenizer: tokenizer of the text tower, without padding or truncation.
        digest: sha256 of the weights file.
        num_candidates: instances to keep per photo; None for the number in the checkpoint.
        batch_size: number of photos that the model encodes at once. Photos of similar shape share a
            batch, so that little of it is padding.
        half: run the model under bf16 autocast.
        masks: compute the masks of instances.

    Raises:
        ValueError: `num_candidates` or `batch_size` is below 1, or masks are requested from a model
            without a mask branch.
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
        masks: bool = False,
    ) -> None:
        if masks and not model.config.masks:
            raise ValueError("masks=True needs a model with the mask branch, got masks=False")
        kept = model.config.num_candidates if num_candidates is None else num_candidates
        for name, value in (("num_candidates", kept), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._model = model.eval().requires_grad_(False)
        self._tokenizer, self._digest = tokenizer, digest
        self._num_candidates, self._batch_size, self._half = kept, batch_size, half
        self._masks = masks

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
        """Maximum number of instances per photo."""
        return self._num_candidates

    @property
    def masks(self) -> bool:
        """Whether instances have masks, which are of the size of the original photo."""
        return self._masks

    @property
    def _device(self) -> torch.device:
        return self._model.queries.weight.device

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each photo, by descending objectness; a photo may have none.

        Raises:
            ValueError: a photo is empty or not (H, W, 3) uint8.
        """
        found: dict[int, Instances] = {}
        for rows in self._batches(images):
            photos = [images[i] for i in rows]
            output, shares_B2 = self._forward(photos)
            chosen = candidates(output, self._num_candidates, self._model.config.nms_iou)
            masks = self._photo_masks(output, chosen, shares_B2, photos) if self._masks else None
            found.update(zip(rows, _records(chosen, masks), strict=True))
        return [found[i] for i in range(len(images))]

    def encode_images_for(
        self, images: Sequence[RgbImage], expressions: Sequence[FloatArray], num_kept: int
    ) -> list[InstanceChoices]:
        """Return the instances of each photo, chosen without a query and by each expression.

        An expression chooses as in the released evaluator (docs/clare.md, section 6): it ranks the
        queries of the last layer by their scores, before the same NMS.

        Raises:
            ValueError: a photo is empty or not (H, W, 3) uint8.
        """
        found: dict[int, InstanceChoices] = {}
        nms_iou = self._model.config.nms_iou
        for rows in self._batches(images):
            output, _ = self._forward([images[i] for i in rows])
            query_free = _records(candidates(output, self._num_candidates, nms_iou))
            by_text = self._chosen_by(output, [expressions[i] for i in rows], num_kept)
            found.update(zip(rows, map(InstanceChoices, query_free, by_text), strict=True))
        return [found[i] for i in range(len(images))]

    def _batches(self, images: Sequence[RgbImage]) -> list[list[int]]:
        """Divide photos, as indices, into batches of similar shape."""
        config = self._model.config
        order = sorted(range(len(images)), key=lambda i: target_size(images[i], config))
        size = self._batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _forward(self, images: Sequence[RgbImage]) -> tuple[ClareOutput, Tensor]:
        """Return the model's output, and (B, 2) fractions of the batch's sides for each photo."""
        config = self._model.config
        photos = [resized(image, config) for image in images]
        batch, sizes = (torch.from_numpy(x).to(self._device) for x in pad_and_stack(photos))
        pixels, mask = model_input(batch, sizes, config)
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._half),
        ):
            output = self._model(pixels, mask)
        return output, sizes / sizes.new_tensor(pixels.shape[2:])

    def _chosen_by(
        self, output: ClareOutput, expressions: Sequence[FloatArray], num_kept: int
    ) -> list[tuple[Instances, ...]]:
        """Return what each expression of each photo chooses.

        The t-th expressions of all photos choose at the same time.
        """
        counts = [len(vectors) for vectors in expressions]
        # Photos with fewer expressions choose by a zero vector, and the result is dropped.
        turns = np.zeros((max(counts), len(counts), self.dim), dtype=np.float32)
        for photo, vectors in enumerate(expressions):
            turns[: len(vectors), photo] = vectors
        found = [
            _records(
                candidates(
                    scored_by(output, torch.from_numpy(turn)),
                    num_kept,
                    self._model.config.nms_iou,
                )
            )
            for turn in turns
        ]
        return [tuple(turn[i] for turn in found[:count]) for i, count in enumerate(counts)]

    @torch.inference_mode()
    def _photo_masks(
        self,
        output: ClareOutput,
        chosen: ClareCandidates,
        shares_B2: Tensor,
        images: Sequence[RgbImage],
    ) -> list[tuple[MaskRle, ...]]:
        """Return the masks of the candidates of each photo, at the size of the original photo.

        Args:
            output: output of the model.
            chosen: the candidates.
            shares_B2: fractions of height and width of the padded batch that each photo covers.
            images: the photos.
        """
        assert output.masks is not None, "asked of a model with the mask branch"
        # Only the last layer, from which boxes and vectors come, too; training uses all layers.
        last = MaskInputs(output.masks.maps, output.masks.states[-1:])
        logits = self._model.masks.of_queries(last, output.boxes[-1:], chosen.queries[None])[0]
        return [
            tuple(
                encode(paint(logits_HW, share_2, box, (image.shape[0], image.shape[1])))
                for logits_HW, box in zip(logits_kHW[:count], boxes_k4, strict=False)
            )
            for logits_kHW, share_2, boxes_k4, count, image in zip(
                logits,
                shares_B2.tolist(),
                chosen.boxes.tolist(),
                chosen.counts.tolist(),
                images,
                strict=True,
            )
        ]

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """Return (M, D) float32 vectors of the last layer, in the order given."""
        vectors = np.zeros((len(expressions), self.dim), dtype=np.float32)
        for start in range(0, len(expressions), TEXT_BATCH):
            texts = expressions[start : start + TEXT_BATCH]
            ids = tokenize(self._tokenizer, texts, self._model.config).to(self._device)
            with (
                torch.inference_mode(),
                torch.autocast(self._device.type, torch.bfloat16, enabled=self._half),
            ):
                vectors[start : start + len(texts)] = self._model.text(ids)[-1].cpu().numpy()
        return vectors


def _records(
    chosen: ClareCandidates, masks: Sequence[tuple[MaskRle, ...] | None] | None = None
) -> list[Instances]:
    """Return the record of each photo."""
    return [
        instances_of(boxes[:count], objectness[:count], vectors[:count], found)
        for boxes, objectness, vectors, count, found in zip(
            chosen.boxes.cpu(),
            chosen.objectness.cpu(),
            chosen.vectors.cpu(),
            chosen.counts.tolist(),
            masks or [None] * len(chosen.boxes),
            strict=True,
        )
    ]


def instances_of(
    boxes_k4: Tensor,
    objectness_k: Tensor,
    vectors_kD: Tensor,
    masks: tuple[MaskRle, ...] | None = None,
) -> Instances:
    """Return the record of one photo.

    The vector of the photo is the mean of its candidates' vectors, weighted by objectness. The
    model has no vector for the whole photo.
    """
    whole_D = F.normalize((objectness_k[:, None] * vectors_kD).sum(dim=0), dim=0)
    return Instances(
        boxes=boxes_k4.numpy(),
        objectness=objectness_k.numpy(),
        vectors=vectors_kD.numpy(),
        image_vector=whole_D.numpy(),
        masks=masks,
    )
