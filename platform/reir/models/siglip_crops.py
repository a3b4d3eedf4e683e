"""SigLIP or SigLIP 2 on crops (Zhai et al. 2023; Tschannen et al. 2025) as an instance encoder.

A detector proposes boxes without any query; the frozen image tower encodes two crops of each box:

    close     the box with a margin of a tenth of its sides: the instance itself
    context   a box with twice its sides: what is next to the instance
    vector    (1 - CONTEXT_SHARE) * close + CONTEXT_SHARE * context, normalized before and after

The share was chosen, not fitted: most words of an expression are about the instance itself. With a
share of 0, a score is exactly the cosine in the library's logit of crop and text; scale and bias of
that logit would not change the order.

With a relation share, the vector of an instance also contains those of its neighbors in the photo:

    weight_ij  exp(-distance of centers / RELATION_SCALE), divided by the sum over all j except i
    vector_i   (1 - share) * vector_i + share * sum of weight_ij * vector_j, normalized

Up to its length, the score of an instance is then its own score and the scores of the others, by
how near they are: "the mug left of the laptop" fits a mug better that has a laptop beside it. It
does not know which side is meant. The vector depends on no expression, so an index can store it.
"""

# Shapes: N instances of one photo, M crops, D vector dimension, H x W pixels

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from reir.models.pretrained import PretrainedModel, load_pretrained
from reir.models.proposals import Candidates
from reir.records import FloatArray, Instances, RgbImage

CLOSE_MARGIN, CONTEXT_MARGIN = 0.1, 0.5
"""Fraction of the box side added on each side, as far as the photo goes."""
CONTEXT_SHARE = 0.3
RELATION_SHARE = 0.2
"""Share of the neighbors in an encoder with relations; chosen, not fitted."""
RELATION_SCALE = 0.2
"""Distance, in sides of the photo, over which the weight of a neighbor falls to 1/e."""
NUM_CANDIDATES = 30
CROP_BATCH = 32
DETECTOR_BATCH = 8
TEXT_BATCH = 128


@dataclass(frozen=True)
class Detector:
    """The detector that proposes instances.

    Attributes:
        propose: (photos, maximum number) -> candidates of each photo, best first; must be
            thread-safe.
        digest: sha256 of its weights.
    """

    propose: Callable[[Sequence[RgbImage], int], list[Candidates]]
    digest: str


def load_siglip_crops(
    source: str,
    detector: Detector,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    relation_share: float = 0.0,
) -> SiglipCropsEncoder:
    """Load SigLIP from a directory or the hub, and build the encoder.

    Raises the errors of `load_pretrained`.
    """
    parts = load_pretrained(source, AutoModel, ("siglip", "siglip2"), device=device, dtype=dtype)
    return SiglipCropsEncoder(parts, detector, relation_share=relation_share)


class SiglipCropsEncoder:
    """Encodes photos and expressions; thread-safe after construction.

    Args:
        parts: SigLIP with its tokenizer and image processor.
        detector: proposes the boxes.
        num_candidates: maximum number of instances per photo.
        context_share: weight of the context in a vector, 0 to 1.
        relation_share: weight of the other instances of the photo in a vector, 0 to 1.

    Raises:
        ValueError: `num_candidates` is below 1, or a share is out of range.
    """

    masks = False

    def __init__(
        self,
        parts: PretrainedModel,
        detector: Detector,
        *,
        num_candidates: int = NUM_CANDIDATES,
        context_share: float = CONTEXT_SHARE,
        relation_share: float = 0.0,
    ) -> None:
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
        shares = {"context_share": context_share, "relation_share": relation_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        self._relation_share = relation_share
        self._parts, self._model, self._detector = parts, parts.model, detector
        self._num_candidates, self._context_share = num_candidates, context_share
        # Everything that a vector depends on, because vectors of equal digests are compared.
        made_of = [parts.digest, detector.digest, CLOSE_MARGIN, CONTEXT_MARGIN, context_share]
        # Without relations, the digest stays that of galleries that were indexed before.
        made_of += [relation_share, RELATION_SCALE] if relation_share else []
        self._digest = hashlib.sha256(" ".join(map(str, made_of)).encode()).hexdigest()

    @property
    def dim(self) -> int:
        """Dimension D of both kinds of vector."""
        return int(self._model.config.vision_config.hidden_size)

    @property
    def digest(self) -> str:
        """Sha256 over the digests of SigLIP and the detector, and the settings of the crops."""
        return self._digest

    @property
    def num_candidates(self) -> int:
        """Maximum number of instances per photo."""
        return self._num_candidates

    def propose_boxes(self, image: RgbImage, num_boxes: int) -> tuple[FloatArray, FloatArray]:
        """Return the boxes of one photo and their scores; see `BoxProposer.propose_boxes`."""
        (found,) = self._detector.propose([image], num_boxes)
        return found.boxes.numpy(), found.scores.numpy()

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each photo, by descending objectness; a photo may have none."""
        out: list[Instances] = []
        for start in range(0, len(images), DETECTOR_BATCH):
            some = images[start : start + DETECTOR_BATCH]
            with torch.inference_mode():
                found = self._detector.propose(some, self._num_candidates)
            for image, candidates in zip(some, found, strict=True):
                boxes, scores = candidates.boxes.cpu().numpy(), candidates.scores.cpu().numpy()
                out.append(self._instances(image, boxes, scores))
        return out

    def encode_boxes(self, image: RgbImage, boxes: FloatArray) -> Instances:
        """Return the instances of one photo at (N, 4) given boxes; their objectness is 1."""
        return self._instances(image, boxes, np.ones(len(boxes), dtype=np.float32))

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors, in the order given; only the first 64 tokens count."""
        vectors = np.zeros((len(expressions), self.dim), dtype=np.float32)
        for start in range(0, len(expressions), TEXT_BATCH):
            rows = slice(start, start + TEXT_BATCH)
            vectors[rows] = self._encode_texts(expressions[rows])
        return vectors

    @torch.inference_mode()
    def _encode_texts(self, texts: Sequence[str]) -> FloatArray:
        # SigLIP was trained on texts padded to full length, without a mask, and pools the last
        # position.
        output = self._model.text_model(input_ids=self._parts.tokens(texts)["input_ids"])
        return np.asarray(F.normalize(output.pooler_output, dim=-1).cpu())

    def _instances(self, image: RgbImage, boxes: FloatArray, scores: FloatArray) -> Instances:
        close = [crop(image, box, CLOSE_MARGIN) for box in boxes]
        context = [crop(image, box, CONTEXT_MARGIN) for box in boxes]
        # The photo as a whole goes first, for the vector of the photo.
        unit_MD = self._encode_crops([image, *close, *context])
        close_ND, context_ND = unit_MD[1 : 1 + len(boxes)], unit_MD[1 + len(boxes) :]
        mixed_ND = F.normalize(close_ND.lerp(context_ND, self._context_share), dim=-1)
        if self._relation_share and len(boxes) > 1:
            nearby_ND = neighbor_weights(torch.as_tensor(boxes)) @ mixed_ND
            mixed_ND = F.normalize(mixed_ND.lerp(nearby_ND, self._relation_share), dim=-1)
        return Instances(
            boxes=boxes,
            objectness=scores,
            vectors=mixed_ND.numpy(),
            image_vector=unit_MD[0].numpy(),
        )

    @torch.inference_mode()
    def _encode_crops(self, crops: Sequence[RgbImage]) -> Tensor:
        """(M, D) unit vectors of crops of any sizes."""
        parts = []
        for start in range(0, len(crops), CROP_BATCH):
            inputs = self._parts.pixels(crops[start : start + CROP_BATCH])
            with self._parts.autocast():
                parts.append(self._model.get_image_features(**inputs).pooler_output)
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def neighbor_weights(boxes_N4: Tensor) -> Tensor:
    """(N, N) weight of each instance for another, at least two; rows sum to 1, the diagonal is 0.

    Args:
        boxes_N4: xyxy in [0, 1].
    """
    centers_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]).double() / 2
    distance_NN = torch.cdist(centers_N2, centers_N2)
    distance_NN.fill_diagonal_(torch.inf)
    return (-distance_NN / RELATION_SCALE).softmax(dim=1).float()


def crop(image: RgbImage, box: FloatArray, margin: float) -> RgbImage:
    """Return the whole pixels of a box with a margin, at least one in each direction.

    Args:
        image: (H, W, 3).
        box: (4,) xyxy in [0, 1].
        margin: fraction of the box side added on each side, as far as the photo goes.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = box.astype(np.float64)
    dx, dy = (x2 - x1) * margin, (y2 - y1) * margin
    left, right = _pixel_range(x1 - dx, x2 + dx, width)
    top, bottom = _pixel_range(y1 - dy, y2 + dy, height)
    return image[top:bottom, left:right]


def _pixel_range(low: float, high: float, size_px: int) -> tuple[int, int]:
    """Return the pixels that overlap `low` to `high`, which are fractions of the side."""
    first = min(max(int(np.floor(low * size_px)), 0), size_px - 1)
    return first, min(max(int(np.ceil(high * size_px)), first + 1), size_px)
