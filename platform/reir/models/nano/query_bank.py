"""`QueryBank`: lowers the scores of instances that fit many sentences about other photos.

Some instances are hubs: they are among the best for many sentences that do not describe them. The
bank holds sentences of the training set. How well an instance fits them becomes one more dimension
of its vector. So its scores are lower for every expression, by an inner product alone.

Source: querybank normalization (Bogolin et al. 2022, "Cross Modal Retrieval with Querybank
Normalisation") and its inverted softmax (Smith et al. 2017, "Offline Bilingual Word Vectors",
section 2.3), applied to the indexed side.
"""

# Shapes: B photos, K candidates of each, Q sentences, D vector dimension

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 0.05
"""Sentences whose scores are lower than the best one's by more than this hardly count."""
STRENGTH, PHOTO_STRENGTH = 0.4, 0.1
"""What a unit of its fit takes from the scores of an instance, and what a unit of the best fit of a
photo takes from those of all its instances; chosen on `val`."""
QUERY_VALUE, QUERY_TOKENS = 0.4, 20
"""An expression of `QUERY_TOKENS` tokens has the number `QUERY_VALUE` in the dimension of the bank,
beside a part of unit length. With a smaller number, instances would need larger ones, which would
count too much where two instances are compared ("more like this")."""

MAX_PART = 2000
"""An extended bank has at most this many of its old sentences, and at most this many new ones.
Without this limit, the bank would grow with each fine-tuning of the same model."""


class QueryBank(nn.Module):
    """Vectors of sentences; without effect until it is filled.

    Args:
        num_sentences: Q; with 0, the bank never has an effect.
        dim: D.

    Attributes:
        vectors: (Q, D) unit vectors of the sentences.
        usual: (1,) mean penalty of instances, which is given back to all of them.
    """

    vectors: Tensor
    usual: Tensor

    def __init__(self, num_sentences: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_sentences, dim))
        self.register_buffer("usual", torch.zeros(1))

    def forward(self, vectors_BKD: Tensor, valid_BK: Tensor) -> Tensor:
        """Return (B, K, 1): the value of each instance in the dimension of the query bank."""
        above_BK = self.penalties(vectors_BKD, valid_BK) - self.usual
        # Divided, because the inner product multiplies it by the number of the expression, which is
        # `QUERY_VALUE` for one of `QUERY_TOKENS` tokens.
        return -above_BK[..., None] / QUERY_VALUE

    @staticmethod
    def express(mask_NL: Tensor) -> Tensor:
        """Return (N, 1), the numbers of expressions in the dimension of the bank.

        They grow with the square root of the number of tokens: a short expression, such as "the
        man", rightly fits what fits many sentences.

        Args:
            mask_NL: 1 on real tokens.
        """
        return QUERY_VALUE * (mask_NL.sum(1, keepdim=True) / QUERY_TOKENS).sqrt()

    def penalties(self, vectors_BKD: Tensor, valid_BK: Tensor) -> Tensor:
        """(B, K) what each instance loses in the scores of expressions of `QUERY_TOKENS` tokens."""
        # An empty bank has no logarithm of its size, and without candidates there is no maximum.
        if not len(self.vectors) or not vectors_BKD.shape[1]:
            return vectors_BKD.new_zeros(vectors_BKD.shape[:2])
        scores_BKQ = vectors_BKD.float() @ self.vectors.T
        mean_BK = (scores_BKQ / TEMPERATURE).logsumexp(-1) - math.log(len(self.vectors))
        fit_BK = TEMPERATURE * mean_BK
        # Not minus infinity, which would remain as the best fit of a photo that has only padding.
        best_B1 = fit_BK.masked_fill(~valid_BK, -1.0).amax(1, keepdim=True)
        return STRENGTH * fit_BK + PHOTO_STRENGTH * best_B1

    @torch.no_grad()
    def fill(self, vectors_ND: Tensor) -> None:
        """Take Q of the vectors of N > 0 sentences, evenly; with fewer than Q, they repeat."""
        self.vectors.copy_(_evenly(vectors_ND, len(self.vectors)))

    @torch.no_grad()
    def extend(self, vectors_ND: Tensor) -> None:
        """Add the vectors of N sentences; at most `MAX_PART` old and new ones each are kept."""
        parts = (self.vectors, vectors_ND)
        self.vectors = torch.cat([_evenly(each, min(len(each), MAX_PART)) for each in parts])


def _evenly(vectors_ND: Tensor, num: int) -> Tensor:
    rows = torch.arange(num) * len(vectors_ND) // max(num, 1)
    return vectors_ND[rows]
