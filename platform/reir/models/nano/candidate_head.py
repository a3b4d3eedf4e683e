"""`CandidateHead`: how well an expression fits what the detector says about each candidate.

The detector knows the class and the box of a candidate, and with them its place in the photo and
among others of its kind ("the second cup from the left", "the largest dog"). The head compares them
with the expression by two products: of the classes that the expression may be about with the class
scores, and of a vector that the expression chooses with the place of the candidate.

It has few weights and sees no pixels. So it also holds for photos unlike those of its training,
where the vectors of the dual stream, which were fitted to pixels, are less certain.
"""

# Shapes: M expressions, K candidates of a photo, C classes, S width of the text tower, P features
#         of a place

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reir.models.interfaces import EncodedExpression
from reir.models.picodet import NUM_CLASSES
from reir.records import FloatArray

THIRDS = (1 / 6, 1 / 2, 5 / 6)
"""Centers of the thirds of a side."""
THIRD_WIDTH = 0.2
PLACE_FEATURES = 20
MIN_SCORE = 0.02
"""Added to each class score, because the detector also misses classes."""
ALONE = 0.3
"""Number of candidates of the same kind below which an order among them does not count in full."""


@dataclass(frozen=True, kw_only=True)
class CandidateHeadConfig:
    """The hyperparameters of the head; stored in the `candidate_head.json` of a checkpoint.

    Attributes:
        width: of the layer between the expression and the weights of a place.
        dropout: in training.
    """

    width: int = 64
    dropout: float = 0.4


class CandidateHead(nn.Module):
    """Scores the candidates of one photo.

    Args:
        config: hyperparameters.
        text_width: S.
    """

    def __init__(self, config: CandidateHeadConfig, text_width: int) -> None:
        super().__init__()
        self.config = config
        width, drop = config.width, config.dropout
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Dropout(drop))
        self.to_classes = nn.Linear(text_width, NUM_CLASSES)
        weigh = nn.Linear(width, PLACE_FEATURES)
        self.to_place = nn.Sequential(
            nn.Linear(text_width, width), nn.ReLU(), nn.Dropout(drop), weigh
        )
        # One number, but with an axis, because DeepSpeed broadcasts no parameter without one.
        self.class_weight = nn.Parameter(torch.ones(1))
        # A place has no effect at first; the classes alone are already a good answer.
        nn.init.zeros_(weigh.weight)
        nn.init.zeros_(weigh.bias)

    def forward(self, texts_MS: Tensor, classes_MKC: Tensor, places_MKP: Tensor) -> Tensor:
        """Return (M, K) scores: logits of a softmax over the candidates.

        Args:
            texts_MS: means over the token states of the expressions.
            classes_MKC: class scores of the candidates, in [0, 1].
            places_MKP: see `places_of`.
        """
        texts_MS = self.text(texts_MS)
        named_MC = self.to_classes(texts_MS).softmax(-1)
        evidence_MK = (classes_MKC @ named_MC[..., None])[..., 0] + MIN_SCORE
        place_MK = (places_MKP @ self.to_place(texts_MS)[..., None])[..., 0]
        out: Tensor = self.class_weight * evidence_MK.log() + place_MK
        return out

    def named_classes(self, texts_MS: Tensor) -> Tensor:
        """(M, C) logits of the class that each expression is about."""
        out: Tensor = self.to_classes(self.text(texts_MS))
        return out

    def score(
        self, expression: EncodedExpression, boxes: FloatArray, class_scores: FloatArray
    ) -> FloatArray:
        """Score the candidates of a photo; see `CandidateScorer.score`."""
        text = torch.from_numpy(expression.states.mean(axis=0, keepdims=True))
        classes = torch.from_numpy(class_scores)
        places = places_of(torch.from_numpy(boxes), classes)
        with torch.inference_mode():
            scores: FloatArray = self(text, classes[None], places[None])[0].numpy()
        return scores


def places_of(boxes_K4: Tensor, classes_KC: Tensor) -> Tensor:
    """Return (K, P) features of the place of each candidate, each of about the same size.

    These are its center, its size, its lower edge, the thirds of the photo in which it lies, the
    number of candidates of its kind, and its order among them from left to right, from top to
    bottom, and by size. Two candidates are of the same kind as far as their class scores are alike,
    and count as far as the detector is certain of them.

    Args:
        boxes_K4: xyxy in [0, 1].
        classes_KC: class scores.
    """
    center = (boxes_K4[:, :2] + boxes_K4[:, 2:]) / 2
    side = (boxes_K4[:, 2:] - boxes_K4[:, :2]).clamp(min=0.01)
    area, bottom = side.log().sum(1, keepdim=True), boxes_K4[:, 3:]
    alike_KK = _alike(classes_KC)
    num = alike_KK.sum(1, keepdim=True) + ALONE
    ordered = torch.cat([center, area, bottom, side[:, 1:]], dim=1)
    above_KKO = torch.sign(ordered[:, None] - ordered[None])
    order = (above_KKO * alike_KK[..., None]).sum(1) / num
    thirds = torch.tensor(THIRDS)
    near = torch.exp(-(((center[..., None] - thirds) / THIRD_WIDTH) ** 2)).flatten(1)
    signed = center * 2 - 1
    own = [signed, signed.square(), side.log() / 2, area / 3, bottom * 2 - 1, num.log()]
    return torch.cat([*own, order, near], dim=1)


def _alike(classes_KC: Tensor) -> Tensor:
    """(K, K) how far each other candidate is of the same kind, times the score of its class."""
    unit = nn.functional.normalize(classes_KC, dim=1)
    alike = unit @ unit.T * classes_KC.amax(1)
    return alike.fill_diagonal_(0)
