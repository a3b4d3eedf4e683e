"""`CandidateHead`: what the detector says about each candidate, as a part of its vector.

The detector knows the class and the box of a candidate, and with them its place in the photo and
among others of its kind ("the second cup from the left", "the largest dog"). The head writes both
into further dimensions of the instance vectors. For an expression, it writes there which class it
is about, and which places fit. So the inner product of two vectors compares these, too.

The head has few weights and sees no pixels. So it also holds for photos unlike those of its
training, where the other dimensions, which were fitted to pixels, are less certain.
"""

# Shapes: M expressions, K candidates of a photo, C classes, S width of the text tower, P features
#         of a place, E dimensions of the head's part of a vector; ... any axes in front

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reir.models.picodet import NUM_CLASSES

SCORE_OF_LOGIT = 0.02
"""What a unit of the head's logit adds to an inner product; chosen on `val`."""
CLASS_LENGTH, PLACE_LENGTH = 6.0, 5.0
"""Divisors of the head's part of an instance vector, and factors of that of an expression. The part
of an expression becomes a third as long as the rest, so that it hardly changes the scores of the
rest when the whole is scaled to unit length."""

THIRDS = (1 / 6, 1 / 2, 5 / 6)
"""Centers of the thirds of a side."""
THIRD_WIDTH = 0.2
PLACE_FEATURES = 20
MIN_SCORE = 0.02
"""A class score that says as little as none, because the detector also misses classes."""
ALONE = 0.3
"""Number of candidates of the same kind below which an order among them does not count in full."""


@dataclass(frozen=True, kw_only=True)
class CandidateHeadConfig:
    """The hyperparameters of the head; stored in the `config.json` of a checkpoint.

    Attributes:
        class_dims: dimensions in which classes are compared.
        width: of the layer between the expression and the weights of a place.
        dropout: in training.
    """

    class_dims: int = 28
    width: int = 64
    dropout: float = 0.4

    @property
    def dims(self) -> int:
        """E, the dimension of the head's part of a vector."""
        return self.class_dims + PLACE_FEATURES


class CandidateHead(nn.Module):
    """Describes candidates by their class scores and boxes, and expressions by what they ask for.

    Args:
        config: hyperparameters.
        text_width: S.

    Attributes:
        usual: (E,) mean of the parts of candidates, which is subtracted from them. Training only
            compares candidates of one photo, so without this, an expression could score higher for
            all candidates.
    """

    usual: Tensor

    def __init__(self, config: CandidateHeadConfig, text_width: int) -> None:
        super().__init__()
        self.config = config
        width, drop = config.width, config.dropout
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Dropout(drop))
        self.to_classes = nn.Linear(text_width, NUM_CLASSES)
        self.class_axes = nn.Parameter(torch.empty(NUM_CLASSES, config.class_dims))
        weigh = nn.Linear(width, PLACE_FEATURES)
        self.to_place = nn.Sequential(
            nn.Linear(text_width, width), nn.ReLU(), nn.Dropout(drop), weigh
        )
        self.register_buffer("usual", torch.zeros(config.dims))
        # One number, but with an axis, because DeepSpeed broadcasts no parameter without one.
        self.class_weight = nn.Parameter(torch.ones(1))
        nn.init.orthogonal_(self.class_axes)
        # A place has no effect at first; the classes alone are already a good answer.
        nn.init.zeros_(weigh.weight)
        nn.init.zeros_(weigh.bias)

    def forward(self, texts_MS: Tensor, classes_MKC: Tensor, places_MKP: Tensor) -> Tensor:
        """Return (M, K) logits of a softmax over the candidates of one photo.

        Args:
            texts_MS: means over the token states of the expressions.
            classes_MKC: class scores of the candidates, in [0, 1].
            places_MKP: see `places_of`.
        """
        classes_ME, places_MP = self._asked(texts_MS)
        found = torch.einsum("me,mke->mk", classes_ME, self._found(classes_MKC))
        return found + torch.einsum("mp,mkp->mk", places_MP, places_MKP)

    def named_classes(self, texts_MS: Tensor) -> Tensor:
        """(M, C) logits of the class that each expression is about."""
        out: Tensor = self.to_classes(self.text(texts_MS))
        return out

    def describe(self, boxes: Tensor, classes: Tensor) -> Tensor:
        """Return the (..., K, E) part of the vectors of candidates.

        Args:
            boxes: (..., K, 4) xyxy in [0, 1].
            classes: (..., K, C) class scores; 0 for padding.
        """
        parts = [self._found(classes) / CLASS_LENGTH, places_of(boxes, classes) / PLACE_LENGTH]
        return torch.cat(parts, dim=-1) - self.usual

    def express(self, texts_MS: Tensor) -> Tensor:
        """Return the (M, E) part of the vectors of expressions, given means of token states."""
        classes_ME, places_MP = self._asked(texts_MS)
        parts = torch.cat([classes_ME * CLASS_LENGTH, places_MP * PLACE_LENGTH], dim=-1)
        return SCORE_OF_LOGIT * parts

    def _asked(self, texts_MS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class of each expression in the class dimensions, and weights of places."""
        texts_MS = self.text(texts_MS)
        named_MC = self.to_classes(texts_MS).softmax(-1)
        return self.class_weight * (named_MC @ self.class_axes), self.to_place(texts_MS)

    def _found(self, classes: Tensor) -> Tensor:
        """Return class scores in the class dimensions."""
        evidence = (classes.clamp(min=0) / MIN_SCORE).log1p()
        return evidence @ self.class_axes


def places_of(boxes: Tensor, classes: Tensor) -> Tensor:
    """Return (..., K, P) features of the place of each candidate, each of about the same size.

    These are its center, its size, its lower edge, the thirds of the photo in which it lies, the
    number of candidates of its kind, and its order among them from left to right, from top to
    bottom, and by size. Two candidates are of the same kind as far as their class scores are alike,
    and count as far as the detector is certain of them.

    Args:
        boxes: (..., K, 4) xyxy in [0, 1].
        classes: (..., K, C) class scores; 0 for padding, which does not count.
    """
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0.01)
    area, bottom = side.log().sum(-1, keepdim=True), boxes[..., 3:]
    alike = _alike(classes)
    num = alike.sum(-1, keepdim=True) + ALONE
    ordered = torch.cat([center, area, bottom, side[..., 1:]], dim=-1)
    above = torch.sign(ordered[..., :, None, :] - ordered[..., None, :, :])
    order = (above * alike[..., None]).sum(-2) / num
    thirds = torch.tensor(THIRDS, device=boxes.device)
    near = torch.exp(-(((center[..., None] - thirds) / THIRD_WIDTH) ** 2)).flatten(-2)
    signed = center * 2 - 1
    own = [signed, signed.square(), side.log() / 2, area / 3, bottom * 2 - 1, num.log()]
    return torch.cat([*own, order, near], dim=-1)


def _alike(classes: Tensor) -> Tensor:
    """(..., K, K) how far each other candidate is of the same kind, times its class score."""
    unit = nn.functional.normalize(classes, dim=-1)
    alike = unit @ unit.mT * classes.amax(-1)[..., None, :]
    return alike * (1 - torch.eye(alike.shape[-1], device=alike.device))
