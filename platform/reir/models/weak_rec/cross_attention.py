"""Cross-modality attention (CMA): lets a sentence change the features of a photo's anchors.

The anchors attend to one another; then the sentence scales and shifts their features (FiLM), and
the anchors attend to the result. All additions have gates that are closed at first, so that the
untrained block is a linear projection.

The released code differs in four ways, which `paper_parity` restores:

* Attention has one head as wide as the model, although it is scaled for eight. Here it has eight.
* Values are multiplied by the total attention that they receive (`released_attention`), so that
  anchors are not mixed. This only runs when there are as many queries as keys. Here each anchor
  gets the mean of the values, weighted by its attention, as usual.
* Instance norm takes one mean and variance of all channels of a photo, since the layer for maps
  gets an array without map axes. Here each channel has its own, as intended by instance norm.
* The layers that read the sentence have batch norm. Here they have layer norm, so that the result
  depends on neither the batch nor the number of workers.

Source: Chu et al. 2024, "Enhancing Anchor-based Weakly Supervised REC with Cross-Modality
Attention", and its released code; gates as in Alayrac et al. 2022, "Flamingo"; Perez et al. 2018,
"FiLM".
"""

# Shapes: B photos, A anchors, C features of an anchor, T features of a sentence, W width, H heads

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ANCHOR_WIDTH = 1024
TEXT_WIDTH = 512
WIDTH = 512
NUM_HEADS = 8
EXPANSION = 4
"""Hidden units of a feed-forward layer, in widths."""
DROPOUT = 0.1
"""In the layers that read the sentence."""
FILM_GATE = 0.1
NORM_EPS = 1e-5


class CrossModalityAttention(nn.Module):
    """The attention block, with 7.87 M parameters at the published sizes.

    Args:
        anchor_width: C.
        text_width: T.
        width: W, a multiple of `num_heads`.
        num_heads: H.
        paper_parity: compute as the released code does; see the module's docstring.
    """

    def __init__(
        self,
        anchor_width: int = ANCHOR_WIDTH,
        text_width: int = TEXT_WIDTH,
        *,
        width: int = WIDTH,
        num_heads: int = NUM_HEADS,
        paper_parity: bool = False,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(anchor_width, width, bias=False)
        self.anchors_to_anchors = Attention(width, num_heads, paper_parity=paper_parity)
        self.feedforward = feedforward(width)
        self.film = Film(text_width, width, paper_parity=paper_parity)
        self.anchors_to_film = Attention(width, num_heads, paper_parity=paper_parity)
        self.film_feedforward = feedforward(width)
        # Of one element each, because DeepSpeed cannot broadcast scalars.
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feedforward_gate = nn.Parameter(torch.zeros(1))
        self.film_gate = nn.Parameter(torch.tensor([FILM_GATE]))
        self.film_attention_gate = nn.Parameter(torch.zeros(1))
        self.film_feedforward_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, anchors_BAC: Tensor, text_BT: Tensor, valid_BA: Tensor | None = None
    ) -> Tensor:
        """Return the (B, A, W) features of the anchors in the light of the sentences.

        Args:
            anchors_BAC: features of the anchors.
            text_BT: one sentence for each photo.
            valid_BA: bool, False on padding, to which nothing attends; None if there is none.
        """
        everywhere = anchors_BAC.new_ones(anchors_BAC.shape[:2], dtype=torch.bool)
        valid = everywhere if valid_BA is None else valid_BA
        x = self.project(anchors_BAC)
        x = x + self.attention_gate.tanh() * self.anchors_to_anchors(x, x, valid)
        x = x + self.feedforward_gate.tanh() * self.feedforward(x)
        told = x + self.film_gate * self.film(x, text_BT, valid)
        attended = x + self.film_attention_gate.tanh() * self.anchors_to_film(x, told, valid)
        # The sum is with x and not with `attended`, as in the released code.
        out: Tensor = x + self.film_feedforward_gate.tanh() * self.film_feedforward(attended)
        return out


def feedforward(width: int) -> nn.Sequential:
    """Return layer norm and a feed-forward layer without bias."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, EXPANSION * width, bias=False),
        nn.GELU(),
        nn.Linear(EXPANSION * width, width, bias=False),
    )


class Attention(nn.Module):
    """Attention of normalized queries to a context, without bias."""

    def __init__(self, width: int, num_heads: int, *, paper_parity: bool) -> None:
        super().__init__()
        self.num_heads, self.paper_parity = num_heads, paper_parity
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)

    def forward(self, queries_BAW: Tensor, context_BAW: Tensor, valid_BA: Tensor) -> Tensor:
        """(B, A, W) queries and (B, A, W) context -> (B, A, W)."""
        query = self.query(self.norm(queries_BAW))
        key, value = self.key_value(context_BAW).chunk(2, dim=-1)
        if self.paper_parity:
            scale = (query.shape[-1] // self.num_heads) ** -0.5
            mixed = released_attention(query * scale, key, value, valid_BA)
        else:
            query, key, value = (
                x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
            )
            mask = valid_BA[:, None, None, :]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            mixed = mixed.transpose(1, 2).flatten(2)
        merged: Tensor = self.merge(mixed)
        return merged


def released_attention(query: Tensor, key: Tensor, value: Tensor, valid_BA: Tensor) -> Tensor:
    """Multiply each value by the sum of the attention that all queries pay to it.

    Args:
        query, key, value: (B, A, W); queries are scaled.
        valid_BA: bool; padding neither pays attention nor receives it.

    Returns:
        (B, A, W).
    """
    logits = query @ key.transpose(1, 2)
    lowest = torch.finfo(logits.dtype).min
    attention_BAA = logits.masked_fill(~valid_BA[:, None, :], lowest).softmax(-1)
    received_BA = (attention_BAA * valid_BA[..., None]).sum(dim=1)
    return received_BA[..., None] * value


class Film(nn.Module):
    """Normalizes the features of anchors, and scales and shifts them as a sentence says."""

    def __init__(self, text_width: int, width: int, *, paper_parity: bool) -> None:
        super().__init__()
        # One mean and variance of anchors and channels, or of the anchors for each channel.
        self.norm_axes = (1, 2) if paper_parity else (1,)
        norm = nn.BatchNorm1d if paper_parity else nn.LayerNorm
        self.read = nn.Sequential(
            nn.Linear(text_width, width),
            norm(width),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(width, width),
            norm(width),
            nn.ReLU(),
        )
        self.scale, self.shift = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_BAW: Tensor, text_BT: Tensor, valid_BA: Tensor) -> Tensor:
        """(B, A, W) -> (B, A, W)."""
        read_B1W = self.read(text_BT)[:, None]
        scale, shift = self.scale(read_B1W).tanh(), self.shift(read_B1W).tanh()
        return F.relu(scale * instance_norm(x_BAW, valid_BA, self.norm_axes) + shift)


def instance_norm(x_BAW: Tensor, valid_BA: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Give the valid anchors of each photo mean 0 and variance 1 over `axes`."""
    weight = valid_BA[..., None].to(x_BAW.dtype).expand_as(x_BAW)
    count = weight.sum(axes, keepdim=True).clamp(min=1)
    deviation = x_BAW - (x_BAW * weight).sum(axes, keepdim=True) / count
    variance = (deviation.square() * weight).sum(axes, keepdim=True) / count
    return deviation * torch.rsqrt(variance + NORM_EPS)
