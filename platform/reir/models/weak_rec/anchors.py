"""Anchors: the boxes of a photo among which a sentence chooses, and where they come from.

A source of anchors is frozen, so that what it finds depends on no sentence. The shipped one is the
frozen part of `clare-nano`, whose candidates are the anchors.
"""

# Shapes: B photos, A anchors of a photo, R boxes of an anchor, F features, C classes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reir.models.nano.box_geometry import GEOMETRY_FEATURES, box_geometry
from reir.models.nano.candidates import CandidateExtractor
from reir.models.nano.crop_network import CHANNELS, CropNetwork
from reir.models.nano.encoder import fast_dtype
from reir.models.nano.model import (
    DETECTOR_FEATURES,
    CandidateBatch,
    ClareNano,
    ClareNanoConfig,
)
from reir.models.picodet import PicoDet
from reir.records import RgbImage

LEAST_DEVIATION = 1e-3
"""Features that hardly vary are divided by this instead of by their standard deviation."""


class Anchors(NamedTuple):
    """The anchors of B photos; a tuple, since ZeRO-3 finds tensors in tuples only.

    Attributes:
        features: (B, A, F).
        boxes: (B, A, R, 4) xyxy in [0, 1] of the photo; an anchor has R boxes, of which the most
            confident one is its answer.
        confidence: (B, A, R) of each box, without any sentence.
        class_scores: (B, A, C) probabilities of the detector's classes; C is 0 if it has none.
        valid: (B, A) bool, False on padding.
    """

    features: Tensor
    boxes: Tensor
    confidence: Tensor
    class_scores: Tensor
    valid: Tensor

    def most_confident(self, num: int) -> Anchors:
        """Keep the `num` anchors of each photo with the highest mean confidence of their boxes.

        This is the anchor selection of RefCLIP (docs/weak-rec.md, section 3.4).
        """
        num = min(num, self.valid.shape[1])
        # Padding is kept only where a photo has fewer anchors than `num`, and remains invalid.
        confidence_BA = self.confidence.mean(-1).masked_fill(~self.valid, -torch.inf)
        rows_BK = confidence_BA.topk(num, dim=1).indices

        def kept(values: Tensor) -> Tensor:
            shape = (*rows_BK.shape, *values.shape[2:])
            index = rows_BK.reshape(*rows_BK.shape, *[1] * (values.ndim - 2)).expand(shape)
            return values.gather(1, index)

        return Anchors(*map(kept, self))

    def answers(self) -> Tensor:
        """(B, A, 4) the most confident box of each anchor."""
        best_BA = self.confidence.argmax(-1)[..., None, None]
        return self.boxes.gather(2, best_BA.expand(-1, -1, 1, 4))[:, :, 0]


class AnchorSource(Protocol):
    """Finds the anchors of photos; what is loaded of a photo is separate, so it can be cached."""

    @property
    def width(self) -> int:
        """F, the number of features of an anchor."""
        ...

    def load(self, photos: Sequence[RgbImage]) -> dict[str, Tensor]:
        """Return what `forward` needs of some photos: tensors with one row for each photo."""
        ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> Anchors:
        """Return the anchors of the photos."""
        ...


class FrozenParts(nn.Module):
    """The detector and the crop network of a `clare-nano`.

    Args:
        config: of that `clare-nano`.
    """

    def __init__(self, config: ClareNanoConfig) -> None:
        super().__init__()
        self.config = config
        self.detector, self.crop_network = PicoDet(), CropNetwork(config.crop_network)

    @classmethod
    def of(cls, nano: ClareNano) -> FrozenParts:
        """Return the parts of a `clare-nano`, with its own weights."""
        parts = cls(nano.config)
        parts.detector, parts.crop_network = nano.detector, nano.crop_network
        return parts


class Standardize(nn.Module):
    """Gives each feature a mean of 0 and a standard deviation of 1 over the training photos.

    Args:
        width: F.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def fit(self, rows: Tensor) -> None:
        """Set mean and deviation from (N, F) features; fewer than two leave them as they are."""
        # A single value has no deviation, and would turn all features into no numbers.
        if len(rows) < 2:
            return
        self.mean.copy_(rows.mean(0))
        self.deviation.copy_(rows.std(0).clamp(min=LEAST_DEVIATION))

    def forward(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., F)."""
        return (features - self.mean) / self.deviation


class CandidateAnchors(nn.Module):
    """The candidates of `clare-nano` as anchors, with one box each.

    Args:
        parts: frozen.
    """

    width = CHANNELS + DETECTOR_FEATURES + GEOMETRY_FEATURES

    def __init__(self, parts: FrozenParts) -> None:
        super().__init__()
        self.parts = parts.requires_grad_(False)
        self.standardize = Standardize(self.width)

    def load(self, photos: Sequence[RgbImage]) -> dict[str, Tensor]:
        """Return the fields of the `CandidateBatch` of the photos."""
        return self._extractor()(photos).tensors()

    def forward(self, inputs: Mapping[str, Tensor]) -> Anchors:
        """Return the candidates as anchors, with standardized features."""
        found = CandidateBatch(**inputs)
        return Anchors(
            features=self.standardize(self.features(found)),
            boxes=found.boxes[:, :, None],
            confidence=found.objectness[:, :, None],
            class_scores=found.class_scores,
            valid=found.valid,
        )

    def fit(self, found: CandidateBatch) -> None:
        """Set mean and deviation of the features from the candidates of the training photos."""
        self.standardize.fit(self.features(found)[found.valid])

    @staticmethod
    def features(found: CandidateBatch) -> Tensor:
        """(B, A, F) features of the crop, of the detector, and of the position in the photo.

        Each is the difference from the mean of the photo's candidates. What all of them have in
        common tells photos apart, but not the instances of a photo. With it, the contrast across
        photos would learn the scene instead of the instance (docs/LOG.md, 2026-11-25).
        """
        place = box_geometry(found.boxes, found.objectness, found.aspect)
        features = torch.cat([found.crops, found.detector, place], dim=-1)
        valid = found.valid[..., None].to(features.dtype)
        mean = (features * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return (features - mean) * valid

    def _extractor(self) -> CandidateExtractor:
        # Built at first use and kept out of the module's state: an engine is no weight.
        if "_engines" not in self.__dict__:
            self.__dict__["_engines"] = CandidateExtractor(self.parts, fast_dtype())
        engines: CandidateExtractor = self.__dict__["_engines"]
        return engines
