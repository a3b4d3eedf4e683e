"""`ColorHead`: how probable each color word is at its place in an expression about an instance.

The expression is read with the word covered, as in masked language modeling (Devlin et al. 2019,
"BERT"). The state of the covered token knows what the color is said about: the instance, a part of
it ("in a [MASK] shirt") or something beside it ("next to a [MASK] car"). That state attends to the
cells of three views of the photo: the box, its surroundings and the whole photo.
"""

# Shapes: N words, V views, G x G cells of a view, K = V * G * G cells, C channels, P pixels of a
#         cell, S width of what is read of a text, H heads, W width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reir.datasets.generated_expressions import COLOR_WORDS

NUM_VIEWS, GRID, CELL_SIDE = 3, 8, 2
"""Views of a photo, cells along a side of a view, and color samples along a side of a cell."""
NUM_CELLS = NUM_VIEWS * GRID**2
PLACE_FEATURES = 6
PIXEL_WIDTH = 32
# Keeps the logarithm of a share finite, so that a color which no cell shows remains possible.
MIN_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class ColorHeadConfig:
    """The hyperparameters of the head; stored in the `color_head.json` of a checkpoint.

    Attributes:
        width: W.
        num_heads: H, of the attention over the cells.
        dropout: in training.
    """

    width: int = 128
    num_heads: int = 2
    dropout: float = 0.3


@dataclass
class CellBatch:
    """The cells around the instances that N words are about.

    Attributes:
        features: (N, K, C) of the crop network at stride 16.
        pixels: (N, K, P, 3) mean RGB of parts of each cell, uint8.
        places: (N, K, 6), see `places_of`.
    """

    features: Tensor
    pixels: Tensor
    places: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.features)

    def take(self, rows: Tensor) -> CellBatch:
        """Return some of the rows, some perhaps several times."""
        return CellBatch(self.features[rows], self.pixels[rows], self.places[rows])

    def to(self, device: torch.device | str) -> CellBatch:
        """Return the batch on a device."""
        return CellBatch(self.features.to(device), self.pixels.to(device), self.places.to(device))

    @staticmethod
    def joined(parts: Sequence[CellBatch]) -> CellBatch:
        """Return one batch of all rows."""
        return CellBatch(
            torch.cat([each.features for each in parts]),
            torch.cat([each.pixels for each in parts]),
            torch.cat([each.places for each in parts]),
        )


class ColorHead(nn.Module):
    """Reads a color from cells.

    Args:
        config: hyperparameters.
        channels: C, of the features.
        text_width: S.
    """

    def __init__(self, config: ColorHeadConfig, channels: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        width, drop = config.width, config.dropout
        self.query = nn.Sequential(
            nn.LayerNorm(text_width),
            nn.Dropout(drop),
            nn.Linear(text_width, width),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(width, width),
        )
        self.features = nn.Sequential(nn.LayerNorm(channels), nn.Dropout(drop))
        num_colors, heads = len(COLOR_WORDS), config.num_heads
        self.name_pixel = nn.Sequential(
            nn.Linear(3, PIXEL_WIDTH), nn.ReLU(), nn.Linear(PIXEL_WIDTH, num_colors), nn.Softmax(-1)
        )
        seen = channels + num_colors + PLACE_FEATURES
        self.key, self.value = nn.Linear(seen, width), nn.Linear(seen, width)
        self.cell = nn.Parameter(torch.zeros(NUM_CELLS, width))
        self.share_weight = nn.Parameter(torch.ones(heads))
        self.to_color = nn.Sequential(
            nn.Dropout(drop),
            nn.Linear(heads * num_colors + 2 * width, width),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(width, num_colors),
        )

    def forward(self, cells: CellBatch, states_NS: Tensor) -> Tensor:
        """Return (N, number of `COLOR_WORDS`) logits.

        Args:
            cells: around the instances.
            states_NS: of the covered tokens, and means over the tokens of each expression.
        """
        query_NW = self.query(states_NS)
        # Colors are named before they are averaged over a cell: the mean of red and white pixels
        # would be pink, which none of them is.
        named_NKC = self.name_pixel(cells.pixels.float() / 127.5 - 1).mean(2)
        features = self.features(cells.features.float())
        seen = torch.cat([features, named_NKC, cells.places.float()], dim=-1)
        heads = (self.config.num_heads, -1)
        key = (self.key(seen) + self.cell).unflatten(-1, heads)
        value = self.value(seen).unflatten(-1, heads)
        scores = (key * query_NW.unflatten(-1, heads)[:, None]).sum(-1)
        attention_NKH = (scores / key.shape[-1] ** 0.5).softmax(1)
        share_NHC = attention_NKH.transpose(1, 2) @ named_NKC
        read_NHW = (attention_NKH[..., None] * value).sum(1)
        learned_NC: Tensor = self.to_color(
            torch.cat([share_NHC.flatten(1), read_NHW.flatten(1), query_NW], dim=1)
        )
        shown_NC: Tensor = self.share_weight @ (share_NHC + MIN_SHARE).log()
        return learned_NC + shown_NC


def places_of(boxes_NV4: Tensor) -> Tensor:
    """Return where the cells of each view lie relative to the box.

    Args:
        boxes_NV4: xyxy of the box in [0, 1] of each view; it may reach beyond a view.

    Returns:
        (N, K, 6): whether the center of the cell is in the box; its distance from the center of the
        box to the right and downward, signed and unsigned, divided by two sides of the box (each at
        least .05) and clipped to [-3, 3]; and log(share + .001) / 3 of the share of the view that
        the box covers.
    """
    centers = (torch.arange(GRID) + 0.5) / GRID
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    cells_C2 = torch.stack([x, y], dim=-1).flatten(0, 1)
    low, high = boxes_NV4[..., None, :2], boxes_NV4[..., None, 2:]
    # In the view of the whole photo, a tiny box would make the distances of other cells huge, so
    # sides and distances have limits.
    sides = (high - low).clamp(min=0.05)
    inside = ((cells_C2 >= low) & (cells_C2 <= high)).all(-1, keepdim=True)
    away = ((cells_C2 - (low + high) / 2) / (2 * sides)).clamp(-3, 3)
    share = (((high - low).clamp(min=0).prod(-1, keepdim=True) + 1e-3).log() / 3).expand_as(inside)
    return torch.cat([inside, away, away.abs(), share], dim=-1).flatten(1, 2)
