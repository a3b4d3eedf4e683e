"""`PhraseLanguage`: the first phrase of a sentence, in the words of a frozen sentence encoder.

What a sentence describes is in its first phrase: "the red cup" in "the red cup left of the plate".
The words after it name other objects. Without boxes, a model cannot learn that from a few thousand
sentences, and takes any of the named objects (docs/LOG.md, 2026-11-25).
"""

# Shapes: N sentences, L tokens, C channels, K classes, W words for classes

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.wrong_words import PERSON, PERSONS
from reir.models.nano.encoder import TEXT_BATCH, tokenize
from reir.models.nano.sentence_tower import SentenceTower
from reir.models.weak_rec.anchors import Standardize
from reir.text import first_phrase

CLASS_WORDS = [
    (i, word)
    for i, name in enumerate(COCO_CLASSES)
    for word in (PERSONS if name == PERSON else (name,))
]
"""Class and word, for all words that stand for a class. People are hardly ever called "person"."""


class PhraseLanguage(nn.Module):
    """Sentences -> features of their first phrases, and the classes that these name.

    Args:
        tower: frozen sentence encoder.
        tokenizer: of the tower, without padding or truncation.
    """

    words: Tensor
    center: Tensor

    def __init__(self, tower: SentenceTower, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tower, self.tokenizer = tower.requires_grad_(False), tokenizer
        self.width = tower.width
        self.standardize = Standardize(tower.width)
        self.register_buffer("center", torch.zeros(tower.width))
        self.register_buffer("words", torch.zeros(len(CLASS_WORDS), tower.width))

    def load(self, sentences: Sequence[str]) -> Tensor:
        """Return (N, C) means of the token states of the first phrases; see `means`."""
        return self.means([first_phrase(each) for each in sentences])

    @torch.no_grad()
    def means(self, texts: Sequence[str]) -> Tensor:
        """Return (N, C) means of the token states of texts, as the tower was trained."""
        # Many sentences begin with the same phrase. In order of length, there is little padding.
        unique = sorted(set(texts), key=len)
        places = {text: place for place, text in enumerate(unique)}
        self.tower.eval()
        parts = [self.center.new_zeros(0, self.width)]
        for start in range(0, len(unique), TEXT_BATCH):
            some = unique[start : start + TEXT_BATCH]
            ids_NL, mask_NL = tokenize(self.tokenizer, some, len(self.tower.positions))
            ids_NL, mask_NL = ids_NL.to(self.center.device), mask_NL.to(self.center.device)
            shares = mask_NL[..., None] / mask_NL.sum(1)[:, None, None]
            parts.append((self.tower(ids_NL, mask_NL) * shares).sum(1))
        return torch.cat(parts)[[places[text] for text in texts]]

    def forward(self, loaded_NC: Tensor) -> Tensor:
        """(N, C) loaded phrases -> (N, C) features."""
        features: Tensor = self.standardize(loaded_NC)
        return features

    @torch.no_grad()
    def fit(self, loaded_NC: Tensor) -> None:
        """Set the buffers from the loaded phrases of the training sentences."""
        self.standardize.fit(loaded_NC)
        words = F.normalize(self.load([f"the {word}" for _, word in CLASS_WORDS]), dim=-1)
        # All phrases have a common part, which would make all of them look alike.
        named = [i for i, (_, word) in enumerate(CLASS_WORDS) if word in COCO_CLASSES]
        self.center.copy_(words[named].mean(0))
        self.words.copy_(F.normalize(words - self.center, dim=-1))

    def classes(self, loaded_NC: Tensor) -> Tensor:
        """(N, C) loaded phrases -> (N, K) cosine with the most similar word of each class."""
        phrases_NC = F.normalize(F.normalize(loaded_NC, dim=-1) - self.center, dim=-1)
        cosine_NW = phrases_NC @ self.words.T
        class_NW = torch.tensor([i for i, _ in CLASS_WORDS], device=cosine_NW.device)
        best_NK = cosine_NW.new_full((len(cosine_NW), len(COCO_CLASSES)), -1.0)
        return best_NK.scatter_reduce(1, class_NW.expand_as(cosine_NW), cosine_NW, "amax")
