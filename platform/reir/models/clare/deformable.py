"""Deformable encoder and decoder of a two-stage, DINO-style detector (docs/clare.md, section 3.3).

Every position here is a share of the upright photo *without* its padding, so that nothing depends
on how much padding a batch needed; only `DeformableAttention` turns it into a place on the padded
map. Knows torch and nothing of towers, texts, losses or devices.
"""

# Shapes: B images, T tokens of all levels, Q queries, D width, L levels, H heads, P points,
#         E = D / H, K layers; `_xy` pairs are (x, y), sides are (height, width)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reir.models.clare.level_sampling import sample_levels

LOGIT_EPS = 1e-5
TEMPERATURE = 10_000.0


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of a feature pyramid lie; tokens go level by level, row by row.

    Attributes:
        sides: L pairs (height, width) in cells of the padded maps.
        shares: (B, L, 2) share of each padded map, along x and y, that the photo covers.
        centers: (B, T, 2) cell centers in the frame of the photo; beyond 1 in the padding.
        valid: (B, T) bool, False where a cell begins outside the photo.
        levels: (T,) int64, the level of each token.
    """

    sides: tuple[tuple[int, int], ...]
    shares: Tensor
    centers: Tensor
    valid: Tensor
    levels: Tensor

    @staticmethod
    def build(
        sizes_B2: Tensor, sides: Sequence[tuple[int, int]], strides: Sequence[int]
    ) -> TokenGrid:
        """Lay out the maps of a padded batch.

        Args:
            sizes_B2: (width, height) of each photo in pixels, without padding.
            sides: (height, width) of each padded map in cells.
            strides: pixels per cell of each map.
        """
        starts, strides_T1, shares, levels = [], [], [], []
        for level, ((height, width), stride) in enumerate(zip(sides, strides, strict=True)):
            x = torch.arange(width, device=sizes_B2.device, dtype=sizes_B2.dtype)
            y = torch.arange(height, device=sizes_B2.device, dtype=sizes_B2.dtype)
            cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
            starts.append(cells * stride)
            strides_T1.append(cells.new_full((len(cells), 1), stride))
            shares.append(sizes_B2 / sizes_B2.new_tensor([width * stride, height * stride]))
            levels.append(torch.full((len(cells),), level, device=sizes_B2.device))
        starts_T2, size_T1 = torch.cat(starts), torch.cat(strides_T1)
        return TokenGrid(
            sides=tuple(sides),
            shares=torch.stack(shares, dim=1),
            centers=(starts_T2 + size_T1 / 2) / sizes_B2[:, None],
            valid=(starts_T2 < sizes_B2[:, None]).all(dim=-1),
            levels=torch.cat(levels),
        )

    def valid_maps(self) -> list[Tensor]:
        """Return `valid` as one (B, height, width) map a level."""
        parts = torch.split(self.valid, [height * width for height, width in self.sides], dim=1)
        return [part.view(-1, *side) for part, side in zip(parts, self.sides, strict=True)]


# ------------------------------------------------------------------------------------- geometry


def sine_embedding(coordinates: Tensor, num_features: int) -> Tensor:
    """(..., C) numbers in [0, 1] -> (..., C * num_features), sine and cosine interleaved."""
    exponent = torch.arange(0, num_features, 2, device=coordinates.device) / num_features
    angles = (2 * math.pi * coordinates.float())[..., None] / TEMPERATURE**exponent
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def logit(boxes: Tensor) -> Tensor:
    """Inverse sigmoid, finite at 0 and 1."""
    return torch.logit(boxes, eps=LOGIT_EPS)


def to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) center and size -> corners, not clipped."""
    center, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


# ------------------------------------------------------------------------------------ attention


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The numbers that every layer of encoder and decoder shares.

    Attributes:
        dim: D.
        num_heads: H, divides D.
        num_levels: L.
        num_points: P, places read for each head and level.
        ffn: hidden width of the feed-forward part.
    """

    dim: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int = 4
    ffn: int = 2048


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: each query reads a few learned places of every level."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        dim = shape.dim
        self.shape = (shape.num_heads, shape.num_levels, shape.num_points)
        num_places = math.prod(self.shape)
        self.sampling_offsets = nn.Linear(dim, 2 * num_places)
        self.attention_weights = nn.Linear(dim, num_places)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with each head looking its own way, point `p` being `p` steps out."""
        num_heads, num_levels, num_points = self.shape
        angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
        way = torch.stack([angle.cos(), angle.sin()], dim=-1)
        way = way / way.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, num_points + 1, dtype=torch.float32)
        places = way[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(places.expand(-1, num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def locations(self, query_BQD: Tensor, references: Tensor, grid: TokenGrid) -> Tensor:
        """(B, Q, H, L, P, 2) places on the padded maps, as shares of them.

        Offsets count cells around a point, and eighths of the box side around a box (at P = 4).
        """
        shares_B11L12 = grid.shares[:, None, None, :, None]
        offsets: Tensor = self.sampling_offsets(query_BQD).float()
        offsets = offsets.view(*query_BQD.shape[:2], *self.shape, 2)
        centers = references[:, :, None, None, None, :2] * shares_B11L12
        if references.shape[-1] == 2:
            sides_L12 = offsets.new_tensor([(width, height) for height, width in grid.sides])
            return centers + offsets / sides_L12[:, None]
        reach = references[:, :, None, None, None, 2:] * shares_B11L12 / (2 * self.shape[-1])
        return centers + offsets * reach

    def forward(
        self, query_BQD: Tensor, references: Tensor, memory_BTD: Tensor, grid: TokenGrid
    ) -> Tensor:
        """Return (B, Q, D).

        Args:
            query_BQD: content with its position added.
            references: (B, Q, 2) points or (B, Q, 4) cxcywh boxes in the frame of the photo.
            memory_BTD: tokens that are read; those in the padding read as 0.
            grid: where they lie.
        """
        value_BTD = self.value_proj(memory_BTD).masked_fill(~grid.valid[..., None], 0.0)
        weights = self.attention_weights(query_BQD).unflatten(-1, (self.shape[0], -1))
        weights = weights.float().softmax(dim=-1).unflatten(-1, self.shape[1:])
        read = sample_levels(
            value_BTD.unflatten(-1, (self.shape[0], -1)),
            grid.sides,
            self.locations(query_BQD, references, grid),
            weights,
        )
        return torch.as_tensor(self.output_proj(read))


class SelfAttention(nn.Module):
    """Dense attention among queries; positions take part in the comparison only."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.compare = nn.Linear(dim, 2 * dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        for part in (*self.compare.weight.chunk(2), self.value.weight, self.output.weight):
            nn.init.xavier_uniform_(part)
        for linear in (self.compare, self.value, self.output):
            nn.init.zeros_(linear.bias)

    def forward(self, content_BQD: Tensor, position_BQD: Tensor, allowed: Tensor) -> Tensor:
        """Return (B, Q, D); `allowed` (B, 1, Q, Q) is True where a row may look at a column."""
        query, key = self.compare(content_BQD + position_BQD).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (query, key, self.value(content_BQD))
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return torch.as_tensor(self.output(read.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with ReLU, the sum with the input, then LayerNorm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.widen = nn.Linear(dim, hidden)
        self.narrow = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        for linear in (self.widen, self.narrow):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return torch.as_tensor(self.norm(x + self.narrow(self.widen(x).relu_())))


# ---------------------------------------------------------------------------- encoder, proposals


class EncoderLayer(nn.Module):
    """Deformable self-attention over the tokens, then the feed-forward part; norms come last."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.attention = DeformableAttention(shape)
        self.norm = nn.LayerNorm(shape.dim)
        self.feed_forward = FeedForward(shape.dim, shape.ffn)

    def forward(self, tokens_BTD: Tensor, position_BTD: Tensor, grid: TokenGrid) -> Tensor:
        """Return the tokens, (B, T, D)."""
        read = self.attention(tokens_BTD + position_BTD, grid.centers, tokens_BTD, grid)
        return torch.as_tensor(self.feed_forward(self.norm(tokens_BTD + read)))


class DeformableEncoder(nn.Module):
    """A stack of encoder layers; sine positions plus one learned vector a level.

    Attributes:
        checkpointing: keep no activations of the layers for the backward pass.
    """

    def __init__(self, shape: LayerShape, num_layers: int) -> None:
        super().__init__()
        self.level_embedding = nn.Embedding(shape.num_levels, shape.dim)
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(num_layers))
        self.checkpointing = False

    def forward(self, tokens_BTD: Tensor, grid: TokenGrid) -> Tensor:
        """Return the memory, (B, T, D)."""
        sine_BTD = sine_embedding(grid.centers, tokens_BTD.shape[-1] // 2)
        position_BTD = sine_BTD + self.level_embedding(grid.levels)
        for layer in self.layers:
            tokens_BTD = run_layer(self, layer, tokens_BTD, position_BTD, grid)
        return tokens_BTD


def run_layer(stack: nn.Module, layer: nn.Module, *inputs: object) -> Tensor:
    """Run one layer; under `stack.checkpointing`, gradients recompute what lies inside it."""
    if stack.checkpointing and torch.is_grad_enabled():
        return torch.as_tensor(checkpoint(layer, *inputs, use_reentrant=False))
    return torch.as_tensor(layer(*inputs))


class BoxHead(nn.Module):
    """Three linear layers that say by how much a box moves, in logits; starts with no move."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.move = nn.Linear(dim, 4)
        nn.init.zeros_(self.move.weight)
        nn.init.zeros_(self.move.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 4) float32."""
        for linear in self.hidden:
            x = linear(x).relu()
        return torch.as_tensor(self.move(x).float())


class ProposalHead(nn.Module):
    """Class-agnostic objectness and one box for every token of the memory.

    Anchors are square in the frame of the photo, of side 0.05 at the finest level and twice that
    at each coarser one. Tokens in the padding and anchors centered within 1 % of the border, where
    logits run off, propose nothing: their logit is `NO_PROPOSAL`.
    """

    NO_PROPOSAL = -1e4
    ANCHOR_SIDE = 0.05
    BORDER = 0.01

    def __init__(self, dim: int, *, prior: float = 0.01) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.objectness = nn.Linear(dim, 1)
        self.box = BoxHead(dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        nn.init.constant_(self.objectness.bias, math.log(prior / (1 - prior)))

    def forward(self, memory_BTD: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, T) objectness logits, (B, T, 4) cxcywh boxes as logits, (B, T) bool valid."""
        centers = grid.centers
        inside_BT = ((centers > self.BORDER) & (centers < 1 - self.BORDER)).all(dim=-1)
        valid_BT = grid.valid & inside_BT
        side_T = self.ANCHOR_SIDE * 2.0**grid.levels
        side_BT2 = side_T[None, :, None].expand_as(centers)
        anchors = logit(torch.cat([centers, side_BT2], dim=-1))
        features = self.norm(self.project(memory_BTD))
        logits_BT = self.objectness(features)[..., 0].float()
        boxes = anchors + self.box(features)
        return logits_BT.masked_fill(~valid_BT, self.NO_PROPOSAL), boxes, valid_BT


# -------------------------------------------------------------------------------------- decoder


class DecoderLayer(nn.Module):
    """Attention among queries, deformable attention to the memory, feed-forward; norms last."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.self_attention = SelfAttention(shape.dim, shape.num_heads)
        self.self_norm = nn.LayerNorm(shape.dim)
        self.cross_attention = DeformableAttention(shape)
        self.cross_norm = nn.LayerNorm(shape.dim)
        self.feed_forward = FeedForward(shape.dim, shape.ffn)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        boxes: Tensor,
        allowed: Tensor,
        memory: EncoderMemory,
    ) -> Tensor:
        """Return the content, (B, Q, D)."""
        content = self.self_norm(content + self.self_attention(content, position, allowed))
        read = self.cross_attention(content + position, boxes, memory.tokens, memory.grid)
        return torch.as_tensor(self.feed_forward(self.cross_norm(content + read)))


@dataclass(frozen=True)
class EncoderMemory:
    """What the decoder reads: (B, T, D) tokens of the encoder, and where they lie."""

    tokens: Tensor
    grid: TokenGrid


class DeformableDecoder(nn.Module):
    """A stack of decoder layers, each with the box head that refines its queries' boxes.

    A layer's reference box is what the layer before made of its own, cut off from gradients. The
    box that it *reports* starts from the uncut one, so that every box teaches the head of its own
    layer and the one before (look forward twice).

    Attributes:
        checkpointing: keep no activations of the layers for the backward pass.
    """

    def __init__(self, shape: LayerShape, num_layers: int) -> None:
        super().__init__()
        dim = shape.dim
        self.position = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(num_layers))
        self.box_heads = nn.ModuleList(BoxHead(dim) for _ in range(num_layers))
        self.checkpointing = False

    def forward(
        self, content_BQD: Tensor, boxes_BQ4: Tensor, allowed_B1QQ: Tensor, memory: EncoderMemory
    ) -> tuple[Tensor, Tensor]:
        """Decode every query.

        Args:
            content_BQD: what each query starts from.
            boxes_BQ4: cxcywh in (0, 1), the first reference boxes.
            allowed_B1QQ: bool, True where a row may look at a column.
            memory: of the encoder.

        Returns:
            (K, B, Q, D) states and (K, B, Q, 4) cxcywh boxes, float32, of every layer.
        """
        reference, uncut = boxes_BQ4, boxes_BQ4
        states, boxes = [], []
        for layer, head in zip(self.layers, self.box_heads, strict=True):
            position = self.position(sine_embedding(reference, content_BQD.shape[-1] // 2))
            content_BQD = run_layer(
                self, layer, content_BQD, position, reference, allowed_B1QQ, memory
            )
            move = head(content_BQD)
            boxes.append((move + logit(uncut)).sigmoid())
            states.append(content_BQD)
            uncut = (move + logit(reference)).sigmoid()
            reference = uncut.detach()
        return torch.stack(states), torch.stack(boxes)
