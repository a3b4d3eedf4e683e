"""RefCLIP's language encoder: a GRU over word vectors, self-attention, and a weighted mean.

Source: Jin et al. 2023, "RefCLIP", and its released code.
"""

# Shapes: N texts, L words, V words of the vocabulary, E width of their vectors, T width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 512
NUM_BLOCKS = 3
"""Of self-attention; the authors use 1 for ReferIt."""
NUM_HEADS = 8
EXPANSION = 4
"""Hidden units of a feed-forward layer, in widths."""
DROPOUT = 0.1
NORM_EPS = 1e-6


class GruLanguage(nn.Module):
    """Encodes texts.

    Args:
        vectors_VE: word vectors, which stay as they are; row 0 is the padding.
        width: T, a multiple of `num_heads`.
        num_blocks: of self-attention.
        num_heads: heads of each block.
        dropout: in training.
    """

    def __init__(
        self,
        vectors_VE: Tensor,
        *,
        width: int = WIDTH,
        num_blocks: int = NUM_BLOCKS,
        num_heads: int = NUM_HEADS,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        num_words, vector_width = vectors_VE.shape
        self.words = nn.Embedding(num_words, vector_width, _weight=vectors_VE, _freeze=True)
        self.gru = nn.GRU(vector_width, width, batch_first=True)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(width, num_heads, dropout) for _ in range(num_blocks)
        )
        self.pool = WordPooling(width, dropout)

    def forward(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Encode N texts.

        Args:
            ids_NL: word ids of `Vocabulary.encode`.
            mask_NL: bool, False on padding, which follows the words.

        Returns:
            (N, T).
        """
        # The GRU needs no mask: it reads forward, and padding follows the words.
        states, _ = self.gru(self.words(ids_NL))
        for block in self.blocks:
            states = block(states, mask_NL)
        pooled: Tensor = self.pool(states, mask_NL)
        return pooled


class SelfAttentionBlock(nn.Module):
    """Self-attention and a feed-forward layer, each added to its input, with a norm of the sum."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.merge = nn.Linear(width, width), nn.Linear(width, width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, EXPANSION * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(EXPANSION * width, width),
        )
        self.attention_norm, self.feedforward_norm = (
            UnbiasedLayerNorm(width),
            UnbiasedLayerNorm(width),
        )

    def forward(self, x_NLT: Tensor, mask_NL: Tensor) -> Tensor:
        """(N, L, T) -> (N, L, T)."""
        x = self.attention_norm(x_NLT + self._drop(self._attend(x_NLT, mask_NL)))
        out: Tensor = self.feedforward_norm(x + self._drop(self.feedforward(x)))
        return out

    def _attend(self, x_NLT: Tensor, mask_NL: Tensor) -> Tensor:
        query, key, value = (
            linear(x_NLT).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_NL[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        merged: Tensor = self.merge(mixed.transpose(1, 2).flatten(2))
        return merged

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class UnbiasedLayerNorm(nn.Module):
    """The released layer norm: divides by the unbiased standard deviation plus epsilon."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., T) -> (..., T)."""
        deviation = x - x.mean(-1, keepdim=True)
        return self.weight * deviation / (x.std(-1, keepdim=True) + NORM_EPS) + self.bias


class WordPooling(nn.Module):
    """Averages the states of the words, with weights that are computed from the states."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.Linear(width, width // 2), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width // 2, 1)
        )
        self.merge = nn.Linear(width, width)

    def forward(self, x_NLT: Tensor, mask_NL: Tensor) -> Tensor:
        """(N, L, T) -> (N, T)."""
        weights_NL1 = self.weigh(x_NLT)
        # Not minus infinity, with which a text of padding alone would be NaN.
        lowest = torch.finfo(weights_NL1.dtype).min
        weights_NL1 = weights_NL1.masked_fill(~mask_NL[..., None], lowest).softmax(dim=1)
        merged: Tensor = self.merge((weights_NL1 * x_NLT).sum(dim=1))
        return merged
