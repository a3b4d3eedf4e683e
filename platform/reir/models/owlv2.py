"""OWLv2 (Minderer et al., "Scaling Open-Vocabulary Object Detection", 2023) as an instance encoder.

Its boxes, objectness and class embeddings do not depend on the query, so photos can be indexed once
and searched with any expression. The library computes, for box i and query q,

    logit_i(q) = (cos(e_i, q) + b_i) * s_i

with a shift b_i and a positive scale s_i for each box. The store ranks by the inner product of unit
vectors, and the logit can be written as one: s_i and b_i are linear in the output of a layer norm,
which bounds them by s_i <= S and |b_i| <= B. With e_i and q of length 1,

    instance    (s_i e_i, s_i b_i / sqrt(B), r_i * S sqrt(1 + B)) / (S sqrt(1 + B))
    expression  (q, sqrt(B), 0) / sqrt(1 + B)

r_i makes the length of the vector 1, which the bounds leave room for; it is multiplied by the zero
of the expression. The inner product is logit_i(q) / (S (1 + B)): the order of the library, within a
photo and across photos. The divisor is the largest possible logit, so scores lie in [-1, 1].
"""

# Shapes: B photos, P patches (one box each), K kept boxes, C width of the image tower, N texts,
#         T width of text and class embeddings, D = T + 2 vector dimension

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # noqa: F401, without it the image processor fails only when a photo is encoded
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Owlv2ForObjectDetection

from reir.models.pretrained import PretrainedModel, load_pretrained
from reir.models.proposals import greedy_nms
from reir.records import FloatArray, Instances, RgbImage

NUM_CANDIDATES = 30
NMS_IOU = 0.7
IMAGE_BATCH = 4
"""A photo has 3,600 patches, so larger batches take more memory without being faster."""
TEXT_BATCH = 128
LENGTH_EPS = 1e-6
"""Added by the library to the length of an embedding before dividing by it."""


def load_owlv2(
    source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Owlv2Encoder:
    """Load an encoder from a directory or the hub; raises the errors of `load_pretrained`."""
    return Owlv2Encoder(
        load_pretrained(source, Owlv2ForObjectDetection, ("owlv2",), device=device, dtype=dtype)
    )


@dataclass(frozen=True)
class UnitForm:
    """Writes logits with a shift and a scale as inner products of unit vectors.

    Attributes:
        max_scale: S, an upper bound of every scale.
        max_shift: B, a positive upper bound of the magnitude of every shift.
    """

    max_scale: float
    max_shift: float

    @property
    def score_scale(self) -> float:
        """The logit that corresponds to a score of 1."""
        return self.max_scale * (1 + self.max_shift)

    def instances(self, unit_KT: Tensor, shift_K: Tensor, scale_K: Tensor) -> Tensor:
        """(K, D - 1) instance vectors without the coordinate that makes their length 1."""
        shift_K1 = shift_K[:, None] / math.sqrt(self.max_shift)
        longest = self.max_scale * math.sqrt(1 + self.max_shift)
        return torch.cat([unit_KT, shift_K1], dim=1) * scale_K[:, None] / longest

    def expressions(self, unit_NT: Tensor) -> Tensor:
        """(N, D) expression vectors."""
        rows = F.pad(unit_NT, (0, 1), value=math.sqrt(self.max_shift))
        return F.pad(rows, (0, 1)) / math.sqrt(1 + self.max_shift)

    def photo(self, part_KE: Tensor, weight_K: Tensor) -> Tensor:
        """(D - 1,) weighted mean of a photo's instances; its score is their weighted mean logit.

        A photo without instances gets the lowest score that does not depend on the expression.
        """
        if not len(part_KE):
            return F.pad(part_KE.new_zeros(part_KE.shape[1] - 1), (0, 1), value=-1.0)
        return (part_KE * weight_K[:, None]).sum(0) / weight_K.sum()


def fill_to_unit_length(part: Tensor) -> Tensor:
    """Append a coordinate that makes the vectors in the last dimension unit length."""
    rest = (1 - part.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    return torch.cat([part, rest], dim=-1)


def linear_range(head: nn.Linear, norm: nn.LayerNorm) -> tuple[float, float]:
    """Return the range of a linear unit over all possible outputs of the layer norm before it.

    A layer norm of width C gives `gain * h + offset` with h of mean 0 and length at most sqrt(C),
    so the unit's output is a constant plus an inner product with h, largest along its own weights.
    """
    # In float64, so that only the layer norm itself, in float32, can exceed the bounds by rounding.
    weight_C, bias = head.weight[0].detach().double(), head.bias[0].detach()
    slope_C = weight_C * norm.weight.detach().double()
    center = float(weight_C @ norm.bias.detach().double() + bias)
    # The mean of h is 0, so the mean of the slope has no effect.
    reach = float((slope_C - slope_C.mean()).norm()) * math.sqrt(len(slope_C))
    return center - reach, center + reach


def unit_form(model: Owlv2ForObjectDetection) -> UnitForm:
    """Return the bounds of the shifts and scales, which follow from the weights."""
    head, norm = model.class_head, model.layer_norm
    _, raw = linear_range(head.logit_scale, norm)
    low, high = linear_range(head.logit_shift, norm)
    slack = 1 + 1e-5  # rounding in the layer norm could exceed the bounds
    max_scale = raw + 1 if raw > 0 else math.exp(raw)  # ELU + 1
    return UnitForm(max_scale * slack, max(-low, high, LENGTH_EPS) * slack)


class Owlv2Encoder:
    """Encodes photos and expressions; thread-safe after construction.

    Args:
        parts: the model with its tokenizer and image processor.
        num_candidates: maximum number of instances per photo, the best by objectness.
        nms_iou: of two boxes that overlap by more, only the one with more objectness is kept.

    Raises:
        ValueError: `num_candidates` is below 1.
    """

    masks = False

    def __init__(
        self,
        parts: PretrainedModel,
        *,
        num_candidates: int = NUM_CANDIDATES,
        nms_iou: float = NMS_IOU,
    ) -> None:
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
        self._parts, self._model = parts, parts.model
        self._num_candidates, self._nms_iou = num_candidates, nms_iou
        self._form = unit_form(parts.model)

    @property
    def dim(self) -> int:
        """Dimension D of both kinds of vector."""
        return int(self._model.class_head.dense0.out_features) + 2

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        return self._parts.digest

    @property
    def num_candidates(self) -> int:
        """Maximum number of instances per photo."""
        return self._num_candidates

    @property
    def score_scale(self) -> float:
        """A score times this is the library's logit; its sigmoid is the library's score."""
        return self._form.score_scale

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each photo, by descending objectness; a photo may have none."""
        out: list[Instances] = []
        for start in range(0, len(images), IMAGE_BATCH):
            out.extend(self._encode_batch(images[start : start + IMAGE_BATCH]))
        return out

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors, in the order given.

        The text tower reads 16 tokens, including start and end; the rest is ignored.
        """
        vectors = np.zeros((len(expressions), self.dim), dtype=np.float32)
        for start in range(0, len(expressions), TEXT_BATCH):
            rows = slice(start, start + TEXT_BATCH)
            vectors[rows] = self._encode_texts(expressions[rows])
        return vectors

    @torch.inference_mode()
    def _encode_texts(self, texts: Sequence[str]) -> FloatArray:
        core = self._model.owlv2
        output = core.text_model(**self._parts.tokens(texts))
        unit_NT = F.normalize(core.text_projection(output.pooler_output), dim=-1)
        return np.asarray(self._form.expressions(unit_NT).cpu())

    @torch.inference_mode()
    def _encode_batch(self, images: Sequence[RgbImage]) -> list[Instances]:
        pixels = self._parts.pixels(images)["pixel_values"]
        # The tower takes nearly all of the time. The heads stay in float32, since their outputs
        # determine the order of hits.
        with self._parts.autocast():
            maps, _ = self._model.image_embedder(pixels)
        features_BPC = maps.float().flatten(1, 2)
        objectness_BP = self._model.objectness_predictor(features_BPC).sigmoid()
        cxcywh_BP4 = self._model.box_predictor(features_BPC, maps)
        return [
            self._instances(image, *found)
            for image, *found in zip(images, features_BPC, objectness_BP, cxcywh_BP4, strict=True)
        ]

    def _instances(
        self, image: RgbImage, features_PC: Tensor, objectness_P: Tensor, cxcywh_P4: Tensor
    ) -> Instances:
        boxes_P4 = boxes_without_padding(cxcywh_P4, image.shape[0], image.shape[1])
        # Boxes that are thinner than a pixel of the model's input are remains of the padding.
        pixel = 1 / self._model.config.vision_config.image_size
        rows = best_boxes(boxes_P4, objectness_P, self._num_candidates, self._nms_iou, pixel)
        part_KE = self._vector_part(features_PC[rows])
        whole_E = self._form.photo(part_KE, objectness_P[rows])
        return Instances(
            boxes=boxes_P4[rows].cpu().numpy(),
            objectness=objectness_P[rows].cpu().numpy(),
            vectors=fill_to_unit_length(part_KE).cpu().numpy(),
            image_vector=fill_to_unit_length(whole_E).cpu().numpy(),
        )

    def _vector_part(self, features_KC: Tensor) -> Tensor:
        head = self._model.class_head
        embedding_KT = head.dense0(features_KC)
        unit_KT = embedding_KT / (embedding_KT.norm(dim=-1, keepdim=True) + LENGTH_EPS)
        scale_K = F.elu(head.logit_scale(features_KC)[:, 0]) + 1
        return self._form.instances(unit_KT, head.logit_shift(features_KC)[:, 0], scale_K)


def boxes_without_padding(cxcywh_P4: Tensor, height_px: int, width_px: int) -> Tensor:
    """Convert boxes of the square, padded at the right or bottom, to xyxy of the photo."""
    center, half = cxcywh_P4[:, :2], cxcywh_P4[:, 2:] / 2
    sides = cxcywh_P4.new_tensor([width_px, height_px] * 2) / max(height_px, width_px)
    return (torch.cat([center - half, center + half], dim=1) / sides).clamp(0, 1)


def best_boxes(
    boxes_P4: Tensor, objectness_P: Tensor, num_keep: int, max_iou: float, min_side: float
) -> Tensor:
    """Return the rows of the best boxes by objectness after class-agnostic NMS, best first.

    Boxes in the padding, and boxes with a side below `min_side` of the photo, are never kept.
    """
    usable_P = ((boxes_P4[:, 2:] - boxes_P4[:, :2]) >= min_side).all(dim=1)
    # `greedy_nms` never keeps a score of 0.
    scores_P, order_P = objectness_P.where(usable_P, 0.0).sort(descending=True, stable=True)
    picks, counts = greedy_nms(boxes_P4[order_P][None], scores_P[None], num_keep, max_iou)
    return order_P[picks[0, : int(counts[0])]]
