"""`PhraseLanguage`: the first phrase of a sentence, in the words of a frozen sentence encoder.

What a sentence describes is in its first phrase: "the red cup" in "the red cup left of the plate".
The words after it name other objects. Without boxes, a model cannot learn that from a few thousand
sentences, and takes any of the named objects (docs/LOG.md, 2026-11-25).
"""

# Shapes: N sentences, L tokens, C channels, K classes

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.datasets.coco_classes import COCO_CLASSES
from reir.models.nano.encoder import TEXT_BATCH, tokenize
from reir.models.nano.sentence_tower import SentenceTower
from reir.models.weak_rec.anchors import Standardize
from reir.text import first_phrase

CLASS_SHARPNESS = 12.0
"""Multiplies the cosine of a phrase and a class name before the softmax over all class names."""


class PhraseLanguage(nn.Module):
    """Sentences -> features of their first phrases, and the classes that these name.

    Args:
        tower: frozen sentence encoder.
        tokenizer: of the tower, without padding or truncation.
    """

    names: Tensor
    center: Tensor

    def __init__(self, tower: SentenceTower, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tower, self.tokenizer = tower.requires_grad_(False), tokenizer
        self.width = tower.width
        self.standardize = Standardize(tower.width)
        self.register_buffer("center", torch.zeros(tower.width))
        self.register_buffer("names", torch.zeros(len(COCO_CLASSES), tower.width))

    @torch.no_grad()
    def load(self, sentences: Sequence[str]) -> Tensor:
        """Return (N, C) means of the token states of first phrases, as the tower was trained."""
        device, longest = self.center.device, len(self.tower.positions)
        parts = [self.center.new_zeros(0, self.width)]
        phrases = [first_phrase(each) for each in sentences]
        self.tower.eval()
        for start in range(0, len(phrases), TEXT_BATCH):
            some = phrases[start : start + TEXT_BATCH]
            ids_NL, mask_NL = (x.to(device) for x in tokenize(self.tokenizer, some, longest))
            shares = mask_NL[..., None] / mask_NL.sum(1)[:, None, None]
            parts.append((self.tower(ids_NL, mask_NL) * shares).sum(1).float())
        return torch.cat(parts)

    def forward(self, loaded_NC: Tensor) -> Tensor:
        """(N, C) loaded phrases -> (N, C) features."""
        return self.standardize(loaded_NC)

    @torch.no_grad()
    def fit(self, loaded_NC: Tensor) -> None:
        """Set the buffers from the loaded phrases of the training sentences."""
        self.standardize.fit(loaded_NC)
        names = F.normalize(self.load([f"the {name}" for name in COCO_CLASSES]), dim=-1)
        # All phrases have a common part, which would make all of them look alike.
        self.center.copy_(names.mean(0))
        self.names.copy_(F.normalize(names - self.center, dim=-1))

    def classes(self, loaded_NC: Tensor) -> Tensor:
        """(N, C) loaded phrases -> (N, K) probability that the phrase names each class of COCO."""
        phrases_NC = F.normalize(F.normalize(loaded_NC, dim=-1) - self.center, dim=-1)
        return (CLASS_SHARPNESS * phrases_NC @ self.names.T).softmax(-1)
