"""Small trainable modules for a frozen model: Adapter+, LoRA and CoOp, and their PIZA forms.

Sources: Steitz and Roth 2024, "Adapters Strike Back" (Adapter+); Hu et al. 2022, "LoRA"; Zhou et
al. 2022, "Learning to Prompt for Vision-Language Models" (CoOp); Goto et al. 2025 (PIZA), which
inserts into each of them what is known of the search so far.
"""

# Shapes: B searches, N tokens, C channels, R bottleneck, I inserted features, S step features

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEP_WIDTH = 256
"""S, features of a zoom step."""
STEP_ROUNDING = 0.05
"""Progress is rounded to multiples of this before it is embedded."""
MAX_PERIOD = 10_000
HOULSBY_STD = 0.01
"""Standard deviation of the first weights of an adapter; they are cut off at twice this."""
PROMPT_STD = 0.02


class StepEmbedding(nn.Module):
    """Embeds the progress of a search, as DDPM embeds the time of a diffusion.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models". Progress is not multiplied
    by the number of steps, so only the highest frequencies differ much between steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(STEP_WIDTH, STEP_WIDTH), nn.SiLU(), nn.Linear(STEP_WIDTH, STEP_WIDTH)
        )

    def forward(self, progress_B: Tensor) -> Tensor:
        """(B,) progress -> (B, S)."""
        rounded = (progress_B / STEP_ROUNDING).round() * STEP_ROUNDING
        half = STEP_WIDTH // 2
        ranks = torch.arange(half, device=progress_B.device, dtype=progress_B.dtype)
        angles = rounded[:, None] * torch.exp(-math.log(MAX_PERIOD) / (half - 1) * ranks)
        embedding: Tensor = self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))
        return embedding


class Adapter(nn.Module):
    """Adapter+: adds a bottleneck of its input, scaled per channel, to the input.

    Args:
        width: C.
        bottleneck: R.
        inserted: I, or 0 for an adapter without input about the search.
    """

    def __init__(self, width: int, bottleneck: int, inserted: int = 0) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.insert = nn.Linear(inserted, width) if inserted else None
        for each in (self.down, self.up, self.insert):
            if each is not None:
                _init_houlsby(each)

    def forward(self, tokens_BNC: Tensor, inserted_BI: Tensor | None) -> Tensor:
        """Return the adapted (B, N, C) tokens."""
        change: Tensor = self.scale * self.up(F.gelu(self.down(tokens_BNC)))
        if self.insert is not None:
            change = change + self.insert(F.silu(_given(inserted_BI)))[:, None]
        return tokens_BNC + change


class Lora(nn.Module):
    """LoRA: what is to be added to the output of a linear layer, BAx, or BAx + BCh with PIZA.

    x is the input of the layer and h the summary of the search. There is no bias and no scale.

    Args:
        width, out: of the linear layer.
        bottleneck: R.
        inserted: I, or 0 for a layer without input about the search.
    """

    def __init__(self, width: int, out: int, bottleneck: int, inserted: int = 0) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, out, bias=False)
        self.insert = nn.Linear(inserted, bottleneck, bias=False) if inserted else None
        # The adapted model starts as the base.
        nn.init.zeros_(self.up.weight)

    def forward(self, tokens_BNC: Tensor, inserted_BI: Tensor | None) -> Tensor:
        """(B, N, C) input of the linear layer -> (B, N, out)."""
        hidden = self.down(tokens_BNC)
        if self.insert is not None:
            hidden = hidden + self.insert(_given(inserted_BI))[:, None]
        change: Tensor = self.up(hidden)
        return change


class Prompts(nn.Module):
    """CoOp: learned word vectors before an expression; PIZA adds one that depends on the search.

    Args:
        count: number of learned vectors.
        width: C, of the word vectors.
        inserted: I, or 0 for prompts without input about the search.
    """

    def __init__(self, count: int, width: int, inserted: int = 0) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.vectors, std=PROMPT_STD)
        self.insert = (
            nn.Sequential(nn.Linear(inserted, width), nn.GELU(), nn.Linear(width, width))
            if inserted
            else None
        )

    @property
    def count(self) -> int:
        """Number of vectors before an expression."""
        return len(self.vectors) + (self.insert is not None)

    def forward(self, words_BNC: Tensor, inserted_BI: Tensor | None) -> Tensor:
        """Replace the `count` word vectors after the first by the prompts."""
        prompts = self.vectors.expand(len(words_BNC), -1, -1)
        if self.insert is not None:
            prompts = torch.cat([prompts, self.insert(_given(inserted_BI))[:, None]], dim=1)
        # `PizaModel` made room for the prompts by placeholder tokens, whose vectors are dropped.
        rest = words_BNC[:, 1 + self.count :]
        return torch.cat([words_BNC[:, :1], prompts.to(words_BNC.dtype), rest], dim=1)


def _init_houlsby(layer: nn.Linear) -> None:
    # Close to zero, so that training starts near the frozen base.
    nn.init.trunc_normal_(layer.weight, std=HOULSBY_STD, a=-2 * HOULSBY_STD, b=2 * HOULSBY_STD)
    nn.init.zeros_(layer.bias)


def _given(inserted_BI: Tensor | None) -> Tensor:
    if inserted_BI is None:
        raise ValueError("this adapter needs the history of the search, but none was given")
    return inserted_BI
