"""`HistoryEncoder`: reads the boxes that a search has zoomed into, and says how far it has come.

Source: Goto et al. 2025, "Referring Expression Comprehension for Small Objects", and its released
code. The features of a box are relative to the photo, so boxes in [0, 1] give the released values.
"""

# Shapes: B searches, T boxes of a search, F Fourier features, C width

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARE_FOURIER, PLACE_FOURIER = 16, 8
"""Fourier features of a number, and of a pair of numbers."""
GROUPS = 4
"""Groups of features of a box: size in the photo, size in the box before, sides, and center."""
FOURIER_HIDDEN = 32


@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """The shape of a `HistoryEncoder`; the defaults are those of the released code.

    Attributes:
        width: C, a multiple of `GROUPS`.
        num_heads: attention heads.
        feedforward: hidden units of the transformer layer.
        out: size of the summary of a history.
        hidden: hidden units of the two heads.
        dropout: of the transformer layer.
    """

    width: int = 32
    num_heads: int = 4
    feedforward: int = 2048
    out: int = 16
    hidden: int = 16
    dropout: float = 0.1


class HistoryOutput(NamedTuple):
    """What a history says about each of B searches.

    Attributes:
        summary: (B, out) unit vectors.
        end_logits: (B,) logit of the probability that the last box is the target's box.
        progress: (B,) estimated progress from the whole photo, 0, to the target, 1; not clipped.
    """

    summary: Tensor
    end_logits: Tensor
    progress: Tensor


class HistoryEncoder(nn.Module):
    """Encodes the boxes of a search, the whole photo first."""

    def __init__(self, config: HistoryConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or HistoryConfig()
        each = config.width // GROUPS
        self.shares = FourierFeatures(1, SHARE_FOURIER, each)
        self.places = FourierFeatures(2, PLACE_FOURIER, each)
        self.layer = nn.TransformerEncoderLayer(
            config.width,
            config.num_heads,
            config.feedforward,
            config.dropout,
            batch_first=True,
        )
        self.out = nn.Linear(config.width, config.out)
        self.end = _head(config.out, config.hidden)
        self.progress = _head(config.out, config.hidden)

    def forward(self, boxes_BT4: Tensor, valid_BT: Tensor) -> HistoryOutput:
        """Encode B histories.

        Args:
            boxes_BT4: xyxy in [0, 1] of the photo; the first box is the whole photo.
            valid_BT: bool, False where a shorter history is padded.
        """
        tokens_BTC = self._tokens(boxes_BT4)
        states_BTC = self.layer(tokens_BTC, src_key_padding_mask=~valid_BT)
        weights_BT1 = valid_BT[..., None].to(states_BTC.dtype)
        mean = (self.out(states_BTC) * weights_BT1).sum(1) / weights_BT1.sum(1)
        summary = F.normalize(mean, dim=-1)
        return HistoryOutput(summary, self.end(summary)[:, 0], self.progress(summary)[:, 0])

    def _tokens(self, boxes_BT4: Tensor) -> Tensor:
        """(B, T, 4) boxes -> (B, T, C)."""
        low, high = boxes_BT4[..., :2], boxes_BT4[..., 2:]
        sides = high - low
        area = sides.prod(-1)
        # The first box has no box before it, so its size relative to it is 1.
        before = torch.cat([area[:, :1], area[:, :-1]], dim=1)
        # Padding has no area, and 0 / 0 would be NaN. A mask could not keep it out of the sums,
        # because it multiplies by zero, and zero times NaN is NaN.
        shares = torch.stack([area, area / (before + 1e-8)], dim=2)[..., None]
        places = torch.stack([sides, (low + high) / 2], dim=2)
        return torch.cat([self.shares(shares), self.places(places)], dim=2).flatten(2)


class FourierFeatures(nn.Module):
    """Learnable Fourier features of positions.

    Source: Li et al. 2021, "Learnable Fourier Features for Multi-Dimensional Spatial Positional
    Encoding", algorithm 1.

    Args:
        position: numbers in a position.
        fourier: F, even.
        out: size of the features.
    """

    def __init__(self, position: int, fourier: int, out: int) -> None:
        super().__init__()
        self.frequencies = nn.Linear(position, fourier // 2, bias=False)
        nn.init.normal_(self.frequencies.weight)
        self.mlp = nn.Sequential(
            nn.Linear(fourier, FOURIER_HIDDEN), nn.GELU(), nn.Linear(FOURIER_HIDDEN, out)
        )
        self._scale = fourier**-0.5

    def forward(self, positions: Tensor) -> Tensor:
        """(..., position) -> (..., out)."""
        angles = self.frequencies(positions)
        features: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], -1) * self._scale)
        return features


def _head(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
