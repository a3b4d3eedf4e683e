"""`QueryBank`: ranks photos lower that fit sentences about other photos.

Some photos are hubs: they are among the best for many sentences that do not describe them. The bank
holds sentences of the training set. A photo that fits them better than usual gets shorter vectors,
so that its scores are lower for every sentence, while the order of its instances stays the same.

Source: querybank normalization (Bogolin et al. 2022, "Cross Modal Retrieval with Querybank
Normalisation") and CSLS (Conneau et al. 2018, "Word Translation Without Parallel Data", section
2.3), applied to the indexed side, so that a search is still a plain inner product.
"""

# Shapes: B photos, K candidates of each, Q sentences, D vector dimension

from __future__ import annotations

import torch
from torch import Tensor, nn

NEAREST = 20
"""Number of sentences whose mean score tells how well an instance fits the bank."""
STRENGTH = 0.5


class QueryBank(nn.Module):
    """Vectors of sentences; without effect until it is filled.

    Args:
        num_sentences: Q; with 0, the bank never has an effect.
        dim: D.
    """

    vectors: Tensor
    usual: Tensor

    def __init__(self, num_sentences: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_sentences, dim))
        self.register_buffer("usual", torch.zeros(1))

    def fit(self, vectors_BKD: Tensor, valid_BK: Tensor) -> Tensor:
        """(B,) how well the best instance of each photo fits the sentences; 0 without any."""
        nearest = min(NEAREST, len(self.vectors))
        if not nearest or not vectors_BKD.shape[1]:
            return vectors_BKD.new_zeros(len(vectors_BKD))
        scores_BKQ = vectors_BKD.float() @ self.vectors.T
        fit_BK = scores_BKQ.topk(nearest, dim=-1).values.mean(-1)
        # A photo without instances has nothing to rank; 0 is as good as any other value.
        return fit_BK.masked_fill(~valid_BK, -1.0).amax(1).clamp(min=0.0)

    def factors(self, vectors_BKD: Tensor, valid_BK: Tensor) -> Tensor:
        """(B,) lengths for the vectors of each photo, around 1."""
        return 1 - STRENGTH * (self.fit(vectors_BKD, valid_BK) - self.usual)

    @torch.no_grad()
    def fill(self, vectors_ND: Tensor) -> None:
        """Take Q of the vectors of N > 0 sentences, evenly; with fewer than Q, they repeat."""
        self.vectors.copy_(_evenly(vectors_ND, len(self.vectors)))

    @torch.no_grad()
    def mix(self, vectors_ND: Tensor) -> None:
        """Replace every second sentence by one of N > 0 others, taken evenly."""
        self.vectors[::2] = _evenly(vectors_ND, len(self.vectors[::2]))


def _evenly(vectors_ND: Tensor, num: int) -> Tensor:
    rows = torch.arange(num) * len(vectors_ND) // max(num, 1)
    return vectors_ND[rows]
