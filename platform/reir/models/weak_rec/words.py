"""`WordLanguage`: sentences as words of a vocabulary, read by RefCLIP's language encoder."""

# Shapes: N sentences, L words, C channels, V words of the vocabulary, E width of their vectors

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from reir.models.weak_rec.language import NUM_BLOCKS, WIDTH, GruLanguage
from reir.models.weak_rec.vocabulary import MAX_TOKENS, PAD, Vocabulary


class WordLanguage(nn.Module):
    """Sentences -> (N, C).

    Args:
        vocabulary: of the words.
        vectors_VE: their vectors, which stay as they are.
        max_words: L; longer sentences are truncated.
        num_blocks: of self-attention.
    """

    width = WIDTH

    def __init__(
        self,
        vocabulary: Vocabulary,
        vectors_VE: Tensor,
        *,
        max_words: int = MAX_TOKENS,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        super().__init__()
        self.vocabulary, self._max_words = vocabulary, max_words
        self.encoder = GruLanguage(vectors_VE, num_blocks=num_blocks)

    def load(self, sentences: Sequence[str]) -> Tensor:
        """Return (N, L) word ids."""
        return self.vocabulary.encode(sentences, self._max_words)[0]

    def forward(self, loaded_NL: Tensor) -> Tensor:
        """(N, L) word ids -> (N, C)."""
        features: Tensor = self.encoder(loaded_NL, loaded_NL != PAD)
        return features

    def classes(self, loaded: Tensor) -> Tensor:
        """Return (N, 0): words are not compared with the classes of the detector."""
        return loaded.new_zeros(len(loaded), 0).float()
